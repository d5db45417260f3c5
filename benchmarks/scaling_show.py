"""Tables and figures of the records of the group `scaling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from .blocks import COLOURS, MARKERS, Block, Picture, Table, axes, picture
from .registry import Record
from .scaling import AXES


def scaling(record: Record) -> Sequence[Block]:
    """Predicted and measured seconds against each size on one plot, the points, and the fitted exponents."""
    m, p = record["metrics"], record["params"]
    drawing, ax = axes()
    for i, axis in enumerate(("tokens", "width", "blocks")):
        alone = [q for q in m["points"] if all(q[o] == p["base"][o] for o in AXES if o != axis)]
        points = sorted(alone, key=itemgetter(axis))
        relative = [q[axis] / p["base"][axis] for q in points]
        style = {"color": COLOURS[i], "marker": MARKERS[i]}
        ax.plot(relative, [q["predicted_evaluate_s"] for q in points], linestyle="--", fillstyle="none", **style)
        measured = [(x, q["evaluate_s"]) for x, q in zip(relative, points, strict=True) if q["evaluate_s"] is not None]
        ax.plot([x for x, _ in measured], [y for _, y in measured], label=axis, **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("times the base size")
    ax.set_ylabel("seconds, encrypted")
    ax.legend(fontsize=8)
    base = ", ".join(f"{axis} {p['base'][axis]}" for axis in AXES)
    caption = f"Seconds of a request against one size at a time (base: {base}); dashed: predicted, full: measured."
    table = Table(
        caption="Every size: predicted and measured",
        columns=(*AXES, "predicted s", "s", "predicted GB", "GB", "error", "not measured because"),
        rows=[
            (
                *(q[axis] for axis in AXES),
                q["predicted_evaluate_s"],
                q["evaluate_s"],
                q["predicted_peak_gb"],
                q["peak_gb"],
                q.get("max_abs_error"),
                q["why"] or "",
            )
            for q in m["points"]
        ],
    )
    fits = Table(
        caption="e of figure ~ size^e, least squares of the logarithms",
        columns=("size", "figure", "predicted", "predicted, where measured", "measured", "points measured"),
        rows=[
            (
                row["axis"],
                row["figure"],
                row["predicted"],
                row["predicted_at_measured"],
                row["measured"],
                row["measured_points"],
            )
            for row in m["exponents"]
        ],
    )
    return [picture(drawing, caption), table, *by_node(m["points"]), fits]


def by_node(points: Sequence[Mapping[str, Any]]) -> Sequence[Table]:
    """Thread-seconds of each node of the model at every measured size; none if no point says them, as in older records."""
    measured = [q for q in points if q.get("nodes_s")]
    if not measured:
        return ()
    names = list(dict.fromkeys(name for q in measured for name in q["nodes_s"]))

    def levels(name: str) -> str:
        """Highest and lowest over all points: with the size, the chain changes too."""
        spans = [q["nodes_levels"][name] for q in measured if name in q["nodes_levels"]]
        return f"{max(high for high, _ in spans)} → {min(low for _, low in spans)}"

    columns = [
        f"T {q['tokens']}, d {q['width']}, {q['blocks']} bl., {q['threads']} thr., L {q['levels']}" for q in measured
    ]
    return (
        Table(
            caption="Thread-seconds by node against tokens T, width d, blocks and threads; L: levels of the chain; levels: the node's",
            columns=("node", "levels", *columns),
            rows=[(name, levels(name), *(q["nodes_s"].get(name) for q in measured)) for name in names],
        ),
    )


def projection(record: Record) -> Sequence[Block]:
    """Projected figures of the large models, the projection's error on measured ones, and what is assumed."""
    m = record["metrics"]
    keys = ("evaluate_s", "refresh_s", "encode_s", "peak_gb", "key_gb", "refreshes")
    large = Table(
        caption="PROJECTED from measured primitives, nothing of it was run",
        columns=("model", "parameters", *(f"projected {k.replace('_', ' ')}" for k in keys)),
        rows=[(q["name"], q["parameters"], *(q[f"projected_{k}"] for k in keys)) for q in m["models"]],
    )
    checks = Table(
        caption="The same projection of requests that were measured: projected over measured",
        columns=(
            "record",
            "projected s",
            "measured s",
            "ratio",
            "memory, ratio",
            "weights encoded ahead, GB",
            "no check because",
        ),
        rows=[
            (
                q["name"],
                q.get("projected_evaluate_s"),
                q.get("measured_evaluate_s"),
                q.get("projected_over_measured"),
                q.get("projected_peak_over_measured"),
                f"{q['encoded_gb']:.3g}, {q['encoded_gb_from']}" if "encoded_gb" in q else None,
                q.get("why") or "",
            )
            for q in m["checks"]
        ],
    )
    first = m["models"][0]
    parts = sorted(first["projected_primitives_s"].items(), key=lambda item: -item[1])
    shares = Table(
        caption=f"Projected thread-seconds by primitive, {first['name']}",
        columns=("primitive", "calls", "thread-s"),
        rows=[(name, first["projected_counts"].get(name), seconds) for name, seconds in parts],
    )
    assumptions = Table(caption="Assumptions", columns=("assumption",), rows=[(text,) for text in m["assumptions"]])
    return [large, checks, shares, assumptions]


QUALITY = (
    "Held-out loss and recall: of the mixer as it was trained, with its non-polynomial functions, at the 2 blocks of the training "
    "records. Degree and depth: of the mixer alone in its polynomial form. Degree of the model, levels, refreshes and predicted seconds: "
    "of a causal language model of 1 block in that form, random weights. Measured seconds: of another model of the same size, a "
    "bidirectional encoder with a head on its first token (`encrypted-scaling`)"
)


def quality(record: Record) -> Sequence[Block]:
    """One row a mixer, and held-out loss against predicted seconds."""
    rows = record["metrics"]["rows"]
    table = Table(
        caption=f"Quality beside cost; a dash has its reason in the last column. {QUALITY}",
        columns=(
            "mixer",
            "held-out loss",
            "recall",
            "degree",
            "depth",
            "degree of the model",
            "levels of the circuit",
            "refreshes",
            "predicted s",
            "measured s, encoder",
            "remarks",
        ),
        rows=[
            (
                row["mixer"],
                _mean(row["heldout_loss"]),
                _recall(row["recall"]),
                row["degree"],
                row["depth"],
                row.get("model_degree"),
                row.get("circuit_levels"),
                row["refreshes"],
                row["predicted_evaluate_s"],
                row["measured_evaluate_s"],
                "; ".join(dict.fromkeys(t for t in (row["note"], *row["why"].values()) if t)),
            )
            for row in rows
        ],
    )
    both = [row for row in rows if row["heldout_loss"] and row["predicted_evaluate_s"]]
    return [_scatter(both), table] if both else [table]


def _scatter(rows: Sequence[Mapping[str, Any]]) -> Picture:
    drawing, ax = axes()
    for i, row in enumerate(rows):
        loss = row["heldout_loss"]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.errorbar(
            row["predicted_evaluate_s"], loss["mean"], yerr=loss["deviation"], label=row["mixer"], linestyle="", **style
        )
    ax.set_xlabel("predicted seconds of an encrypted request")
    ax.set_ylabel("held-out loss, nats a token")
    ax.legend(fontsize=8)
    return picture(
        drawing,
        "Held-out loss of the non-polynomial mixer at 2 blocks (mean and deviation over seeds) against predicted encrypted seconds of its "
        "polynomial form at one block.",
    )


def _mean(figure: Mapping[str, Any] | None) -> str | None:
    return None if figure is None else f"{figure['mean']:.3f} ± {figure['deviation']:.3f}"


def _recall(figure: Mapping[str, float] | None) -> str | None:
    return None if figure is None else ", ".join(f"{task} {value:.2f}" for task, value in figure.items())
