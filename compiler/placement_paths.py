"""Placement as a shortest path: the best choice of sites if few values are open at once, a good one for any graph.

The list is read backwards. A state is what the values that are already read, but not yet made, must have: for each the
highest level asked for up to R, which a refresh could serve, and the highest above R, which it could not; and which refreshed
values are still without a partner. A step's successors are: its value refreshed or not, and with whom; the step replaced or
not. One state dominates another if it costs no more, asks no more of any value and has no partner less to offer. On a chain
the states are the levels and this is the textbook shortest path; on a transformer's residual stream few values are open at
once, nothing need be thrown away, and the result is the best one (if seconds rise with levels). Where more than `width`
states remain, the dearest go, what is asked counted at a refresh's seconds a level; the result is then without a proof.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .placement_problem import Pair, Problem, Step, reach

WIDTH = 600  # states kept
SIDEWAYS = 0.2  # share of what the other open values ask for that counts when states are dropped
BLOCK = 128  # states compared with all others at once


@dataclass(frozen=True, kw_only=True)
class Path:
    """Refreshed and replaced steps and the pairs of refreshes; `exact` if no state was thrown away."""

    refreshed: frozenset[int]
    functional: frozenset[int]
    pairs: tuple[Pair, ...]
    exact: bool


@dataclass
class _States:
    """Cost [states], what is asked of each column's value up to and above R [states, columns], and how each state came about.

    A column is an open value v, or len(steps) + w: 0 there says that w's refresh is without a partner, 1 that it has none to offer.
    """

    cost: np.ndarray
    low: np.ndarray
    high: np.ndarray
    parent: np.ndarray
    refreshed: np.ndarray
    replaced: np.ndarray
    partner: np.ndarray  # -1 for none

    def take(self, rows: np.ndarray) -> _States:
        return _States(*(getattr(self, f.name)[rows] for f in fields(self)))


def shortest(problem: Problem, *, width: int = WIDTH, price_byte: float = 0.0) -> Path | None:
    """The best choice of sites among those whose states fit the width; None if there is none.

    Args:
        price_byte: seconds charged for each byte and each step that it is held, to find placements with a lower peak.
    """
    search = _Search(problem, price_byte)
    states = _States(np.zeros(1), *(np.zeros((1, 0), int),) * 2, *(np.zeros(1, int),) * 4)
    history: list[_States] = []  # of each step, the last one first
    exact = problem.monotone and not price_byte
    for step in reversed(problem.steps):
        states = search.step(step, states)
        if not states.cost.size:
            return None
        chosen, complete = _undominated(states, search.weights(), width)
        exact &= complete
        states = states.take(chosen)
        history.append(states)
    at = int(np.argmin(states.cost))
    refreshed, functional, pairs = set(), set(), []
    for v, made in enumerate(reversed(history)):
        if made.refreshed[at]:
            refreshed.add(v)
        if made.replaced[at]:
            functional.add(v)
        if made.partner[at] >= 0:
            pairs.append((v, int(made.partner[at])))
        at = int(made.parent[at])
    return Path(refreshed=frozenset(refreshed), functional=frozenset(functional), pairs=tuple(pairs), exact=exact)


class _Search:
    """The columns in use, and the successors of states."""

    def __init__(self, problem: Problem, price_byte: float) -> None:
        self.problem, self.price_byte = problem, price_byte
        self.best = reach(problem)  # a state that asks no value for more can be completed: the search has no dead ends
        self.names: list[int] = []
        self.earliest: dict[int, int] = {}  # value -> the first one that could be its partner
        self.partners: dict[int, list[int]] = {}  # value -> later ones that could be
        for u, w in problem.pairs:
            self.earliest[w] = min(self.earliest.get(w, u), u)
            self.partners.setdefault(u, []).append(w)

    def step(self, step: Step, states: _States) -> _States:
        """All successors by one step."""
        problem, v, n = self.problem, step.id, len(self.problem.steps)
        offered = [n + v] if v in self.earliest else []
        for name in (v, *step.args, *offered):
            if name not in self.names:
                self.names.append(name)
                states.low = np.pad(states.low, ((0, 0), (0, 1)), constant_values=int(name >= n))
                states.high = np.pad(states.high, ((0, 0), (0, 1)))
        choices = [(False, -1)]
        if problem.refreshable(v):
            choices += [(True, -1), *((True, w) for w in self.partners.get(v, []) if n + w in self.names)]
        parts = [
            self._choice(step, states, fresh, partner, replaced)
            for fresh, partner in choices
            for replaced in ((False, True) if step.function else (False,))
        ]
        keep = [i for i, name in enumerate(self.names) if name != v and (name < n or self.earliest[name - n] < v)]
        self.names = [self.names[i] for i in keep]
        joined = _States(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(_States)))
        joined.low, joined.high = joined.low[:, keep], joined.high[:, keep]
        return joined

    def _choice(self, step: Step, states: _States, fresh: bool, partner: int, replaced: bool) -> _States:
        """The successors by one choice, where it is possible."""
        problem, v, n = self.problem, step.id, len(self.problem.steps)
        c = self.names.index(v)
        low, high = states.low[:, c], states.high[:, c]
        level = np.maximum(high, problem.refresh_from) if fresh else np.maximum(low, high)
        ok = level <= (problem.functional_level if replaced else self.best.run[v])
        if replaced:
            ok &= all(self.best.read[a] >= problem.functional_from for a in step.args)
        if fresh:
            ok &= low > level  # otherwise nobody reads the copy
        if partner >= 0:
            ok &= states.low[:, self.names.index(n + partner)] == 0
        rows = np.flatnonzero(ok)
        level = level[rows]
        held = self.price_byte * problem.limb_bytes * step.ciphertexts * (problem.last_reader(v) - v + 1)
        cost = states.cost[rows]
        if fresh:
            cost = cost + problem.even(v) + problem.odd(v) + held * (problem.refresh_level + 1)
        if partner >= 0:
            cost = cost - problem.pairs[v, partner]
        if replaced:
            cost = cost + problem.functional(v) + held * (problem.functional_level + 1)
            need = np.full(rows.size, problem.functional_from)
        else:
            cost = cost + np.array(step.seconds)[level] + held * (level + 1)
            need = level + step.depth
        low, high = states.low[rows], states.high[rows]
        served = need <= problem.copy_level(v)
        for a in set(step.args):
            c = self.names.index(a)
            low[:, c] = np.maximum(low[:, c], np.where(served, need, 0))
            high[:, c] = np.maximum(high[:, c], np.where(served, 0, need))
        if partner >= 0:
            low[:, self.names.index(n + partner)] = 1
        elif fresh and n + v in self.names:
            low[:, self.names.index(n + v)] = 0
        return _States(
            cost=cost,
            low=low,
            high=high,
            parent=rows,
            refreshed=np.full(rows.size, fresh),
            replaced=np.full(rows.size, replaced),
            partner=np.full(rows.size, partner),
        )

    def weights(self) -> np.ndarray:
        """What one level of each column is worth in seconds, about: a refresh divided by the levels that it gains."""
        problem, n = self.problem, len(self.problem.steps)
        gained = max(1, problem.refresh_level - problem.refresh_from)
        return np.array(
            [(problem.even(v) + problem.odd(v)) / gained if v < n else 0.25 * problem.odd(v - n) for v in self.names]
        )


def _undominated(states: _States, weights: np.ndarray, width: int) -> tuple[np.ndarray, bool]:
    """Indices of the states that no other dominates, at most `width` of them; and whether that was all of them."""
    needs = np.concatenate([states.low, states.high], axis=1)
    order = np.lexsort((needs.sum(axis=1), states.cost))
    needs, cost = needs[order], states.cost[order]
    # A state is dominated only by one that stands before it: cheaper, or as cheap and asking for less (or the same, earlier).
    kept: np.ndarray = np.zeros(0, dtype=int)
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
        worth = most * weights
        # Open values mostly hang on the same stream, whose one refresh serves them all: the most that is asked counts, not the sum.
        score = cost[kept] + worth.max(axis=1, initial=0.0) + SIDEWAYS * worth.sum(axis=1)
        kept = kept[np.argsort(score, kind="stable")[:width]]
    return order[kept], complete


def _below(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)]: whether each row of a is nowhere above each row of b."""
    below = np.ones((len(a), len(b)), dtype=bool)
    for column in range(a.shape[1]):
        below &= a[:, None, column] <= b[None, :, column]
    return below
