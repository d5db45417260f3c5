"""Primitives of a backend, one at a time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.registry import Benchmark, Record, Settings


def _ops(settings: Settings) -> Record:
    from benchmarks import ops
    from he_backend.params import Params

    log_n, levels = (10, 4) if settings.quick else (16, 30)
    params = Params(log_n=log_n, levels=levels, scale_bits=40, first_bits=46, digits=5)
    return ops.measure(params, repeats=settings.repeats, progress=settings.progress, allow_insecure=settings.quick)


def _save(record: Record, folder: Path | None) -> Path:
    from benchmarks import ops

    return ops.save(dict(record), folder or ops.COSTS)


BENCHMARKS = (
    Benchmark(
        name="ops",
        group="primitives",
        measures="thread-milliseconds of every primitive at every level: the compiler's cost table",
        conditions="OpenFHE, N = 2^16, 30 levels, one and two threads",
        minutes=10,
        memory_gb=2,
        run=_ops,
        save=_save,
    ),
)
