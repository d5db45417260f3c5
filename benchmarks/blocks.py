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
NARROWEST = (
    680  # pixels that a figure shrinks to before it scrolls: its smallest letters, 8 of 504 units, are then 11 pixels
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns. A number is shown with three digits, None as a dash; text stays as it is."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self) -> str:
        """A table that scrolls sideways on a phone."""
        head = "".join(
            f"<th{' class=num' if self._numeric(i) else ''}>{escape(c)}</th>" for i, c in enumerate(self.columns)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{' class=num' if self._numeric(i) else ''}>{escape(cell(v))}</td>" for i, v in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        return (
            f"<div class='scroll'><table><caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as SVG text, with what it shows in words for those who do not see it."""

    caption: str
    svg: str

    def html(self) -> str:
        """The figure in the page."""
        return f"<figure class='picture'><div class='scroll'>{self.svg}</div><figcaption>{escape(self.caption)}</figcaption></figure>"

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


def picture(drawing: Drawing, caption: str) -> Picture:
    """A matplotlib figure as SVG: text stays text, the background is the page's, and the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polyformer"}):
        buffer = io.StringIO()
        drawing.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    label = escape(caption, quote=True)
    return Picture(
        caption=caption,
        svg=svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="min-width:{NARROWEST}px"', 1),
    )


def axes(width: float = 7.0, height: float = 3.6) -> tuple[Drawing, Any]:
    """An empty matplotlib figure in the page's look, and its axes; needs no display."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    ax = drawing.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return drawing, ax
