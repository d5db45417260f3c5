"""Tables and figures of the records that `plaintext` makes."""

from __future__ import annotations

from collections.abc import Sequence

from . import records
from .blocks import COLOURS, MARKERS, Block, Table, axes, picture
from .registry import Record


def context_growth(record: Record) -> Sequence[Block]:
    """Log-log curves of seconds, and the exponents fitted to their ends."""
    rows = record["metrics"]["mixers"]
    drawing, ax = axes()
    for i, row in enumerate(rows):
        xs, ys = [p["tokens"] for p in row["points"]], [p["forward_s"] for p in row["points"]]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        ax.loglog(xs, ys, label=row["name"], markersize=4, linestyle="-" if i < len(COLOURS) else "--", **style)
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("seconds of one pass")
    ax.legend(fontsize=8, ncols=2)
    caption = "One pass of the model in the clear against the length of the context, one thread, log-log."
    lengths = sorted({p["tokens"] for row in rows for p in row["points"]})
    table = Table(
        caption="Seconds of one pass; exponent e of seconds ~ tokens^e over the longest contexts; growth of the process's peak memory",
        columns=("mixer", *(f"{n:,} tokens" for n in lengths), "exponent", "GB at the longest", "not measured because"),
        rows=[
            (
                row["name"],
                *({p["tokens"]: p["forward_s"] for p in row["points"]}.get(n) for n in lengths),
                row.get("exponent"),
                row["points"][-1]["forward_gb"] if row["points"] else None,
                row["stopped"] or "",
            )
            for row in rows
        ],
    )
    return [picture(drawing, caption), table]


def clear_request(record: Record) -> Sequence[Block]:
    """Milliseconds in the clear, and how many times longer the newest encrypted request of the same shape took."""
    encrypted = {n: r["metrics"]["evaluate_s"] for n, r in records.latest().items() if n in {"demo", "generate-2x128"}}
    names = [("demo", "32 tokens encrypted"), ("generate-2x128", "one token encrypted")]
    known = [(name, text) for name, text in names if name in encrypted]
    rows = [
        (row["name"], row["engine"], row["ms"], *(1000 * encrypted[name] / row["ms"] for name, _ in known))
        for row in record["metrics"]["rows"]
    ]
    columns = ("model", "engine", "ms, one request", *(f"{text}: times slower" for _, text in known))
    caption = (
        "One request in the clear on one thread; the slowdown compares with records of other runs on the same machine"
    )
    return [Table(caption=caption, columns=columns, rows=rows)]


def references(record: Record) -> Sequence[Block]:
    """Differences and speedups."""
    rows = [
        (
            row["name"],
            row["max_difference"],
            row["scale"],
            *(row[kind][key] for kind in ("forward", "training") for key in ("ours_s", "theirs_s", "speedup")),
        )
        for row in record["metrics"]["rows"]
    ]
    columns = ["layer and tokens", "largest difference", "largest value"]
    columns += [
        f"{kind}: {what}" for kind in ("forward", "training") for what in ("ours, s", "reference, s", "speedup")
    ]
    caption = (
        "Same weights, same input, one run, A B A B: Mamba against mambapy, linear attention against its definition"
    )
    return [Table(caption=caption, columns=columns, rows=rows)]
