"""Linear maps as rotations: which diagonals, which folds, and the baby-step giant-step plan.

y[p] = sum over rotations r of weights[r, p] x[p + r], then folds y += rotate(y, F' 2^k): for each output position the rotations,
together with the positions that the folds add, must meet every input feature exactly once. What is possible follows from the two
feature maps; the cheapest cover by predicted cost is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from he_backend.base import UnsupportedOpError


@dataclass(frozen=True, kw_only=True)
class MatVec:
    """A linear map on positions.

    rotations  [R] positions; weights [R, P], or [T, R, P] where each token has its own; folds: positions of each fold, in order
    plan       [(giant, [(baby, row), ...]), ...] with rotations[row] = giant + baby, in positions
    """

    rotations: np.ndarray
    weights: np.ndarray
    folds: tuple[int, ...]
    plan: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]

    @property
    def babies(self) -> int:
        return len({b for _, terms in self.plan for b, _ in terms})


# Seconds of a plan from (diagonals, babies, giants, folds); the compiler's cost model provides it.
PlanCost = Callable[[int, int, int, int], float]


def cover(source: np.ndarray, folds: int, period: int, features: int) -> tuple[np.ndarray, np.ndarray] | None:
    """`_cover`, computed once for the tiles of a wide tensor, whose maps are the same."""
    return _cover(source.astype(np.int64).tobytes(), folds, period, features)


@lru_cache(maxsize=64)
def _cover(held: bytes, folds: int, period: int, features: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Rotations that, with `folds` copies `period` apart, meet every feature once at every position.

    Returns:
        rotations [R], and owner [R, P] bool: whether rotation r at position p is the one that serves its feature for the
        fold class of p; None when no set of rotations covers all.
    """
    source = np.frombuffer(held, dtype=np.int64)
    positions = source.size
    arange = np.arange(positions)
    offsets = period * np.arange(folds)
    met = np.zeros((positions, features), dtype=bool)  # at output position p, through all folds
    chosen: list[int] = []
    for strict in (True, False):
        for r in range(positions):
            if met.all():
                break
            hit = source[(arange[:, None] + r + offsets) % positions]  # [P, folds]
            valid = hit >= 0
            new = valid & ~met[arange[:, None], np.maximum(hit, 0)]
            if (strict and not (new == valid).all()) or not new.any() or r in chosen:
                continue
            met[np.broadcast_to(arange[:, None], hit.shape)[valid], hit[valid]] = True
            chosen.append(r)
    if not met.all():
        return None
    chosen.sort()
    # Who serves feature g for the fold class of p: the first (rotation, fold) that meets it.
    owner = np.zeros((len(chosen), positions), dtype=bool)
    classes = min(period, positions) if folds > 1 else positions
    served = np.zeros((classes, features), dtype=bool)
    for i, r in enumerate(chosen):
        for m in range(folds if folds > 1 else 1):
            p = (np.arange(classes) + m * period) % positions
            feature = source[(p + r) % positions]
            free = (feature >= 0) & ~served[np.arange(classes), np.maximum(feature, 0)]
            owner[i, p] |= free
            served[np.arange(classes)[free], feature[free]] = True
        if folds > 1:  # beyond the folded copies the pattern repeats with the period of all folds together
            span = folds * period
            for start in range(span, positions, span):
                owner[i, start : start + span] = owner[i, :span]
    return np.array(chosen), owner


def split(
    rotations: np.ndarray, cost: Callable[[int, int], float]
) -> tuple[tuple[int, tuple[tuple[int, int], ...]], ...]:
    """Cheapest baby-step giant-step split of a set of rotations that is a sum set babies + giants."""
    best: tuple[float, int] = (float("inf"), len(rotations))
    row = {int(r): i for i, r in enumerate(rotations)}
    for babies in range(1, len(rotations) + 1):
        if len(rotations) % babies:
            continue
        giants = rotations[::babies] - rotations[0]
        sums = {int(g + b) for g in giants for b in rotations[:babies]}
        if sums == set(row) and (c := cost(babies, len(giants))) < best[0]:
            best = (c, babies)
    babies = best[1]
    giants = rotations[::babies] - rotations[0]
    return tuple((int(g), tuple((int(b), row[int(g + b)]) for b in rotations[:babies])) for g in giants)


def plan_matvec(source: np.ndarray, target: np.ndarray, matrix: np.ndarray, cost: PlanCost) -> MatVec:
    """Plan y = x @ matrix between two feature maps.

    Args:
        source: [P] feature map of x; target: [P] feature map of y; matrix: [in, out], or [T, in, out] by token.
        cost: predicted seconds of (diagonals, babies, giants, folds).

    Raises:
        UnsupportedOpError: no rotations cover the map.
    """
    features = matrix.shape[-2]
    period = _period(target)
    reach = max(period, _period(source))  # folds beyond the source's own period meet the same features again
    best: tuple[float, MatVec] | None = None
    folds = 1
    while folds * period <= reach:
        found = cover(source, folds, period, features)
        if found is not None:
            rotations, owner = found
            plan = split(rotations, partial(_split_cost, cost, len(rotations), folds.bit_length() - 1))
            babies = len({b for _, terms in plan for b, _ in terms})
            seconds = cost(len(rotations), babies, len(plan), folds.bit_length() - 1)
            if best is None or seconds < best[0]:
                weights = _weights(source, target, matrix, rotations, owner)
                steps = tuple(period << k for k in range(folds.bit_length() - 1))
                best = seconds, MatVec(rotations=rotations, weights=weights, folds=steps, plan=plan)
        folds *= 2
    if best is None:
        raise UnsupportedOpError(f"no set of rotations covers a {matrix.shape} map between these layouts")
    return best[1]


def _split_cost(cost: PlanCost, diagonals: int, folds: int, babies: int, giants: int) -> float:
    return cost(diagonals, babies, giants, folds)


def _weights(
    source: np.ndarray, target: np.ndarray, matrix: np.ndarray, rotations: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    positions = source.size
    feature = source[(np.arange(positions)[None, :] + rotations[:, None]) % positions]  # [R, P]
    use = owner & (feature >= 0) & (target >= 0)[None, :]
    return np.where(use, matrix[..., np.maximum(feature, 0), np.maximum(target, 0)[None, :]], 0.0)


def _period(feature: np.ndarray) -> int:
    """Smallest power of two after which a feature map repeats."""
    period = 1
    while period < feature.size and not np.array_equal(np.roll(feature, -period), feature):
        period *= 2
    return period
