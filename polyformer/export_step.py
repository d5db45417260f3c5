"""Write one decoding step of a causal Transformer as an ONNX file: one more token, beside keys and values that are kept.

Contract. Inputs `token` int64 [1, 1], `step` int64 [] (how many tokens came before), and for each block the keys and values
of all T places, `blocks.i.mixer.k.state` and `blocks.i.mixer.v.state` float32 [1, T, D], zero where no token has been yet.
Outputs `logits` float32 [1, 1, V] and, in the order of the inputs, the states for the next step, `blocks.i.mixer.k.next`
and `blocks.i.mixer.v.next`. Fed with the tokens of a window one by one it gives the rows of the whole model's logits.

What depends on the step alone is public and is looked up in tables: Gather(table [T, ...], step). Positions, the factor of
the scores, eps, and the place of the token: the new key is multiplied by row `step` of the identity [T, T, 1] and added to
the state, so that every step is the same graph. The factor of the scores is that of the row times 1/sqrt(head size), one
number a step; with LaS it is a row [H, T], because the key in place j is step - j tokens away and each head decays on its
own. No mask is needed, since an empty place has a zero key, its score is 0 and 0^p = 0.

Rotary positions turn a query or a new key by its step, x cos + x[partner] sin, with cosines and sines from tables and the
partners out of a linear of their own; keys are kept turned. Key heads that several queries read are kept as often.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from polyformer.export_attention import power_of
from polyformer.export_blocks import head
from polyformer.export_graph import DOMAIN, OPSET, Graph
from polyformer.export_layers import linear, mlp, norm
from polyformer.export_rotary import partnered, projection, turn
from polyformer.fold import folded
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer
from polyformer.norms import BatchNorm

KIND = "step"  # metadata_props["kind"] of such a file
# What a step is written for, by field of the config: the parts of released causal models are among it.
WRITABLE: dict[str, tuple[object, ...]] = {"order": ("pre",), "token_types": (0,), "head": ("linear", "tied")}


def export_step(model: Transformer, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write the step of `model` to `path`; `metadata` joins the producer, the kind and the model config in metadata_props.

    Raises:
        ValueError: the model is not causal PowerSoftmax attention before a head, smooths values (las_width > 1), or has a part
            that ONNX export does not know.
    """
    if any(isinstance(m, BatchNorm) for m in model.modules()):
        model = folded(model)
    proto = build_step(model)
    own = {"producer": "polyformer", "kind": KIND, "config": model.config.to_json()}
    helper.set_model_props(proto, {**own, **(metadata or {})})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def build_step(model: Transformer) -> onnx.ModelProto:
    """Return the ONNX model of one step; see `export_step`."""
    check_known(model.config)
    config = model.config
    if not config.causal:
        raise ValueError("the model is not causal (causal=False): a token would change what earlier ones have computed")
    if config.las_width > 1:
        raise ValueError(
            f"las_width={config.las_width} averages {config.las_width} values, of which a step adds one; a step is written "
            "for las_width=1, with any las_decay"
        )
    g = Graph()
    t, d = config.length, config.width
    token = g.constant("token.weight", model.token.weight)
    x = g.node("Gather", [token, "token"], "token.row", axis=0)
    if model.position is not None:
        x = g.node("Add", [x, _row(g, "position", model.position[:t, None, None])], "position")
    _row(g, "place", torch.eye(t)[:, :, None])
    states: list[str] = []
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        if not isinstance(block.mixer, PowerSoftmax):
            raise ValueError(f"{name}.mixer is a {type(block.mixer).__name__}; a step is written for PowerSoftmax")
        if i == 0 and config.rotary:
            cos_TK, sin_TK, _ = turn(block.mixer)
            _row(g, "rotary.cos", cos_TK.repeat(1, config.heads)[:, None, None])
            _row(g, "rotary.sin", sin_TK.repeat(1, config.heads)[:, None, None])
        h = norm(g, block.norm1, f"{name}.norm1", x)  # type: ignore[arg-type]
        mixed = g.node("Add", [x, _mixer(g, block.mixer, f"{name}.mixer", h)], f"{name}.mixer.residual")
        h = h if block.norm2 is None else norm(g, block.norm2, f"{name}.norm2", mixed)  # type: ignore[arg-type]
        x = g.node("Add", [mixed, mlp(g, block.mlp, f"{name}.mlp", h)], f"{name}.mlp.residual")  # type: ignore[arg-type]
        states += [f"{name}.mixer.{part}" for part in ("k", "v")]
    logits, _ = head(g, model, norm(g, model.norm, "norm", x))  # type: ignore[arg-type]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        g.nodes,
        "polyformer",
        [
            helper.make_tensor_value_info("token", TensorProto.INT64, [1, 1]),
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            *(helper.make_tensor_value_info(f"{s}.state", floats, [1, t, d]) for s in states),
        ],
        [
            helper.make_tensor_value_info(logits, floats, [1, 1, config.vocab]),
            *(helper.make_tensor_value_info(f"{s}.next", floats, [1, t, d]) for s in states),
        ],
        initializer=g.initializers,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=list(g.functions.values()), opset_imports=imports, producer_name="polyformer", ir_version=8
    )


def check_known(config: ModelConfig) -> None:
    """Refuse a config with a part outside `WRITABLE`.

    Raises:
        ValueError: it has one.
    """
    unknown = [
        f"{name}={getattr(config, name)!r}" for name, known in WRITABLE.items() if getattr(config, name) not in known
    ]
    if unknown:
        raise ValueError(
            f"a step is not written for {', '.join(unknown)}, but for {WRITABLE}; write the whole window with export_onnx"
        )


def _row(g: Graph, name: str, table: Tensor) -> str:
    """Row `step` of a table [T, ...]."""
    return g.node("Gather", [g.constant(f"{name}.table", table), "step"], f"{name}.row", axis=0)


def _mixer(g: Graph, layer: PowerSoftmax, name: str, h: str) -> str:
    """One query against all places, the token's own among them."""
    t, heads, size = layer.length, layer.heads, layer.head_size
    one = g.constant(f"{name}.one_row", np.array([1, 1, heads, size], dtype=np.int64))
    all_rows = g.constant(f"{name}.rows", np.array([1, t, heads, size], dtype=np.int64))
    merge = g.constant(f"{name}.merge", np.array([1, 1, heads * size], dtype=np.int64))

    def split(part: str, value: str, shape: str, order: list[int]) -> str:
        cut = g.node("Reshape", [value, shape], f"{name}.{part}.split")
        return g.node("Transpose", [cut], f"{name}.{part}.heads", perm=order)

    def projected(part: str) -> str:
        """This token's row [1, 1, D], queries and keys turned: each channel and its partner, both straight from the input."""
        given, own = projection(layer, part), f"{name}.{part}"
        y = linear(g, given, own, h)
        if part == "v" or not layer.rotary:
            return y
        straight = g.node("Mul", [y, "rotary.cos.row"], f"{own}.straight")
        partner = linear(g, partnered(layer, given), f"{own}.partner", h)
        across = g.node("Mul", [partner, "rotary.sin.row"], f"{own}.across")
        return g.node("Add", [straight, across], f"{own}.turned")

    def kept(part: str, order: list[int]) -> str:
        """The state with this token's row in its place."""
        placed = g.node("Mul", [projected(part), "place.row"], f"{name}.{part}.placed")
        whole = g.node("Add", [f"{name}.{part}.state", placed], f"{name}.{part}.next")
        return split(part, whole, all_rows, order)

    f_T1 = layer.public_factor()
    q = split("q", projected("q"), one, [0, 2, 1, 3])
    key, v = kept("k", [0, 2, 3, 1]), kept("v", [0, 2, 1, 3])
    scores = g.node("MatMul", [q, key], f"{name}.scores")
    factor = _row(g, f"{name}.scores.factor", _score_factor(layer, f_T1))
    scores = g.node("Mul", [scores, factor], f"{name}.scores.scaled")
    powers = power_of(g, name, scores, layer.power)
    axis = g.constant(f"{name}.axis", np.array([-1], dtype=np.int64))
    total = g.node("ReduceSum", [powers, axis], f"{name}.sum", keepdims=1)
    eps = _row(g, f"{name}.eps", (layer.eps * f_T1**layer.power)[:, :, None, None])
    total = g.node("Add", [total, eps], f"{name}.denominator")
    numerator = g.node("MatMul", [powers, v], f"{name}.numerator")
    if layer.reciprocal is not None:
        inverse = g.polynomial(layer.reciprocal, f"{name}.reciprocal", total)
    elif layer.steps:
        inverse = _goldschmidt(g, layer, f"{name}.reciprocal", total)
    else:
        inverse = ""
    if inverse:
        y = g.node("Mul", [numerator, inverse], f"{name}.out")
    else:
        y = g.node("Div", [numerator, total], f"{name}.out")
    y = g.node(
        "Reshape", [g.node("Transpose", [y], f"{name}.out.heads", perm=[0, 2, 1, 3]), merge], f"{name}.out.merged"
    )
    return linear(g, layer.o, f"{name}.o", y)


def _score_factor(layer: PowerSoftmax, f_T1: Tensor) -> Tensor:
    """What row i multiplies its scores by: one number, [T, 1, 1, 1, 1], or with LaS one a head and key, [T, 1, H, 1, T]."""
    scale_T = (f_T1 / math.sqrt(layer.head_size))[:, :, None, None, None]
    if not any(layer.las.alphas):
        return scale_T
    decay_HTT = layer.factor(layer.length).detach().double()
    return decay_HTT.permute(1, 0, 2)[:, None, :, None, :] * scale_T


def _goldschmidt(g: Graph, layer: PowerSoftmax, name: str, d: str) -> str:
    """1/d from the public start of this step's row."""
    start = _row(g, f"{name}.start", layer.goldschmidt_start_T[: layer.length, None, None, None])
    one = g.constant(f"{name}.one", 1.0)
    e = g.node("Sub", [one, g.node("Mul", [d, start], f"{name}.scaled")], f"{name}.error.0")
    factor = g.node("Add", [e, one], f"{name}.factor.0")
    y = g.node("Mul", [factor, start], name if layer.steps == 1 else f"{name}.0")
    for i in range(1, layer.steps):
        e = g.node("Mul", [e, e], f"{name}.error.{i}")
        factor = g.node("Add", [e, one], f"{name}.factor.{i}")
        y = g.node("Mul", [factor, y], name if i + 1 == layer.steps else f"{name}.{i}")
    return y
