"""Tables and figure of `two-libraries`: requests, operators, primitives; TenSEAL beside OpenFHE and the ratio of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import COLOURS, SMALL, Block, Table, legend, logarithmic, panels, picture
from .registry import Record
from .sides_show import lines

NAMES = {"openfhe": "OpenFHE", "tenseal": "TenSEAL"}
RATIO = "ratio"  # TenSEAL over OpenFHE
SIDES = ("openfhe", "tenseal")
# OpenFHE's rotations are partly hoisted: their decompositions and mod-downs are counted as key switches. SEAL's are whole.
SWITCHES = "rotate and key switch"


def show(record: Record) -> Sequence[Block]:
    """One bar picture and four tables; the last one, of primitives at one ring, is absent from a run cut short."""
    m = record["metrics"]
    rows = m["models"]
    blocks: list[Block] = [bars(rows)] if rows else []
    blocks.append(requests(rows, m))
    blocks.append(side_by_side(rows, "operators", "By node of the model, one thread: thread-seconds of one request"))
    caption = (
        "By CKKS primitive, the same runs, each library at its own ring; OpenFHE splits rotations, so compare the sum"
    )
    blocks.append(side_by_side(rows, "primitives", caption))
    if m.get("primitives_ms"):
        blocks.append(at_one_ring(m))
    return blocks


def bars(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Seconds of evaluation on one thread and on two, by model."""
    drawing, (ax,) = panels()
    kinds = [(name, key) for name in SIDES for key in ("evaluate_s", "evaluate_2_threads_s")]
    width = 0.8 / len(kinds)
    seconds = [row["libraries"][name][key] for name, key in kinds for row in rows]
    for i, (name, key) in enumerate(kinds):
        threads = "1 thread" if key == "evaluate_s" else "2 threads"
        drawn = ax.bar(
            [at + (i - (len(kinds) - 1) / 2) * width for at in range(len(rows))],
            [row["libraries"][name][key] for row in rows],
            width,
            color=COLOURS[SIDES.index(name)],
            alpha=1.0 if key == "evaluate_s" else 0.55,
            label=f"{NAMES[name]}, {threads}",
        )
        ax.bar_label(drawn, fmt="%.2g", fontsize=SMALL, rotation=90, padding=2)
    ax.set_xticks(range(len(rows)), [row["name"] for row in rows])
    ax.set_ylim(
        min(seconds) / 3, 4 * max(seconds)
    )  # or the shortest bar has no height, and the longest no room for its figure
    logarithmic(ax, "y")
    ax.set_ylabel("seconds, encrypted")
    legend(ax)
    return picture(drawing, "Seconds of one encrypted evaluation, the same model in both libraries, logarithmic")


def requests(rows: Sequence[Mapping[str, Any]], m: Mapping[str, Any]) -> Table:
    """Figures of whole requests."""
    caption = (
        "The same model and input, TenSEAL over OpenFHE, on one thread unless it says two; evaluate: median over neighbouring "
        "turns A B A B"
    )
    if m.get("levels"):
        most = ", ".join(f"{NAMES[name]} {m['levels'][name]}" for name in SIDES)
        caption += f"; most levels at 128 bits and scale 2^40: {most}"
    if m.get("too_deep"):
        caption += f"; two blocks in TenSEAL: {m['too_deep'].partition(' Use ')[0]}"
    cells: list[tuple[Any, ...]] = []
    for row in rows:
        first, second = (row["libraries"][name] for name in SIDES)
        cells += [(row["name"], *line) for line in lines(first, second, row["ratio"]["median"])]
        cells.append((row["name"], "peak memory of both together, GB", None, None, row["peak_gb"]))
    return Table(caption=caption, columns=("model", "figure", *NAMES.values(), RATIO), rows=cells)


def side_by_side(rows: Sequence[Mapping[str, Any]], table: str, caption: str) -> Table:
    """The rows of `efficiency.tables` of both, joined by name; a row that one library does not have is a dash there."""
    lines = []
    for row in rows:
        mine = {name: {r["name"]: r for r in _with_sum(row["libraries"][name][table])} for name in SIDES}
        for part in dict.fromkeys(n for name in SIDES for n in mine[name]):
            a, b = (mine[name].get(part, {}) for name in SIDES)
            first, second = a.get("seconds"), b.get("seconds")
            ratio = second / first if first and second is not None else None
            lines.append(
                (row["name"], part, a.get("count"), b.get("count"), first, second, ratio, _levels(a), _levels(b))
            )
    columns = (
        "model",
        "part",
        *(f"{name} calls" for name in NAMES.values()),
        *(f"{name} s" for name in NAMES.values()),
        RATIO,
        *(f"{name} levels" for name in NAMES.values()),
    )
    return Table(caption=caption, columns=columns, rows=lines)


def at_one_ring(m: Mapping[str, Any]) -> Table:
    """Thread-milliseconds of each primitive at equal ring, levels, scale and digits."""
    ring = m["ring"]["tenseal"]
    found = m["primitives_ms"]
    levels = sorted({level for row in found.values() for level in row}, key=int, reverse=True)
    lines = []
    for part, row in found.items():
        cells: list[float | None] = []
        for level in levels:
            a, b = (row.get(level, {}).get(name) for name in SIDES)
            cells += [a, b, b / a if a and b is not None else None]
        lines.append((part, *cells))
    return Table(
        caption=f"Thread-milliseconds of one primitive at one ring: N = 2^{ring['log_n']}, {ring['levels']} levels, scale "
        f"2^{ring['scale_bits']}, one digit a prime; keys: OpenFHE's are cut to the level, TenSEAL's are for the whole chain",
        columns=("primitive", *(f"{n}, level {level}" for level in levels for n in (*NAMES.values(), RATIO))),
        rows=lines,
    )


def _with_sum(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows, and after the key switches the sum of all that rotates and switches keys."""
    parts = [r for r in rows if r["name"] in ("rotate", "key switch")]
    if not parts:
        return list(rows)
    levels = [level for r in parts for level in r["levels"]]
    both = {
        "name": SWITCHES,
        "count": sum(r["count"] for r in parts),
        "seconds": sum(r["seconds"] for r in parts),
        "levels": [max(levels), min(levels)],
    }
    at = max(i for i, r in enumerate(rows) if r in parts) + 1
    return [*rows[:at], both, *rows[at:]]


def _levels(row: Mapping[str, Any]) -> str | None:
    return f"{row['levels'][0]} → {row['levels'][1]}" if row else None
