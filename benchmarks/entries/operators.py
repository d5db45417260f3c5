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
        minutes=4,
        memory_gb=19,
        run=_operators,
        show="benchmarks.two_tables:of_record",
    ),
    Benchmark(
        name="norm-1x128x32",
        group="encrypted",
        measures="the same tables of a block whose RMSNorms are polynomials, beside the same block with BatchNorms, which fold",
        conditions="the demo's model with 1 block (d = 128, 32 tokens), norms before attention, feed-forward and head, inverse square "
        "roots of degree 2 on the trained range, an eighth of the training, 128 bits, A B A B",
        minutes=8,
        memory_gb=20,
        run="benchmarks.norms:measure",
        show="benchmarks.norms:show",
    ),
)
