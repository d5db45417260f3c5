"""Benchmark records: one JSON file `<name>-<date>.json`, written by a program and never edited by hand.

    name, version, created, commit, machine, versions, params, seed, repeats, quiet, metrics

`quiet` is true when nothing else used the processors before the measurement (load below a tenth of the cores).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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


def quiet() -> bool:
    """Whether the machine had nothing else to do during the last minute."""
    return os.getloadavg()[0] < 0.1 * len(os.sched_getaffinity(0))


def record(
    name: str,
    *,
    metrics: Mapping[str, Any],
    params: Mapping[str, Any],
    threads: int,
    seed: int | None = None,
    repeats: int = 1,
    was_quiet: bool | None = None,
) -> dict[str, Any]:
    """A record of something just measured."""
    return {
        "name": name,
        "version": VERSION,
        "created": now(),
        "commit": commit(),
        "machine": machine(threads),
        "versions": versions(),
        "params": dict(params),
        "seed": seed,
        "repeats": repeats,
        "quiet": quiet() if was_quiet is None else was_quiet,
        "metrics": dict(metrics),
    }


def write(data: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record as <name>-<date>.json; a second one of a day gets the time as well."""
    folder.mkdir(parents=True, exist_ok=True)
    day, _, clock = str(data["created"]).rstrip("Z").partition("T")
    path = folder / f"{data['name']}-{day}.json"
    if path.exists():
        path = folder / f"{data['name']}-{day}T{clock.replace(':', '')}.json"
    path.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    return path
