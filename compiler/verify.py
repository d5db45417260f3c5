"""Verification after lowering: the circuit in the simulator against the graph, tensor by tensor; levels, keys and magnitudes from
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from he_backend.base import HEError
from he_backend.circuit import Circuit, Op
from he_backend.circuit_check import faults, level_faults, traced_faults
from he_backend.simulator import Case, simulate

from .ir import Graph, evaluate
from .placed import OUTPUT, Lowered
from .samples import graph_inputs

Inputs = np.ndarray | Mapping[str, np.ndarray]  # of a graph: its one input, or all of them by name

TOLERANCE = 1e-7  # relative to the largest element of the tensor: float64 against float64


class VerificationError(HEError):
    """A pass broke what it must keep; the message names the pass, the tensor and both figures."""


def same_meaning(before: Graph, after: Graph, x: Inputs, y: Inputs, name: str) -> None:
    """Outputs of two graphs on one input each (a pass may move the input behind the embedding).

    Raises:
        VerificationError: they differ.
    """
    a, b = evaluate(before, x)[before.output], evaluate(after, y)[after.output]
    if not np.isfinite(a).all():
        raise VerificationError(
            f"the output is not finite on the first sample, before pass {name!r}: calibrate on samples that the model can take"
        )
    if a.shape != b.shape:
        raise VerificationError(f"pass {name!r} changed the output's shape from {a.shape} to {b.shape}")
    gap = float(np.max(np.abs(a - b)) / max(1e-30, float(np.max(np.abs(a)))))
    if not gap < TOLERANCE:
        raise VerificationError(
            f"pass {name!r} changed the output by {gap:.2e} of its size; at most {TOLERANCE:.0e} is rounding"
        )


def levels(circuit: Circuit) -> None:
    """Recompute that every operand has the levels that its reader uses.

    Raises:
        VerificationError: an op has fewer levels than it needs, or more than the chain.
    """
    for fault in level_faults(circuit):
        raise VerificationError(fault)


def against_graph(circuit: Circuit, lowered: Lowered, graph: Graph, sequences: Sequence[Sequence[Case]]) -> float:
    """Compare every op that holds a tensor with the graph; returns the largest relative difference.

    Raises:
        VerificationError: a tensor differs; the first one in order is named.
    """
    worst = 0.0

    def compare(op: Op, value: np.ndarray) -> None:
        nonlocal worst
        if op.id not in lowered.tensors:
            return
        tensor, _ = lowered.tensors[op.id]
        layout = circuit.arrays[op.layout]
        flat = wanted[tensor].reshape(-1)
        used = layout >= 0
        gap = np.max(np.abs(value[used] * op.factor - flat[layout[used]])) / max(1e-30, np.max(np.abs(flat)))
        if not gap < TOLERANCE:
            raise VerificationError(
                f"tensor {tensor!r}{_at(graph, case)} differs by {gap:.2e} of its size after lowering (op {op}); at most "
                f"{TOLERANCE:.0e} is rounding"
            )
        worst = max(worst, float(gap))

    for case in itertools.chain.from_iterable(sequences):
        wanted = evaluate(graph, graph_inputs(graph, case))
        simulate(circuit, case.tensors, step=case.step, visit=compare)
    return worst


def _at(graph: Graph, case: Case) -> str:
    return f" of step {case.step}" if graph.steps else ""


def sound(circuit: Circuit) -> None:
    """Check the form of a circuit that is about to be written, its levels, its keys, and the scale of what it keeps.

    Raises:
        VerificationError: the first rule that is broken, with both figures.
    """
    for fault in itertools.chain(faults(circuit), traced_faults(circuit)):
        raise VerificationError(fault)


def finished(circuit: Circuit, graph: Graph, sequences: Sequence[Sequence[Case]]) -> None:
    """The same, and the bound of every op, the output as its signature reads it, and what a step keeps.

    A sequence is run as a server runs it: what a step leaves is what the next one takes, and is held against the graph's.

    Args:
        graph: its meaning; sequences: of those that the bounds were taken over.

    Raises:
        VerificationError: the first rule that is broken, with both figures.
    """
    sound(circuit)

    def bounded(op: Op, value: np.ndarray) -> None:
        if (peak := float(np.max(np.abs(value)))) > op.bound:
            raise VerificationError(
                f"{op}: a slot reaches {peak:.6g}{_at(graph, case)}, above its bound {op.bound:.6g}"
            )

    for sequence in sequences:
        kept: dict[str, np.ndarray] = {}
        for case in sequence:
            outputs = simulate(circuit, {**case.tensors, **kept}, step=case.step, visit=bounded).outputs
            for signature in (*circuit.inputs, *circuit.outputs, *circuit.states):
                tensor = {**case.tensors, **outputs}[signature.name]
                if (peak := float(np.max(np.abs(tensor)))) > signature.bound:
                    raise VerificationError(
                        f"{signature.name!r} reaches {peak:.6g}{_at(graph, case)}, above the {signature.bound:.6g} of its signature"
                    )
            values = evaluate(graph, graph_inputs(graph, case))
            wanted = {OUTPUT: values[graph.output], **{k.before: values[k.after] for k in graph.kept}}
            for name, tensor in wanted.items():
                gap = float(np.max(np.abs(outputs[name] - tensor[0])) / max(1e-30, float(np.max(np.abs(tensor)))))
                if not gap < TOLERANCE:
                    raise VerificationError(
                        f"output {name!r}{_at(graph, case)} differs from the graph by {gap:.2e} of its size; at most "
                        f"{TOLERANCE:.0e} is rounding"
                    )
            kept = {s.name: outputs[s.name] for s in circuit.states}
