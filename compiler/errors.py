"""The promised error, of the outputs and of every value: where in the model a reply loses its digits.

Noise is simulated run by run (`simulator.simulate_noise`) and compared with the exact run. In a sequence the kept tensors carry
theirs on: what a step writes has that step's error, with all that earlier rows did to it, and every later step reads it so. Rows
are written once and never refreshed, so that their errors stay as they are, but for the little that the product with the place
adds to all rows at every step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import Array
from he_backend.circuit import Circuit, Op
from he_backend.simulator import SIMULATIONS, Case, simulate, simulate_noise
from he_backend.trace import Trace

ERROR_MARGIN = 4.0  # promised error over the largest one of a few simulated runs
SIMULATED = 32  # steps of a sequence, at most


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Largest differences between runs with simulated noise and exact ones.

    outputs  of an output element, in the model's units, by the number of the step
    slots    of a stored slot after the last op of every ONNX node, and of what a step leaves for the next one, by op id
    """

    outputs: Mapping[int, float]
    slots: Mapping[int, float]


def simulated_noise(circuit: Circuit, t: Trace, sequences: Sequence[Sequence[Case]]) -> Noise:
    """Run sequences with noise, each from its first case to its last.

    Args:
        t: the circuit's trace; sequences: see `samples`.
    """
    with ThreadPoolExecutor(SIMULATIONS) as pool:
        runs = list(itertools.chain(*pool.map(lambda pair: _sequence(circuit, t, *pair), enumerate(sequences))))
    outputs: dict[int, float] = {}
    for run in runs:
        outputs |= {step: max(error, outputs.get(step, 0.0)) for step, error in run.outputs.items()}
    return Noise(outputs=outputs, slots={i: max(run.slots[i] for run in runs) for i in runs[0].slots})


def _sequence(circuit: Circuit, t: Trace, number: int, sequence: Sequence[Case]) -> list[Noise]:
    """The differences of its cases; of a long sequence those of `SIMULATED`, evenly spread, the first and the last among them.

    A row that is written between two of them gets the errors of the last one that was simulated, and all rows what so many steps
    add to them.
    """
    chosen = {round(i) for i in np.linspace(0, len(sequence) - 1, min(SIMULATED, len(sequence)))}
    kept: dict[str, Array] = {}  # errors of what the steps so far have left, [T, D]
    last, found = -1, []
    for i, case in enumerate(sequence):
        if i in chosen:
            before = kept
            noise, kept = _compared(circuit, t, case, kept, seed=(number, i))
            for name, error in before.items():  # independent from step to step, so that their squares add up
                added = kept[name] - error
                added[i] = 0.0
                kept[name] = kept[name] + (np.sqrt(i - last) - 1.0) * added
            found.append(noise)
            last = i
        else:
            for error in kept.values():
                error[i] = error[last]
    return found


def _compared(
    circuit: Circuit, t: Trace, case: Case, kept: Mapping[str, Array], seed: Sequence[int]
) -> tuple[Noise, dict[str, Array]]:
    """The differences of one case whose states have some errors, and the errors of the states that it leaves."""
    looked_at = {op.id for op in _looked_at(circuit)}
    clear: dict[int, Array] = {}
    slots: dict[int, float] = {}

    def keep(op: Op, value: Array) -> None:
        if op.id in looked_at:
            clear[op.id] = value

    def compare(op: int, value: Array) -> None:
        if op in looked_at:
            slots[op] = _largest(value - clear.pop(op))

    exact = simulate(circuit, case.tensors, step=case.step, visit=keep).outputs
    tensors = {**case.tensors, **{name: case.tensors[name] + error for name, error in kept.items()}}
    (output,) = circuit.outputs
    with np.errstate(over="ignore", invalid="ignore"):  # noise that a small scale lets run away
        noisy = simulate_noise(circuit, tensors, step=case.step, seed=seed, traced=t, visit=compare)
        worst = _largest(noisy[output.name] - exact[output.name])
    left = {s.name: noisy[s.name] - exact[s.name] for s in circuit.states}
    return Noise(outputs={case.step: worst}, slots=slots), left


def _largest(difference: Array) -> float:
    """Infinite where one is no number."""
    largest = float(np.max(np.abs(difference)))
    return math.inf if math.isnan(largest) else largest


def _looked_at(circuit: Circuit) -> Iterator[Op]:
    kept = {s.name for s in circuit.states}
    yield from circuit.ends
    yield from (op for op in circuit.ops if op.kind == "output" and op.attrs["name"] in kept)


def promised_error(noise: Noise) -> float:
    """Promised largest error of an output element, at any step: the simulated one times ERROR_MARGIN."""
    return ERROR_MARGIN * max(noise.outputs.values())


def with_errors(circuit: Circuit, noise: Noise) -> Circuit:
    """The circuit with predicted errors after every ONNX node and of what a step keeps, made as `promised_error` makes that of the
    outputs, so that no output gets more than its promise but from slots that hold no element."""
    errors = {
        op.id: float(abs(op.factor) * ERROR_MARGIN * noise.slots[op.id])
        for op in _looked_at(circuit)
        if op.id in noise.slots
    }
    return replace(circuit, errors=errors)
