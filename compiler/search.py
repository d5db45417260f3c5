"""Search the rings, smallest first: lower for each, assign levels, cost all parameters, keep the first that holds its promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import UnsupportedOpError
from he_backend.circuit import Circuit

from .calibrate import Range
from .cost import CostTable
from .deepen import deepen
from .ir import Graph
from .lower import Lowered, lower
from .matvec import PlanCost
from .passes.levels import assign_levels
from .plan import LARGEST_RING, Candidate, Plan, Target, as_circuit, choose, predicted_error, refuse

SMALLEST_RING = 13  # below it 128 bits leave no two levels
ERROR_SAMPLES = 3  # calibration samples that noise is simulated on

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Found:
    """The chosen circuit, still without keys and bounds; its lowering; its promised error; and the plan it was chosen from."""

    circuit: Circuit
    lowered: Lowered
    error: float
    plan: Plan


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
    insecure = target.insecure_log_n
    rings = [insecure] if insecure is not None else range(SMALLEST_RING, LARGEST_RING[target.backend] + 1)
    rows: list[Candidate] = []
    levels = 0
    misfit: UnsupportedOpError | None = None
    for log_n in rings:
        report(f"lower at N = 2^{log_n}", 0, 1)
        try:
            lowered = lower(graph, ranges, 1 << (log_n - 1), plan_cost(table, log_n))
        except UnsupportedOpError as error:
            misfit = error
            continue
        lowered = replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, 1 << (log_n - 1)))
        levels = max(1, lowered.ops[0].level)  # a circuit of sums alone needs none, parameters hold at least one
        tried = choose(lowered, levels, log_n, target, table)
        for i, candidate in enumerate(tried):
            if candidate.trace is None:
                continue
            report("noise", 0, 1)
            circuit = as_circuit(lowered, candidate.params)
            promised = predicted_error(circuit, candidate.trace, samples[:ERROR_SAMPLES])
            if promised <= target.max_error:
                others = [c for c in rows + tried if c is not candidate]
                others.sort(key=lambda c: (c.forecast is None, c.evaluate_s))
                plan = Plan(chosen=candidate, others=tuple(others), costs=table.name)
                return Found(circuit=circuit, lowered=lowered, error=promised, plan=plan)
            tried[i] = replace(candidate, why=f"predicted error {promised:.2g} above {target.max_error:.2g}")
        rows += tried
        rows += (found := deepen(lowered, log_n, samples, target, table, report)).rows
        if found.circuit is not None:
            others = sorted(rows, key=lambda c: (c.forecast is None, c.evaluate_s))
            others = [c for c in others if c is not found.candidate]
            assert found.candidate is not None and found.lowered is not None
            plan = Plan(chosen=found.candidate, others=tuple(others), costs=table.name)
            return Found(circuit=found.circuit, lowered=found.lowered, error=found.error, plan=plan)
    raise misfit if misfit is not None and not rows else refuse(rows, levels, target)


def plan_cost(table: CostTable, log_n: int) -> PlanCost:
    """Seconds of a linear map by its counts, at the middle of the table's chain: only the ratios matter for a plan."""
    params = replace(table.params, log_n=log_n)
    level = params.levels // 2
    cost = {op: table.seconds(op, params, level) for op in ("hoist", "rotate_extended", "mod_down", "rotate")}
    term = table.seconds("weighted_sum_extended", params, level)

    def seconds(diagonals: int, babies: int, giants: int, folds: int) -> float:
        giant = cost["mod_down"] + cost["hoist"] + cost["rotate_extended"]
        return diagonals * term + babies * cost["rotate_extended"] + (giants - 1) * giant + folds * cost["rotate"]

    return seconds
