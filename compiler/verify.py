"""Verification after lowering: the circuit in the simulator against the graph, tensor by tensor, and levels from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from he_backend.base import HEError
from he_backend.circuit import Circuit, Op
from he_backend.kernels import depth
from he_backend.simulator import simulate

from .ir import Graph, evaluate
from .lower import Lowered

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
    gap = float(np.max(np.abs(a - b)) / max(1e-30, float(np.max(np.abs(a)))))
    if not gap < TOLERANCE:
        raise VerificationError(
            f"pass {name!r} changed the output by {gap:.2e} of its size; at most {TOLERANCE:.0e} is rounding"
        )


def levels(circuit: Circuit) -> None:
    """Recompute that every operand has the levels that its reader uses.

    Raises:
        VerificationError: an op has fewer levels than it needs.
    """
    for op in circuit.ops:
        need = op.level + depth(op, circuit.arrays, circuit.params.slots)
        if op.kind == "refresh":
            need = circuit.params.refresh_input
            if op.level > circuit.params.refresh_output:
                raise VerificationError(f"{op}: a refresh reaches level {circuit.params.refresh_output}")
        for a in op.args:
            if circuit.ops[a].level < need:
                raise VerificationError(f"{op} needs its operand at level {need}; %{a} has {circuit.ops[a].level}")


def against_graph(circuit: Circuit, lowered: Lowered, graph: Graph, samples: Sequence[np.ndarray]) -> float:
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
                f"tensor {tensor!r} differs by {gap:.2e} of its size after lowering (op {op}); at most {TOLERANCE:.0e} is rounding"
            )
        worst = max(worst, float(gap))

    for x in samples:
        wanted = evaluate(graph, x[None])
        simulate(circuit, {circuit.inputs[0].name: x}, visit=compare)
    return worst
