"""Models in the clear."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="context-growth",
        version=2,
        group="plaintext",
        measures="seconds of one pass, and its peak memory above what was resident before, against the length of the context; exponents",
        conditions="2 blocks, d = 128, batch 1, 128 to 16,384 tokens, random weights, one thread",
        minutes=5,
        memory_gb=11,
        run="benchmarks.plaintext:context_growth",
        show="benchmarks.plaintext_show:context_growth",
    ),
    Benchmark(
        name="clear-request",
        group="plaintext",
        measures="milliseconds of one request in the clear, and the encrypted slowdown over each model",
        conditions="2 blocks, d = 128, 32 tokens, random weights, one thread",
        minutes=0.3,
        memory_gb=1,
        run="benchmarks.plaintext:clear_request",
        show="benchmarks.plaintext_show:clear_request",
        beside=("demo", "generate-2x128"),
    ),
    Benchmark(
        name="references",
        group="plaintext",
        measures="our Mamba and linear attention beside independent implementations: difference and speed",
        conditions="one layer, d = 128, 256 to 4,096 tokens, same weights, one thread, A B A B",
        minutes=2,
        memory_gb=3,
        run="benchmarks.plaintext:references",
        show="benchmarks.plaintext_show:references",
    ),
)
