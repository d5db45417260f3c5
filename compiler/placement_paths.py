"""Placement as a shortest path, for graphs that are too large for the integer program.

The list is read backwards. A state is what the values that are already read, but not yet made, must have: for each the highest
level asked for up to R, which a refresh could serve, and the highest above R, which it could not. A step has at most four
successors: its value refreshed or not, the step replaced or not. One state dominates another if it costs no more and asks
no more of any value. On a chain the states are the levels and this is the textbook shortest path; on a transformer's residual
stream few values are open at once and nothing need be thrown away: the result is then the best one (if seconds rise with levels and
no pairs are to be had). Where more than `width` states remain, the dearest go, each level asked for counted at a refresh's
seconds a level; the result is then a placement without a proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .placement_problem import Problem

WIDTH = 600  # states kept: 240 steps of a transformer in seconds
BLOCK = 128  # states compared with all others at once


@dataclass(frozen=True, kw_only=True)
class Path:
    """Refreshed and replaced steps; `exact` if no state was thrown away."""

    refreshed: frozenset[int]
    functional: frozenset[int]
    exact: bool


@dataclass
class _States:
    """Needs [states, steps that are open] as two arrays, cost [states], and how each came about."""

    low: np.ndarray
    high: np.ndarray
    cost: np.ndarray


def shortest(problem: Problem, *, width: int = WIDTH, paired: bool = False, price_byte: float = 0.0) -> Path | None:
    """The best choice of sites among those whose states fit the width; None if there is none.

    Args:
        paired: count the odd ciphertext of a value that has a possible partner at half a pair's seconds.
        price_byte: seconds charged for each byte and each step that it is held, to find placements with a lower peak.
    """
    half = {v for pair in problem.pairs for v in pair} if paired else set()
    top, n = problem.highest, len(problem.steps)
    column: dict[int, int] = {}  # open value -> column
    states = _States(np.zeros((1, 0), int), np.zeros((1, 0), int), np.zeros(1))
    history: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # step, parent, refreshed, replaced
    exact = problem.monotone and (not problem.pairs)
    for step in reversed(problem.steps):
        v = step.id
        for name in (v, *step.args):
            if name not in column:
                column[name] = len(column)
                states.low = np.pad(states.low, ((0, 0), (0, 1)))
                states.high = np.pad(states.high, ((0, 0), (0, 1)))
        held = price_byte * problem.limb_bytes * step.ciphertexts * (problem.last_reader(v) - v + 1)
        odd = (problem.times.pair or 0.0) / 2 if v in half else problem.odd(v)
        refresh = problem.even(v) + odd + held * (problem.refresh_level + 1)
        seconds = np.append(np.array(step.seconds[: top + 1]) + held * np.arange(1, top + 2), math.inf)
        parts, parents, choices = [], [], []
        for fresh in (False, True) if problem.refreshable(v) else (False,):
            for replaced in (False, True) if step.function else (False,):
                low, high = states.low[:, column[v]], states.high[:, column[v]]
                level = np.maximum(high, problem.refresh_from) if fresh else np.maximum(low, high)
                ok = (level <= problem.functional_level) if replaced else (level + step.depth <= top)
                if not step.args:
                    ok &= level <= problem.top
                if fresh:
                    ok &= low > 0  # a copy that nobody needs
                keep = np.flatnonzero(ok)
                cost = states.cost[keep] + (refresh if fresh else 0.0)
                if replaced:
                    cost = cost + problem.functional(v) + held * (problem.functional_level + 1)
                    need = np.full(keep.size, problem.functional_from)
                else:
                    cost = cost + seconds[level[keep]]
                    need = level[keep] + step.depth
                part = _States(states.low[keep].copy(), states.high[keep].copy(), cost)
                small = need <= problem.refresh_level
                for a in set(step.args):
                    c = column[a]
                    part.low[:, c] = np.maximum(part.low[:, c], np.where(small, need, 0))
                    part.high[:, c] = np.maximum(part.high[:, c], np.where(small, 0, need))
                parts.append(part)
                parents.append(keep)
                choices.append((np.full(keep.size, fresh), np.full(keep.size, replaced)))
        keep_columns = [c for name, c in column.items() if name != v]
        column = {name: i for i, name in enumerate(name for name in column if name != v)}
        states = _States(
            np.concatenate([p.low for p in parts])[:, keep_columns],
            np.concatenate([p.high for p in parts])[:, keep_columns],
            np.concatenate([p.cost for p in parts]),
        )
        if not states.cost.size:
            return None
        weights = _weights(problem, list(column))
        best, complete = _undominated(states, weights, width)
        exact &= complete
        history.append(
            (
                v,
                np.concatenate(parents)[best],
                np.concatenate([f for f, _ in choices])[best],
                np.concatenate([r for _, r in choices])[best],
            )
        )
        states = _States(states.low[best], states.high[best], states.cost[best])
    assert len(history) == n
    at = int(np.argmin(states.cost))
    refreshed, functional = set(), set()
    for v, parent, fresh_, replaced_ in reversed(history):
        if fresh_[at]:
            refreshed.add(v)
        if replaced_[at]:
            functional.add(v)
        at = int(parent[at])
    return Path(refreshed=frozenset(refreshed), functional=frozenset(functional), exact=exact and not price_byte)


def _weights(problem: Problem, names: list[int]) -> np.ndarray:
    """Seconds that one level of each open value is worth, about: its refresh divided by the levels that a refresh gains."""
    gained = max(1, problem.refresh_level - problem.refresh_from)
    return np.array([(problem.even(v) + problem.odd(v)) / gained for v in names])


def _undominated(states: _States, weights: np.ndarray, width: int) -> tuple[np.ndarray, bool]:
    """Indices of the states that no other dominates, at most `width` of them; and whether that was all of them."""
    needs = np.concatenate([states.low, states.high], axis=1)
    order = np.lexsort((needs.sum(axis=1), states.cost))
    needs, cost = needs[order], states.cost[order]
    # A state is dominated only by one that stands before it: cheaper, or as cheap and asking for less (or the same, earlier).
    kept = np.zeros(0, dtype=int)
    for start in range(0, order.size, BLOCK):
        rows = np.arange(start, min(start + BLOCK, order.size))
        if kept.size:
            rows = rows[~_below(needs[kept], needs[rows]).any(axis=0)]
        inside = _below(needs[rows], needs[rows])
        rows = rows[~np.triu(inside, 1).any(axis=0)]
        kept = np.concatenate([kept, rows])
    complete = kept.size <= width
    if not complete:
        most = np.maximum(states.low, states.high)[order][kept]
        score = cost[kept] + most @ weights
        kept = kept[np.argsort(score, kind="stable")[:width]]
    return order[kept], complete


def _below(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)]: whether each row of a is nowhere above each row of b."""
    below = np.ones((len(a), len(b)), dtype=bool)
    for column in range(a.shape[1]):
        below &= a[:, None, column] <= b[None, :, column]
    return below
