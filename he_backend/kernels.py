"""Kernels over slots, written once: linear maps, sums and polynomials in terms of add, mul and rotate.

The same code is interpreted by NumPy (the oracle, below), by a depth counter (below) and by the tracer that turns a
circuit into primitives (`trace.py`). A kernel knows no levels, scales or keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .base import Array, C, Plain, SlotOps, UnsupportedOpError
from .circuit import Op
from .container import Arrays


@dataclass(frozen=True)
class Row:
    """Row `row` of a weight array [rows, m], each element repeated slots / m times, then rolled right by `roll` slots."""

    array: str
    row: int
    roll: int
    size: int
    weights: np.ndarray = field(repr=False, compare=False)

    def slots(self) -> Array:
        values = self.weights[self.row].astype(np.float64)
        return np.roll(np.repeat(values, self.size // values.size), self.roll)


@dataclass(frozen=True)
class StepRow:
    """Row `step` of an array [T, m]: which one is known only when the circuit runs."""

    array: str
    size: int
    weights: np.ndarray = field(repr=False, compare=False)

    def at(self, step: int) -> Row:
        return Row(self.array, step, 0, self.size, self.weights)


def linear(ops: SlotOps[C], x: C, *, name: str, weights: np.ndarray, plan: Sequence[Any], bias: np.ndarray | None) -> C:
    """sum over (g, [(b, r), ...]) in plan of weights[r] * rotate(x, g + b), plus bias.

    Baby-step giant-step (Halevi and Shoup, eprint 2018/244): the weights of giant step g are rolled right by g, so that
    one rotation by g serves the whole group, and the rotations by b are shared by all groups.

    Args:
        weights: [rows, m] with m dividing ops.slots.
    """
    groups = [
        (int(g), [(int(b), Row(name, int(r), int(g), ops.slots, weights)) for b, r in terms]) for g, terms in plan
    ]
    y = ops.weighted_rotations(x, groups)
    return y if bias is None else ops.add(y, Row(f"{name}.bias", 0, 0, ops.slots, bias.reshape(1, -1)))


def weighted_rotations(ops: SlotOps[C], x: C, groups: Sequence[tuple[int, Sequence[tuple[int, Plain]]]]) -> C:
    """The fallback of the fast path with the same name: plain rotations, products and sums."""
    babies = {b: ops.rotate(x, b) if b else x for b in sorted({b for _, terms in groups for b, _ in terms})}
    total: C | None = None
    for giant, terms in groups:
        inner: C | None = None
        for b, plain in terms:
            term = ops.mul(babies[b], plain)
            inner = term if inner is None else ops.add(inner, term)
        if inner is None:
            continue
        outer = ops.rotate(inner, giant) if giant else inner
        total = outer if total is None else ops.add(total, outer)
    if total is None:
        raise UnsupportedOpError("a linear map without a single diagonal")
    return total


def rotate_sum(ops: SlotOps[C], x: C, steps: Sequence[int], runs: Sequence[int] = ()) -> C:
    """x + rotate(x, k) for each k of steps in turn: with steps s, 2s, 4s, ... the sum over a cyclic axis of stride s.

    Args:
        runs: how many steps are taken at once, from one decomposition: r steps are then 2^r - 1 rotations of one value, which is
            cheaper than r rotations of r values where decompositions are dear. Empty: one by one.
    """
    at = 0
    for run in runs or [1] * len(steps):
        x = ops.doubled_sum(x, steps[at : at + run]) if run > 1 else ops.add(x, ops.rotate(x, steps[at]))
        at += run
    return x


def doubled_sum(ops: SlotOps[C], x: C, steps: Sequence[int]) -> C:
    """The fallback of the fast path with the same name."""
    return rotate_sum(ops, x, steps)


def polynomial(ops: SlotOps[C], x: C, attrs: Mapping[str, Any]) -> C:
    """A polynomial of one variable, slot by slot, in one of two forms.

    factors    [[alpha, beta], ...]: the monic product of (x + alpha)^2 + beta, or of x + alpha where beta is None. No
               product by a constant, so degree n costs ceil(log2 n) levels.
    chebyshev  coefficients c_k of sum c_k T_k(u), u = scale * x + shift, `domain` = [scale, shift]; scale 1 costs nothing.
    """
    if "factors" in attrs:
        return _product(ops, [_factor(ops, x, alpha, beta) for alpha, beta in attrs["factors"]])
    scale, shift = attrs["domain"]
    u = x if scale == 1.0 else ops.mul(x, float(scale))
    return chebyshev(ops, ops.add(u, float(shift)) if shift else u, [float(c) for c in attrs["chebyshev"]])


def _factor(ops: SlotOps[C], x: C, alpha: float, beta: float | None) -> C:
    shifted = ops.add(x, float(alpha)) if alpha else x
    if beta is None:
        return shifted
    square = ops.mul(shifted, shifted)
    return ops.add(square, float(beta)) if beta else square


def _product(ops: SlotOps[C], terms: list[C]) -> C:
    """A balanced product; terms come deepest last, so the shallow ones are paired first."""
    while len(terms) > 1:
        terms = [ops.mul(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
    return terms[0]


def chebyshev(ops: SlotOps[C], u: C, coefficients: Sequence[float]) -> C:
    """sum c_k T_k(u) by Paterson and Stockmeyer in the Chebyshev basis (Bossuat et al., eprint 2020/1203, section 5).

    The powers T_1..T_b and T_2b, T_4b, ... are shared; p = q T_m + r is split at the largest such m. Depth is about
    ceil(log2(degree + 1)) + 1 for coefficients that are not folded elsewhere.
    """
    degree = max((k for k, c in enumerate(coefficients) if c), default=0)
    if degree == 0:
        raise UnsupportedOpError("a constant polynomial needs no circuit: fold it")
    basis: dict[int, C] = {1: u}

    def power(k: int) -> C:
        if k not in basis:
            low = k // 2
            high = k - low
            product = ops.mul(power(high), power(low))
            double = ops.add(product, product)
            basis[k] = ops.add(double, -1.0) if high == low else ops.sub(double, power(high - low))
        return basis[k]

    babies = 1 << max(1, (degree.bit_length() + 1) // 2)

    def evaluate(c: Sequence[float]) -> C | float:
        top = max((k for k, value in enumerate(c) if value), default=0)
        if top == 0:
            return float(c[0]) if len(c) else 0.0
        if top < babies:
            total: C | None = None
            for k in range(1, top + 1):
                if c[k]:
                    term = power(k) if c[k] == 1.0 else ops.mul(power(k), float(c[k]))
                    total = term if total is None else ops.add(total, term)
            assert total is not None
            return ops.add(total, float(c[0])) if c[0] else total
        m = 1 << (top.bit_length() - 1)
        quotient, rest = _divide(c[: top + 1], m)
        q, r = evaluate(quotient), evaluate(rest)
        t = power(m)
        y = (t if q == 1.0 else ops.mul(t, q)) if isinstance(q, float) else ops.mul(q, t)
        return y if isinstance(r, float) and r == 0.0 else ops.add(y, r)

    result = evaluate(list(coefficients))
    assert not isinstance(result, float)
    return result


def _divide(c: Sequence[float], m: int) -> tuple[list[float], list[float]]:
    """c = q T_m + r in the Chebyshev basis, degree of c below 2m; from T_(m+j) = 2 T_m T_j - T_(m-j)."""
    rest = list(c[:m])
    quotient = [float(c[m])] + [0.0] * (len(c) - m - 1)
    for j in range(1, len(c) - m):
        quotient[j] = 2.0 * c[m + j]
        rest[m - j] -= c[m + j]
    return quotient, rest


def apply(ops: SlotOps[C], op: Op, args: Sequence[C], arrays: Arrays) -> C:
    """One op of a circuit in terms of `ops`; `input`, `output` and `refresh` belong to whoever runs the circuit."""
    a = op.attrs
    match op.kind:
        case "add":
            return ops.add(args[0], args[1])
        case "sub":
            return ops.sub(args[0], args[1])
        case "mul":
            return ops.mul(args[0], args[1])
        case "add_plain":
            return ops.add(args[0], Row(a["array"], 0, 0, ops.slots, arrays[a["array"]].reshape(1, -1)))
        case "mul_step":
            return ops.mul(args[0], StepRow(a["array"], ops.slots, arrays[a["array"]]))
        case "add_step":
            return ops.add(args[0], StepRow(a["array"], ops.slots, arrays[a["array"]]))
        case "linear":
            bias = None if a.get("bias") is None else arrays[a["bias"]]
            return linear(ops, args[0], name=a["weights"], weights=arrays[a["weights"]], plan=a["plan"], bias=bias)
        case "rotate":
            return ops.rotate(args[0], int(a["k"]))
        case "rotate_sum":
            return rotate_sum(ops, args[0], a["steps"], a.get("runs", ()))
        case "polynomial":
            return polynomial(ops, args[0], a)
    raise UnsupportedOpError(f"no kernel for op kind {op.kind!r}")


class NumpySlots:
    """SlotOps on float64 arrays: the oracle that every other interpretation is compared with."""

    hoisting = False

    def __init__(self, slots: int, step: int = 0) -> None:
        self.slots, self.step = slots, step

    def _value(self, b: Any) -> Any:
        b = b.at(self.step) if isinstance(b, StepRow) else b
        return b.slots() if hasattr(b, "slots") else b

    def add(self, a: Array, b: Any) -> Array:
        return a + self._value(b)

    def sub(self, a: Array, b: Any) -> Array:
        return a - self._value(b)

    def mul(self, a: Array, b: Any) -> Array:
        return a * self._value(b)

    def rotate(self, a: Array, k: int) -> Array:
        return np.roll(a, -k)

    def weighted_rotations(self, a: Array, groups: Any) -> Array:
        return weighted_rotations(self, a, groups)

    def doubled_sum(self, a: Array, steps: Sequence[int]) -> Array:
        return doubled_sum(self, a, steps)


class Depth:
    """SlotOps on multiplicative depth: the value of an int is how many rescales lie behind it."""

    hoisting = False

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def add(self, a: int, b: Any) -> int:
        return max(a, b) if isinstance(b, int) else a

    sub = add

    def mul(self, a: int, b: Any) -> int:
        return self.add(a, b) + 1

    def rotate(self, a: int, k: int) -> int:
        return a

    def weighted_rotations(self, a: int, groups: Any) -> int:
        return a + 1

    def doubled_sum(self, a: int, steps: Sequence[int]) -> int:
        return a


def depth(op: Op, arrays: Arrays, slots: int) -> int:
    """Levels that an op costs beyond those of its deepest argument."""
    if op.kind in ("input", "output", "refresh"):
        return 0
    return int(apply(Depth(slots), op, [0] * len(op.args), arrays))
