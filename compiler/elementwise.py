"""Lowering of what acts on each element alone: sums, products, polynomials, and changes of shape, which move nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from he_backend.base import UnsupportedOpError

from .general import move
from .ir import Node
from .layout import broadcast_index, constant_slots
from .placed import Placed
from .polynomials import MOST_PEAK, prepare

if TYPE_CHECKING:
    from .lower import Lowering


def _scaled(low: Lowering, x: Placed, factor: float, source: str) -> Placed:
    """The same tensor under another factor: a product by a number, one level."""
    name = low.array(f"scale.{len(low.ops)}", np.full((1, low.positions), x.factor / factor))
    ops = tuple(
        low.emit("linear", (op,), source, factor=factor, weights=name, plan=[[0, [[0, 0]]]], bias=None) for op in x.ops
    )
    return replace(x, ops=ops, factor=factor)


def lower_add(low: Lowering, node: Node) -> Placed:
    a, b = (low.placed[name] for name in node.inputs)
    if low.graph.shape(node.inputs[0]) != node.shape:
        a, b = b, a
    index = broadcast_index(_smaller(low, node), node.shape)
    if low.graph.shape(node.inputs[0]) != low.graph.shape(node.inputs[1]) or not np.array_equal(a.layout, b.layout):
        b = move(low, node, b, index, a.layout, int(np.prod(_smaller(low, node))))
    if not np.isclose(a.factor, b.factor, rtol=1e-9):
        b = _scaled(low, b, a.factor, node.source)
    ops = tuple(low.emit("add", pair, node.source, factor=a.factor) for pair in zip(a.ops, b.ops, strict=True))
    return replace(a, ops=ops, clean=a.clean and b.clean)


UNIT_RATIO = 1.05  # of factors: five squarings make 1.05 of it 5
LENGTH = 4.0  # of a stored interval on which monic polynomials are neither large nor tiny


def _in_units(low: Lowering, node: Node, x: Placed) -> Placed:
    """The argument of a kept polynomial as its steps want it; a level, unless it lies so already (see `Lowering.unit`)."""
    factor = low.unit(node)
    if not low.roomy and 1.0 / UNIT_RATIO < x.factor / factor < UNIT_RATIO:
        return x
    key = ("unit", x.ops, factor)
    if key not in low.memo:
        low.memo[key] = _scaled(low, x, factor, node.source)
        low.free.update(low.memo[key].ops)
    return low.memo[key]


def _paused(low: Lowering, node: Node, x: Placed) -> Placed:
    """A value inside of a form, where a circuit with refreshes may have one: a product by 1, whose result can be made small enough."""
    if not low.roomy or "pause" not in node.attrs:
        return x
    x = _scaled(low, x, x.factor, node.source)
    low.pauses.update(x.ops)
    return x


def _smaller(low: Lowering, node: Node) -> tuple[int, ...]:
    """Shape of the operand that is broadcast; of the second one where both have the node's shape.

    Raises:
        UnsupportedOpError: both are broadcast.
    """
    a, b = (low.graph.shape(name) for name in node.inputs)
    if node.shape not in (a, b):
        raise UnsupportedOpError(f"{node}: both operands, {a} and {b}, would have to be broadcast; expand one of them")
    return b if a == node.shape else a


def lower_add_const(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    assert node.const is not None
    unused = node.attrs.get("unused") if x.clean else None
    values = np.where(x.layout >= 0, constant_slots(node.const, node.shape, x.layout), unused or 0.0) / x.factor
    ops = tuple(
        low.emit("add_plain", (op,), node.source, factor=x.factor, array=low.array(f"{node.name}.{part}", values[part]))
        for part, op in enumerate(x.ops)
    )
    return replace(x, ops=ops, unused=unused)


def lower_mul_const(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    assert node.const is not None
    if node.const.size == 1:
        c = float(node.const.reshape(-1)[0])
        if c == 0.0:
            raise UnsupportedOpError(f"{node}: a product by zero; remove the branch")
        return replace(x, factor=x.factor * c)
    factor = low.wanted(node.name)
    values = constant_slots(node.const, node.shape, x.layout) * (x.factor / factor)
    ops = tuple(
        low.emit(
            "linear",
            (op,),
            node.source,
            factor=factor,
            weights=low.array(f"{node.name}.{part}", values[part][None]),
            plan=[[0, [[0, 0]]]],
            bias=None,
        )
        for part, op in enumerate(x.ops)
    )
    return replace(x, ops=ops, factor=factor, clean=True)


def lower_mul(low: Lowering, node: Node) -> Placed:
    a, b = (low.placed[name] for name in node.inputs)
    if "unit" in node.attrs:  # x y, the beginning of Newton's x y^3
        a = _scaled(low, a, b.factor**-2, node.source)
    a = _paused(low, node, a)
    if low.graph.shape(node.inputs[0]) != node.shape:
        a, b = b, a
    index = broadcast_index(_smaller(low, node), node.shape)
    partners = _partners(a.layout, b.layout, index)
    if partners is None:
        b = move(low, node, b, index, a.layout, int(np.prod(_smaller(low, node))))
        partners = list(range(len(a.ops)))
    pairs = [(op, b.ops[i]) for op, i in zip(a.ops, partners, strict=True)]
    factor = a.factor * b.factor
    ops = tuple(low.emit("mul", pair, node.source, factor=factor) for pair in pairs)
    return replace(a, ops=ops, factor=factor, clean=a.clean or b.clean)


def _partners(layout: np.ndarray, other: np.ndarray, index: np.ndarray) -> list[int] | None:
    """For each ciphertext of a tensor the one of another tensor whose slots hold what its elements are multiplied by.

    Args:
        layout, other: [ciphertexts, slots]; index: element of the other tensor by element of this one.
    """
    found = []
    for row in layout:
        wanted = index[np.maximum(row, 0)]
        fitting = [i for i, held in enumerate(other) if ((row < 0) | (held == wanted)).all()]
        if not fitting:
            return None
        found.append(fitting[0])
    return found


MOST_AT_LEVEL_0 = 4.0  # stored output: the first modulus holds 2^5 and more at most scales, with calibration's margins


def leaving(low: Lowering, name: str) -> float:
    """Largest element of what a tensor becomes at the output by views and sums, in the tensor's own units; 0 if it does not.

    It then lies at level 0, where there is little room: a mean over 64 tokens leaves as a sum, 64 times as large.
    """
    if ("leaving", name) not in low.memo:
        found = [low.bound(name)] if name == low.graph.output else []
        for user in low.users[name]:
            if user.op in ("reshape", "transpose", "add", "add_const", "reduce_sum"):
                found.append(leaving(low, user.name))
            elif user.op == "mul_const" and user.const is not None and user.const.size == 1 and user.const.any():
                found.append(leaving(low, user.name) / abs(float(user.const.reshape(-1)[0])))
        low.memo["leaving", name] = max(found, default=0.0)
    return float(low.memo["leaving", name])


def _largest(low: Lowering, name: str) -> float:
    """Largest element of a tensor and of its sums with constants, which keep its factor: 1 + e is stored as e is."""
    sums = [u.name for u in low.users[name] if u.op == "add_const"]
    return max([low.bound(name), *(_largest(low, user) for user in sums)])


def lower_polynomial(low: Lowering, node: Node) -> Placed:
    x = _paused(low, node, low.placed[node.inputs[0]])
    if "unit" in node.attrs:
        x = _in_units(low, node, x)
    lo, hi = low.ranges[node.inputs[0]]
    interval = tuple(sorted((lo / x.factor, hi / x.factor)))
    peak, largest = low.bound(node.name), _largest(low, node.name)
    dwarfed = largest > MOST_AT_LEVEL_0 * peak and not node.attrs.get("kept")
    if dwarfed:  # by a constant: products of such sums would grow and grow, unless a form knows how far
        peak = largest
    left = leaving(low, node.name)
    peak, most = max(peak, left), MOST_AT_LEVEL_0 if dwarfed or left else MOST_PEAK
    attrs, factor = prepare(node.attrs["coefficients"], x.factor, (interval[0], interval[1]), peak, most=most)
    ops = tuple(low.emit("polynomial", (op,), node.source, factor=factor, **attrs) for op in x.ops)
    if "peak" in node.attrs:
        return _scaled(low, replace(x, ops=ops, factor=factor), low.bound(node.name) / node.attrs["peak"], node.source)
    rest = x.unused if x.unused is not None else 0.0 if x.clean else None
    clean = rest is not None and abs(np.polynomial.polynomial.polyval(rest, node.attrs["coefficients"])) < 1e-12
    return replace(x, ops=ops, factor=factor, clean=clean, unused=None)


def lower_transpose(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    shape = low.graph.shape(node.inputs[0])
    moved = np.arange(int(np.prod(shape))).reshape(shape).transpose(node.attrs["perm"]).reshape(-1)
    inverse = np.empty_like(moved)
    inverse[moved] = np.arange(moved.size)
    return replace(x, layout=np.where(x.layout >= 0, inverse[np.maximum(x.layout, 0)], -1))


def lower_reshape(low: Lowering, node: Node) -> Placed:
    return low.placed[node.inputs[0]]
