"""A transformer under encryption, node by node and primitive by primitive."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Record, Settings


def _operators(settings: Settings) -> Record:
    from benchmarks import operators

    return operators.measure(quick=settings.quick, repeats=1, progress=settings.progress)


BENCHMARKS = (
    Benchmark(
        name="operators",
        group="encrypted",
        measures="latency, share, levels, error and efficiency by node of the model and by CKKS primitive",
        conditions="the demo's model (2 blocks, d = 128, 32 tokens) after an eighth of its training, one request, 128 bits",
        minutes=6,
        memory_gb=19,
        run=_operators,
        show="benchmarks.two_tables:of_record",
    ),
)
