"""Write a model as an ONNX file: the only door to the compiler. The graph is built node by node, not traced.

Contract. Opset 17; runs unmodified in onnxruntime; one input, one output float32, batch 1:

    Transformer   tokens int64 [1, T]        -> logits [1, T, V], or without a head states [1, T, D]
    Encoder       tokens int64 [1, T]        -> logits [1, C]
    ViT           images float32 [1, c, H, W] -> logits [1, C]

A polynomial model gives Gather, Add, Sub, Mul, MatMul, Conv, ReduceSum, ReduceMean, Reshape, Transpose, Slice, Concat
and calls of local functions of the domain "polyformer":

    Polynomial_power_n, Polynomial_chebyshev_n     inputs (x, a, b, c0, ..., cn): u = a x + b, then sum c_k u^k or sum
    c_k T_k(u)

Node and value names are layer paths, `blocks.0.mixer.q`; a layer of several nodes gives its last value the path itself
and the others a suffix, `blocks.0.mixer.q.matmul`. Newton steps and Goldschmidt steps are plain Mul, Add and Sub.
Exact functions are exported as Softmax, Sqrt, Div, Erf, Tanh, Sigmoid and Relu, so that a compiler can refuse them by
name; the exact LayerNorm that opens a post-norm stack is a LayerNormalization, which the client computes. What released
checkpoints have besides is written with the same operators: rotary positions as one Gather of each head's channels and
products by constants, shared key heads as repeated columns of the projections, token types as the row of type 0, a tied
head as the transposed table.

PowerSoftmax in the forms exact, stable and mean is one function; it is exported with the row factors of its form
(stable, whose factors depend on the data, as exact).

The parts are in export_graph (nodes and constants), export_layers, export_blocks (residual blocks, embedding and head of
a Transformer), export_attention, export_rotary, export_hyena and export_mixers (the table of mixers that can be written).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from polyformer.encoder import Classifier, Encoder
from polyformer.export_attention import power_of
from polyformer.export_blocks import block, head, positioned
from polyformer.export_graph import DOMAIN, OPSET, Graph, polynomial_function
from polyformer.export_layers import activation, linear, mlp, norm, opening
from polyformer.export_mixers import mixer
from polyformer.fold import folded
from polyformer.model import Transformer
from polyformer.models import Model
from polyformer.norms import BatchNorm
from polyformer.vision import ViT

__all__ = [
    "DOMAIN",
    "OPSET",
    "Graph",
    "activation",
    "build",
    "export_onnx",
    "linear",
    "mixer",
    "mlp",
    "norm",
    "polynomial_function",
    "power_of",
]


def export_onnx(model: Model, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write `model` to `path`; `metadata` is added to the producer and the model config in metadata_props."""
    if any(isinstance(m, BatchNorm) for m in model.modules()):
        model = folded(model)
    proto = build(model)
    helper.set_model_props(proto, {"producer": "polyformer", "config": model.config.to_json(), **(metadata or {})})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def build(model: Model) -> onnx.ModelProto:
    """Return the ONNX model for one window of full length, or one image; its BatchNorms are `folded` away.

    Raises:
        ValueError: a mixer is not polynomial and has no exact form here either; its sentence says what to change.
        TypeError: a mixer, or the model, has no ONNX form.
    """
    if not isinstance(model, (Transformer, Encoder, ViT)):
        raise TypeError(
            f"{type(model).__name__} has no ONNX form, its windows and merged patches are not written; export a Transformer, an "
            "Encoder, or a ViT without windows"
        )
    body = model.config if isinstance(model, Transformer) else model.config.body
    g = Graph()
    if isinstance(model, ViT):
        given = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, model.channels, *model.size])
        x = _images(g, model)
    else:
        given = helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, body.length])
        x = g.node("Gather", [g.constant("token.weight", model.token.weight), "tokens"], "token", axis=0)
    x = positioned(g, model, x)
    post = body.order == "post"
    x = opening(g, model.norm, "norm", x) if post else x  # type: ignore[arg-type]
    for i, layer in enumerate(model.blocks):
        x = block(g, layer, f"blocks.{i}", x)  # type: ignore[arg-type]
    x = x if post else norm(g, model.norm, "norm", x)  # type: ignore[arg-type]
    if isinstance(model, Classifier):
        logits = linear(g, model.head, "head", _pooled(g, model, x), output="logits")
        shape = [1, model.config.classes]
    else:
        logits, shape = head(g, model, x)
    graph = helper.make_graph(
        g.nodes,
        "polyformer",
        [given],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, shape)],
        initializer=g.initializers,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=list(g.functions.values()), opset_imports=imports, producer_name="polyformer", ir_version=8
    )


def _images(g: Graph, model: ViT) -> str:
    """Patches in raster order, each a row [c P P], through their linear; the class token before them."""
    c, p, (height, width) = model.channels, model.patch_size, model.size
    rows, columns = height // p, width // p
    cut = g.constant("patch.sizes", np.array([1, c, rows, p, columns, p], dtype=np.int64))
    flat = g.constant("patch.flat", np.array([1, rows * columns, c * p * p], dtype=np.int64))
    x = g.node("Transpose", [g.node("Reshape", ["images", cut], "patch.cut")], "patch.sorted", perm=[0, 2, 4, 1, 3, 5])
    x = linear(g, model.patch, "patch", g.node("Reshape", [x, flat], "patch.rows"))
    if model.token is None:
        return x
    return g.node("Concat", [g.constant("token.row", model.token[None, None]), x], "token", axis=1)


def _pooled(g: Graph, model: Classifier, x: str) -> str:
    """The mean over positions, or the first of them: [1, D]."""
    if model.config.pool == "mean":
        return g.node("ReduceMean", [x], "pool", axes=[1], keepdims=0)
    first = g.node("Gather", [x, g.constant("pool.at", np.array([0], dtype=np.int64))], "pool.first", axis=1)
    return g.node("Reshape", [first, g.constant("pool.flat", np.array([1, -1], dtype=np.int64))], "pool")
