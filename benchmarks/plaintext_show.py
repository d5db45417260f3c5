"""Tables and figures of the records that `plaintext` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .blocks import COLOURS, Block, Table, legend, logarithmic, look, panels, picture
from .registry import Record


def context_growth(record: Record) -> Sequence[Block]:
    """Log-log curves of seconds, and the exponents fitted to their ends."""
    rows = record["metrics"]["mixers"]
    drawing, (ax,) = panels()
    for i, row in enumerate(rows):
        xs, ys = [p["tokens"] for p in row["points"]], [p["forward_s"] for p in row["points"]]
        ax.plot(xs, ys, label=row["name"], markersize=4, linestyle="-" if i < len(COLOURS) else "--", **look(i))
    logarithmic(ax, "x", [p["tokens"] for row in rows for p in row["points"]])
    logarithmic(ax, "y")
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("seconds of one pass")
    legend(ax)
    caption = "One pass of the model in the clear against the length of the context, one thread, log-log."
    lengths = sorted({p["tokens"] for row in rows for p in row["points"]})
    table = Table(
        caption="Seconds of one pass; exponent e of seconds ~ tokens^e over the longest contexts; GB: peak of the process during "
        "the passes above what was resident before",
        columns=(
            "mixer",
            *(f"{n:,} tokens" for n in lengths),
            "exponent",
            "GB above before, at the longest",
            "not measured because",
        ),
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


# Encrypted records to compare with: name, what it is, and how many of the clear request's tokens it answers.
ENCRYPTED = (("demo", "all tokens encrypted", None), ("generate-2x128", "one token encrypted", 1))


def clear_request(record: Record, found: Mapping[str, Record]) -> Sequence[Block]:
    """Milliseconds in the clear, and how many times longer the encrypted request of the same shape took.

    One encrypted token is set beside a token's share of the clear request. Records of another machine, of a quick run or of another shape
    are not compared with, and the caption says so.
    """
    shape = record["params"]
    known: list[tuple[str, float, float]] = []
    left_out: list[str] = []
    for name, text, tokens in ENCRYPTED:
        if name not in found:
            continue
        other = found[name]
        if why := _not_comparable(record, other):
            left_out.append(f"{name} left out: {why}")
            continue
        share = 1.0 if tokens is None else tokens / shape["tokens"]
        over = "this request" if tokens is None else f"1/{shape['tokens']} of this request"
        threads = other["machine"]["threads"]
        column = f"{text}, {threads} thread{'s' * (threads > 1)}: times {over}"
        known.append((column, other["metrics"]["evaluate_s"], share))
    rows = [
        (
            row["name"],
            row["engine"],
            row["ms"],
            row.get("spread_ms"),
            row["ms"] / shape["tokens"],
            *(1000 * seconds / (share * row["ms"]) for _, seconds, share in known),
        )
        for row in record["metrics"]["rows"]
    ]
    columns = ("model", "engine", "ms, one request", "spread, ms", "ms a token of it", *(text for text, _, _ in known))
    threads = record["machine"]["threads"]
    caption = f"One request of {shape['tokens']} tokens in the clear on {threads} thread{'s' * (threads > 1)}"
    if known:
        caption += "; beside encrypted requests of other runs on the same machine, evaluation alone, on the threads that the column says"
    return [Table(caption="; ".join([caption, *left_out]), columns=columns, rows=rows)]


def _not_comparable(clear: Record, encrypted: Record) -> str:
    """Why an encrypted record says nothing about a clear one; "" if it does."""
    mine, other = clear["machine"], encrypted["machine"]
    for key in ("cpu", "cores"):
        if mine.get(key) != other.get(key):
            return f"made on a machine with {other.get(key)}{' cores' * (key == 'cores')}, not {mine.get(key)}"
    if encrypted.get("quick") or encrypted["params"].get("insecure"):
        return "a quick run"
    if encrypted["metrics"].get("evaluate_s") is None:
        return "it has no evaluation"
    model = encrypted["params"].get("model")  # records without it say their shape in their name
    if model:
        own = {key: clear["params"][key] for key in ("blocks", "width")} | {"length": clear["params"]["tokens"]}
        differ = [f"{key} {model[key]}, not {n}" for key, n in own.items() if model.get(key) != n]
        return f"another shape: {', '.join(differ)}" if differ else ""
    return ""


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
