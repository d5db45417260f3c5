"""Verification after lowering: the circuit in the simulator against the graph, tensor by tensor; levels, keys and magnitudes from
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from he_backend.base import HEError
from he_backend.circuit import Circuit, Op
from he_backend.circuit_check import faults, key_faults, level_faults
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


def sound(circuit: Circuit) -> None:
    """Check the form of a circuit that is about to be written, its levels and its keys.

    Raises:
        VerificationError: the first rule that is broken, with both figures.
    """
    for fault in itertools.chain(faults(circuit), key_faults(circuit)):
        raise VerificationError(fault)


def finished(circuit: Circuit, graph: Graph, samples: Sequence[np.ndarray]) -> None:
    """The same, and the bound of every op and the output as its signature reads it.

    Args:
        graph: its meaning; samples: inputs without the leading axis, of those that the bounds were taken over.

    Raises:
        VerificationError: the first rule that is broken, with both figures.
    """
    sound(circuit)

    def bounded(op: Op, value: np.ndarray) -> None:
        if (peak := float(np.max(np.abs(value)))) > op.bound:
            raise VerificationError(f"{op}: a slot reaches {peak:.6g}, above its bound {op.bound:.6g}")

    for x in samples:
        outputs = simulate(circuit, {circuit.inputs[0].name: x}, visit=bounded).outputs
        wanted, name = evaluate(graph, x[None])[graph.output][0], circuit.outputs[0].name
        gap = float(np.max(np.abs(outputs[name] - wanted)) / max(1e-30, float(np.max(np.abs(wanted)))))
        if not gap < TOLERANCE:
            raise VerificationError(
                f"output {name!r} differs from the graph by {gap:.2e} of its size; at most {TOLERANCE:.0e} is rounding"
            )
