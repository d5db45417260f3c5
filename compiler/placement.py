"""Levels and refreshes, placed together for the least predicted seconds, with a bound on what is missed.

`place` tries, in this order: no refresh at all, if even free levels could not save the price of one; the shortest path
(`placement_paths`), which is over in seconds and knows whether it is exact; if it is not, the integer program
(`placement_milp`) for as long as there is time, if the list is small enough, and the better of the two. The program's dual
bound, or that of its linear relaxation, or else every step at its cheapest level, bounds what any placement takes.

Related: Orion (arXiv 2311.03470) places bootstraps by a shortest path over levels, region by region of residual networks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from he_backend.base import LevelError, ParamsError

from . import placement_milp, placement_paths
from .placement_check import check
from .placement_problem import Pair, Placement, Problem, assemble, least_levels, reach

METHODS = ("auto", "leveled", "milp", "paths")
LARGEST_PROGRAM = 200_000  # unknowns; above, even the relaxation takes minutes
RELAX_FIRST = 20_000  # unknowns above which the program may end without a bound: its relaxation comes first
NARROW = 60  # states kept in the first search
WIDER = 12  # time of the second one over that of the first, about
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
    _possible(problem)
    floor = sum(
        min([*s.seconds[: problem.highest + 1], *([problem.functional(s.id)] if s.function else [])])
        for s in problem.steps
    )
    found: list[Placement] = []
    bound = floor
    leveled = _choose(problem, (), (), (), bound=floor, method="levels alone")
    if method in ("auto", "leveled") and leveled is not None and _fits(problem, leveled):
        cheapest = min([problem.single(s.id)[0] for s in problem.steps], default=0.0)
        cheapest = min(cheapest, cheapest if problem.times.pair is None else problem.times.pair)
        functional = any(s.function for s in problem.steps)
        if problem.monotone and not functional and leveled.seconds <= floor + cheapest:
            leveled = replace(leveled, bound=leveled.seconds)
            check(problem, leveled)
            return leveled
        found.append(leveled)
    if method == "leveled":
        return _leveled(problem, leveled, bound)
    if method in ("auto", "paths"):
        found += _paths(problem, bound, seconds)
        if any(p.bound == p.seconds and _fits(problem, p) for p in found):
            return _best(problem, [p for p in found if _fits(problem, p)], bound)
    bound = max([bound, *(p.bound for p in found)])  # what is best without a cap bounds what keeps it
    size, hopeless = placement_milp.Program.size(problem), False

    def left() -> float:
        return max(1.0, seconds - (time.monotonic() - started))

    if size <= LARGEST_PROGRAM and (method == "paths" or size > RELAX_FIRST):
        relaxed = placement_milp.relaxation(problem, left())
        bound = max(bound, relaxed)
        hopeless = math.isinf(relaxed)  # what has no time for the relaxation has none for the program
    if method == "milp" or (method == "auto" and size <= LARGEST_PROGRAM and not hopeless):
        solution = placement_milp.solve(problem, left())
        bound = max(bound, solution.bound)
        if solution.infeasible and not any(_fits(problem, p) for p in found):
            raise _over_cap(problem, found, seconds)
        if solution.levels is not None:
            proof = "integer program" if solution.proven else f"integer program, stopped after {seconds:.0f} s"
            sites = (solution.refreshed, solution.functional, solution.pairs)
            plan = _choose(problem, *sites, bound=bound, method=proof) if problem.monotone else None
            found.append(plan or assemble(problem, solution.levels, *sites, bound=bound, method=proof))
    fitting = [p for p in found if _fits(problem, p)]
    if not fitting:
        raise _over_cap(problem, found, seconds)
    plan = _best(problem, fitting, bound)
    beaten = not plan.method.startswith("integer") and floor < bound
    return replace(plan, method=f"{plan.method}; bound by integer program") if beaten else plan


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
    """Placements by shortest path: few states, more states if there is time, and prices on bytes while a cap is broken."""
    found: list[Placement] = []
    started = time.monotonic()
    held = sum(s.ciphertexts * (problem.last_reader(s.id) - s.id + 1) for s in problem.steps) * problem.limb_bytes
    mean = sum(s.seconds[0] for s in problem.steps) / max(held, 1)
    prices = [0.0] + ([p * mean for p in BYTE_PRICES] if problem.max_bytes is not None else [])
    for price, width in [(0.0, NARROW), *((price, placement_paths.WIDTH) for price in prices)]:
        took = time.monotonic() - started
        if found and WIDER * took > seconds:
            break
        path = placement_paths.shortest(problem, width=width, price_byte=price)
        if path is None:
            break
        name = "shortest path" if path.exact else "shortest path, not all states kept"
        plan = _choose(problem, path.refreshed, path.functional, path.pairs, bound=bound, method=name)
        if plan is not None:
            found.append(replace(plan, bound=plan.seconds) if path.exact else plan)
        if any(_fits(problem, p) and (p.bound == p.seconds or width > NARROW) for p in found):
            break
    return found


def _fits(problem: Problem, plan: Placement) -> bool:
    return problem.max_bytes is None or plan.peak_bytes <= problem.max_bytes


def _best(problem: Problem, found: Sequence[Placement], bound: float) -> Placement:
    """The fastest of several, with the best bound known, checked."""
    plan = min(found, key=lambda p: (p.seconds, -p.bound))  # of equals, the one with a proof
    exact = any(p.bound >= p.seconds for p in found)
    plan = replace(plan, bound=max(plan.bound, plan.seconds if exact else min(plan.seconds, bound)))
    check(problem, plan)
    return plan


def _possible(problem: Problem) -> None:
    """Whether some placement exists when memory is no object; the first step that has too few levels is named."""
    best = reach(problem)
    for step in problem.steps:
        if best.given[step.id] < 0:
            have = best.run[step.id] + step.depth
            raise LevelError(
                f"no placement of {len(problem.steps)} steps: %{step.id} takes {step.depth} levels and its arguments have at most "
                f"{have}; encryption gives {problem.top}, a refresh {problem.refresh_level} from {problem.refresh_from} on. "
                "Allow more refreshes, split the step, or take a longer chain"
            )


def _leveled(problem: Problem, plan: Placement | None, bound: float) -> Placement:
    """The placement without refreshes, or why there is none."""
    if plan is None:
        wide = replace(
            problem,
            top=sum(s.depth for s in problem.steps),
            steps=tuple(replace(s, seconds=(0.0,) * (1 + sum(s.depth for s in problem.steps))) for s in problem.steps),
        )
        levels = least_levels(wide, (), ())
        assert levels is not None
        raise LevelError(
            f"without a refresh the steps need {max(levels)} levels, encryption gives {problem.top}; "
            "allow refreshes or take a longer chain"
        )
    if not _fits(problem, plan):
        raise ParamsError(
            f"without a refresh the values take {plan.peak_bytes} bytes at their peak, {problem.max_bytes} are allowed"
        )
    return _best(problem, [plan], bound)


def _over_cap(problem: Problem, found: Sequence[Placement], seconds: float) -> ParamsError:
    """By how much memory is missed: the smallest peak that any placement has, or the smallest that was found."""
    free = replace(problem, max_bytes=None)
    smallest, proven = min((p.peak_bytes for p in found), default=None), False
    if placement_milp.Program.size(free) <= LARGEST_PROGRAM:
        peak, proven = placement_milp.smallest_peak(free, seconds)
        smallest = peak if smallest is None else min(smallest, peak)
    return ParamsError(
        f"no placement keeps its values within {problem.max_bytes} bytes; the smallest cap that can be met is "
        f"{'' if proven else 'at most '}{smallest} bytes"
    )
