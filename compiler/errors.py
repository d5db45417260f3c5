"""The promised error of every value, not of the outputs alone: where in the model a reply loses its digits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from he_backend.base import Array
from he_backend.circuit import Circuit, Op
from he_backend.simulator import SIMULATIONS, simulate, simulate_noise
from he_backend.trace import Trace

from .plan import ERROR_MARGIN


def with_errors(circuit: Circuit, t: Trace, samples: Sequence[np.ndarray]) -> Circuit:
    """The circuit with predicted errors after every ONNX node, made as `plan.predicted_error` makes that of the outputs: the largest
    difference of a slot over runs with simulated noise, times ERROR_MARGIN.

    Args:
        circuit: with bounds; t: its trace.
        samples: input tensors; with those of `predicted_error` the noise drawn is the same, so that no output gets more than its
            promise but from slots that hold no element.
    """
    ends = {op.id: op for op in circuit.ends}
    name = circuit.inputs[0].name

    def largest(seed: int, x: np.ndarray) -> dict[int, float]:
        clear: dict[int, Array] = {}
        found: dict[int, float] = {}

        def keep(op: Op, value: Array) -> None:
            if op.id in ends:
                clear[op.id] = value

        def compare(op_id: int, value: Array) -> None:
            if op_id in ends:
                found[op_id] = float(np.max(np.abs(value - clear.pop(op_id))))

        simulate(circuit, {name: x}, visit=keep)
        simulate_noise(circuit, {name: x}, seed=seed, traced=t, visit=compare)
        return found

    with ThreadPoolExecutor(SIMULATIONS) as pool:
        runs = list(pool.map(largest, range(len(samples)), samples))
    errors = {
        i: float(abs(op.factor) * ERROR_MARGIN * max(run[i] for run in runs)) for i, op in ends.items() if i in runs[0]
    }
    return replace(circuit, errors=errors)
