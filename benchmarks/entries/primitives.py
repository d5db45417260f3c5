"""Primitives of a backend, one at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.registry import Benchmark, Record, Settings


def _ops(settings: Settings) -> Record:
    from benchmarks import ops
    from he_backend.params import Params

    log_n, levels = (10, 4) if settings.quick else (16, 30)
    params = Params(log_n=log_n, levels=levels, scale_bits=40, first_bits=46, digits=5)
    return ops.measure(params, repeats=settings.repeats, progress=settings.progress, allow_insecure=settings.quick)


def _refresh(settings: Settings, *, period: int) -> Record:
    from benchmarks import ops
    from he_backend.params import Params

    params = Params(
        log_n=11 if settings.quick else 16,
        levels=20 if settings.quick else 23,
        scale_bits=54,
        first_bits=60,
        digits=6,
        secret="sparse192",
        insecure=settings.quick,
        refresh_encode=3,
        refresh_decode=3,
        refresh_slots=64 if settings.quick and period else period,
    )
    return ops.measure_refresh(
        params, repeats=settings.repeats, progress=settings.progress, allow_insecure=settings.quick
    )


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
    *(
        Benchmark(
            name=name,
            group="primitives",
            measures="thread-milliseconds of a refresh: a row of the compiler's cost table",
            conditions=f"OpenFHE, N = 2^16, 23 levels, budget 3 + 3, {slots}, one thread",
            minutes=6,
            memory_gb=13,
            run=partial(_refresh, period=period),
            save=_save,
        )
        for name, slots, period in (
            ("ops-refresh", "all slots", 0),
            ("ops-refresh-4096", "4096 slots that repeat", 4096),
        )
    ),
    Benchmark(
        name="refresh-kinds",
        group="primitives",
        measures="one refresh of each kind: seconds, levels, error and memory; functions inside it against polynomials behind it",
        conditions="OpenFHE, N = 2^16, 128 bits, 23 to 26 levels, budget 3 + 3, one thread, a process for each kind",
        minutes=35,
        memory_gb=14,
        run="benchmarks.refresh_kinds:measure",
        show="benchmarks.refresh_kinds:show",
    ),
)
