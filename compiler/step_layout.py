"""Layouts of a decoding step, and the two kinds of matrix-vector product that lead from one to the other.

A step works on one vector of features at a time, and a ciphertext has many more slots than that, so that every slot can hold
one weight of a matrix: a product costs one plaintext product and a sum over slots, without diagonals. Two layouts alternate:

    tiled    slot s holds feature s mod G: the vector, again and again
    blocks   slot s holds feature s div w: every feature w times; of each block the first v slots are valid

    outer    blocks -> tiled: slot s multiplies by W[s div w, s mod G]; the sum over blocks is cyclic, valid everywhere
    inner    tiled -> blocks: slot s multiplies by W[s mod G, s div w]; the sum over L neighbours starts anywhere in a tile, so
             that it is whole wherever its window stays inside the block: v = w / 2 of the slots, no mask and no level spent

Rotations that can be hoisted replace the last steps of a sum where that is cheaper: `outer` may leave its sum at a period of
several tiles and `inner` at a shorter window, each then meets the rest of the inputs by rotations of its argument.

Keys and values, [T, D], lie as [copy][token][two tiles of D]: a sum over the channels of a head starts in the first tile and
ends in the second, a sum over tokens is cyclic because the copies continue it. Neither needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from he_backend.base import UnsupportedOpError

from .layout import power_of_two
from .matvec import PlanCost
from .sparse import Plan, baby_giant

MOST_DIAGONALS = 64


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """Slot s holds feature[s mod G], -1 for none; feature is int [G]."""

    feature: np.ndarray

    @property
    def period(self) -> int:
        return self.feature.size

    def layout(self, slots: int) -> np.ndarray:
        return np.tile(self.feature, slots // self.period)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Slot s holds feature[s div w] where s mod w < valid, and nothing that means anything elsewhere; w = slots / blocks."""

    feature: np.ndarray
    valid: int

    def width(self, slots: int) -> int:
        return slots // self.feature.size

    def layout(self, slots: int) -> np.ndarray:
        at = np.arange(slots)
        width = self.width(slots)
        return np.where(at % width < self.valid, self.feature[at // width], -1)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of T tokens in one ciphertext: [copy][token][two tiles][channel][head].

    Raises:
        UnsupportedOpError: sizes are no powers of two, or a ciphertext is too small.
    """

    slots: int
    tokens: int
    heads: int
    channels: int

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "channels"):
            if (n := getattr(self, name)) != power_of_two(n):
                raise UnsupportedOpError(
                    f"a step with {n} {name}: the layout wants a power of two; pad to {power_of_two(n)}"
                )
        if 2 * self.tokens * self.width > self.slots:
            raise UnsupportedOpError(
                f"keys of {self.tokens} tokens and width {self.width} need {2 * self.tokens * self.width} slots, a ciphertext has "
                f"{self.slots}; take a larger ring, fewer tokens or a narrower model"
            )

    @property
    def width(self) -> int:
        return self.heads * self.channels

    @property
    def order(self) -> np.ndarray:
        """[D] feature h dk + c at each position of a tile: channels outside, heads inside."""
        at = np.arange(self.width)
        return at % self.heads * self.channels + at // self.heads

    @property
    def first(self) -> np.ndarray:
        """[slots] whether a slot is in the first tile of its token, where sums over channels are whole."""
        return np.arange(self.slots) // self.width % 2 == 0

    @property
    def token(self) -> np.ndarray:
        """[slots] token of each slot."""
        return np.arange(self.slots) // (2 * self.width) % self.tokens

    def kept(self, *, keys: bool) -> np.ndarray:
        """[slots] index into [T, D]; values fill the first tile alone, so that nothing but zeros lies in the second."""
        feature = np.tile(self.order, self.slots // self.width)
        index = self.token * self.width + feature
        return index if keys else np.where(self.first, index, -1)

    @property
    def scores(self) -> np.ndarray:
        """[slots] index into scores [H, T]."""
        head = np.arange(self.slots) % self.heads
        return np.where(self.first, head * self.tokens + self.token, -1)

    @property
    def row(self) -> np.ndarray:
        """[slots] index into what is left of scores after a sum over tokens, [H]."""
        return np.where(self.first, np.arange(self.slots) % self.heads, -1)

    @property
    def out(self) -> Tiled:
        """The weighted sum of the values, features h dk + c."""
        return Tiled(feature=np.concatenate([self.order, np.full(self.width, -1)]))

    @property
    def channel_steps(self) -> list[int]:
        return [self.heads << k for k in range(self.channels.bit_length() - 1)]

    @property
    def token_steps(self) -> list[int]:
        return [2 * self.width << k for k in range(self.tokens.bit_length() - 1)]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A planned matrix-vector product: weights [R, slots] at plan's rotations, then `folds`; seconds by the cost model."""

    weights: np.ndarray
    plan: Plan
    folds: tuple[int, ...]
    form: Tiled | Blocks
    seconds: float


def outer(matrix: np.ndarray, source: Blocks, order: np.ndarray, slots: int, cost: PlanCost) -> Product:
    """y = x @ matrix from blocks to a tile.

    Args:
        matrix: [in, out]; order: [F] output at each position of the tile, -1 for none, F a power of two.

    Raises:
        UnsupportedOpError: the outputs do not fit a ciphertext, or take too many rotations.
    """
    tile, width, valid = order.size, source.width(slots), source.valid
    if tile > slots:
        raise UnsupportedOpError(
            f"a map to {matrix.shape[1]} outputs needs {tile} slots, a ciphertext has {slots}: a step's vectors lie in one ciphertext; "
            "take a larger ring, or a smaller vocabulary or hidden size"
        )
    at = np.arange(slots)
    wanted = order[at % tile]
    best: Product | None = None
    period = tile
    while period <= slots:
        spread = period <= valid
        if (
            spread
        ):  # one product of the valid slots; the sum over blocks, and then the rest of each block filled with it
            rotations = np.array([0])
            held = [np.where(at % width < valid, source.feature[at // width], -1)]
            folds = [width << k for k in range((slots // width).bit_length() - 1)]
            folds += [-valid << k for k in range((width // valid).bit_length() - 1)]
        else:
            parts, across = min(width, period) // valid, max(1, period // width)
            rotations = np.array([b * width - m * valid for b in range(across) for m in range(parts)])
            here = at % width // valid
            inside = at % width < period  # of several tiles in a block one does the work
            held = [
                np.where(inside & (here == m), source.feature[(at // width + b) % source.feature.size], -1)
                for b in range(across)
                for m in range(parts)
            ]
            folds = [period << k for k in range((slots // period).bit_length() - 1)]
        best = _better(best, matrix, rotations, held, wanted, folds, Tiled(feature=order), cost)
        period *= 2
    return _found(best, matrix, slots)


def inner(matrix: np.ndarray, source: Tiled, slots: int, cost: PlanCost) -> Product:
    """y = x @ matrix from a tile to blocks.

    Raises:
        UnsupportedOpError: a block would hold a single slot, or it takes too many rotations.
    """
    outputs = matrix.shape[1]
    blocks, period = power_of_two(outputs), source.period
    width = slots // blocks if blocks <= slots else 0
    at = np.arange(slots)
    feature = np.where(np.arange(blocks) < outputs, np.arange(blocks), -1)
    best: Product | None = None
    window = 1
    while window <= min(period, width // 2):
        rotations = np.arange(period // window) * window
        if rotations.size <= MOST_DIAGONALS:
            wanted = feature[at // width]
            held = [source.feature[(at + r) % period] for r in rotations]
            folds = [1 << k for k in range(window.bit_length() - 1)]
            form = Blocks(feature=feature, valid=width if window == 1 else width // 2)
            best = _better(best, matrix, rotations, held, wanted, folds, form, cost)
        window *= 2
    return _found(best, matrix, slots)


def _better(
    best: Product | None,
    matrix: np.ndarray,
    rotations: np.ndarray,
    held: list[np.ndarray],
    wanted: np.ndarray,
    folds: list[int],
    form: Tiled | Blocks,
    cost: PlanCost,
) -> Product | None:
    """The cheaper of a known plan and a new one, whose rotation i brings input held[i] [slots] to the output `wanted` [slots]."""
    if rotations.size > MOST_DIAGONALS:
        return best
    plan = baby_giant(rotations, cost)
    seconds = cost(rotations.size, len({b for _, row in plan for b, _ in row}), len(plan), len(folds))
    if best is not None and best.seconds <= seconds:
        return best
    weights = np.stack(
        [np.where((h >= 0) & (wanted >= 0), matrix[np.maximum(h, 0), np.maximum(wanted, 0)], 0.0) for h in held]
    )
    return Product(weights=weights, plan=plan, folds=tuple(folds), form=form, seconds=seconds)


def _found(best: Product | None, matrix: np.ndarray, slots: int) -> Product:
    if best is None:
        raise UnsupportedOpError(
            f"a {matrix.shape} map in a ciphertext of {slots} slots takes more than {MOST_DIAGONALS} rotations, or has no block of two "
            "slots; take a larger ring or a narrower model"
        )
    return best
