"""Softmax and norms over features, written out: refused unless their functions are to be approximated (passes/approximate.py).

But for the norm behind an embedding, in a stack that opens with one (BERT): it reads what the client knows, so the client computes it,
exactly.
"""

from __future__ import annotations

import math

import numpy as np

from .functions import OR_FIT, function
from .reading import Call, Handler, Reading
from .refuse import refusal

LAST_AXIS = 13  # the first opset whose Softmax is over one axis: before, over all from it on


def _softmax(g: Reading, call: Call) -> None:
    """exp(x - max x) / sum exp(x - max x) over an axis."""
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    x, name = call.inputs[0], call.outputs[0]
    shape = g.shapes[x]
    axis = int(call.attrs.get("axis", -1 if g.opset >= LAST_AXIS else 1)) % len(shape)
    if g.opset < LAST_AXIS and axis < len(shape) - 1:
        flat = (math.prod(shape[:axis]), math.prod(shape[axis:]))
        x = g.emit(call, "reshape", (x,), flat, name=f"{name}.flat")
        _weights(g, call, x, f"{name}.weights")
        g.emit(call, "reshape", (f"{name}.weights",), shape)
    elif axis < len(shape) - 1:
        perm = [i for i in range(len(shape)) if i != axis] + [axis]
        x = g.emit(call, "transpose", (x,), [shape[p] for p in perm], attrs={"perm": perm}, name=f"{name}.last")
        _weights(g, call, x, f"{name}.weights")
        back = [perm.index(i) for i in range(len(shape))]
        g.emit(call, "transpose", (f"{name}.weights",), shape, attrs={"perm": back})
    else:
        _weights(g, call, x, name)


def _weights(g: Reading, call: Call, x: str, name: str) -> None:
    """Softmax over the last axis."""
    shape = g.shapes[x]
    row = (*shape[:-1], 1)
    largest = g.emit(call, "reduce_max", (x,), row, name=f"{name}.max")
    negative = g.emit(call, "mul_const", (largest,), row, const=np.array(-1.0), name=f"{name}.negative")
    stable = g.emit(call, "add", (x, negative), shape, name=f"{name}.stable")
    powers = function(g, call, "Exp", stable, name=f"{name}.exp")
    total = g.emit(call, "reduce_sum", (powers,), row, name=f"{name}.sum")
    inverse = function(g, call, "Reciprocal", total, name=f"{name}.reciprocal")
    g.emit(call, "mul", (powers, inverse), shape, name=name)


def _reduce_max(g: Reading, call: Call) -> None:
    """Over the last axis, as a softmax that is written out subtracts it; all others are maxima to be refused."""
    x = call.inputs[0]
    shape = g.shapes[x]
    axes = tuple(a % len(shape) for a in g.ints(call, 1, "axes", range(len(shape))))
    if not g.approximate or axes != (len(shape) - 1,) or not call.attrs.get("keepdims", 1):
        raise refusal(call)
    g.emit(call, "reduce_max", (x,), (*shape[:-1], 1))


def _layer_norm(g: Reading, call: Call) -> None:
    x = call.inputs[0]
    if not _embedded(g, x) or (g.approximate and g.readers[x] > 1):
        _centred(g, call)
        return
    shape, scale, shift = g.shapes[x], g.constant(call, 1, "scale"), g.constant(call, 2, "bias")
    if call.attrs.get("axis", -1) % len(shape) != len(shape) - 1 or scale is None:
        raise call.fail(
            "is a LayerNormalization over other axes than the last; the client normalises each token's features"
        )
    shift = np.zeros_like(scale) if shift is None else shift
    g.emit(call, "client_norm", (x,), shape, const=scale, bias=shift, attrs={"eps": call.attrs.get("epsilon", 1e-5)})


def _embedded(g: Reading, name: str) -> bool:
    """Whether a tensor is rows of a table plus constants."""
    nodes = {node.name: node for node in g.nodes}
    while name in nodes and nodes[name].op == "add_const":
        (name,) = nodes[name].inputs
    return name in nodes and nodes[name].op == "gather"


def _norm(centre: bool) -> Handler:
    """x / sqrt(mean x^2 + epsilon) . scale + shift over the axes from `axis` on; of x minus its mean for LayerNormalization."""

    def handle(g: Reading, call: Call) -> None:
        if not g.approximate:
            raise refusal(call, approximate=OR_FIT)
        if any(call.outputs[1:]):
            raise call.fail(f"is a {call.op} that hands out its statistics; its first output alone is compiled")
        x, name = call.inputs[0], call.outputs[0]
        shape = g.shapes[x]
        axis = int(call.attrs.get("axis", -1)) % len(shape)
        flat = (*shape[:axis], math.prod(shape[axis:]))
        affine = [g.constant(call, 1, "scale"), g.constant(call, 2, "shift")]
        scale, shift = (None if c is None else np.broadcast_to(c, shape[axis:]).reshape(-1) for c in affine)
        row = (*flat[:-1], 1)
        share = np.array(1.0 / flat[-1])

        def mean(x: str, what: str) -> str:
            total = g.emit(call, "reduce_sum", (x,), row, name=f"{name}.{what}.sum")
            return g.emit(call, "mul_const", (total,), row, const=share, name=f"{name}.{what}")

        if flat != shape:
            x = g.emit(call, "reshape", (x,), flat, name=f"{name}.flat")
        if centre:
            average = mean(x, "mean")
            negative = g.emit(call, "mul_const", (average,), row, const=np.array(-1.0), name=f"{name}.negative")
            x = g.emit(call, "add", (x, negative), flat, name=f"{name}.centred")
        attrs = {"coefficients": np.array([0.0, 0.0, 1.0]), "interval": None}
        square = g.emit(call, "polynomial", (x,), flat, attrs=attrs, name=f"{name}.square")
        epsilon = np.array(float(call.attrs.get("epsilon", 1e-5)))
        variance = g.emit(call, "add_const", (mean(square, "variance"),), row, const=epsilon, name=f"{name}.epsilon")
        root = function(g, call, "Sqrt", variance, name=f"{name}.root")
        inverse = function(g, call, "Reciprocal", root, name=f"{name}.inverse")
        y = f"{name}.normed"
        g.emit(call, "mul", (x, inverse), flat, name=y)
        if scale is not None:
            y = g.emit(call, "mul_const", (y,), flat, const=scale, name=f"{name}.scaled")
        if shift is not None:
            y = g.emit(call, "add_const", (y,), flat, const=shift, name=f"{name}.shifted")
        if flat == shape:
            g.same[name] = y
        else:
            g.emit(call, "reshape", (y,), shape)

    return handle


_centred = _norm(centre=True)

TABLE: dict[str, Handler] = {
    "Softmax": _softmax,
    "ReduceMax": _reduce_max,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _norm(centre=False),
}
