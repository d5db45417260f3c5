"""How commands talk to people and to scripts: text and progress on stderr, results on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

INSECURE = "[bold white on red] INSECURE TEST RING [/] [bold red]{}[/]"

Advance = Callable[[int, int, str], None]  # done, total, what


class Failure(Exception):  # noqa: N818  it is a result (of the demo's checks, for one), not a fault of the program
    """The command did its work and the outcome is bad; the message says all there is to say."""


def error_paragraph(what: str, next_step: str = "") -> None:
    """One readable paragraph on stderr."""
    err.print(f"[bold red]error:[/] {escape(what)}" + (f" {escape(next_step)}" if next_step else ""), soft_wrap=True)


def emit(data: Mapping[str, Any] | list[Any]) -> None:
    """A result for a script, alone on stdout."""
    print(json.dumps(data, indent=2, default=str))


def say(text: str) -> None:
    """A line for people; markup allowed."""
    err.print(text)


def warn_insecure(name: str) -> None:
    """The red line that every output of a test-size ring carries."""
    err.print(INSECURE.format(escape(f"{name}: these parameters protect nothing; for tests only")))


@contextmanager
def bar(title: str) -> Iterator[Advance]:
    """A progress bar on stderr; what it yields takes (done, total, what)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=err, transient=False) as progress:
        task = progress.add_task(title, total=None, what="")

        def advance(done: int, total: int, what: str = "") -> None:
            progress.update(task, completed=done, total=max(total, 1), what=escape(what[:60]))

        yield advance


def size(count: float) -> str:
    """Bytes for people: 12.3 MB (decimal)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def must_exist(path: Path, made_by: str) -> Path:
    """A file that an earlier step makes.

    Raises:
        Failure: it is not there; names the command that makes it.
    """
    if not path.exists():
        raise Failure(f"{path} does not exist; `{made_by}` makes it")
    return path


def load_array(path: Path) -> Any:
    """What np.load makes of a .npy or .npz file.

    Raises:
        Failure: it is neither.
    """
    import zipfile

    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Failure(f"{path} is no .npy or .npz file of numbers") from error
