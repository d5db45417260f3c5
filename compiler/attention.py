"""Lowering of the two products of attention, in the layout `layout.Heads`; scores lie in one of two ways, the cheaper is taken.

Folded: copy b of ciphertext a holds key t - (b + B a) for query t. So the keys are shifted and masked once (one level, rotations
by multiples of 1 shared with a giant step of B), and T / B products with the queries give all scores; the sum over channels is
cyclic. Values: shifted alike, multiplied by the powers, summed over ciphertexts before one relinearisation.
Merged: see `merged`; one level more, and a fraction of the key switches where tokens are many or copies few.

Both end with a sum over the copies that is complete in copy 0, which a 0/1 vector selects and rotations spread again. The
reciprocal of the denominator needs longer, so that this costs no level on the critical path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from . import merged
from .general import lower_matmul
from .ir import Node
from .layout import Heads, power_of_two
from .matvec import PlanCost
from .placed import Placed

if TYPE_CHECKING:
    from .lower import Lowering

WORTH = 0.8  # merged scores cost a level: they must save a fifth of the seconds


def choose(heads: Heads, cost: PlanCost, merge: bool | None) -> Heads:
    """How the scores of a geometry lie.

    Args:
        cost: predicted seconds of (diagonals, babies, giants, folds); merge: None for what is cheaper, else the answer.
    """
    if merge is False or heads.width > heads.tokens:
        return heads
    candidate = replace(heads, merged=True)
    if merge or merged.seconds(candidate, cost) < WORTH * seconds(heads, cost):
        return candidate
    return heads


def seconds(heads: Heads, cost: PlanCost) -> float:
    """Predicted seconds of folded attention without its projections: key switches, and the token shifts of keys and values."""
    switch = cost(0, 0, 1, 1)
    products = 1 + len(heads.channel_steps) + 1  # relinearisation, sum over channels, square
    shifts = 2 * cost(2 * heads.shifts, 2 * heads.shifts, 2, 0)
    return heads.groups * heads.scores * (products * switch + heads.ranges * shifts)


def lower_product(low: Lowering, node: Node) -> Placed:
    """matmul of two encrypted tensors: scores, values, or a product that no layout was made for."""
    a, b = (low.placed[name] for name in node.inputs)
    if a.heads is None or a.heads != b.heads:
        return lower_matmul(low, node, a, b)
    return (lower_values if a.scores else lower_scores)(low, node, a, b, a.heads)


def lower_scores(low: Lowering, node: Node, q: Placed, k: Placed, heads: Heads) -> Placed:
    """matmul(q [1, H, T, dk], k [1, H, dk, T]), times the mask of the node -> scores [1, H, T, T]."""
    mask = node.attrs.get("mask")
    weight = np.broadcast_to(1.0 if mask is None else mask, node.shape)[0]
    factor = low.wanted(node.name)
    lower = merged.scores if heads.merged else _folded_scores
    ops = lower(low, node, q, k, heads, weight, factor)
    return replace(q, ops=tuple(ops), layout=heads.layout, factor=factor, clean=True, scores=True)


def lower_values(low: Lowering, node: Node, p: Placed, v: Placed, heads: Heads) -> Placed:
    """matmul(p [1, H, T, T], v [1, H, T, dk]) -> [1, H, T, dk] in the layout of v."""
    support = np.ones((heads.heads, heads.tokens, heads.tokens))
    mask = _mask_of(low, node.inputs[0])
    if mask is not None:
        support = np.broadcast_to(mask != 0.0, (1, *support.shape))[0].astype(np.float64)
    factor = p.factor * v.factor
    ops = (merged.values if heads.merged else _folded_values)(low, node, p, v, heads, support)
    if heads.shifts == 1:
        return replace(v, ops=tuple(ops), factor=factor, clean=True)
    wanted = low.wanted(node.name)
    first = low.array(f"{node.name}.first_copy", np.where(heads.copy == 0, factor / wanted, 0.0)[None])
    back = [-s for s in heads.copy_steps]
    spread = []
    for op in ops:
        op = low.emit("rotate_sum", (op,), node.source, factor=factor, steps=heads.copy_steps)
        op = low.emit("linear", (op,), node.source, factor=wanted, weights=first, plan=[[0, [[0, 0]]]], bias=None)
        spread.append(low.emit("rotate_sum", (op,), node.source, factor=wanted, steps=back))
    return replace(v, ops=tuple(spread), factor=wanted, clean=True)


def shifted(
    low: Lowering, node: Node, x: Placed, part: int, heads: Heads, name: str, weight: np.ndarray, factor: float
) -> list[int]:
    """Token shifts of one ciphertext of a heads tensor: slot (i, b, h, t) of shift a = weight[h, t, j] * x[h, j, i], j = t - b - B a.

    Args:
        part: ciphertext of x.
        weight: [H, T, T] plaintext factors by head, query, key; where a wrap around the window has weight 0 it is left out.
    """
    t, shifts = heads.tokens, heads.shifts
    group = part // heads.ranges
    ops = []
    for a in range(heads.scores):
        head, token, shift = heads.per_slot(group, a)
        rows: list[np.ndarray] = []
        terms: list[list[int]] = []
        for wrap in (0, 1):  # key t - s, or T + t - s where that is negative
            inside = token >= shift if wrap == 0 else token < shift
            for b in range(shifts):
                here = inside & (shift == b + shifts * a)
                values = np.where(here, weight[head, token, (token - shift) % t], 0.0)
                if values.any():
                    # Rotation by -(b + B a) + wrap T, its part -B a as the giant step: undone in the weights by the kernel.
                    terms.append([wrap * t - b, len(rows)])
                    rows.append(values)
        attrs = {
            "weights": low.array(f"{name}.{part}.{a}", np.stack(rows) * (x.factor / factor)),
            "plan": [[-shifts * a, terms]],
            "bias": None,
        }
        ops.append(low.emit("linear", (x.ops[part],), node.source, factor=factor, **attrs))
    return ops


def _folded_scores(
    low: Lowering, node: Node, q: Placed, k: Placed, heads: Heads, weight: np.ndarray, factor: float
) -> list[int]:
    ops = []
    for group in range(heads.groups):
        parts = range(group * heads.ranges, (group + 1) * heads.ranges)
        keys = [shifted(low, node, k, part, heads, f"{node.name}.keys", weight, factor / q.factor) for part in parts]
        for a in range(heads.scores):
            pairs = [(q.ops[part], key[a]) for part, key in zip(parts, keys, strict=True)]
            total = sum_of_products(low, node, pairs, factor)
            ops.append(low.emit("rotate_sum", (total,), node.source, factor=factor, steps=heads.channel_steps))
    return ops


def _folded_values(low: Lowering, node: Node, p: Placed, v: Placed, heads: Heads, support: np.ndarray) -> list[int]:
    ops = []
    for part in range(len(v.ops)):
        group = part // heads.ranges
        powers = p.ops[group * heads.scores : (group + 1) * heads.scores]
        values = shifted(low, node, v, part, heads, f"{node.name}.values", support, v.factor)
        ops.append(sum_of_products(low, node, list(zip(powers, values, strict=True)), p.factor * v.factor))
    return ops


def sum_of_products(low: Lowering, node: Node, pairs: list[tuple[int, int]], factor: float) -> int:
    """Products of two ciphertexts each, summed before one relinearisation."""
    total = -1
    for pair in pairs:
        product = low.emit("mul", pair, node.source, factor=factor)
        total = product if total < 0 else low.emit("add", (total, product), node.source, factor=factor)
    return total


def lower_denominators(low: Lowering, node: Node, x: Placed, heads: Heads) -> Placed:
    """Sum over keys of powers [1, H, T, T] -> [1, H, T, 1], complete in every slot of its head and query."""
    steps = [*(heads.channel_steps if heads.merged else ()), *heads.copy_steps]
    ops, rows = [], []
    for group in range(heads.groups):
        first, *others = x.ops[group * heads.scores : (group + 1) * heads.scores]
        for op in others:
            first = low.emit("add", (first, op), node.source, factor=x.factor)
        ops.append(low.emit("rotate_sum", (first,), node.source, factor=x.factor, steps=steps) if steps else first)
        head, token, _ = heads.per_slot(group, 0)
        rows.append(head * heads.tokens + token)
    return Placed(ops=tuple(ops), layout=np.stack(rows), factor=x.factor, clean=False, heads=heads)


def heads_of(shape: tuple[int, ...], positions: int) -> Heads | None:
    """The geometry of a tensor [1, T, H, dk], or None where its sizes are no powers of two."""
    _, tokens, heads, channels = shape
    if any(n != power_of_two(n) for n in (tokens, heads, channels)):
        return None
    return Heads(tokens=tokens, heads=heads, channels=channels, positions=positions)


def _mask_of(low: Lowering, name: str) -> np.ndarray | None:
    """The mask of the scores that a tensor of powers came from, where it makes powers 0 too; that of a softmax (passes/softmax.py)."""
    node = low.nodes[name]
    if "visible" in node.attrs:
        return node.attrs["visible"]
    while node.op == "polynomial" and node.inputs[0] in low.nodes and node.attrs["coefficients"][0] == 0.0:
        node = low.nodes[node.inputs[0]]
    return node.attrs.get("mask") if node.op == "matmul" else None
