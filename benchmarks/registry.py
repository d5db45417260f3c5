"""Benchmarks by name, for `polyformer bench`. One function a benchmark; what it measures with is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[int, int, str], None]
Benchmark = Callable[..., tuple[Path, dict[str, Any]]]  # keyword arguments repeats, folder, progress

_BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark; the first line of its docstring is what the list shows."""

    def register(run: Benchmark) -> Benchmark:
        _BENCHMARKS[name] = run
        return run

    return register


def topics() -> dict[str, str]:
    """Name -> one line."""
    return {name: (run.__doc__ or "").strip().partition("\n")[0] for name, run in sorted(_BENCHMARKS.items())}


def run(name: str, *, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run a benchmark and write its record; the file and the record.

    Raises:
        ValueError: no benchmark has this name; lists those that exist.
    """
    if name not in _BENCHMARKS:
        raise ValueError(f"no benchmark is called {name!r}; known are: {', '.join(sorted(_BENCHMARKS))}")
    return _BENCHMARKS[name](repeats=repeats, folder=folder, progress=progress)


@benchmark("ops")
def ops(*, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Every primitive at every level on this machine, N = 2^16: the compiler's cost table (about 10 minutes, 2 GB)."""
    from he_backend.params import Params

    from . import ops as table

    params = Params(log_n=16, levels=30, scale_bits=40, first_bits=46, digits=5)
    record = table.measure(params, repeats=repeats, progress=progress)
    return table.save(record, folder or table.COSTS), record


@benchmark("security")
def security(*, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Lattice estimates behind the 128-bit limits: attacks on each ring and secret (some minutes; repeats are ignored)."""
    from . import records
    from . import security_estimate as estimate

    record = estimate.measure(progress)
    return estimate.save(record, folder or records.RESULTS), record
