"""Elementwise ops: sums, products, powers, normalisation by constants, polynomial calls."""

from __future__ import annotations

import math

import numpy as np

from he_backend.base import Array

from . import maps
from .functions import OR_FIT, function
from .reading import Call, Handler, Reading
from .refuse import refusal

MAX_EXPONENT = 256


def _expanded(g: Reading, call: Call, a: str, shape: tuple[int, ...]) -> str:
    """A tensor repeated along the axes that it is broadcast over."""
    index = np.broadcast_to(np.arange(math.prod(g.shapes[a])).reshape(g.shapes[a]), shape)
    matrix = maps.selection(index, math.prod(g.shapes[a]))
    return g.emit(call, "sparse", (a,), shape, attrs={"matrix": matrix}, name=f"{call.outputs[0]}.{a}.expanded")


def _alike(g: Reading, call: Call, a: str, b: str) -> tuple[tuple[str, str], tuple[int, ...]]:
    """Operands of which at most one is still to be broadcast, and the shape of the result."""
    shape = np.broadcast_shapes(g.shapes[a], g.shapes[b])
    return (a if shape in (g.shapes[a], g.shapes[b]) else _expanded(g, call, a, shape), b), shape


def with_constant(g: Reading, call: Call, op: str, a: str, const: Array, name: str | None = None) -> None:
    """x + c or x . c, x repeated first where the constant is the larger one; the op itself keeps its operand's shape."""
    shape = np.broadcast_shapes(g.shapes[a], const.shape)
    if math.prod(shape) > math.prod(g.shapes[a]):
        a = _expanded(g, call, a, shape)
    rank = len(g.shapes[a])
    if rank == len(shape):
        g.emit(call, op, (a,), shape, const=const, name=name)
        return
    # The constant only puts axes of length 1 in front, which would be lost where a pass folds it into what makes x.
    inner = np.reshape(const, const.shape[const.ndim - rank :])
    same = g.emit(call, op, (a,), g.shapes[a], const=inner, name=f"{name or call.outputs[0]}.same")
    g.emit(call, "reshape", (same,), shape, name=name)


def _elementwise(op: str) -> Handler:
    def handle(g: Reading, call: Call) -> None:
        a, b = call.inputs
        if a in g.constants:
            a, b = b, a
        if b in g.constants:
            with_constant(g, call, f"{op}_const", a, g.constants[b].astype(np.float64))
        else:
            g.emit(call, op, *_alike(g, call, a, b))

    return handle


def _sub(g: Reading, call: Call) -> None:
    a, b = call.inputs
    if b in g.constants:
        with_constant(g, call, "add_const", a, -g.constants[b].astype(np.float64))
        return
    negative = f"{call.outputs[0]}.negative"
    g.emit(call, "mul_const", (b,), g.shapes[b], const=np.array(-1.0), name=negative)
    if a in g.constants:
        with_constant(g, call, "add_const", negative, g.constants[a].astype(np.float64))
    else:
        g.emit(call, "add", *_alike(g, call, a, negative))


def _neg(g: Reading, call: Call) -> None:
    g.emit(call, "mul_const", (call.inputs[0],), g.shapes[call.inputs[0]], const=np.array(-1.0))


def _div(g: Reading, call: Call) -> None:
    a, b = call.inputs
    if b in g.constants:
        divisor = g.constants[b].astype(np.float64)
        if not np.all(divisor):
            raise call.fail("divides by a constant that holds a zero")
        with_constant(g, call, "mul_const", a, 1.0 / divisor)
        return
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    inverse = function(g, call, "Reciprocal", b, name=f"{call.outputs[0]}.reciprocal")
    if a in g.constants:
        with_constant(g, call, "mul_const", inverse, g.constants[a].astype(np.float64))
    else:
        g.emit(call, "mul", *_alike(g, call, a, inverse))


def _pow(g: Reading, call: Call) -> None:
    a, b = call.inputs
    value = g.constants.get(b)
    exponent = float(value.reshape(-1)[0]) if value is not None and value.size == 1 else float("nan")
    if exponent != int(exponent if np.isfinite(exponent) else 0) or exponent < 1:
        if g.approximate and np.isfinite(exponent) and a not in g.constants:
            function(g, call, "Pow", a, exponent=exponent)
            return
        raise call.fail(f"is a power with exponent {exponent}; only whole exponents >= 1 are polynomials")
    if exponent > MAX_EXPONENT:
        raise call.fail(
            f"is a power with exponent {exponent:g}; at most {MAX_EXPONENT} is compiled, it takes {MAX_EXPONENT.bit_length() - 1} "
            "levels already: use a lower one"
        )
    coefficients = np.zeros(int(exponent) + 1)
    coefficients[-1] = 1.0
    g.emit(call, "polynomial", (a,), g.shapes[a], attrs={"coefficients": coefficients, "interval": None})


def _sum(g: Reading, call: Call) -> None:
    """Sum of any number of tensors, constants among them."""
    constants = [g.constants[n].astype(np.float64) for n in call.inputs if n in g.constants]
    total, *others = [n for n in call.inputs if n not in g.constants]
    for i, other in enumerate(others):
        last = i + 1 == len(others) and not constants
        total = g.emit(call, "add", *_alike(g, call, total, other), name=None if last else f"{call.outputs[0]}.{i}")
    if constants:
        with_constant(g, call, "add_const", total, np.asarray(sum(constants)))
    elif not others:
        g.emit(call, "reshape", (total,), g.shapes[total])


def _batch_normalization(g: Reading, call: Call) -> None:
    """y = (x - mean) / sqrt(variance + epsilon) . scale + shift, all four constants of shape [C]."""
    x, shape = call.inputs[0], g.shapes[call.inputs[0]]
    if call.attrs.get("training_mode"):
        raise call.fail("is a BatchNormalization in training mode; export the model in evaluation mode")
    names = ("scale", "shift", "mean", "variance")
    scale, shift, mean, variance = (np.asarray(g.constant(call, i + 1, what)) for i, what in enumerate(names))
    factor = scale / np.sqrt(variance + call.attrs.get("epsilon", 1e-5))
    spread = (1, -1) + (1,) * (len(shape) - 2)
    product = f"{call.outputs[0]}.scaled"
    g.emit(call, "mul_const", (x,), shape, const=factor.reshape(spread), name=product)
    g.emit(call, "add_const", (product,), shape, const=(shift - mean * factor).reshape(spread))


def polynomial(g: Reading, call: Call) -> None:
    """A local function Polynomial_power_n or Polynomial_chebyshev_n: inputs (x, a, b, c_0 .. c_n)."""
    x, *scalars = call.inputs
    a, b, *c = (float(g.constants[s].reshape(())) for s in scalars)
    inner = np.polynomial.Polynomial([b, a])
    chebyshev = "chebyshev" in call.op
    power = (
        np.polynomial.Chebyshev(c).convert(kind=np.polynomial.Polynomial)(inner)
        if chebyshev
        else np.polynomial.Polynomial(c)(inner)
    )
    interval = sorted(((-1.0 - b) / a, (1.0 - b) / a)) if chebyshev else None
    attrs = {"coefficients": np.atleast_1d(power.coef), "interval": interval}
    g.emit(call, "polynomial", (x,), g.shapes[x], attrs=attrs)


TABLE: dict[str, Handler] = {
    "Add": _elementwise("add"),
    "Mul": _elementwise("mul"),
    "Sub": _sub,
    "Neg": _neg,
    "Div": _div,
    "Pow": _pow,
    "Sum": _sum,
    "BatchNormalization": _batch_normalization,
}
