"""Write a Transformer as an ONNX file: the only door to the compiler. The graph is built node by node, not traced.

Contract. Input `tokens` int64 [1, T], output `logits` float32 [1, T, V]; opset 17; runs unmodified in onnxruntime. A
polynomial model gives Gather, Add, Sub, Mul, MatMul, ReduceSum, ReduceMean, Reshape, Transpose and calls of local
functions of the domain "polyformer":

    Polynomial_power_n, Polynomial_chebyshev_n     inputs (x, a, b, c0, ..., cn): u = a x + b, then sum c_k u^k or sum
    c_k T_k(u)

Node and value names are layer paths, `blocks.0.mixer.q`; a layer of several nodes gives its last value the path itself
and the others a suffix, `blocks.0.mixer.q.matmul`. Newton steps and Goldschmidt steps are plain Mul, Add and Sub.
Exact functions are exported as Softmax, Sqrt, Div, Erf, Sigmoid and Relu, so that a compiler can refuse them by name.
PowerSoftmax in the forms exact, stable and mean is one function; it is exported with the row factors of its form
(stable, whose factors depend on the data, as exact).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from polyformer.activations import Activation
from polyformer.fold import folded
from polyformer.layers import PolynomialLayer
from polyformer.mixers.base import Attention
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.mixers.softmax import Softmax
from polyformer.model import MLP, ModelConfig, Transformer
from polyformer.norms import BatchNorm, Norm

OPSET = 17
DOMAIN = "polyformer"


def export_onnx(model: Transformer, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write `model` to `path`; `metadata` is added to the producer and the model config in metadata_props."""
    if any(isinstance(m, BatchNorm) for m in model.modules()):
        model = folded(model)
    proto = build(model)
    helper.set_model_props(proto, {"producer": "polyformer", "config": model.config.to_json(), **(metadata or {})})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def build(model: Transformer) -> onnx.ModelProto:
    """Return the ONNX model of a Transformer for one window of its full length; its BatchNorms are `folded` away.

    Raises:
        ValueError: the config has a part that this writer does not know (those of released checkpoints).
    """
    check_known(model.config)
    assert model.position is not None and isinstance(model.head, nn.Linear)
    g = Graph()
    t, v = model.config.length, model.config.vocab
    token = g.constant("token.weight", model.token.weight)
    x = g.node("Gather", [token, "tokens"], "token", axis=0)
    x = g.node("Add", [x, g.constant("position.weight", model.position[:t])], "position")
    for i, block in enumerate(model.blocks):
        x = _block(g, block, f"blocks.{i}", x)
    logits = linear(g, model.head, "head", norm(g, model.norm, "norm", x), output="logits")  # type: ignore[arg-type]
    graph = helper.make_graph(
        g.nodes,
        "polyformer",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, t])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [1, t, v])],
        initializer=g.initializers,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=list(g.functions.values()), opset_imports=imports, producer_name="polyformer", ir_version=8
    )


# What this writer knows, by field of the config; the parts of released checkpoints are not among it yet.
WRITABLE: dict[str, tuple[object, ...]] = {
    "order": ("pre",),
    "causal": (True, False),
    "kv_heads": (0,),
    "rotary": (0,),
    "positions": ("learned",),
    "token_types": (0,),
    "biases": (True,),
    "gated": (False,),
    "head": ("linear",),
    "head_bias": (True,),
    "activation": ("gelu", "silu", "relu", "square", "quartic", "polynomial"),
}


def check_known(config: ModelConfig) -> None:
    """Refuse a config with a part outside `WRITABLE`.

    Raises:
        ValueError: it has one.
    """
    unknown = [
        f"{name}={getattr(config, name)!r}" for name, known in WRITABLE.items() if getattr(config, name) not in known
    ]
    if unknown:
        raise ValueError(f"export_onnx cannot write {', '.join(unknown)} yet; it writes {WRITABLE}")


class Graph:
    """Collects nodes, constants and local functions while the walkers below go through the model."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        *,
        output: str | None = None,
        domain: str = "",
        **attributes: int | list[int],
    ) -> str:
        """Append a node called `name`, whose value has the same name unless `output` says otherwise; return the
        value's name.
        """
        output = output or name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, domain=domain, **attributes))  # type: ignore[arg-type]
        return output

    def constant(self, name: str, value: Tensor | np.ndarray | float) -> str:
        """Add an initializer (float32 unless the array is integer) and return its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def polynomial(self, layer: PolynomialLayer, name: str, x: str) -> str:
        """Call the local function of the layer's basis and degree."""
        function = f"Polynomial_{layer.basis}_{layer.degree}"
        if function not in self.functions:
            self.functions[function] = polynomial_function(layer.basis, layer.degree)
        a, b = layer.map.tolist()
        scalars = {"a": a, "b": b, **{f"c{k}": c for k, c in enumerate(layer.coefficients.tolist())}}
        inputs = [x, *(self.constant(f"{name}.{k}", value) for k, value in scalars.items())]
        return self.node(function, inputs, name, domain=DOMAIN)


def polynomial_function(basis: str, degree: int) -> onnx.FunctionProto:
    """Return the local function of a basis and degree: Horner for powers, Clenshaw for Chebyshev, in Mul, Add and Sub
    only.
    """
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, left: str, right: str, out: str) -> str:
        nodes.append(helper.make_node(kind, [left, right], [out]))
        return out

    c = [f"c{k}" for k in range(degree + 1)]
    u = op("Add", op("Mul", "x", "a", "ax"), "b", "u")
    if degree == 0:
        op("Add", op("Sub", u, u, "zero"), c[0], "y")
    elif basis == "power" or degree == 1:
        y = c[-1]
        for k in range(degree - 1, -1, -1):
            y = op("Add", op("Mul", u, y, f"p{k}"), c[k], f"h{k}" if k else "y")
    else:
        two_u = op("Add", u, u, "two_u")
        b1, b2 = c[-1], ""
        for k in range(degree - 1, 0, -1):
            b0 = op("Add", op("Mul", two_u, b1, f"p{k}"), c[k], f"s{k}")
            b0 = op("Sub", b0, b2, f"b{k}") if b2 else b0
            b1, b2 = b0, b1
        op("Sub", op("Add", op("Mul", u, b1, "p0"), c[0], "s0"), b2, "y")
    return helper.make_function(
        DOMAIN, f"Polynomial_{basis}_{degree}", ["x", "a", "b", *c], ["y"], nodes, [helper.make_opsetid("", OPSET)]
    )


def linear(g: Graph, layer: nn.Linear, name: str, x: str, *, output: str | None = None) -> str:
    """x W + b with W stored [in, out]."""
    y = g.node("MatMul", [x, g.constant(f"{name}.weight", layer.weight.T)], f"{name}.matmul")
    return g.node("Add", [y, g.constant(f"{name}.bias", layer.bias)], name, output=output)


def norm(g: Graph, layer: Norm, name: str, x: str) -> str:
    """Square, mean, (polynomial) inverse square root, two products; an affine norm is its last two nodes alone."""
    if layer.tap is not None:
        if layer.centre:
            x = g.node("Sub", [x, g.node("ReduceMean", [x], f"{name}.mean", axes=[-1], keepdims=1)], f"{name}.centred")
        s = g.node("ReduceMean", [g.node("Mul", [x, x], f"{name}.square")], f"{name}.variance", axes=[-1], keepdims=1)
        x = g.node("Mul", [x, _inverse_root(g, layer, name, s)], f"{name}.scaled")
    if layer.beta is None:
        return g.node("Mul", [x, g.constant(f"{name}.gamma", layer.gamma)], name)
    x = g.node("Mul", [x, g.constant(f"{name}.gamma", layer.gamma)], f"{name}.product")
    return g.node("Add", [x, g.constant(f"{name}.beta", layer.beta)], name)


def _inverse_root(g: Graph, layer: Norm, name: str, s: str) -> str:
    if layer.inverse_sqrt is None:
        root = g.node(
            "Sqrt", [g.node("Add", [s, g.constant(f"{name}.eps", layer.eps)], f"{name}.guarded")], f"{name}.root"
        )
        return g.node("Div", [g.constant(f"{name}.one", 1.0), root], f"{name}.inverse")
    y = g.polynomial(layer.inverse_sqrt, f"{name}.inverse_sqrt", s)
    for i in range(layer.newton):  # y <- 1.5 y - 0.5 (S y)(y y)
        n = f"{name}.newton.{i}"
        cube = g.node("Mul", [g.node("Mul", [s, y], f"{n}.sy"), g.node("Mul", [y, y], f"{n}.yy")], f"{n}.cube")
        y = g.node(
            "Sub",
            [
                g.node("Mul", [y, g.constant(f"{n}.c1", 1.5)], f"{n}.long"),
                g.node("Mul", [cube, g.constant(f"{n}.c3", 0.5)], f"{n}.short"),
            ],
            n,
        )
    return y


def activation(g: Graph, layer: Activation, name: str, x: str) -> str:
    """One polynomial call or one product; exact functions by their ONNX operators."""
    if layer.polynomial is not None:
        return g.polynomial(layer.polynomial, name, x)
    if layer.kind == "square":
        return g.node("Mul", [x, x], name)
    if layer.kind == "quartic":
        square = g.node("Mul", [x, x], f"{name}.square")
        return g.node("Mul", [square, square], name)
    if layer.kind == "relu":
        return g.node("Relu", [x], name)
    if layer.kind == "silu":
        return g.node("Mul", [x, g.node("Sigmoid", [x], f"{name}.sigmoid")], name)
    erf = g.node(
        "Erf", [g.node("Mul", [x, g.constant(f"{name}.scale", math.sqrt(0.5))], f"{name}.scaled")], f"{name}.erf"
    )
    gate = g.node(
        "Mul",
        [g.node("Add", [erf, g.constant(f"{name}.one", 1.0)], f"{name}.shifted"), g.constant(f"{name}.half", 0.5)],
        f"{name}.gate",
    )
    return g.node("Mul", [x, gate], name)


def mixer(g: Graph, layer: Attention, name: str, x: str) -> str:
    """Causal attention: heads split, scores, non-linearity, values, heads merged, output projection."""
    if not isinstance(layer, (PowerSoftmax, Softmax)):
        raise TypeError(
            f"{name} is a {type(layer).__name__}, which export_onnx cannot write; known: PowerSoftmax, Softmax"
        )
    t, h, k = layer.length, layer.heads, layer.head_size
    split = g.constant(f"{name}.split", np.array([1, t, h, k], dtype=np.int64))
    merge = g.constant(f"{name}.merge", np.array([1, t, h * k], dtype=np.int64))

    def heads(part: str, order: list[int]) -> str:
        y = linear(g, getattr(layer, part), f"{name}.{part}", x)
        return g.node(
            "Transpose", [g.node("Reshape", [y, split], f"{name}.{part}.split")], f"{name}.{part}.heads", perm=order
        )

    q, key, v = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    if layer.las.width > 1:
        smoothing = g.constant(f"{name}.v.toeplitz", layer.las.toeplitz(t, layer.mask_TT)[None, None])
        v = g.node("MatMul", [smoothing, v], f"{name}.v.smooth")
    scores = g.node("MatMul", [q, key], f"{name}.scores")
    if isinstance(layer, PowerSoftmax):
        y = _power_softmax(g, layer, name, scores, v)
    else:
        y = _softmax(g, layer, name, scores, v)
    y = g.node(
        "Reshape", [g.node("Transpose", [y], f"{name}.out.heads", perm=[0, 2, 1, 3]), merge], f"{name}.out.merged"
    )
    return linear(g, layer.o, f"{name}.o", y)


def _power_softmax(g: Graph, layer: PowerSoftmax, name: str, scores: str, v: str) -> str:
    t = layer.length
    f_T1 = torch.ones(1, 1) if layer.form == "stable" else layer.row_factor(t)
    f_T1 = f_T1.detach().double().expand(t, 1)
    mask, shift = _score_map(layer)
    masked, u = g.constant(f"{name}.mask", mask * f_T1), f"{name}.masked"
    if shift is None:
        g.node("Mul", [scores, masked], u)
    else:
        product = g.node("Mul", [scores, masked], f"{name}.masked.product")
        g.node("Add", [product, g.constant(f"{name}.shift", shift * f_T1)], u)
    powers = power_of(g, name, u, layer.power)
    eps = g.constant(f"{name}.eps", (layer.eps * f_T1**layer.power)[None, None])
    total = g.node(
        "ReduceSum", [powers, g.constant(f"{name}.axis", np.array([-1], dtype=np.int64))], f"{name}.sum", keepdims=1
    )
    d = g.node("Add", [total, eps], f"{name}.denominator")
    numerator = g.node("MatMul", [powers, v], f"{name}.numerator")
    if layer.reciprocal is not None:
        inverse = g.polynomial(layer.reciprocal, f"{name}.reciprocal", d)
    elif layer.steps:
        inverse = _goldschmidt(g, layer, f"{name}.reciprocal", d)
    else:
        return g.node("Div", [numerator, d], f"{name}.out")
    return g.node("Mul", [numerator, inverse], f"{name}.out")


def _score_map(layer: Attention) -> tuple[Tensor, Tensor | None]:
    """Return constants [1, H or 1, T, T]: masked scores are (q k^T) scale + shift, mask, decay and BatchNorm included."""
    visible_HTT = layer.factor(layer.length).detach().double()
    visible_HTT = visible_HTT if visible_HTT.ndim == 3 else visible_HTT[None]
    if layer.score_norm is None:
        return visible_HTT[None] / math.sqrt(layer.head_size), None
    scale_H, shift_H = (c.detach().double()[:, None, None] for c in layer.score_norm.affine())
    return (visible_HTT * scale_H)[None] / math.sqrt(layer.head_size), (visible_HTT * shift_H)[None]


def power_of(g: Graph, name: str, u: str, p: int) -> str:
    """u^p by squares and products in the order of `integer_power`; the last value is called `name.power`."""
    products: list[tuple[str, str]] = []

    def product(left: str, right: str) -> str:
        products.append((left, right))
        return f"{name}.power.{len(products)}"

    base, result, k = product(u, u), "", p // 2
    while k:
        if k & 1:
            result = product(result, base) if result else base
        k >>= 1
        if k:
            base = product(base, base)
    last = f"{name}.power.{len(products)}"
    for i, (left, right) in enumerate(products, start=1):
        own = f"{name}.power.{i}"
        g.node("Mul", [left, right], f"{name}.power" if own == last else own)
    return f"{name}.power"


def _goldschmidt(g: Graph, layer: PowerSoftmax, name: str, d: str) -> str:
    start = layer.goldschmidt_start_T[: layer.length, None][None, None]
    one = g.constant(f"{name}.one", 1.0)
    y0 = g.constant(f"{name}.start", start)
    e = g.node("Sub", [one, g.node("Mul", [d, y0], f"{name}.scaled")], f"{name}.error.0")
    y = y0
    for i in range(layer.steps):
        last = i + 1 == layer.steps
        y = g.node("Mul", [g.node("Add", [e, one], f"{name}.factor.{i}"), y], name if last else f"{name}.{i}")
        if not last:
            e = g.node("Mul", [e, e], f"{name}.error.{i + 1}")
    return y


def _softmax(g: Graph, layer: Softmax, name: str, scores: str, v: str) -> str:
    scale, shift = _score_map(layer)
    plain = not any(layer.las.alphas) and shift is None
    scale_or_number: Tensor | float = 1 / math.sqrt(layer.head_size) if plain else scale
    scaled = g.node("Mul", [scores, g.constant(f"{name}.scale", scale_or_number)], f"{name}.scaled")
    if shift is not None:
        scaled = g.node("Add", [scaled, g.constant(f"{name}.shift", shift)], f"{name}.shifted")
    hidden = torch.where(layer.mask_TT == 0, -1e9, 0.0)[None, None]
    weights = g.node(
        "Softmax",
        [g.node("Add", [scaled, g.constant(f"{name}.hidden", hidden)], f"{name}.masked")],
        f"{name}.weights",
        axis=-1,
    )
    return g.node("MatMul", [weights, v], f"{name}.out")


def mlp(g: Graph, layer: MLP, name: str, x: str) -> str:
    up = linear(g, layer.up, f"{name}.up", x)
    return linear(g, layer.down, f"{name}.down", activation(g, layer.act, f"{name}.act", up))


def _block(g: Graph, block: nn.Module, name: str, x: str) -> str:
    h = norm(g, block.norm1, f"{name}.norm1", x)  # type: ignore[arg-type]
    mixed = g.node("Add", [x, mixer(g, block.mixer, f"{name}.mixer", h)], f"{name}.mixer.residual")  # type: ignore[arg-type]
    h = h if block.norm2 is None else norm(g, block.norm2, f"{name}.norm2", mixed)  # type: ignore[arg-type]
    return g.node("Add", [mixed, mlp(g, block.mlp, f"{name}.mlp", h)], f"{name}.mlp.residual")  # type: ignore[arg-type]
