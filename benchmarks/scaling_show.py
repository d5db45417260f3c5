"""Tables and figures of the records of the group `scaling`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from .blocks import Block, Picture, Table, legend, logarithmic, look, panels, picture
from .registry import Record
from .scaling import AXES


def scaling(record: Record) -> Sequence[Block]:
    """Predicted and measured seconds against each size on one plot, the points, and the fitted exponents."""
    m, p = record["metrics"], record["params"]
    drawing, (ax,) = panels()
    for i, axis in enumerate(("tokens", "width", "blocks")):
        alone = [q for q in m["points"] if all(q[o] == p["base"][o] for o in AXES if o != axis)]
        points = sorted(alone, key=itemgetter(axis))
        relative = [q[axis] / p["base"][axis] for q in points]
        style = look(i)
        ax.plot(relative, [q["predicted_evaluate_s"] for q in points], linestyle="--", fillstyle="none", **style)
        measured = [(x, q["evaluate_s"]) for x, q in zip(relative, points, strict=True) if q["evaluate_s"] is not None]
        ax.plot([x for x, _ in measured], [y for _, y in measured], label=axis, **style)
    logarithmic(ax, "x", (0.5, 1, 2, 4))
    logarithmic(ax, "y")
    ax.set_xlabel("times the base size")
    ax.set_ylabel("seconds, encrypted")
    legend(ax)
    base = ", ".join(f"{axis} {p['base'][axis]}" for axis in AXES)
    caption = (
        f"Seconds of a request against one size at a time (base: {base}); dashed and hollow: predicted, full: measured."
    )
    table = Table(
        caption="Every size: predicted and measured",
        columns=(*AXES, "predicted s", "measured s", "predicted GB", "measured GB", "error", "not measured because"),
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
        caption="Exponents e of figure ~ size^e, least squares of the logarithms",
        columns=("size", "figure", "predicted e", "predicted e, where measured", "measured e", "points measured"),
        rows=[
            (
                row["axis"],
                {"evaluate_s": "seconds", "peak_gb": "memory"}[row["figure"]],
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


LARGE = (
    ("projected_evaluate_s", "projected evaluation, s"),
    ("projected_refresh_s", "projected refreshes, thread-s"),
    ("projected_encode_s", "projected encodings, thread-s"),
    ("projected_peak_gb", "projected peak memory, GB"),
    ("projected_key_gb", "projected keys, GB"),
    ("projected_refreshes", "projected refreshes, number"),
)


def projection(record: Record) -> Sequence[Block]:
    """Projected figures of the large models, the projection's error on measured ones, and what is assumed."""
    m, p = record["metrics"], record["params"]
    block, threads = p["block"], record["machine"]["threads"]
    shape = f"blocks of d = {block['width']}, {block['heads']} heads, ff = {block['hidden']}, {block['tokens']} tokens"
    large = Table(
        caption=f"PROJECTED from measured primitives, nothing of it was run: one request, {shape}, on {threads} threads; cost table "
        f"{p['costs'].removesuffix('.json')}",
        columns=("model", "parameters", *(words for _, words in LARGE)),
        rows=[(f"{q['name']}, projected", q["parameters"], *(q[key] for key, _ in LARGE)) for q in m["models"]],
    )
    checks = Table(
        caption="The projection's error: the same projection of requests that were measured, whose records are named",
        columns=(
            "measured record",
            "projected evaluation, s",
            "measured evaluation, s",
            "projected over measured",
            "projected over measured memory",
            "weights encoded ahead, GB",
            "no check because",
        ),
        rows=[
            (
                q.get("file", q["name"]).removesuffix(".json"),
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
        caption=f"PROJECTED by primitive, {first['name']}; a weighted sum counts its terms",
        columns=("primitive", "projected calls", "projected thread-s"),
        rows=[(name.replace("_", " "), first["projected_counts"].get(name), seconds) for name, seconds in parts],
    )
    assumptions = Table(
        caption="What the projection assumes", columns=("assumption",), rows=[(text,) for text in m["assumptions"]]
    )
    return [large, checks, shares, assumptions]


def quality(record: Record) -> Sequence[Block]:
    """One row a mixer, and held-out loss against predicted seconds."""
    rows = record["metrics"]["rows"]
    table = Table(
        caption=f"Quality beside cost. {_conditions(record['params'])} A dash has its reason in the last column.",
        columns=(
            "mixer",
            "measured held-out loss",
            "measured recall",
            "exact degree, mixer",
            "exact depth, mixer",
            "exact degree, model",
            "levels, compiled",
            "refreshes, compiled",
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
    return [_scatter(both, record["params"]), table] if both else [table]


def _conditions(params: Mapping[str, Any]) -> str:
    """Which figures were measured, which are exact, which predicted, and of which models."""
    named = {name: f" ({file.removesuffix('.json')})" for name, file in params["records"].items()}
    loss, recall, encoder = (named.get(name, "") for name in ("equal-budget", "recall", "encrypted-scaling"))
    return (
        f"MEASURED: held-out loss{loss} and recall{recall} of the mixer as it was trained, with its non-polynomial functions, "
        "at the 2 blocks of those records, mean and deviation over seeds; seconds of another model of the same size, a "
        f"bidirectional encoder with a head on its first token{encoder}. EXACT: degree and depth of the polynomial form, of the "
        "mixer alone and of the model. COMPILED (levels of the circuit, refreshes) and PREDICTED (seconds): one request of a "
        f"causal language model in that form, random weights, {_shape(params)}."
    )


def _shape(params: Mapping[str, Any]) -> str:
    """The model whose cost is predicted, and for what."""
    model = json.loads(params["model"])
    blocks = f"{model['blocks']} block{'s' * (model['blocks'] != 1)}"
    ring = "128 bits" if params["log_n"] is None else f"an insecure test ring of N = 2^{params['log_n']}"
    sizes = f"d = {model['width']}, {model['heads']} heads, {model['length']} tokens"
    return f"{blocks}, {sizes}, {params['threads']} threads, {ring}"


def _scatter(rows: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> Picture:
    drawing, (ax,) = panels(height=3.6)
    for i, row in enumerate(rows):
        x, loss = row["predicted_evaluate_s"], row["heldout_loss"]
        ax.errorbar(x, loss["mean"], yerr=loss["deviation"], label=row["mixer"], linestyle="", **look(i))
    ax.set_xlabel("predicted seconds of an encrypted request")
    ax.set_ylabel("measured held-out loss, nats a token")
    legend(ax)
    return picture(
        drawing,
        "Measured held-out loss of the mixer as it was trained, with its non-polynomial functions, at 2 blocks (mean and deviation over "
        f"seeds), against the predicted seconds of one encrypted request of its polynomial form: {_shape(params)}.",
    )


def _mean(figure: Mapping[str, Any] | None) -> str | None:
    return None if figure is None else f"{figure['mean']:.3f} ± {figure['deviation']:.3f}"


def _recall(figure: Mapping[str, float] | None) -> str | None:
    return None if figure is None else ", ".join(f"{task} {value:.2f}" for task, value in figure.items())
