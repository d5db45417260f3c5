"""Ways from scores to attention weights."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="operator-race",
        version=2,
        group="race",
        measures="seconds, levels, refreshes and error of PowerSoftmax, exp with a reciprocal, the square strategy, pointwise attention",
        conditions="16,384 standard normal scores in rows of 16 to 1,024 keys, fit and encryption together err at most 1e-3 of the "
        "largest weight, 128 bits",
        minutes=8,
        memory_gb=16,
        run="benchmarks.race:race",
        show="benchmarks.race_show:race",
    ),
)
