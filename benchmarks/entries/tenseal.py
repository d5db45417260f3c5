"""OpenFHE and TenSEAL side by side."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="two-libraries",
        group="encrypted",
        measures="the same models in OpenFHE and TenSEAL: seconds, error, levels, keys and memory, by node and by primitive",
        conditions="an MLP, a CNN and one transformer block, random weights, best parameters of each library, 128 bits, 1 and 2 threads",
        minutes=9,
        memory_gb=15,
        run="benchmarks.two_libraries:measure",
        show="benchmarks.two_libraries_show:show",
    ),
)
