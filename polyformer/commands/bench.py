"""bench: run a benchmark by name; `bench ops` measures every primitive at every level on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyformer.commands.console import bar, emit, out, say


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look", epilog="Example: polyformer bench ops")(bench)


def bench(
    name: Annotated[str | None, typer.Argument(help="Name of the benchmark; without it, the list.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each figure; the median counts.")] = 3,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for the record; default: the repository's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on stdout.")] = False,
) -> None:
    """Run a benchmark and write its record."""
    from benchmarks import registry

    if name is None:
        for topic, line in registry.topics().items():
            out.print(f"{topic:<12} {line}", markup=False)
        return
    with bar(name) as advance:
        path, record = registry.run(name, repeats=repeats, folder=to, progress=advance)
    if json:
        emit(record)
    say(f"{path}")
