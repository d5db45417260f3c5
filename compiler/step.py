"""Compile one decoding step: `pipeline` for graphs with kept keys and values.

The passes are the same. What differs is what a sample is: not one input but a sequence, whose kept tensors come from the steps
before; and what noise is: the kept tensors bring that of the steps that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import HEError, UnsupportedOpError
from he_backend.circuit import Circuit, Op
from he_backend.simulator import simulate, simulate_noise
from he_backend.trace import Trace

from . import verify
from .calibrate import Range
from .cost import CostTable
from .failure import largest_output, over_budget
from .ir import STEP, Graph, evaluate
from .passes.client import Embedding
from .passes.levels import assign_levels, top_level
from .plan import ERROR_MARGIN, LARGEST_RING, Candidate, Plan, Target, as_circuit, choose, refuse, with_style
from .rings import SMALLEST_RING
from .scales import mismatch_error
from .search import Found, Progress, plan_cost, smallest_cap
from .step_lower import LoweredStep, lower_step

Sample = dict[str, np.ndarray]  # all inputs of a step by name
SEQUENCES = 24  # of calibration, each of T steps
NOISY = 3  # sequences whose last step is simulated with noise


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences of a graph with steps: token ids [n, T], or vectors [n, T, D] once the embedding is the client's."""

    graph: Graph
    tokens: np.ndarray
    embedding: Embedding | None

    def start(self) -> Sample:
        return {k.before: np.zeros(k.shape) for k in self.graph.kept}

    def input(self, row: int, step: int) -> np.ndarray:
        """The graph's own input, [1, 1] or [1, 1, D]."""
        token = self.tokens[row, step]
        if self.embedding is None:
            return np.asarray(token).reshape(self.graph.input_shape)
        return self.embedding.step(token, step).reshape(self.graph.input_shape)

    def steps(self, row: int) -> Iterator[tuple[Sample, Sample]]:
        """Inputs and all tensors of each step of a sequence, from empty states on."""
        state = self.start()
        for step in range(min(self.graph.steps, self.tokens.shape[1])):
            x = {self.graph.input: self.input(row, step), STEP: np.asarray(step), **state}
            values = evaluate(self.graph, x)
            yield x, values
            state = {k.before: values[k.after] for k in self.graph.kept}


def calibrate_steps(sequences: Sequences, *, margin: float = 1.25, report: Progress) -> dict[str, Range]:
    """Ranges over whole sequences; see `calibrate.calibrate`."""
    ranges: dict[str, Range] = {}
    count = min(SEQUENCES, len(sequences.tokens))
    for row in range(count):
        for _, values in sequences.steps(row):
            for name, value in values.items():
                lo, hi = float(np.min(value)), float(np.max(value))
                old = ranges.get(name, (lo, hi))
                ranges[name] = (min(lo, old[0]), max(hi, old[1]))
        report("calibrate", row + 1, count)
    return {
        name: (lo - (margin - 1) * max(abs(lo), abs(hi)), hi + (margin - 1) * max(abs(lo), abs(hi)))
        for name, (lo, hi) in ranges.items()
    }


def circuit_tensors(circuit: Circuit, graph: Graph, sample: Sample) -> dict[str, np.ndarray]:
    """A graph's inputs as those of its circuit: without the batch axis, the input under the circuit's name."""
    states = {s.name: sample[s.name][0] for s in circuit.states}
    return {circuit.inputs[0].name: sample[graph.input][0], **states}


def against_graph(circuit: Circuit, lowered: LoweredStep, sequences: Sequences) -> float:
    """Compare every op that holds a tensor with the graph, in the first, a middle and the last step of a sequence.

    Raises:
        VerificationError: a tensor differs; the first one in order is named.
    """
    worst = 0.0
    chosen = {0, sequences.graph.steps // 2, sequences.graph.steps - 1}
    for step, (x, values) in enumerate(sequences.steps(0)):
        if step not in chosen:
            continue
        slots = simulate(circuit, circuit_tensors(circuit, sequences.graph, x), step=step).values
        for op in circuit.ops:
            if op.id not in lowered.tensors:
                continue
            name, _ = lowered.tensors[op.id]
            layout, flat = circuit.arrays[op.layout], values[name].reshape(-1)
            used = layout >= 0
            gap = float(np.max(np.abs(slots[op.id][used] * op.factor - flat[layout[used]])))
            gap /= max(1e-30, float(np.max(np.abs(flat))))
            if not gap < verify.TOLERANCE:
                raise verify.VerificationError(
                    f"tensor {name!r} of step {step} differs by {gap:.2e} of its size after lowering (op {op}); "
                    f"at most {verify.TOLERANCE:.0e} is rounding"
                )
            worst = max(worst, gap)
    return worst


def predicted_error(circuit: Circuit, t: Trace, sequences: Sequences) -> float:
    """Promised largest error of an output element at any step: simulated noise, times ERROR_MARGIN.

    The row that a step adds to a state carries that step's noise, and keeps it. So one step is simulated on states without
    noise; then the last one, on states each of whose places has noise of the size found in the new row. A state as a whole
    gets a little more at every step, from the product with the place: that is added T-fold.
    """
    graph, out, last = sequences.graph, circuit.outputs[0].name, sequences.graph.steps - 1
    worst = 0.0
    for row in range(min(NOISY, len(sequences.tokens))):
        rng = np.random.default_rng(row)
        (x, values) = list(sequences.steps(row))[last]
        tensors = circuit_tensors(circuit, graph, x)
        clear = values[graph.output][0]
        noisy = simulate_noise(circuit, tensors, step=last, seed=row, traced=t)
        worst = max(worst, float(np.max(np.abs(noisy[out] - clear))))
        for k in graph.kept:
            error = noisy[k.before] - values[k.after][0]
            new, rest = float(np.std(error[last])), float(np.std(np.delete(error, last, axis=0)))
            size = np.hypot(new, rest * np.sqrt(graph.steps))
            tensors[k.before] = tensors[k.before] + rng.normal(0.0, size, tensors[k.before].shape)
        noisy = simulate_noise(circuit, tensors, step=last, seed=row + 1000, traced=t)
        worst = max(worst, float(np.max(np.abs(noisy[out] - clear))))
    return ERROR_MARGIN * worst + mismatch_error(circuit, t)


def with_bounds(circuit: Circuit, sequences: Sequences, margin: float = 1.25) -> Circuit:
    """Largest stored slot of every op over the steps of a sequence, times a margin."""
    peaks: np.ndarray = np.zeros(len(circuit.ops))
    for step, (x, _) in enumerate(sequences.steps(0)):
        values = simulate(circuit, circuit_tensors(circuit, sequences.graph, x), step=step).values
        peaks = np.maximum(peaks, [np.max(np.abs(v)) for v in values])
    return replace(
        circuit, ops=tuple(replace(op, bound=float(margin * p)) for op, p in zip(circuit.ops, peaks, strict=True))
    )


def output_peak(circuit: Circuit, sequences: Sequences, ranges: Mapping[str, Range], margin: float = 1.25) -> float:
    """Largest |stored slot| of the reply, with a margin: of its elements in any calibration sequence, of all slots in the first."""
    (reply,) = circuit.outputs
    top = 0.0

    def largest(op: Op, value: np.ndarray) -> None:
        nonlocal top
        if op.kind == "output" and op.attrs["name"] == reply.name:
            top = max(top, float(np.max(np.abs(value))))

    for step, (x, _) in enumerate(sequences.steps(0)):
        simulate(circuit, circuit_tensors(circuit, sequences.graph, x), step=step, visit=largest)
    lo, hi = ranges[sequences.graph.output]  # with the same margin
    return max(margin * top, max(-lo, hi) / abs(reply.factor))


def search_step(
    sequences: Sequences, ranges: dict[str, Range], target: Target, table: CostTable, report: Progress
) -> Found:
    """Find parameters, the smallest ring first; see `search.search`. A step is not refreshed: it has no more levels than a block
    or two, and what is kept must come back at the level at which it left.

    Raises:
        UnsupportedOpError: no ring has a layout for the graph.
        ParamsError: no parameters hold the circuit at 128 bits, within memory and error.
    """
    insecure = target.insecure_log_n
    rings: Sequence[int] = (
        [insecure] if insecure is not None else range(SMALLEST_RING, LARGEST_RING[target.backend] + 1)
    )
    rows: list[Candidate] = []
    levels = 0
    misfit: UnsupportedOpError | None = None
    failed: list[tuple[list[Candidate], _Ring]] = []
    for log_n in rings:
        report(f"lower at N = 2^{log_n}", 0, 1)
        slots = 1 << (log_n - 1)
        try:
            lowered = lower_step(sequences.graph, ranges, slots, plan_cost(table, log_n, target.backend))
        except UnsupportedOpError as error:
            misfit = error
            continue
        lowered = replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, slots))
        levels = top_level(lowered.ops)
        ring = _Ring(log_n=log_n, lowered=lowered, sequences=sequences, ranges=ranges, table=table, report=report)
        tried: list[Candidate] = []
        if (found := ring.search(target, tried)) is not None:
            others = [c for c in rows + tried if c is not found.plan.chosen]
            others.sort(key=lambda c: (c.forecast is None, c.evaluate_s))
            return replace(found, plan=replace(found.plan, others=tuple(others)))
        failed.append((tried, ring))
        rows += tried
    if misfit is not None and not rows:
        raise misfit
    cap: float | None = None
    for tried, ring in failed:
        cap = smallest_cap(tried, target, ring.keeps, cap)
    raise refuse(rows, levels, target, cap)


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """A step lowered for one ring."""

    log_n: int
    lowered: LoweredStep
    sequences: Sequences
    ranges: Mapping[str, Range]
    table: CostTable
    report: Progress

    def keeps(self, target: Target) -> bool:
        """Whether there is a circuit for a target."""
        return self.search(target, []) is not None

    def search(self, target: Target, rows: list[Candidate]) -> Found | None:
        """The fastest circuit within memory and error; every candidate is added to `rows`."""
        rows += choose(self.lowered, max(1, top_level(self.lowered.ops)), self.log_n, target, self.table)
        peak: float | None = None
        for i, candidate in enumerate(rows):
            if candidate.trace is None:
                continue
            self.report("noise", 0, 1)
            params = candidate.params
            styled = with_style(self.lowered, params, self.table, candidate.style)
            circuit = as_circuit(styled, params)
            if peak is None:  # which no parameters change
                peak = output_peak(circuit, self.sequences, self.ranges)
            if (room := peak / largest_output(params)) >= 1.0:
                rows[i] = replace(candidate, why=f"outputs fill {room:.2g} of the first modulus", trace=None)
                continue
            promised = predicted_error(circuit, candidate.trace, self.sequences)
            why = over_budget(circuit, promised, [peak])
            if not why and promised > target.max_error:
                why = f"predicted error {promised:.2g} above {target.max_error:.2g}"
            if why:
                rows[i] = replace(candidate, why=why, trace=None)
                continue
            check_states(circuit)
            plan = Plan(chosen=candidate, others=(), costs=self.table.name)
            return Found(circuit=circuit, lowered=styled, error=promised, plan=plan)
        return None


def check_states(circuit: Circuit) -> None:
    """A state must go out as it comes in.

    Raises:
        VerificationError: its level differs.
    """
    levels: dict[str, dict[str, int]] = {"input": {}, "output": {}}
    for op in circuit.ops:
        if op.kind in levels:
            levels[op.kind][op.attrs["name"]] = op.level
    for s in circuit.states:
        before, after = levels["input"][s.name], levels["output"].get(s.name, -1)
        if not before == after == s.level:
            raise verify.VerificationError(
                f"state {s.name!r} comes in at level {before}, goes out at level {after} and is declared at {s.level}"
            )


def require(found: Found) -> LoweredStep:
    """The lowered step of a search."""
    if not isinstance(found.lowered, LoweredStep):
        raise HEError("the search returned a circuit without steps")
    return found.lowered
