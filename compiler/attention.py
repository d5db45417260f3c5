"""Lowering of the two products of attention, in the layout `layout.Heads`.

Scores: copy b of ciphertext a holds key t - (b + B a) for query t. So the keys are shifted and masked once (one level, rotations
by multiples of 1 shared with a giant step of B), and T / B products with the queries give all scores; the sum over channels is
cyclic. Values: shifted alike, multiplied by the powers, summed over ciphertexts before one relinearisation, then over copies; the
sum is complete in copy 0, which a 0/1 vector selects and rotations spread again. The reciprocal of the denominator needs longer,
so that this costs no level on the critical path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .ir import Node
from .layout import Heads

if TYPE_CHECKING:
    from .lower import Lowering, Placed


def shifted(
    low: Lowering, node: Node, x: Placed, heads: Heads, name: str, weight: np.ndarray, factor: float
) -> list[int]:
    """Token shifts of a heads tensor: one op a ciphertext, slot (i, b, h, t) of part a = weight[h, t, j] * x[h, j, i], j = t - b - B a.

    Args:
        weight: [H, T, T] plaintext factors by head, query, key; where a wrap around the window has weight 0 it is left out.
    """
    t, shifts = heads.tokens, heads.shifts
    ops = []
    for part in range(heads.ciphertexts):
        head, token, shift = heads.per_slot(part)
        rows: list[np.ndarray] = []
        terms: list[list[int]] = []
        for wrap in (0, 1):  # key t - s, or T + t - s where that is negative
            inside = token >= shift if wrap == 0 else token < shift
            for b in range(shifts):
                here = inside & (shift == b + shifts * part)
                values = np.where(here, weight[head, token, (token - shift) % t], 0.0)
                if values.any():
                    # Rotation by -(b + B part) + wrap T, its part -B part as the giant step: undone in the weights by the kernel.
                    terms.append([wrap * t - b, len(rows)])
                    rows.append(values)
        attrs = {
            "weights": low.array(f"{name}.{part}", np.stack(rows) * (x.factor / factor)),
            "plan": [[-shifts * part, terms]],
            "bias": None,
        }
        ops.append(low.emit("linear", x.ops, node.source, factor=factor, **attrs))
    return ops


def lower_scores(low: Lowering, node: Node, q: Placed, k: Placed, heads: Heads) -> Placed:
    """matmul(q [1, H, T, dk], k [1, H, dk, T]), times the mask of the node -> scores [1, H, T, T]."""
    mask = node.attrs.get("mask")
    weight = np.broadcast_to(1.0 if mask is None else mask, node.shape)[0]
    factor = low.wanted(node.name)
    keys = shifted(low, node, k, heads, f"{node.name}.keys", weight, factor / q.factor)
    ops = []
    for key in keys:
        product = low.emit("mul", (*q.ops, key), node.source, factor=factor)
        ops.append(low.emit("rotate_sum", (product,), node.source, factor=factor, steps=heads.channel_steps))
    layout = np.stack([heads.score_layout(part) for part in range(heads.ciphertexts)])
    return replace(q, ops=tuple(ops), layout=layout, factor=factor, clean=True, scores=True)


def lower_values(low: Lowering, node: Node, p: Placed, v: Placed, heads: Heads) -> Placed:
    """matmul(p [1, H, T, T], v [1, H, T, dk]) -> [1, H, T, dk] in the layout of v."""
    support = np.ones((heads.heads, heads.tokens, heads.tokens))
    mask = _mask_of(low, node.inputs[0])
    if mask is not None:
        support = np.broadcast_to(mask != 0.0, (1, *support.shape))[0].astype(np.float64)
    values = shifted(low, node, v, heads, f"{node.name}.values", support, v.factor)
    factor = p.factor * v.factor
    total = -1
    for power, value in zip(p.ops, values, strict=True):
        product = low.emit("mul", (power, value), node.source, factor=factor)
        total = product if total < 0 else low.emit("add", (total, product), node.source, factor=factor)
    wanted = low.wanted(node.name)
    if heads.shifts > 1:
        total = low.emit("rotate_sum", (total,), node.source, factor=factor, steps=heads.copy_steps)
        first = np.where(heads.copy == 0, factor / wanted, 0.0)
        name = low.array(f"{node.name}.first_copy", first[None])
        total = low.emit("linear", (total,), node.source, factor=wanted, weights=name, plan=[[0, [[0, 0]]]], bias=None)
        steps = [-s for s in heads.copy_steps]
        total = low.emit("rotate_sum", (total,), node.source, factor=wanted, steps=steps)
        factor = wanted
    return replace(v, ops=(total,), factor=factor, clean=True)


def _mask_of(low: Lowering, name: str) -> np.ndarray | None:
    """The mask of the scores that a tensor of powers came from."""
    node = low.nodes[name]
    while node.op == "polynomial" and node.inputs[0] in low.nodes:
        node = low.nodes[node.inputs[0]]
    return node.attrs.get("mask") if node.op == "matmul" else None
