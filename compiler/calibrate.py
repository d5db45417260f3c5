"""Ranges of every tensor on sample input, with a margin: they set factors, intervals and bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .ir import Graph, evaluate

Range = tuple[float, float]


def calibrate(
    graph: Graph, samples: Iterable[np.ndarray], *, margin: float = 1.25, progress: Callable[[int], None] | None = None
) -> dict[str, Range]:
    """Smallest and largest element of every tensor, each moved outwards by (margin - 1) of the larger magnitude.

    Args:
        samples: input tensors of the graph's shape.
    """
    ranges: dict[str, Range] = {}
    for i, x in enumerate(samples):
        for name, value in evaluate(graph, x).items():
            lo, hi = float(np.min(value)), float(np.max(value))
            if name in ranges:
                lo, hi = min(lo, ranges[name][0]), max(hi, ranges[name][1])
            ranges[name] = (lo, hi)
        if progress is not None:
            progress(i + 1)
    return {
        name: (lo - (margin - 1) * max(abs(lo), abs(hi)), hi + (margin - 1) * max(abs(lo), abs(hi)))
        for name, (lo, hi) in ranges.items()
    }
