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


def _request(name: str, build: Callable[[Path], Any], repeats: int, folder: Path | None, progress: Progress) -> Any:
    """Build a model in a temporary folder and measure one request of it."""
    import tempfile

    from compiler import Target

    from . import records, requests

    with tempfile.TemporaryDirectory() as place:
        path, samples = build(Path(place))
        record = requests.measure(
            name,
            path,
            samples,
            target=Target(max_memory_gb=21.0),
            repeats=repeats,
            progress=progress,
            weights="random, seed 0",
        )
    return records.write(record, folder or records.RESULTS), record


@benchmark("mlp-784")
def mlp_784(*, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """MLP 784-128-10 with x^2, one input, 128 bits (ten seconds)."""
    from . import models

    return _request("mlp-784", models.mlp_784, max(repeats, 21), folder, progress)


@benchmark("cnn-28")
def cnn_28(*, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """LeNet-like CNN with x^2, one image of 28 x 28, 128 bits (about two minutes)."""
    from . import models

    return _request("cnn-28", models.cnn_28, max(repeats, 5), folder, progress)


@benchmark("request-2x128x128")
def request_2x128x128(*, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Encoder of 2 blocks, d = 128, 128 tokens (BERT-Tiny's shape), one request, 128 bits (about six minutes, 15 GB)."""
    from functools import partial

    from . import models

    build = partial(models.encoder, blocks=2, width=128, heads=4, hidden=512, tokens=128)
    return _request("request-2x128x128", build, 1, folder, progress)


@benchmark("security")
def security(*, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Lattice estimates behind the 128-bit limits: attacks on each ring and secret (some minutes; repeats are ignored)."""
    from . import records
    from . import security_estimate as estimate

    record = estimate.measure(progress)
    return estimate.save(record, folder or records.RESULTS), record
