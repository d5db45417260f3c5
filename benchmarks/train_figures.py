"""Tables and figures of training benchmarks, from the summaries of their records: colour-blind safe, readable in grey.

Colours and markers are those of `blocks`; every line has both. A mean that is null belongs to a group with a run that
is not finite: it has no point, and a dash in the table. No window opens and no global setting of matplotlib changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.blocks import COLOURS, SMALL, Table, legend, logarithmic, look
from benchmarks.charts import figure as digits

Entry = Mapping[str, Any]
Series = Mapping[str, Sequence[tuple[float, float, float]]]  # name -> (x, mean, deviation)


def table(summary: Sequence[Entry], caption: str, columns: Mapping[str, str], figures: Mapping[str, str]) -> Table:
    """Return a table of a summary, figures as mean ± standard deviation over seeds. `columns` and `figures` map what
    stands in an entry to the heading shown.
    """
    rows = [
        [*(entry.get(name) for name in columns), *(spread(entry[name]) if name in entry else None for name in figures)]
        for entry in summary
    ]
    return Table(caption=caption, columns=[*columns.values(), *figures.values()], rows=rows)


def spread(figure: Mapping[str, Any]) -> str | None:
    """Return mean ± deviation, both to the second digit of the deviation; the mean to four digits where runs do not
    differ or there is one; both as powers of ten where they would be long; None where a run is not finite.
    """
    mean, deviation = figure["mean"], figure["deviation"]
    if mean is None:
        return None
    if mean and not 1e-3 <= abs(mean) < 1e6:
        return f"{digits(mean)} ± {digits(deviation)}" if deviation else digits(mean)
    if not deviation:
        return f"{mean:.4g}" if abs(mean) < 1e4 else f"{mean:,.0f}"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:,.{decimals}f} ± {deviation:,.{decimals}f}"


def bars(axis: Any, summary: Sequence[Entry], figure: str, *, label: str, zero: bool = True) -> None:
    """Draw one horizontal bar a case with its deviation over seeds, the first case on top; without `zero` the axis
    starts below the smallest mean, and dots stand for bars, whose length would mislead.
    """
    names = [str(entry["case"]) for entry in summary]
    known = [(i, e[figure]) for i, e in enumerate(summary) if e[figure]["mean"] is not None]
    places, means = [i for i, _ in known], [f["mean"] for _, f in known]
    errors = [f["deviation"] or 0.0 for _, f in known]
    if zero:
        axis.barh(places, means, xerr=errors, color=COLOURS[0], alpha=0.75, ecolor="0.2", capsize=2)
    else:
        axis.errorbar(means, places, xerr=errors, color=COLOURS[0], fmt="o", markersize=5, ecolor="0.2", capsize=2)
    for i in set(range(len(names))) - set(places):
        axis.text(0.02, i, "not finite", va="center", color=COLOURS[1], transform=axis.get_yaxis_transform())
    axis.set_yticks(range(len(names)), names, fontsize=SMALL)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel(label)
    axis.grid(visible=False, axis="y")


def lines(axis: Any, series: Series, *, x_label: str, y_label: str, doubling: bool = False) -> None:
    """Draw each name as a line with its own colour and marker, and bars of one standard deviation over seeds.

    Args: `doubling` for places that double, on a logarithmic axis.
    """
    for i, (name, points) in enumerate(series.items()):
        xs, means, spread = zip(*points, strict=True) if points else ((), (), ())
        axis.errorbar(
            xs,
            means,
            yerr=spread,
            label=name,
            **look(i),
            linestyle="-" if i < len(COLOURS) else "--",
            markersize=4,
            linewidth=1.4,
            capsize=2,
        )
    if doubling:
        logarithmic(axis, "x", [p[0] for points in series.values() for p in points])
    else:
        axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    legend(axis)


def dots(axis: Any, names: Sequence[str], series: Series, *, x_label: str, y_label: str) -> None:
    """Draw series over named places, which have no order: markers side by side and no lines between them."""
    step = 0.6 / max(1, len(series))
    for i, (name, points) in enumerate(series.items()):
        xs, means, spread = zip(*points, strict=True) if points else ((), (), ())
        axis.errorbar(
            [x + (i - (len(series) - 1) / 2) * step for x in xs],
            means,
            yerr=spread,
            label=name,
            **look(i),
            linestyle="none",
            markersize=5,
            capsize=2,
        )
    axis.set_xticks(range(len(names)), names, fontsize=SMALL)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(visible=False, axis="x")
    legend(axis)


def by_name(
    summary: Sequence[Entry], figure: str, *, x: str, name: str = "case"
) -> dict[str, list[tuple[float, float, float]]]:
    """Return the series of `lines`: x and name are columns of the summary."""
    series: dict[str, list[tuple[float, float, float]]] = {}
    for entry in summary:
        if figure in entry and entry[figure]["mean"] is not None:
            point = (float(entry[x]), float(entry[figure]["mean"]), float(entry[figure]["deviation"] or 0.0))
            series.setdefault(str(entry[name]), []).append(point)
    return {key: sorted(points) for key, points in series.items()}


def categories(
    summary: Sequence[Entry], figure: str, *, category: str, name: str
) -> tuple[list[str], dict[str, list[tuple[float, float, float]]]]:
    """Return the categories in order of appearance, and series over their places."""
    names = list(dict.fromkeys(str(e[category]) for e in summary if figure in e))
    placed = [{**e, "place": names.index(str(e[category]))} for e in summary if figure in e]
    return names, by_name(placed, figure, x="place", name=name)
