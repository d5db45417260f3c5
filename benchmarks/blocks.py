"""What a benchmark shows of its record: tables and figures, as HTML and as Markdown."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from .charts import figure as digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# Okabe and Ito's palette (Color Universal Design, 2008): told apart by colour-blind readers, in this order.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# A figure is drawn for a phone, where it fills the page (336 of 390 pixels), and no letter is then below 9 pixels. On a wide page it grows
# to `style.STYLE`'s limit.
WIDTH_IN = 4.4
SMALL = 8.6  # points: the smallest letters of a figure, those of legends and of names along an axis
LONG = 28  # letters: a column with longer text is kept from being squeezed to a word a line


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns. A number is shown with three digits, None as a dash; text stays as it is."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self) -> str:
        """A table that scrolls sideways on a phone, under its caption, which does not."""
        kinds = [self._kind(i) for i in range(len(self.columns))]
        head = "".join(f"<th{kind}>{escape(c)}</th>" for kind, c in zip(kinds, self.columns, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{kind}>{escape(_joined(cell(v)))}</td>" for kind, v in zip(kinds, row, strict=True))
            + "</tr>"
            for row in self.rows
        )
        return (
            f"<figure class='table'><figcaption>{escape(self.caption)}</figcaption><div class='scroll' tabindex='0'>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
        )

    def markdown(self) -> str:
        """The same as a Markdown table."""
        lines = [
            f"| {' | '.join(self.columns)} |",
            f"|{'|'.join('---:' if self._numeric(i) else '---' for i in range(len(self.columns)))}|",
            *(f"| {' | '.join(cell(v).replace('|', chr(92) + '|') for v in row)} |" for row in self.rows),
        ]
        return f"{self.caption}\n\n" + "\n".join(lines) + "\n"

    def _numeric(self, i: int) -> bool:
        return all(row[i] is None or is_number(row[i]) for row in self.rows)

    def _kind(self, i: int) -> str:
        """The class of a column's cells."""
        if self._numeric(i):
            return " class=num"
        return " class=long" if any(len(cell(row[i])) > LONG for row in self.rows) else ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as SVG text, with what it shows in words for those who do not see it."""

    caption: str
    svg: str

    def html(self) -> str:
        """The figure in the page."""
        return f"<figure class='picture'>{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>"

    def markdown(self) -> str:
        """Its caption: the picture is on the page."""
        return f"*Figure, on the page: {self.caption}*\n"


Block = Table | Picture


def is_number(value: Any) -> bool:
    """A number that is shown with digits, not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell(value: Any) -> str:
    """How a value looks in a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return digits(value) if isinstance(value, float) else str(value)


def _joined(text: str) -> str:
    """A figure and its deviation, or a range, are not parted at the end of a line."""
    return re.sub(r" ([±→]) ", "\u00a0\\1\u00a0", text)


def picture(drawing: Drawing, caption: str) -> Picture:
    """A matplotlib figure as SVG: text stays text, the background is the page's, and the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polyformer"}):
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    label = escape(caption, quote=True)
    return Picture(caption=caption, svg=svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def panels(count: int = 1, *, height: float = 3.0) -> tuple[Drawing, list[Any]]:
    """An empty matplotlib figure in the page's look, and its axes, one below the other; needs no display.

    Args:
        height: of each, in inches.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; run `pip install 'polyformer[report]'`") from error
    drawing = Figure(figsize=(WIDTH_IN, count * height), layout="constrained")
    axes = list(drawing.subplots(count, 1, squeeze=False)[:, 0])
    for ax in axes:
        bare(ax)
    return drawing, axes


def bare(ax: Any) -> None:
    """Give axes the page's look, in place: two sides, a faint grid behind what is drawn, small ticks."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", labelsize=SMALL)


def logarithmic(ax: Any, which: str, places: Sequence[float] = ()) -> None:
    """Make an axis, "x" or "y", of a drawn figure logarithmic, its ticks plain numbers.

    Args:
        places: where its ticks are, else at 1, 2 and 5 of each power of ten, or at the powers alone where there are many.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set(**{f"{which}scale": "log"})
    low, high = getattr(ax, f"get_{which}lim")()
    axis = getattr(ax, f"{which}axis")
    axis.set_minor_locator(NullLocator())
    if places:
        axis.set_ticks(sorted(set(places)))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 2.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if 1e-3 <= value < 1e6 else _power(value)))


def _power(value: float) -> str:
    """A tick that has many digits: 10⁷ or 2.00·10⁷."""
    return digits(value).removeprefix("1.00·")


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series of a figure: no two of the first 64 share both."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}


def legend(ax: Any) -> None:
    """What the series are, above the axes, where it hides none of them; nothing where no series has a name."""
    handles, names = ax.get_legend_handles_labels()
    if not names:
        return
    longest = max(map(len, names))
    columns = min(len(names), 3 if longest <= 11 else 2 if longest <= 22 else 1)
    ax.legend(
        handles, names, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=columns, frameon=False, fontsize=SMALL
    )
