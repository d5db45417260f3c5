"""Search the rings, smallest first: lower for each, assign levels, cost all parameters; the fastest that holds its promises.

A larger ring makes every limb dearer, but allows fewer digits and needs fewer ciphertexts. The search ends at the first ring that is
slower than the one before, or where the next one cannot be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import BACKENDS, UnsupportedOpError
from he_backend.circuit import Circuit

from .calibrate import Range
from .cost import CostTable
from .deepen import deepen
from .failure import largest_output, over_budget
from .ir import Graph
from .lower import Lowered, lower
from .matvec import PlanCost
from .passes.levels import assign_levels, top_level
from .plan import (
    Candidate,
    Plan,
    Target,
    as_circuit,
    choose,
    few,
    larger_ring_may_win,
    output_room,
    predicted_error,
    refuse,
    with_style,
)
from .rings import possible_rings

ERROR_SAMPLES = 3  # calibration samples that noise is simulated on

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Found:
    """The chosen circuit, still without keys and bounds; its lowering; its promised error; and the plan it was chosen from."""

    circuit: Circuit
    lowered: Lowered
    error: float
    plan: Plan

    @property
    def seconds(self) -> float:
        return self.plan.chosen.evaluate_s


def search(
    graph: Graph,
    ranges: dict[str, Range],
    samples: Sequence[np.ndarray],
    target: Target,
    table: CostTable,
    report: Progress,
) -> Found:
    """Find parameters.

    Args:
        samples: input tensors [T, D].

    Raises:
        UnsupportedOpError: no ring has a layout for the graph.
        ParamsError: no parameters hold the circuit at 128 bits, within memory and error.
    """
    rings = possible_rings(graph, target)
    rows: list[Candidate] = []
    levels = 0
    misfit: UnsupportedOpError | None = None
    best: Found | None = None
    cap: float | None = None
    for log_n in rings:
        report(f"lower at N = 2^{log_n}", 0, 1)
        try:
            lowered = lower(graph, ranges, 1 << (log_n - 1), plan_cost(table, log_n, target.backend))
        except UnsupportedOpError as error:
            misfit = error
            continue
        lowered = replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, 1 << (log_n - 1)))
        levels = top_level(lowered.ops)
        before = len(rows)
        found = _one_ring(lowered, log_n, samples, target, table, report, rows)
        if found is None and best is None:

            def keeps(larger: Target, lowered: Lowered = lowered, log_n: int = log_n) -> bool:
                return _one_ring(lowered, log_n, samples, larger, table, report, []) is not None

            cap = smallest_cap(rows[before:], target, keeps, cap)
        if best is not None and (found is None or found.seconds >= best.seconds):
            break
        best = found
        if best is not None and (log_n == max(rings) or not larger_ring_may_win(best.plan.chosen, target, table)):
            break
    if best is None:
        raise misfit if misfit is not None and not rows else refuse(rows, levels, target, cap)
    others = sorted((c for c in rows if c is not best.plan.chosen), key=lambda c: (c.forecast is None, c.evaluate_s))
    return replace(best, plan=replace(best.plan, others=tuple(others)))


def _one_ring(
    lowered: Lowered,
    log_n: int,
    samples: Sequence[np.ndarray],
    target: Target,
    table: CostTable,
    report: Progress,
    rows: list[Candidate],
) -> Found | None:
    """The fastest of one ring within memory and error; every candidate is added to `rows`."""
    levels = max(1, top_level(lowered.ops))  # a circuit of sums alone needs none, parameters hold at least one
    tried = choose(lowered, levels, log_n, target, table)
    for i, candidate in enumerate(tried):
        if candidate.trace is None:
            continue
        report("noise", 0, 1)
        grouped = with_style(lowered, candidate.params, table, candidate.style)
        circuit = as_circuit(grouped, candidate.params)
        if (room := output_room(circuit, few(samples, ERROR_SAMPLES))) >= 1.0:
            tried[i] = replace(candidate, why=f"outputs fill {room:.2g} of the first modulus", trace=None)
            continue
        promised = predicted_error(circuit, candidate.trace, few(samples, ERROR_SAMPLES))
        replies = sum(op.kind == "output" for op in circuit.ops)
        if why := over_budget(circuit, promised, [room * largest_output(candidate.params)] * replies):
            tried[i] = replace(candidate, why=why, trace=None)
            continue
        if promised <= target.max_error:
            rows += tried
            plan = Plan(chosen=candidate, others=(), costs=table.name)
            return Found(circuit=circuit, lowered=grouped, error=promised, plan=plan)
        tried[i] = replace(candidate, why=f"predicted error {promised:.2g} above {target.max_error:.2g}", trace=None)
    rows += tried
    deeper = deepen(lowered, log_n, samples, target, table, report)
    rows += deeper.rows
    if deeper.circuit is None:
        return None
    assert deeper.candidate is not None and deeper.lowered is not None
    plan = Plan(chosen=deeper.candidate, others=(), costs=table.name)
    return Found(circuit=deeper.circuit, lowered=deeper.lowered, error=deeper.error, plan=plan)


def smallest_cap(
    rows: Sequence[Candidate], target: Target, keeps: Callable[[Target], bool], known: float | None = None
) -> float | None:
    """Smallest memory cap, in tenths of a GB, with which a ring keeps all promises; `known` if none below that does.

    A candidate that lacks memory was not asked for its error and its latency: the ring is searched again under each cap.

    Args:
        rows: the ring's candidates under the target; keeps: whether the ring has a circuit for another target.
    """
    lacking = {math.ceil(10 * c.memory_gb) / 10 for c in rows if c.memory_gb > target.max_memory_gb}
    for cap in sorted(c for c in lacking if known is None or c < known):
        if keeps(replace(target, max_memory_gb=cap)):
            return cap
    return known


def plan_cost(table: CostTable, log_n: int, backend: str = "openfhe") -> PlanCost:
    """Seconds of a linear map by its counts, at the middle of the table's chain: only the ratios matter for a plan.

    A backend without double hoisting rotates once for every baby step as for every giant step, whoever measured the table.
    """
    params = replace(table.params, log_n=log_n)
    level = params.levels // 2
    names = ("hoist", "rotate_extended", "mod_down", "rotate", "weighted_sum", "weighted_sum_extended")
    cost = {op: table.seconds(op, params, level) for op in names}

    def hoisted(diagonals: int, babies: int, giants: int, folds: int) -> float:
        giant = cost["mod_down"] + cost["hoist"] + cost["rotate_extended"]
        term = cost["weighted_sum_extended"]
        return diagonals * term + babies * cost["rotate_extended"] + (giants - 1) * giant + folds * cost["rotate"]

    def plain(diagonals: int, babies: int, giants: int, folds: int) -> float:
        return diagonals * cost["weighted_sum"] + (max(babies - 1, 0) + giants - 1 + folds) * cost["rotate"]

    return hoisted if "double_hoisting" in BACKENDS[backend] else plain
