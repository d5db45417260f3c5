"""Ranges of every tensor on sample input, with a margin: they set factors, intervals and bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from he_backend.base import Array

from .ir import Graph, evaluate

Range = tuple[float, float]


def calibrate(
    graph: Graph, samples: Iterable[np.ndarray], *, margin: float = 1.25, progress: Callable[[int], None] | None = None
) -> dict[str, Range]:
    """The ranges of a graph that is run once.

    Args:
        samples: input tensors of the graph's shape.
    """

    def every() -> Iterator[Mapping[str, Array]]:
        for i, x in enumerate(samples):
            yield evaluate(graph, x)
            if progress is not None:
                progress(i + 1)

    return ranges_of(every(), margin=margin)


def ranges_of(runs: Iterable[Mapping[str, Array]], *, margin: float = 1.25) -> dict[str, Range]:
    """Smallest and largest element of every tensor over runs, each moved outwards by (margin - 1) of the larger magnitude.

    Args:
        runs: all tensors by name, as `ir.evaluate` gives them.
    """
    ranges: dict[str, Range] = {}
    for values in runs:
        for name, value in values.items():
            lo, hi = float(np.min(value)), float(np.max(value))
            if name in ranges:
                lo, hi = min(lo, ranges[name][0]), max(hi, ranges[name][1])
            ranges[name] = (lo, hi)
    if margin == 1.0:
        return ranges  # infinite ones too
    return {
        name: (lo - (margin - 1) * max(abs(lo), abs(hi)), hi + (margin - 1) * max(abs(lo), abs(hi)))
        for name, (lo, hi) in ranges.items()
    }
