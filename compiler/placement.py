"""Levels and refreshes, placed together for the least predicted seconds, with a bound on what is missed.

`place` tries, in this order: no refresh at all, if even free levels could not save the price of one; the integer program
(`placement_milp`) if the list is small enough; the shortest path (`placement_paths`) if the program is too large or its time was
up. The integer program's dual bound, or else that of its linear relaxation, or else every step at its cheapest level, bounds
what any placement takes.

Related: Orion (arXiv 2311.03470) places bootstraps by a shortest path over levels, region by region of residual networks.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from he_backend.base import LevelError, ParamsError

from . import placement_milp, placement_paths
from .placement_check import check
from .placement_problem import Pair, Placement, Problem, assemble, least_levels, match

METHODS = ("auto", "leveled", "milp", "paths")
LARGEST_PROGRAM = 40_000  # unknowns; above, even the relaxation takes minutes
BYTE_PRICES = tuple(10.0**e for e in range(-4, 5))  # of the mean step's seconds, for all its bytes


def place(problem: Problem, *, method: str = "auto", seconds: float = 40.0) -> Placement:
    """Place levels and refreshes, and check the result independently.

    Args:
        method: auto, or one of leveled (no refresh), milp, paths.
        seconds: time for the search; finding out by how much a memory cap is missed may take as long again.

    Raises:
        LevelError: no placement exists, whatever is refreshed.
        ParamsError: none keeps within max_bytes; the message names the smallest cap that one keeps within.
    """
    if method not in METHODS:
        raise ParamsError(f"placement method {method!r} is unknown; known are {', '.join(METHODS)}")
    started = time.monotonic()
    floor = sum(
        min([*s.seconds[: problem.highest + 1], *([problem.functional(s.id)] if s.function else [])])
        for s in problem.steps
    )
    found: list[Placement] = []
    bound = floor
    leveled = _choose(problem, (), (), (), bound=floor, method="levels alone")
    if method in ("auto", "leveled") and leveled is not None and _fits(problem, leveled):
        cheapest = min((problem.even(v) + problem.odd(v) for v in _sites(problem)), default=float("inf"))
        functional = any(s.function for s in problem.steps)
        if problem.monotone and not functional and leveled.seconds <= floor + cheapest:
            leveled = replace(leveled, bound=leveled.seconds)
            check(problem, leveled)
            return leveled
        found.append(leveled)
    size = placement_milp.Program.size(problem)
    if method == "milp" or (method == "auto" and size <= LARGEST_PROGRAM):
        solution = placement_milp.solve(problem, seconds if method == "milp" else 0.6 * seconds)
        bound = max(bound, solution.bound)
        if solution.infeasible:
            raise _impossible(problem, seconds)
        if solution.levels is not None:
            proof = "integer program" if solution.proven else f"integer program, stopped after {seconds:.0f} s"
            sites = (solution.refreshed, solution.functional, solution.pairs)
            plan = _choose(problem, *sites, bound=bound, method=proof) if problem.monotone else None
            found.append(plan or assemble(problem, solution.levels, *sites, bound=bound, method=proof))
        if solution.proven:
            return _best(problem, found, bound)
    if method in ("auto", "paths"):
        left = max(1.0, seconds - (time.monotonic() - started))
        found += _paths(problem, bound, left)
    if method == "paths" and size <= LARGEST_PROGRAM and not any(p.bound == p.seconds for p in found):
        bound = max(bound, placement_milp.relaxation(problem, seconds))
    found = [p for p in found if _fits(problem, p)]
    if not found:
        raise _impossible(problem, seconds)
    return _best(problem, found, bound)


def _choose(
    problem: Problem,
    refreshed: Collection[int],
    functional: Collection[int],
    pairs: Sequence[Pair],
    *,
    bound: float,
    method: str,
) -> Placement | None:
    """The placement with the lowest levels for a choice of sites; sites that nobody needs are dropped."""
    while True:
        levels = least_levels(problem, refreshed, functional)
        if levels is None:
            return None
        plan = assemble(problem, levels, refreshed, functional, pairs, bound=bound, method=method)
        used = {a for _, a in plan.refreshed}
        if used == set(refreshed):
            return plan
        refreshed = used


def _paths(problem: Problem, bound: float, seconds: float) -> list[Placement]:
    """Placements by shortest path: without and with a price on what may be paired, and on bytes while there is a cap."""
    found: list[Placement] = []
    started = time.monotonic()
    held = sum(s.ciphertexts * (problem.last_reader(s.id) - s.id + 1) for s in problem.steps) * problem.limb_bytes
    mean = sum(s.seconds[0] for s in problem.steps) / max(held, 1)
    prices = [0.0] + ([p * mean for p in BYTE_PRICES] if problem.max_bytes is not None else [])
    for price in prices:
        for paired in (False, True) if problem.pairs else (False,):
            if found and time.monotonic() - started > seconds:
                return found
            path = placement_paths.shortest(problem, paired=paired, price_byte=price)
            if path is None:
                return found
            pairs = match(problem, path.refreshed)
            name = "shortest path" if path.exact else "shortest path, states dropped or pairs guessed"
            plan = _choose(problem, path.refreshed, path.functional, pairs, bound=bound, method=name)
            if plan is not None:
                found.append(replace(plan, bound=plan.seconds) if path.exact and price == 0.0 else plan)
        if any(_fits(problem, plan) for plan in found):
            return found
    return found


def _sites(problem: Problem) -> list[int]:
    return [s.id for s in problem.steps if problem.refreshable(s.id)]


def _fits(problem: Problem, plan: Placement) -> bool:
    return problem.max_bytes is None or plan.peak_bytes <= problem.max_bytes


def _best(problem: Problem, found: Sequence[Placement], bound: float) -> Placement:
    """The fastest of several, with the best bound known, checked."""
    plan = min(found, key=lambda p: p.seconds)
    exact = any(p.bound >= p.seconds for p in found)
    plan = replace(plan, bound=plan.seconds if exact else min(plan.seconds, bound))
    check(problem, plan)
    return plan


def _impossible(problem: Problem, seconds: float) -> LevelError | ParamsError:
    """Why nothing fits: memory, or levels."""
    free = replace(problem, max_bytes=None)
    if placement_paths.shortest(free) is None:
        deepest = max(problem.steps, key=lambda s: s.depth)
        return LevelError(
            f"no placement of {len(problem.steps)} steps: encryption gives {problem.top} levels, a refresh "
            f"{problem.refresh_level} from {problem.refresh_from} on, and step %{deepest.id} alone takes {deepest.depth}; "
            "allow more refreshes or take a longer chain"
        )
    smallest, proven = placement_milp.smallest_peak(free, seconds)
    return ParamsError(
        f"no placement keeps its values within {problem.max_bytes} bytes; the smallest cap that can be met is "
        f"{'' if proven else 'at most '}{smallest} bytes"
    )
