"""Run benchmarks one after another, each in a process of its own: one that crashes takes nothing with it, and peak memory is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from he_backend import heap

from . import records
from .registry import Benchmark, Progress
from .worker import stamped

ENCRYPTED = ("primitives", "encrypted", "race", "scaling")  # groups that evaluate circuits, as a server does
PATIENCE_S = 20.0  # for an interrupted benchmark to end by itself
LAST_LINES = 12  # of what a crashed one wrote


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one benchmark ended."""

    name: str
    status: str  # complete, interrupted, crashed
    seconds: float
    record: dict[str, Any] | None = None  # what was measured
    path: Path | None = None  # its file; None if nothing was measured, or if the record was thrown away
    why: str = ""  # for a crash: the error, or the signal and the last lines


def run(
    benchmarks: Sequence[Benchmark],
    *,
    repeats: int,
    seeds: Sequence[int],
    quick: bool,
    folder: Path | None,
    progress: Progress,
) -> Iterator[Outcome]:
    """Run each and yield how it ended. After Ctrl-C the running one is the last; what it had measured is kept.

    Records of a quick run go to `folder`, or are thrown away: they prove nothing.
    """
    for benchmark in benchmarks:
        with tempfile.TemporaryDirectory(prefix="polyformer-bench-") as scratch:
            target = Path(scratch) if quick and folder is None else folder
            outcome = _one(benchmark, repeats, seeds, quick, target, Path(scratch) / "partial.json", progress)
            if outcome.path and target == Path(scratch):
                outcome = replace(outcome, path=None)
            yield outcome
        if outcome.status == "interrupted":
            return


def _one(
    benchmark: Benchmark,
    repeats: int,
    seeds: Sequence[int],
    quick: bool,
    folder: Path | None,
    partial: Path,
    progress: Progress,
) -> Outcome:
    settings = {
        "repeats": repeats,
        "seeds": list(seeds),
        "quick": quick,
        "folder": str(folder) if folder else None,
        "partial": str(partial),
    }
    reader, writer = os.pipe()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", benchmark.name, json.dumps(settings), str(writer)],
            cwd=records.ROOT,
            env={**heap.ENVIRONMENT, **os.environ} if benchmark.group in ENCRYPTED else None,
            pass_fds=(writer,),
            stdout=errors,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches it once, from here
        )
        os.close(writer)
        said: dict[str, Any] = {}
        with os.fdopen(reader) as pipe:
            try:
                for line in pipe:
                    message = json.loads(line)
                    if "progress" in message:
                        done, total, what = message["progress"]
                        progress(done, total, f"{benchmark.name}: {what}")
                    else:
                        said |= message
                code = process.wait()
                status = "crashed" if code else "complete"
            except KeyboardInterrupt:
                status = "interrupted"
                code = _stop(process)
                for line in pipe:  # it may have written its record all the same
                    said |= json.loads(line)
        path = Path(said["path"]) if "path" in said else None
        errors.seek(0)
        last = [text.decode(errors="replace").rstrip() for text in deque(errors, maxlen=LAST_LINES)]
    if path is None and partial.exists():
        kept = stamped(json.loads(partial.read_text()), benchmark, None, quick=quick, status=status)
        path = benchmark.write(kept, folder)
    why = "" if status != "crashed" else said.get("error") or "\n".join([_ended(code), *last])
    return Outcome(
        name=benchmark.name,
        status=status,
        seconds=time.perf_counter() - start,
        record=json.loads(path.read_text(encoding="utf-8")) if path else None,
        path=path,
        why=why,
    )


def _stop(process: subprocess.Popen[bytes]) -> int:
    """End a benchmark after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _ended(code: int) -> str:
    if code >= 0:
        return f"it ended with code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"it was ended by {name}{hint}"
