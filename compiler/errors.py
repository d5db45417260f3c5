"""The promised error, of the outputs and of every value: where in the model a reply loses its digits.

Noise is simulated run by run (`simulator.simulate_noise`) and compared with the exact run. In a sequence the kept tensors carry
theirs on: what a step writes has that step's error, with all that earlier rows did to it, and every later step reads it so. Rows
are written once and never refreshed, so that their errors stay as they are, but for the little that the product with the place
adds to all rows at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import Array
from he_backend.circuit import Circuit, Op
from he_backend.simulator import SIMULATIONS, Case, simulate, simulate_noise
from he_backend.trace import Trace

ERROR_MARGIN = 4.0  # promised error over the largest one of a few simulated runs


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Largest differences between runs with simulated noise and exact ones.

    outputs  of an output element, in the model's units, by the number of the step
    slots    of a stored slot after the last op of every ONNX node, by op id
    """

    outputs: Mapping[int, float]
    slots: Mapping[int, float]


def simulated_noise(circuit: Circuit, t: Trace, sequences: Sequence[Sequence[Case]]) -> Noise:
    """Run sequences with noise, each from its first case to its last.

    Args:
        t: the circuit's trace; sequences: see `samples`.
    """
    with ThreadPoolExecutor(SIMULATIONS) as pool:
        runs = [
            found
            for sequence in pool.map(lambda pair: _sequence(circuit, t, *pair), enumerate(sequences))
            for found in sequence
        ]
    return Noise(
        outputs={
            step: max(run.outputs[step] for run in runs if step in run.outputs) for run in runs for step in run.outputs
        },
        slots={i: max(run.slots[i] for run in runs) for i in runs[0].slots},
    )


def _sequence(circuit: Circuit, t: Trace, number: int, sequence: Sequence[Case]) -> list[Noise]:
    """The differences of each case."""
    ends = {op.id for op in circuit.ends}
    (output,) = circuit.outputs
    kept: dict[str, Array] = {}
    found = []
    for i, case in enumerate(sequence):
        clear: dict[int, Array] = {}
        slots: dict[int, float] = {}

        def keep(op: Op, value: Array, clear: dict[int, Array] = clear) -> None:
            if op.id in ends:
                clear[op.id] = value

        def compare(op: int, value: Array, clear: dict[int, Array] = clear, slots: dict[int, float] = slots) -> None:
            if op in ends:
                slots[op] = float(np.max(np.abs(value - clear.pop(op))))

        exact = simulate(circuit, case.tensors, step=case.step, visit=keep).outputs
        tensors = {**case.tensors, **kept}
        noisy = simulate_noise(circuit, tensors, step=case.step, seed=(number, i), traced=t, visit=compare)
        kept = {s.name: noisy[s.name] for s in circuit.states}
        worst = float(np.max(np.abs(noisy[output.name] - exact[output.name])))
        found.append(Noise(outputs={case.step: worst}, slots=slots))
    return found


def promised_error(circuit: Circuit, t: Trace, noise: Noise) -> float:
    """Promised largest error of an output element, at any step: the simulated one times ERROR_MARGIN."""
    return ERROR_MARGIN * max(noise.outputs.values())


def with_errors(circuit: Circuit, t: Trace, noise: Noise) -> Circuit:
    """The circuit with predicted errors after every ONNX node, made as `promised_error` makes that of the outputs, so that no output
    gets more than its promise but from slots that hold no element.

    Args:
        circuit: with bounds.
    """
    errors = {
        op.id: float(abs(op.factor) * ERROR_MARGIN * noise.slots[op.id])
        for op in circuit.ends
        if op.id in noise.slots
    }
    return replace(circuit, errors=errors)
