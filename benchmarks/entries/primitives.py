"""Primitives of a backend, one at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.registry import Benchmark, Record, Settings

# (log N, levels, bits of the first prime, digits): OpenFHE's largest ring with a comfortable chain; SEAL's largest ring, all levels that
# 128 bits leave there, and the one digit a prime that it knows.
CHAINS = {"openfhe": (16, 30, 46, 5), "tenseal": (15, 19, 60, 20)}
QUICK = {"openfhe": (10, 4, 46, 5), "tenseal": (10, 4, 60, 5)}


def _ops(settings: Settings, *, backend: str) -> Record:
    from benchmarks import ops
    from he_backend.params import Params

    log_n, levels, first, digits = (QUICK if settings.quick else CHAINS)[backend]
    params = Params(
        backend=backend,
        log_n=log_n,
        levels=levels,
        scale_bits=40,
        first_bits=first,
        digits=digits,
        insecure=settings.quick,
    )
    return ops.measure(
        params,
        repeats=settings.repeats,
        two_threads=backend == "openfhe",
        progress=settings.progress,
        allow_insecure=settings.quick,
    )


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
        run=partial(_ops, backend="openfhe"),
        save=_save,
    ),
    Benchmark(
        name="ops-tenseal",
        group="primitives",
        measures="thread-milliseconds of every primitive of the other library at every level: its cost table",
        conditions="TenSEAL (SEAL), N = 2^15, 19 levels, one thread: its binding keeps the interpreter's lock",
        minutes=5,
        memory_gb=3,
        run=partial(_ops, backend="tenseal"),
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
        suite=False,
        run="benchmarks.refresh_kinds:measure",
        show="benchmarks.refresh_kinds:show",
    ),
)
