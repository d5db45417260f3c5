"""Benchmarks by name: every file of this folder that defines `measure` is one, imported when asked for.

    def measure(*, repeats: int, progress: Callable[[int, int, str], None]) -> dict   # a record, see `records.py`

The first line of such a file's docstring is what `polyformer bench` lists.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import records

HERE = Path(__file__).parent
Progress = Callable[[int, int, str], None]


def topics() -> dict[str, str]:
    """Name -> first line of its docstring; found without importing anything."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def run(name: str, *, repeats: int, folder: Path | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run a benchmark, write its record; the file and the record.

    Raises:
        ValueError: no benchmark has this name; lists those that exist.
    """
    known = topics()
    if name not in known:
        raise ValueError(f"no benchmark is called {name!r}; known are: {', '.join(known) or 'none yet'}")
    module = importlib.import_module(f"{__package__}.{name}")
    record: dict[str, Any] = module.measure(repeats=repeats, progress=progress)
    return records.write(record, folder or getattr(module, "FOLDER", records.RESULTS)), record
