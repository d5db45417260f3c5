"""Cost tables on the page: what each primitive takes at each level, in milliseconds of a thread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import records
from .blocks import Block, Table

CostTable = Mapping[str, Any]
MOST_LEVELS = 12  # columns: as many as can be read


def newest(*folders: Path) -> dict[str, CostTable]:
    """Name -> cost table of some folders; of tables with one name (processor, library, parameters) the newest."""
    found: dict[str, CostTable] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            if not records.is_cost_table(path):
                continue
            table = json.loads(path.read_text(encoding="utf-8"))
            known = found.get(path.stem)
            if known is None or str(table["created"]) > str(known["created"]):
                found[path.stem] = table
    return dict(sorted(found.items()))


def blocks(table: CostTable) -> Sequence[Block]:
    """Primitives by levels that were measured, for one thread and for two at once."""
    titles = (("ms", "one thread"), ("ms_2_threads", "two threads at once"))
    return [_table(table, key, title) for key, title in titles if table.get(key)]


def _table(table: CostTable, key: str, title: str) -> Table:
    rows = table[key]
    skipped = set(table.get("interpolated", ()))
    measured = sorted({int(n) for row in rows.values() for n in row} - skipped, reverse=True)
    levels = measured if len(measured) <= MOST_LEVELS else _some(measured)
    more = len(measured) - len(levels)
    rest = f"; {more} more level{'s' * (more > 1)} in the file" if more else ""
    return Table(
        caption=f"Milliseconds of one call, {title}, by level of the first argument{rest}",
        columns=("primitive", *(f"level {n}" for n in levels)),
        rows=[(name.replace("_", " "), *(row.get(str(n)) for n in levels)) for name, row in rows.items()],
    )


def _some(levels: Sequence[int]) -> list[int]:
    """Both ends and levels spread evenly between them."""
    last = len(levels) - 1
    return [levels[round(i * last / (MOST_LEVELS - 1))] for i in range(MOST_LEVELS)]
