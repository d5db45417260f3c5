"""One benchmark in a process of its own: `python -m benchmarks.worker NAME SETTINGS FD`, started by `runner`.

What it has to say goes as JSON lines to the file descriptor: {"progress": [done, total, what]}, {"path": file} or {"error": sentence}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import noise, records, registry


def main(name: str, settings: Mapping[str, Any], descriptor: int) -> int:
    """Run, write the record, say where it is; 0 if that worked, 1 for an error that a sentence explains."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # also where a shell started us in the background and ignores it
    with os.fdopen(descriptor, "w", buffering=1) as pipe:

        def tell(**message: Any) -> None:
            pipe.write(json.dumps(message, default=str) + "\n")

        benchmark = registry.benchmarks()[name]
        partial = Path(settings["partial"])
        folder = Path(settings["folder"]) if settings["folder"] else None

        def keep(record: Mapping[str, Any]) -> None:
            scratch = partial.with_suffix(".new")
            scratch.write_text(json.dumps(dict(record), default=str), encoding="utf-8")
            scratch.replace(partial)

        try:
            with noise.watch() as seen:
                record = benchmark.measure(
                    registry.Settings(
                        repeats=settings["repeats"],
                        seeds=tuple(settings["seeds"]),
                        quick=settings["quick"],
                        folder=folder,
                        progress=lambda done, total, what: tell(progress=[done, total, what]),
                        keep=keep,
                    )
                )
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            tell(error=f"{type(error).__name__}: {error}")
            raise
        path = benchmark.write(stamped(record, benchmark, seen, quick=settings["quick"]), folder)
        tell(path=str(path))
    return 0


def stamped(
    record: Mapping[str, Any],
    benchmark: registry.Benchmark,
    seen: noise.Noise | None,
    *,
    quick: bool,
    status: str = "complete",
) -> dict[str, Any]:
    """The record with what the benchmark does not know itself; a calculation or cost table, which has no status, stays as it is."""
    if "status" not in record:
        return dict(record)
    return records.check(
        {
            **record,
            "version": benchmark.version,
            "status": status if record["status"] == "complete" else record["status"],
            "quick": quick,
            "conditions": f"quick size in place of: {benchmark.conditions}" if quick else benchmark.conditions,
            **({"seconds": round(seen.wall_s, 1), **seen.to_json()} if seen else {}),
        },
        benchmark.name,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
