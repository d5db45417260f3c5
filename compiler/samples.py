"""Calibration samples as what a circuit is run on: requests, each by itself, or sequences, whose steps hand tensors on.

Passes take sequences of cases: within one, what a step keeps goes into the next. A request is a sequence of one case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from he_backend.base import Array
from he_backend.simulator import Case

from .calibrate import Range, calibrate, ranges_of
from .ir import STEP, Graph, evaluate
from .passes.client import Embedding
from .placed import INPUT

Progress = Callable[[str, int, int], None]  # stage, done, total

ENOUGH = 1 << 17  # elements of requests
CALIBRATED = 24  # sequences that ranges are taken over
STEPS = 24  # steps of sequences: fewer sequences are taken where each has many


class Samples(Protocol):
    """What both kinds have in common."""

    @property
    def graph(self) -> Graph: ...

    def ranges(self, report: Progress) -> dict[str, Range]:
        """Smallest and largest element of every tensor; see `calibrate`."""
        ...

    def few(self, most: int) -> list[Sequence[Case]]:
        """As many sequences as a largest slot or error takes to be seen, and not more than `most`."""
        ...


def requests(inputs: Iterable[np.ndarray]) -> list[Sequence[Case]]:
    """Input tensors without the leading axis, as sequences of one case each."""
    return [(Case(tensors={INPUT: x}),) for x in inputs]


def graph_inputs(graph: Graph, case: Case) -> dict[str, np.ndarray]:
    """All inputs of the graph, as `ir.evaluate` takes them, for a case of its circuit."""
    inputs = {graph.input: case.tensors[INPUT][None]}
    if graph.steps:
        inputs |= {STEP: np.asarray(case.step), **{k.before: case.tensors[k.before][None] for k in graph.kept}}
    return inputs


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Input tensors [T, D] of a graph that is run once."""

    graph: Graph
    inputs: Sequence[np.ndarray]

    def ranges(self, report: Progress) -> dict[str, Range]:
        count = len(self.inputs)
        return calibrate(self.graph, [x[None] for x in self.inputs], progress=lambda i: report("calibrate", i, count))

    def few(self, most: int) -> list[Sequence[Case]]:
        """Two of large tensors."""
        return requests(self.inputs[: min(most, max(2, ENOUGH // self.inputs[0].size))])


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences of a graph with steps: token ids [n, T], of which the client makes vectors where the embedding is its own."""

    graph: Graph
    tokens: np.ndarray
    embedding: Embedding | None

    def input(self, row: int, step: int) -> np.ndarray:
        """The graph's own input, [1, 1] or [1, 1, D]."""
        token = self.tokens[row, step]
        if self.embedding is None:
            return np.asarray(token).reshape(self.graph.input_shape)
        return self.embedding.step(token, step).reshape(self.graph.input_shape)

    def steps(self, row: int) -> Iterator[tuple[dict[str, np.ndarray], Mapping[str, Array]]]:
        """Inputs and all tensors of the graph at each step of a sequence, from empty states on."""
        state: dict[str, np.ndarray] = {k.before: np.zeros(k.shape) for k in self.graph.kept}
        for step in range(self.graph.steps):
            inputs = {self.graph.input: self.input(row, step), STEP: np.asarray(step), **state}
            values = evaluate(self.graph, inputs)
            yield inputs, values
            state = {k.before: values[k.after] for k in self.graph.kept}

    def cases(self, row: int) -> list[Case]:
        """A whole sequence as cases of the circuit."""
        return [
            Case(
                tensors={
                    INPUT: inputs[self.graph.input][0],
                    **{k.before: inputs[k.before][0] for k in self.graph.kept},
                },
                step=step,
            )
            for step, (inputs, _) in enumerate(self.steps(row))
        ]

    def ranges(self, report: Progress) -> dict[str, Range]:
        """Over whole sequences."""

        def every() -> Iterator[Mapping[str, Array]]:
            count = min(CALIBRATED, len(self.tokens))
            for row in range(count):
                for _, values in self.steps(row):
                    yield values
                report("calibrate", row + 1, count)

        return ranges_of(every())

    def few(self, most: int) -> list[Sequence[Case]]:
        """Whole ones: what is kept is largest, and noisiest, at the end."""
        return [self.cases(row) for row in range(min(most, math.ceil(STEPS / self.graph.steps), len(self.tokens)))]
