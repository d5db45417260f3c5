"""Benchmark records: one JSON file `<name>-<date>.json`, written by a program and never edited by hand.

    name, version, status, created, commit, machine, versions, params, seed, repeats, peak_gb, quiet, noise, metrics

`status` is complete, interrupted or crashed (then `metrics` holds what was measured by then). `noise` is what others used of the
processors meanwhile, `quiet` the verdict (see `noise`); a record from before `noise` existed judged by the load before the run.
`version` is the benchmark's: figures of two versions cannot be compared. `seconds` is what all of the benchmark took, where it is there.
`peak_gb` is that of the largest process of the benchmark until the record was made; metrics may hold that of a part.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .noise import Noise

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STATUSES = ("complete", "interrupted", "crashed")
PACKAGES = ("polyformer", "openfhe", "tenseal", "numpy", "torch", "onnx", "onnxruntime")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores that this process may use, threads used, memory in GB."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB (1e9 bytes); since the last `memory.watch`, where there was one."""
    from he_backend.heap import peak_rss  # which imports numpy, and a list of benchmarks needs none

    return peak_rss() / 1e9


def _largest_gb() -> float:
    """The same of this process or of a child that has ended, whichever was larger."""
    return max(peak_gb(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9)  # counted in KiB


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions, and Python's."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of this repository, with "+changes" if files differ from it; "unknown" outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(
    name: str,
    *,
    metrics: Mapping[str, Any],
    params: Mapping[str, Any],
    threads: int,
    seed: int | None = None,
    repeats: int = 1,
    seen: Noise | None = None,
    peak: float | None = None,
) -> dict[str, Any]:
    """A record of something just measured; under `polyformer bench` the runner fills in version, status and noise.

    Args:
        peak: GB of the largest process, of a benchmark that watches parts of its memory (`memory.watch`).
    """
    return {
        "name": name,
        "version": 1,
        "status": "complete",
        "created": now(),
        "commit": commit(),
        "machine": machine(threads),
        "versions": versions(),
        "params": dict(params),
        "seed": seed,
        "repeats": repeats,
        "peak_gb": round(_largest_gb() if peak is None else peak, 3),
        **(seen.to_json() if seen else {"quiet": None, "noise": None}),
        "metrics": dict(metrics),
    }


REQUIRED = {
    "name": str,
    "version": int,
    "created": str,
    "commit": str,
    "machine": dict,
    "versions": dict,
    "params": dict,
    "repeats": int,
    "metrics": dict,
}


def check(data: Any, where: str) -> dict[str, Any]:
    """A record that has what every record must have.

    Raises:
        ValueError: it is none, or a field is absent or of another kind; names the field.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is no benchmark record: {type(data).__name__} instead of an object")
    for field, kind in REQUIRED.items():
        if field not in data:
            raise ValueError(f"{where} is no benchmark record: it has no {field!r}")
        if not isinstance(data[field], kind):
            raise ValueError(f"{where}: {field!r} is {type(data[field]).__name__}, must be {kind.__name__}")
    status = data.get("status", "complete")
    if status not in STATUSES:
        raise ValueError(f"{where}: status {status!r} is none of {', '.join(STATUSES)}")
    return data


def read(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        ValueError: the file is no record (see `check`).
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no benchmark record: {error}") from error
    return check(data, str(path))


def latest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Name -> newest record of a folder; a complete one is preferred to a newer one that was cut short."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        if is_cost_table(path):
            continue
        data = read(path) | {"file": path.name}
        known = found.get(data["name"])
        if known is None or _rank(data) > _rank(known):
            found[data["name"]] = data
    return found


def is_cost_table(path: Path) -> bool:
    """Whether a file is a table of primitives (`benchmarks/costs`), which may lie among records."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(data, dict) and "ms" in data and "metrics" not in data


def _rank(data: Mapping[str, Any]) -> tuple[bool, str]:
    return data.get("status", "complete") == "complete", str(data["created"])


def write(data: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record as <name>-<date>.json; a second one of a day gets the time as well."""
    folder.mkdir(parents=True, exist_ok=True)
    day, _, clock = str(data["created"]).rstrip("Z").partition("T")
    path = folder / f"{data['name']}-{day}.json"
    if path.exists():
        path = folder / f"{data['name']}-{day}T{clock.replace(':', '')}.json"
    path.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    return path
