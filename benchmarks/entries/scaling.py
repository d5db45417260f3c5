"""Cost against size, and quality beside cost."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="encrypted-scaling",
        group="scaling",
        measures="seconds and memory of a request against tokens, width, blocks and threads, predicted and measured; exponents",
        conditions="encoders around 1 block, d = 64, 4 heads, 32 tokens, 2 threads, one axis varied at a time, 128 bits",
        minutes=10,
        memory_gb=16,
        run="benchmarks.scaling:scaling",
        show="benchmarks.scaling_show:scaling",
    ),
    Benchmark(
        name="projection-1.4b",
        group="scaling",
        measures="projected seconds, memory and primitives of 1.4 B parameters, and the projection's error on measured requests",
        conditions="calculation: 24 and 32 blocks, d = 2048, 16 heads, 128 tokens, refreshes, 128 bits, from the cost table",
        minutes=2,
        memory_gb=4,
        run="benchmarks.projection:project",
        show="benchmarks.scaling_show:projection",
    ),
    Benchmark(
        name="quality-beside-cost",
        group="scaling",
        measures="each mixer's held-out loss and recall beside its degree, depth, refreshes and predicted seconds of a request",
        conditions="quality from the newest records; cost of 1 block, d = 64, 4 heads, 32 tokens, random weights, 128 bits",
        minutes=8,
        memory_gb=6,
        run="benchmarks.quality:beside_cost",
        show="benchmarks.scaling_show:quality",
    ),
)
