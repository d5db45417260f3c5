"""Search the rings, smallest first: lower for each, assign levels, cost all parameters; the fastest that holds its promises.

A larger ring makes every limb dearer, but allows fewer digits and needs fewer ciphertexts. The search ends at the first ring that is
slower than the one before, or where the next one cannot be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from he_backend.base import BACKENDS, UnsupportedOpError

from .calibrate import Range
from .cost import CostTable
from .deepen import deepen
from .failure import largest_output
from .lower import Lowered, lower
from .matvec import PlanCost
from .passes.levels import assign_levels, top_level
from .placed import OUTPUT
from .plan import (
    Candidate,
    Plan,
    Target,
    as_circuit,
    choose,
    larger_ring_may_win,
    output_peak,
    refuse,
    with_style,
)
from .promise import NOISY, Found, promise
from .rings import possible_rings
from .samples import Progress, Samples
from .step_lower import lower_step


def search(
    samples: Samples, ranges: Mapping[str, Range], target: Target, table: CostTable, report: Progress
) -> tuple[Found, Plan]:
    """Find parameters for the graph of some samples; the plan says what they were chosen from.

    Raises:
        UnsupportedOpError: no ring has a layout for the graph.
        ParamsError: no parameters hold the circuit at 128 bits, within memory and error.
    """
    graph = samples.graph
    rings = possible_rings(graph, target)
    lowering = lower_step if graph.steps else lower
    rows: list[Candidate] = []
    levels = 0
    misfit: UnsupportedOpError | None = None
    best: Found | None = None
    cap: float | None = None
    for log_n in rings:
        report(f"lower at N = 2^{log_n}", 0, 1)
        slots, cost = 1 << (log_n - 1), plan_cost(table, log_n, target.backend)
        try:
            lowered = _leveled(lowering(graph, ranges, slots, cost), slots)
        except UnsupportedOpError as error:
            misfit = error
            continue
        levels = top_level(lowered.ops)
        before = len(rows)
        ring = _Ring(
            log_n=log_n, lowered=lowered, cost=cost, samples=samples, ranges=ranges, table=table, report=report
        )
        found = ring.search(target, rows)
        if found is None and best is None:
            cap = smallest_cap(rows[before:], target, ring.keeps, cap)
        if best is not None and (found is None or found.seconds >= best.seconds):
            break
        best = found
        if best is not None and (log_n == max(rings) or not larger_ring_may_win(best.candidate, target, table)):
            break
    if best is None:
        raise misfit if misfit is not None and not rows else refuse(rows, levels, target, cap)
    others = sorted((c for c in rows if c is not best.candidate), key=lambda c: (c.forecast is None, c.evaluate_s))
    return best, Plan(chosen=best.candidate, others=tuple(others), costs=table.name)


def _leveled(lowered: Lowered, slots: int) -> Lowered:
    return replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, slots))


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """A graph lowered for one ring, with leveled levels; cost: of its linear maps."""

    log_n: int
    lowered: Lowered
    cost: PlanCost
    samples: Samples
    ranges: Mapping[str, Range]
    table: CostTable
    report: Progress

    def search(self, target: Target, rows: list[Candidate]) -> Found | None:
        """The fastest circuit within memory and error; every candidate is added to `rows`."""
        levels = max(1, top_level(self.lowered.ops))  # a circuit of sums alone needs none, parameters hold at least one
        tried = choose(self.lowered, levels, self.log_n, target, self.table)
        for i, candidate in enumerate(tried):
            if candidate.trace is None:
                continue
            self.report("noise", 0, 1)
            if (room := self.peak / largest_output(candidate.params)) >= 1.0:
                tried[i] = replace(candidate, why=f"outputs fill {room:.2g} of the first modulus", trace=None)
                continue
            styled = with_style(self.lowered, candidate.params, self.table, candidate.style)
            replies = sum(op.kind == "output" and op.attrs["name"] == OUTPUT for op in styled.ops)
            found = promise(candidate, styled, self.samples, target, [self.peak] * replies)
            if isinstance(found, Found):
                rows += tried
                return found
            tried[i] = replace(candidate, why=found, trace=None)
        rows += tried
        deeper = deepen(self.roomy, self.log_n, self.samples, target, self.table, self.report)
        rows += deeper.rows
        return deeper.found

    @cached_property
    def roomy(self) -> Lowered:
        """The graph lowered with room for refreshes, which forms of functions lack (passes/forms.py)."""
        graph, slots = self.samples.graph, 1 << (self.log_n - 1)
        if not any("unit" in node.attrs for node in graph.nodes):
            return self.lowered
        return _leveled(lower(graph, self.ranges, slots, self.cost, roomy=True), slots)

    def keeps(self, target: Target) -> bool:
        """Whether there is a circuit for a target."""
        return self.search(target, []) is not None

    @cached_property
    def peak(self) -> float:
        """Largest stored slot of the reply, which no parameters change."""
        circuit = as_circuit(self.lowered, replace(self.table.params, log_n=self.log_n))
        return output_peak(circuit, self.samples.few(NOISY), self.ranges[self.samples.graph.output])


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
