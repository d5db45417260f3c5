"""Lattice estimates: a calculation, so that there is one record and any day gives the same."""

from __future__ import annotations

from pathlib import Path

from benchmarks.registry import Benchmark, Record, Settings


def _security(settings: Settings) -> Record:
    from benchmarks import security_estimate

    return security_estimate.measure(settings.progress, quick=settings.quick)


def _save(record: Record, folder: Path | None) -> Path:
    from benchmarks import records, security_estimate

    return security_estimate.save(dict(record), folder or records.RESULTS)


BENCHMARKS = (
    Benchmark(
        name="security",
        record="security-estimate",
        group="security",
        measures="bits of security of each ring, modulus and secret; largest modulus for 128 bits",
        conditions="uSVP, dual and hybrid attacks, two cost models",
        minutes=5,
        memory_gb=1,
        run=_security,
        save=_save,
        show="benchmarks.security_show:show",
    ),
)
