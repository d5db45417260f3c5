"""Figures of training benchmarks, drawn from their records by matplotlib: colour-blind safe, text as text in SVG.

Colours are those of Okabe and Ito (Color Universal Design, 2008), and every line has its own marker too, so that a
figure can be read in grey. Black is kept for text. Nothing is shown: no window opens and no global setting changes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")


def new(*, columns: int = 1, rows: int = 1, width: float = 9.0, height: float = 3.6) -> tuple[Any, Any]:
    """Return a matplotlib Figure and its axes (one, or an array), inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; run `pip install 'polyformer[report]'`") from error
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(rows, columns)
    for axis in axes.flat if rows * columns > 1 else (axes,):
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def bars(axis: Any, table: Sequence[Mapping[str, Any]], figure: str, *, label: str, zero: bool = True) -> None:
    """Draw one horizontal bar a case with its deviation over seeds, the first case on top; a case whose figure is not
    finite gets the word instead of a bar.
    """
    names = [str(entry["case"]) for entry in table]
    means = [entry[figure]["mean"] for entry in table]
    finite = [m if math.isfinite(m) else math.nan for m in means]
    spread = [entry[figure]["deviation"] for entry in table]
    places = range(len(names))
    known = [m for m in finite if not math.isnan(m)]
    low = 0.0 if zero or not known else min(known) - 0.25 * (max(known) - min(known) or 1.0)
    axis.barh(places, finite, xerr=spread, color=PALETTE[0], alpha=0.75, ecolor="0.2", capsize=2)
    for place, mean in zip(places, finite, strict=True):
        if math.isnan(mean):
            axis.text(low, place, " not finite", va="center", color=PALETTE[1], fontsize=8)
    axis.set_yticks(list(places), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=low)
    axis.set_xlabel(label)


def lines(
    axis: Any,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> None:
    """Draw (x, mean, deviation) of each name as a line with its own colour, marker and dash; points that are not
    finite are left out.
    """
    for i, (name, points) in enumerate(series.items()):
        kept = [p for p in points if math.isfinite(p[1])]
        axis.errorbar(
            [p[0] for p in kept],
            [p[1] for p in kept],
            yerr=[p[2] for p in kept],
            label=name,
            color=PALETTE[i % len(PALETTE)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINES[(i // len(PALETTE)) % len(LINES)],
            markersize=4,
            linewidth=1.4,
            capsize=2,
        )
    if logarithmic:
        axis.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in series.values() for p in points})
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    if series:
        axis.legend(frameon=False, fontsize=8)


def by_name(
    table: Sequence[Mapping[str, Any]], figure: str, *, x: str, name: str = "case"
) -> dict[str, list[tuple[float, float, float]]]:
    """Return the series of `lines` from a record's summary: x and name are columns of it."""
    series: dict[str, list[tuple[float, float, float]]] = {}
    for entry in table:
        if figure in entry:
            point = (float(entry[x]), float(entry[figure]["mean"]), float(entry[figure]["deviation"]))
            series.setdefault(str(entry[name]), []).append(point)
    return {key: sorted(points) for key, points in series.items()}


def svg(drawing: Any) -> str:
    """Return a figure as an SVG element for a page: text stays text, no XML head, no date, ids that do not vary."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polyformer"}):
        drawing.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    return target.getvalue()[target.getvalue().index("<svg") :]
