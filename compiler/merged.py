"""Attention with merged scores: as many scores in a ciphertext as it has slots.

Slot (i, b, h, t) of ciphertext a holds the score of query t and key t - s, s = b + B i + B w a, for w channels in B shift copies. It is

    S_a[i, t] = sum over r of Q[i + r, t] * K[i + r, t - s(i, a)]           (channels modulo w, tokens modulo T)

w products of a rotation of the queries and a rearrangement of the keys, summed before one relinearisation: no product is spent
on a sum over channels, and the powers are T / (B w) ciphertexts. Values: Y[i, t] = sum over a, r of P_a[i + r, t] * V[i, t - s(i + r, a)],
the same again. This is the product of matrices of Jiang, Kim, Lauter and Song (eprint 2018/1041, section 3) with a batch of tokens
along each slot's position: first skew, C[i, t] = K[i, t - b - B i]; then every rearrangement is a rotation of C by r channels and B r
tokens, except for wraps, which lie a multiple of B w tokens further: a 0/1 combination of few rotations of C, then one rotation.

With baby and giant steps, rotate(left, r c) * rotate(right, r u) = rotate(rotate(left, r c - g) * rotate(right, r u - g), g) for slots c
of a channel and u = c + B (keys) or -B (values): r = r1 + R1 r2 + L r3 and g = R1 r2 c + L r3 u leave R1 w / L rotations of the left, L
different rotations (keys!) of the right, and w / R1 of partial sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .ir import Node
from .layout import Heads
from .matvec import PlanCost
from .placed import Placed
from .sparse import baby_giant

if TYPE_CHECKING:
    from .lower import Lowering

PLAIN_PRODUCTS = 0.4  # four products by 0/1 vectors and a rescale, in key switches


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Baby steps R1 and coarse step L of w channels; see the module."""

    babies: int
    coarse: int

    @classmethod
    def of(cls, width: int) -> Steps:
        babies = 1 << width.bit_length() // 2 if width > 2 else 1
        return cls(babies=min(width, babies), coarse=min(width, 2 * babies))


def seconds(heads: Heads, cost: PlanCost) -> float:
    """Predicted seconds without the projections, as `attention.seconds`."""
    switch, w, n = cost(0, 0, 1, 1), heads.width, heads.scores
    steps = Steps.of(w)
    left, giants = steps.babies * w // steps.coarse, w // steps.babies
    right = n * w * (1 + PLAIN_PRODUCTS)
    skew = cost(2 * heads.reach, 2 * int(heads.reach**0.5), 2 * int(heads.reach**0.5), 0) / switch
    scores = heads.ranges * (left + right + skew) + 2 * n * giants + n
    values = n * left + heads.ranges * (right + 2 * giants + skew)
    return heads.groups * (scores + values) * switch


def scores(
    low: Lowering, node: Node, q: Placed, k: Placed, heads: Heads, weight: np.ndarray, factor: float
) -> list[int]:
    """Scores times weight [H, T, T], one op a ciphertext of `heads.layout`."""
    scale = q.factor * k.factor / factor
    scale = 1.0 if abs(scale - 1.0) < 1e-9 else scale
    keys = [skewed(low, node, op, heads, k.factor) for op in k.ops]
    weights = Weights.of(weight * scale)
    unit = heads.channel_stride + heads.shifts
    ops = []
    for group in range(heads.groups):
        for a in range(heads.scores):
            sums = Sums(low, node, heads, unit=unit, factor=factor)
            for piece in range(heads.ranges):
                part = group * heads.ranges + piece
                for r in range(heads.width):
                    rows = _rows(low, heads, "scores", group, a, r, weights)
                    sums.add(q.ops[part], keys[part], rows, r, factor / q.factor)
            ops.append(sums.total())
    return ops


def values(low: Lowering, node: Node, p: Placed, v: Placed, heads: Heads, support: np.ndarray) -> list[int]:
    """Powers times values, one op a ciphertext of v; to be summed over the shift copies.

    Args:
        support: [H, T, T] 1 where powers may differ from 0.
    """
    ops = []
    weights = Weights.of(support)
    for part, op in enumerate(v.ops):
        group = part // heads.ranges
        sums = Sums(low, node, heads, unit=-heads.shifts, factor=p.factor * v.factor)
        turned = skewed(low, node, op, heads, v.factor)
        for a in range(heads.scores):
            for r in range(heads.width):
                rows = _rows(low, heads, "values", group, a, r, weights)
                sums.add(p.ops[group * heads.scores + a], turned, rows, r, v.factor)
        ops.append(sums.total())
    return ops


class Sums:
    """sum over r of rotate(left, r c) * rotate(right, r u), by giant steps; see the module."""

    def __init__(self, low: Lowering, node: Node, heads: Heads, *, unit: int, factor: float) -> None:
        self.low, self.node, self.unit, self.factor = low, node, unit, factor
        self.stride = heads.channel_stride
        self.steps = Steps.of(heads.width)
        self.sums: dict[int, int] = {}

    def add(self, left: int, right: int, rows: Rows, r: int, factor: float) -> None:
        """One more product, the right one put together of rotations of `right`.

        Args:
            factor: of the right operand.
        """
        if not rows.offsets:
            return
        low, source = self.low, self.node.source
        babies, coarse = self.steps.babies, self.steps.coarse
        far = r // coarse * coarse
        giant = r % coarse // babies * babies * self.stride + far * self.unit
        left = low.rotated(low.rotated(left, far * (self.stride - self.unit)), r % babies * self.stride)
        total = -1
        for row, offset in enumerate(rows.offsets):
            op = low.rotated(right, offset)
            plan = [[0, [[0, row]]]]
            op = low.emit("linear", (op,), source, factor=factor, weights=rows.array, plan=plan, bias=None)
            total = op if total < 0 else low.emit("add", (total, op), source, factor=factor)
        op = low.emit("mul", (left, low.rotated(total, r * self.unit - giant)), source, factor=self.factor)
        known = self.sums.get(giant)
        self.sums[giant] = op if known is None else low.emit("add", (known, op), source, factor=self.factor)

    def total(self) -> int:
        total = -1
        for giant, op in self.sums.items():
            op = self.low.rotated(op, giant)
            total = op if total < 0 else self.low.emit("add", (total, op), self.node.source, factor=self.factor)
        return total


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Weights of a combination of rotations: row i of the array belongs to the rotation by offsets[i]."""

    offsets: tuple[int, ...]
    array: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Factors [H, T, T] by head, query, key; whether all heads have the same; and a digest."""

    values: np.ndarray
    alike: bool
    digest: bytes

    @classmethod
    def of(cls, values: np.ndarray) -> Weights:
        digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes()).digest()
        return cls(values=values, alike=bool((values == values[:1]).all()), digest=digest)


def _rows(low: Lowering, heads: Heads, kind: str, group: int, part: int, r: int, weights: Weights) -> Rows:
    """The combination of rotations of a skewed ciphertext that, rotated by r u, is product r's right operand.

    Args:
        kind: "scores" or "values".
    """
    group = 0 if weights.alike else group  # one array for all groups
    key = (heads, kind, group, part, r, weights.digest)
    if key in low.memo:
        return low.memo[key]
    t, w, shifts, slots = heads.tokens, heads.width, heads.shifts, heads.slots
    head, token, _ = heads.per_slot(group, part)
    channel, copy = np.repeat(heads.channel, t), np.repeat(heads.copy, t)
    other = (channel + r) % w
    at = channel if kind == "scores" else other  # the channel that counts shifts
    held = other if kind == "scores" else channel  # the channel of keys or values
    shift = copy + shifts * at + heads.reach * part
    moved = (token - shift + copy + shifts * held) % t
    turn = r * (heads.channel_stride + shifts if kind == "scores" else -shifts)
    offset = ((held - channel) * heads.channel_stride + moved - token - turn) % slots
    factors = weights.values[head, token, (token - shift) % t]
    rows, offsets = [], []
    for x in np.unique(offset.reshape(-1, t)[:: heads.group]):  # the same for all heads
        row = np.where(offset == x, factors, 0.0)
        if row.any():
            rows.append(np.roll(row, turn))
            offsets.append(int(x))
    name = low.array(f"{kind}.{len(low.memo)}", np.stack(rows)) if rows else ""
    low.memo[key] = Rows(offsets=tuple(offsets), array=name)
    return low.memo[key]


def skewed(low: Lowering, node: Node, op: int, heads: Heads, factor: float) -> int:
    """C[i, b, h, t] = x[i, h, t - b - B i], tokens modulo T: one linear map of at most 2 B w diagonals."""
    key = ("skew", heads)
    if key not in low.memo:
        offsets, rows = zip(*_skew(heads), strict=True)
        plan = baby_giant(np.array(offsets), low.cost)
        low.memo[key] = low.array(f"skew.{len(low.memo)}", np.stack(rows)), [[g, [list(b) for b in t]] for g, t in plan]
    name, plan = low.memo[key]
    return low.emit("linear", (op,), node.source, factor=factor, weights=name, plan=plan, bias=None)


def _skew(heads: Heads) -> Iterator[tuple[int, np.ndarray]]:
    """Rotation and weights [slots] of each diagonal, in order of rotations."""
    _, token, _ = heads.per_slot(0, 0)
    shift = np.repeat(heads.copy + heads.shifts * heads.channel, heads.tokens)
    offset = (token - shift) % heads.tokens - token
    for x in np.unique(offset):
        yield int(x), (offset == x).astype(np.float64)
