"""ONNX to the compiler's graph, by table; whatever is not a polynomial is refused by name.

Constants are folded while reading. Local functions named Polynomial_power_n and Polynomial_chebyshev_n are kept whole:
inputs (x, a, b, c_0 .. c_n), value sum c_k u^k or sum c_k T_k(u) with u = a x + b.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from he_backend.base import UnsupportedOpError

from .ir import Graph, Node
from .ops import maps

# What to use instead of an op that is not a polynomial.
INSTEAD = {
    "Softmax": "the mixer 'power_softmax' (polyformer/mixers/power_softmax.py)",
    "Exp": "a polynomial fitted on the trained range (polyformer.approx.Polynomial)",
    "Div": "a product by a polynomial reciprocal (polyformer.approx, Goldschmidt or Chebyshev)",
    "Reciprocal": "a polynomial reciprocal (polyformer.approx)",
    "Sqrt": "a norm with a polynomial inverse square root (polyformer/norms.py)",
    "LayerNormalization": "a norm with a polynomial inverse square root (polyformer/norms.py)",
    "Erf": "a fitted polynomial activation (polyformer/activations.py)",
    "Gelu": "a fitted polynomial activation (polyformer/activations.py)",
    "Sigmoid": "a fitted polynomial activation (polyformer/activations.py)",
    "Tanh": "a fitted polynomial activation (polyformer/activations.py)",
    "Relu": "a fitted polynomial activation (polyformer/activations.py)",
    "Where": "a product with the mask: polynomials cannot branch",
    "Max": "nothing: a maximum is not a polynomial",
}


class Importer:
    """Reads one ONNX graph; `tensors` maps a name to its node, `constants` to its array."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.constants: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        inputs = [v for v in model.graph.input if v.name not in self.constants]
        if len(inputs) != 1 or len(model.graph.output) != 1:
            raise UnsupportedOpError(
                f"the graph has inputs {[v.name for v in inputs]} and {len(model.graph.output)} outputs; one of each is compiled"
            )
        dims = inputs[0].type.tensor_type.shape.dim
        if any(not d.dim_value for d in dims):
            raise UnsupportedOpError(f"input {inputs[0].name!r} has a dynamic shape; export it with fixed sizes")
        self.input = inputs[0].name
        self.shapes: dict[str, tuple[int, ...]] = {self.input: tuple(d.dim_value for d in dims)}
        self.nodes: list[Node] = []

    def run(self) -> Graph:
        for i, proto in enumerate(self.model.graph.node):
            source = proto.name or f"{proto.op_type}_{i}"
            handler = self._handler(proto, source)
            if proto.op_type in FOLDABLE and all(name in self.constants for name in proto.input):
                self.constants[proto.output[0]] = FOLDABLE[proto.op_type](
                    [self.constants[n] for n in proto.input], _attributes(proto)
                )
                continue
            handler(self, proto, source)
        metadata = {p.key: p.value for p in self.model.metadata_props}
        output = self.model.graph.output[0].name
        return Graph(
            input=self.input,
            input_shape=self.shapes[self.input],
            output=output,
            nodes=tuple(self.nodes),
            metadata=metadata,
        )

    def _handler(self, proto: onnx.NodeProto, source: str) -> Callable[[Importer, onnx.NodeProto, str], None]:
        if (proto.domain, proto.op_type) in self.functions and proto.op_type.startswith("Polynomial_"):
            return _polynomial
        if proto.op_type in TABLE and proto.domain in ("", "ai.onnx"):
            return TABLE[proto.op_type]
        instead = INSTEAD.get(proto.op_type)
        hint = (
            f"use {instead} instead"
            if instead
            else f"the compiler reads {', '.join(sorted(TABLE))} and Polynomial functions"
        )
        raise UnsupportedOpError(
            f"node {source!r} is a {proto.op_type}, which is not a polynomial this compiler knows: {hint}"
        )

    def emit(
        self, proto: onnx.NodeProto, source: str, op: str, inputs: tuple[str, ...], shape: Any, **fields: Any
    ) -> None:
        name = fields.pop("name", proto.output[0])
        self.shapes[name] = tuple(int(n) for n in shape)
        self.nodes.append(Node(name=name, op=op, inputs=inputs, shape=self.shapes[name], source=source, **fields))


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}


def _axes(g: Importer, proto: onnx.NodeProto) -> list[int]:
    """Axes of a reduction: an attribute before opset 13/18, an input after."""
    if len(proto.input) > 1:
        return [int(a) for a in g.constants[proto.input[1]]]
    return [int(a) for a in _attributes(proto).get("axes", [])]


def _elementwise(op: str) -> Callable[[Importer, onnx.NodeProto, str], None]:
    def handle(g: Importer, proto: onnx.NodeProto, source: str) -> None:
        a, b = proto.input
        if a in g.constants:
            a, b = b, a
        if b in g.constants:
            const = g.constants[b].astype(np.float64)
            g.emit(proto, source, f"{op}_const", (a,), np.broadcast_shapes(g.shapes[a], const.shape), const=const)
        else:
            g.emit(proto, source, op, (a, b), np.broadcast_shapes(g.shapes[a], g.shapes[b]))

    return handle


def _sub(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    a, b = proto.input
    if b in g.constants:
        g.emit(proto, source, "add_const", (a,), g.shapes[a], const=-g.constants[b].astype(np.float64))
        return
    negative = f"{proto.output[0]}.negative"
    g.emit(proto, source, "mul_const", (b,), g.shapes[b], const=np.array(-1.0), name=negative)
    if a in g.constants:
        const = g.constants[a].astype(np.float64)
        g.emit(proto, source, "add_const", (negative,), np.broadcast_shapes(g.shapes[b], const.shape), const=const)
    else:
        g.emit(proto, source, "add", (a, negative), np.broadcast_shapes(g.shapes[a], g.shapes[b]))


def _neg(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    g.emit(proto, source, "mul_const", (proto.input[0],), g.shapes[proto.input[0]], const=np.array(-1.0))


def _pow(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    a, b = proto.input
    exponent = float(g.constants[b].reshape(())) if b in g.constants else float("nan")
    if exponent != int(exponent if np.isfinite(exponent) else 0) or exponent < 1:
        raise UnsupportedOpError(
            f"node {source!r} is a power with exponent {exponent}; only whole exponents >= 1 are polynomials"
        )
    coefficients = np.zeros(int(exponent) + 1)
    coefficients[-1] = 1.0
    g.emit(proto, source, "polynomial", (a,), g.shapes[a], attrs={"coefficients": coefficients, "interval": None})


def _matmul(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    a, b = proto.input
    if a in g.constants:
        raise UnsupportedOpError(
            f"node {source!r} multiplies a constant from the left; transpose it: x @ W is compiled"
        )
    if b in g.constants:
        const = g.constants[b].astype(np.float64)
        if const.ndim != 2:
            raise UnsupportedOpError(f"node {source!r} has a weight of shape {const.shape}; [in, out] is compiled")
        g.emit(proto, source, "linear", (a,), (*g.shapes[a][:-1], const.shape[1]), const=const)
        return
    left, right = g.shapes[a], g.shapes[b]
    shape = (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])
    g.emit(proto, source, "matmul", (a, b), shape, attrs={"mask": None})


def _gemm(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    attrs = _attributes(proto)
    a, b = proto.input[:2]
    if attrs.get("transA") or b not in g.constants:
        raise UnsupportedOpError(f"node {source!r} is a Gemm whose weight is not a constant on the right")
    const = g.constants[b].astype(np.float64) * attrs.get("alpha", 1.0)
    const = const.T if attrs.get("transB") else const
    bias = g.constants[proto.input[2]].astype(np.float64) * attrs.get("beta", 1.0) if len(proto.input) > 2 else None
    g.emit(proto, source, "linear", (a,), (*g.shapes[a][:-1], const.shape[1]), const=const, bias=bias)


def _conv(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    x, w = proto.input[:2]
    attrs, weight, shape = _attributes(proto), g.constants[w].astype(np.float64), g.shapes[x]
    rank = len(shape) - 2
    strides = tuple(attrs.get("strides", [1] * rank))
    dilations = tuple(attrs.get("dilations", [1] * rank))
    pads = tuple(attrs.get("pads", [0] * (2 * rank)))
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    out = tuple((n + pads[i] + pads[rank + i] - reach[i]) // strides[i] + 1 for i, n in enumerate(shape[2:]))
    matrix = maps.convolution(
        shape,
        weight,
        strides=strides,
        dilations=dilations,
        begins=pads[:rank],
        out=out,
        groups=attrs.get("group", 1),
        source=source,
    )
    bias = None
    if len(proto.input) > 2:
        bias = np.repeat(g.constants[proto.input[2]].astype(np.float64), int(np.prod(out)))
        bias = np.tile(bias, shape[0])
    g.emit(proto, source, "sparse", (x,), (shape[0], len(weight), *out), attrs={"matrix": matrix}, bias=bias)


def _reduce(mean: bool) -> Callable[[Importer, onnx.NodeProto, str], None]:
    def handle(g: Importer, proto: onnx.NodeProto, source: str) -> None:
        a = proto.input[0]
        rank, axes = len(g.shapes[a]), _axes(g, proto)
        if [x % rank for x in axes] != [rank - 1] or not _attributes(proto).get("keepdims", 1):
            raise UnsupportedOpError(
                f"node {source!r} reduces axes {axes} of rank {rank}; the last one, kept, is compiled"
            )
        shape = (*g.shapes[a][:-1], 1)
        if not mean:
            g.emit(proto, source, "reduce_sum", (a,), shape)
            return
        total = f"{proto.output[0]}.sum"
        g.emit(proto, source, "reduce_sum", (a,), shape, name=total)
        g.emit(proto, source, "mul_const", (total,), shape, const=np.array(1.0 / g.shapes[a][-1]))

    return handle


def _transpose(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    shape = g.shapes[proto.input[0]]
    perm = [int(p) for p in _attributes(proto).get("perm", reversed(range(len(shape))))]
    g.emit(proto, source, "transpose", (proto.input[0],), [shape[p] for p in perm], attrs={"perm": perm})


def _reshape(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    a = proto.input[0]
    target = [int(n) for n in g.constants[proto.input[1]]]
    target = [g.shapes[a][i] if n == 0 else n for i, n in enumerate(target)]
    size = int(np.prod(g.shapes[a]))
    if -1 in target:
        target[target.index(-1)] = size // -int(np.prod(target))
    g.emit(proto, source, "reshape", (a,), target)


def _gather(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    table, ids = proto.input
    if table not in g.constants or ids != g.input or _attributes(proto).get("axis", 0):
        raise UnsupportedOpError(
            f"node {source!r} gathers with an encrypted index; only the embedding of the input is compiled"
        )
    const = g.constants[table].astype(np.float64)
    g.emit(proto, source, "gather", (ids,), (*g.shapes[ids], const.shape[1]), const=const)


def _identity(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    g.emit(proto, source, "reshape", (proto.input[0],), g.shapes[proto.input[0]])


def _constant(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    value = _attributes(proto)
    array = numpy_helper.to_array(value["value"]) if "value" in value else np.array(next(iter(value.values())))
    g.constants[proto.output[0]] = array


def _polynomial(g: Importer, proto: onnx.NodeProto, source: str) -> None:
    x, *scalars = proto.input
    a, b, *c = (float(g.constants[s].reshape(())) for s in scalars)
    basis = np.polynomial.Chebyshev if "chebyshev" in proto.op_type else np.polynomial.Polynomial
    power = (
        basis(c).convert(kind=np.polynomial.Polynomial)(np.polynomial.Polynomial([b, a]))
        if "chebyshev" in proto.op_type
        else basis(c)(np.polynomial.Polynomial([b, a]))
    )
    interval = sorted(((-1.0 - b) / a, (1.0 - b) / a)) if "chebyshev" in proto.op_type else None
    attrs = {"coefficients": np.atleast_1d(power.coef), "interval": interval}
    g.emit(proto, source, "polynomial", (x,), g.shapes[x], attrs=attrs)


TABLE: dict[str, Callable[[Importer, onnx.NodeProto, str], None]] = {
    "Add": _elementwise("add"),
    "Mul": _elementwise("mul"),
    "Sub": _sub,
    "Neg": _neg,
    "Pow": _pow,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ReduceSum": _reduce(mean=False),
    "ReduceMean": _reduce(mean=True),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Gather": _gather,
    "Identity": _identity,
    "Constant": _constant,
}

# Ops on constants alone are carried out while reading.
FOLDABLE: dict[str, Callable[[list[np.ndarray], dict[str, Any]], np.ndarray]] = {
    "Add": lambda v, a: v[0] + v[1],
    "Sub": lambda v, a: v[0] - v[1],
    "Mul": lambda v, a: v[0] * v[1],
    "Neg": lambda v, a: -v[0],
    "Transpose": lambda v, a: np.transpose(v[0], a.get("perm")),
    "Reshape": lambda v, a: v[0].reshape([int(n) for n in v[1]]),
    "Identity": lambda v, a: v[0],
}


def import_onnx(path: Path) -> Graph:
    """Read an ONNX file.

    Raises:
        UnsupportedOpError: it is not an ONNX file, or a node is not a polynomial; the message names it and what to use instead.
    """
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf and the checker raise types of their own
        raise UnsupportedOpError(f"{path} is not an ONNX file that the checker accepts: {error}") from error
    return Importer(model).run()
