"""Placement as a mixed integer program, solved by HiGHS (Huangfu and Hall 2018, doi 10.1007/s12532-017-0130-5).

Unknowns, for value v:
    x[v, k]  the result's level is at least k, for k = 1 .. highest possible
    rho[v]   v is refreshed
    phi[v]   step v is replaced by a functional refresh
    p[u, w]  the odd ciphertexts of u and w share a refresh

    x[v, k+1] <= x[v, k]
    x[v, k]   <= x[u, k+d] + [k+d <= R_v] rho[u] + [k+d <= F] phi[u]     for each argument u of v, depth d; x[u, > top] = 0;
                                                                       R_v: level of a copy for v
    1 - phi[v] <= the same right side at k = 0
    rho[v]    <= x[v, refresh_from] + [refresh_from <= F] phi[v];      phi[v] <= the right side for u at functional_from
    p[u, w]   <= rho[u], rho[w]; at most one pair a value

For fixed rho and phi the rest are difference constraints on [0, 1]: the program has integral levels by itself, so that only the
sites are declared integer. (With a memory cap and seconds that fall with the level this fails, and levels are declared too.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from he_backend.base import HEError

from .placement_problem import Pair, Problem, reach

Terms = list[tuple[int, float]]  # variable, coefficient


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What HiGHS found: levels and sites, None where it found nothing; the bound holds in both cases."""

    levels: tuple[int, ...] | None
    refreshed: frozenset[int]
    functional: frozenset[int]
    pairs: tuple[Pair, ...]
    bound: float
    objective: float
    proven: bool
    infeasible: bool


class Program:
    """The unknowns and rows of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.rows: list[Terms] = []
        self.limits: list[float] = []  # each row is <= its limit
        self.constant = 0.0
        tops = _highest(problem)
        whole = problem.max_bytes is not None and not problem.monotone
        self.x: list[list[int]] = []
        self.rho: dict[int, int] = {}
        self.phi: dict[int, int] = {}
        for step, top in zip(problem.steps, tops, strict=True):
            s = step.seconds
            self.x.append([self._unknown(s[k] - s[k - 1], integer=whole) for k in range(1, top + 1)])
            self.constant += s[0]
            if problem.refreshable(step.id):
                self.rho[step.id] = self._unknown(problem.even(step.id) + problem.odd(step.id), integer=True)
            if step.function:
                self.phi[step.id] = self._unknown(problem.functional(step.id) - s[0], integer=True)
        self.p = {pair: self._unknown(-saved, integer=True) for pair, saved in problem.pairs.items()}
        for v in range(len(problem.steps)):
            self._step(v)
        self._pairs()

    @staticmethod
    def size(problem: Problem) -> int:
        """Unknowns that a problem would have, for deciding whether to try."""
        return sum(top + 2 for top in _highest(problem)) + len(problem.pairs)

    def _unknown(self, cost: float, *, integer: bool = False, upper: float = 1.0) -> int:
        self.cost.append(cost)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.cost) - 1

    def _row(self, terms: Terms, limit: float) -> None:
        self.rows.append(terms)
        self.limits.append(limit)

    def _own(self, v: int, level: int) -> Terms | None:
        """Terms whose sum says that the original of v has at least `level`; None if that is always so."""
        if level <= 0:
            return None
        terms = [(self.x[v][level - 1], 1.0)] if level <= len(self.x[v]) else []
        if v in self.phi and level <= self.problem.functional_level:
            terms.append((self.phi[v], 1.0))
        return terms

    def _has(self, v: int, level: int, reader: int) -> Terms | None:
        """The same of the original or of its copy, for a reader."""
        terms = self._own(v, level)
        if terms is not None and v in self.rho and level <= self.problem.copy_level(reader):
            terms.append((self.rho[v], 1.0))
        return terms

    def _implies(self, cause: Terms, effect: Terms | None, limit: float = 0.0) -> None:
        """The sum of `cause` is at most that of `effect` plus the limit."""
        if effect is not None:
            self._row([*cause, *((i, -c) for i, c in effect)], limit)

    def _step(self, v: int) -> None:
        step, x = self.problem.steps[v], self.x[v]
        for low, high in itertools.pairwise(x):
            self._row([(high, 1.0), (low, -1.0)], 0.0)
        for a in sorted(set(step.args)):
            for k, unknown in enumerate(x, start=1):
                self._implies([(unknown, 1.0)], self._has(a, k + step.depth, v))
            runs = [(self.phi[v], -1.0)] if v in self.phi else []
            self._implies(runs, self._has(a, step.depth, v), -1.0)
            if v in self.phi:
                self._implies([(self.phi[v], 1.0)], self._has(a, self.problem.functional_from, v))
        if v in self.phi and x:
            self._row([(x[0], 1.0), (self.phi[v], 1.0)], 1.0)
        if v in self.rho:
            self._implies([(self.rho[v], 1.0)], self._own(v, self.problem.refresh_from))

    def _pairs(self) -> None:
        partners: dict[int, Terms] = {}
        for pair, unknown in self.p.items():
            for v in pair:
                partners.setdefault(v, []).append((unknown, 1.0))
        for v, terms in partners.items():
            self._row([*terms, (self.rho[v], -1.0)], 0.0)

    def memory(self, cap: int | None) -> int | None:
        """Rows that keep the bytes alive at each step below a cap, or below an unknown, which is returned (in caps of `unit`)."""
        problem = self.problem
        unit = float(max(problem.limb_bytes, 1))
        peak = self._unknown(0.0, upper=math.inf) if cap is None else None
        by_step: list[Terms] = [[] for _ in problem.steps]
        base = np.zeros(len(problem.steps))
        for step in problem.steps:
            n = step.ciphertexts * problem.limb_bytes / unit
            terms: Terms = [(i, n) for i in self.x[step.id]]
            if step.id in self.rho:
                terms.append((self.rho[step.id], n * (problem.refresh_level + 1)))
            if step.id in self.phi:
                terms.append((self.phi[step.id], n * problem.functional_level))
            for now in range(step.id, problem.last_reader(step.id) + 1):
                by_step[now] += terms
                base[now] += n
        for now, terms in enumerate(by_step):
            more: Terms = [] if peak is None else [(peak, -1.0)]
            self._row([*terms, *more], (0.0 if cap is None else cap / unit) - base[now])
        return peak

    def solve(self, seconds: float, *, objective: Sequence[float] | None = None, relax: bool = False) -> Solution:
        """Run HiGHS for at most so many seconds; `relax` gives the bound of the linear relaxation and no levels."""
        cost = np.array(self.cost if objective is None else objective)
        constant = self.constant if objective is None else 0.0
        unit = (
            float(np.max(np.abs(cost), initial=0.0)) or 1.0
        )  # HiGHS stops at an absolute gap too: seconds may be microseconds
        lengths = [len(r) for r in self.rows]
        row = np.repeat(np.arange(len(self.rows)), lengths)
        column = np.array([i for r in self.rows for i, _ in r], dtype=np.int64)
        value = np.array([c for r in self.rows for _, c in r])
        matrix = sparse.csr_array((value, (row, column)), shape=(len(self.rows), len(cost)))
        found = optimize.milp(
            cost / unit,
            integrality=np.zeros(len(cost)) if relax else np.array(self.integer, dtype=int),
            bounds=optimize.Bounds(0.0, np.array(self.upper)),
            constraints=optimize.LinearConstraint(matrix, -np.inf, np.array(self.limits)) if self.rows else None,
            options={"time_limit": seconds, "mip_rel_gap": 1e-9},
        )
        dual = found.fun if relax and found.status == 0 else getattr(found, "mip_dual_bound", None)
        bound = constant + dual * unit if dual is not None and math.isfinite(dual) else -math.inf
        if found.x is None or relax:
            return Solution(
                levels=None,
                refreshed=frozenset(),
                functional=frozenset(),
                pairs=(),
                bound=bound,
                objective=math.inf,
                proven=found.status == 0,
                infeasible=found.status == 2,
            )
        on = found.x > 0.5
        functional = frozenset(v for v, i in self.phi.items() if on[i])
        return Solution(
            levels=tuple(
                self.problem.functional_level if v in functional else int(on[x].sum()) for v, x in enumerate(self.x)
            ),
            refreshed=frozenset(v for v, i in self.rho.items() if on[i]),
            functional=functional,
            pairs=tuple(pair for pair, i in self.p.items() if on[i]),
            bound=bound,
            objective=constant + float(found.fun) * unit,
            proven=found.status == 0,
            infeasible=False,
        )


def solve(problem: Problem, seconds: float) -> Solution:
    """Best placement that HiGHS finds within a time, under the cap if there is one."""
    program = Program(problem)
    if problem.max_bytes is not None:
        program.memory(problem.max_bytes)
    return program.solve(seconds)


def relaxation(problem: Problem, seconds: float) -> float:
    """Lower bound of any placement's seconds; minus infinity if the time does not suffice."""
    program = Program(problem)
    if problem.max_bytes is not None:
        program.memory(problem.max_bytes)
    return program.solve(seconds, relax=True).bound


def smallest_peak(problem: Problem, seconds: float) -> tuple[int, bool]:
    """The smallest peak of bytes that any placement has, and whether that is proven.

    Raises:
        HEError: no placement at all was found in the time.
    """
    program = Program(problem)
    peak = program.memory(None)
    assert peak is not None
    found = program.solve(seconds, objective=[float(i == peak) for i in range(len(program.cost))])
    if found.levels is None:
        raise HEError(f"no placement was found in {seconds:.0f} s; give the placement more time")
    return round(found.objective * max(problem.limb_bytes, 1)), found.proven


def _highest(problem: Problem) -> list[int]:
    """Highest level that is of use to each value and can be reached."""
    highest = [max(0, level) for level in reach(problem).run]
    if not problem.monotone:
        return highest
    needs = [0] * len(problem.steps)
    for step in reversed(problem.steps):
        if problem.refreshable(step.id):
            needs[step.id] = max(needs[step.id], problem.refresh_from)
        highest[step.id] = min(highest[step.id], needs[step.id])
        for a in step.args:
            start = problem.functional_from if step.function else 0
            needs[a] = max(needs[a], highest[step.id] + step.depth, start)
    return highest
