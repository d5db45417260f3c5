"""Polynomial models beside their softmax twins."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="demo-twin",
        version=2,
        group="train",
        measures="held-out loss of the polynomial demo model beside its softmax twins (GELU, x^2) at equal steps, and the gap in percent",
        conditions="2 blocks, d = 128, 32 tokens, State of the Union, with LaS decay and without, one thread",
        minutes=25,
        memory_gb=1.5,
        run="benchmarks.twin:measure",
        show="benchmarks.twin:show",
    ),
    Benchmark(
        name="deep-twin",
        version=2,
        group="train",
        measures="the same of a deeper model, whose norms are polynomials too",
        conditions="6 blocks, d = 64, 32 tokens, State of the Union, with LaS decay and without, one thread",
        minutes=35,
        memory_gb=1.5,
        run="benchmarks.twin:measure_deep",
        show="benchmarks.twin:show",
    ),
)
