"""Ways from scores to attention weights."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="operator-race",
        group="race",
        measures="seconds, levels, refreshes and error of PowerSoftmax, exp with a reciprocal, the square strategy, pointwise attention",
        conditions="16,384 standard normal scores in rows of 16 to 1,024 keys, largest weight error 1e-3, 128 bits",
        minutes=12,
        memory_gb=16,
        run="benchmarks.race:race",
        show="benchmarks.race_show:race",
    ),
)
