"""report: report.html again from report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyformer.commands.console import INSECURE, Failure, err, must_exist, say


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look", epilog="Example: polyformer report runs/demo")(report)


def report(folder: Annotated[Path, typer.Argument(help="Folder with report.json, from `polyformer demo`.")]) -> None:
    """Write report.html from report.json."""
    import json

    from benchmarks.report import render

    source = must_exist(folder / "report.json" if folder.is_dir() else folder, "polyformer demo")
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
        page = render(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{source} is not a report: {error!r}") from error
    if data.get("insecure"):
        err.print(INSECURE.format("this report is of a test-size ring"))
    target = source.with_suffix(".html")
    target.write_text(page, encoding="utf-8")
    say(f"{target}: {len(page):,} bytes")
