"""Charts as inline SVG, drawn by hand: text stays text, colours are CSS variables, so a page follows light and dark.

A chart takes plain numbers and returns a string. Colours are named by family, "rotate", "product", ... (`COLOURS`). Each has a label and
its figures as text for those who do not see it, and scrolls sideways on a page too narrow for its letters (`style.STYLE`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Primitive -> (family, strength of its colour in percent). Families are CSS variables of `report.STYLE`.
COLOURS: dict[str, tuple[str, int]] = {
    "rotate": ("rotate", 100),
    "rotate_hoisted": ("rotate", 80),
    "rotate_extended": ("rotate", 80),
    "hoist": ("rotate", 60),
    "mod_down": ("rotate", 45),
    "extend": ("rotate", 30),
    "mul": ("product", 100),
    "square": ("product", 80),
    "relinearize": ("product", 55),
    "weighted_sum": ("plain", 100),
    "mul_plain": ("plain", 75),
    "mul_scalar": ("plain", 50),
    "encode": ("encode", 100),
    "rescale": ("rescale", 100),
    "drop": ("rescale", 60),
    "refresh": ("refresh", 100),
    "add": ("sum", 100),
    "sub": ("sum", 100),
    "add_plain": ("sum", 70),
    "add_scalar": ("sum", 70),
}
ORDER = list(COLOURS)
LEAST = 0.9  # of its size to which a chart shrinks before it scrolls: letters of 12 units are then 11 pixels
LETTER = 7.0  # width of a letter, in the chart's units


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bar: a label, a note at its end, and (part, value) segments."""

    label: str
    segments: Sequence[tuple[str, float]]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(v for _, v in self.segments)


def colour(part: str) -> str:
    """CSS colour of a primitive; an unknown one is grey."""
    family, strength = COLOURS.get(part, ("other", 100))
    if strength == 100:
        return f"var(--{family})"
    return f"color-mix(in oklab, var(--{family}) {strength}%, var(--card))"


def stacked_bars(rows: Sequence[Row], *, label: str, unit: str = "s", width: int = 940, label_width: int = 250) -> str:
    """Horizontal stacked bars on one scale, in the order given; a segment that has room for its name shows it."""
    height, gap = 16, 6
    room = width - label_width - max([90.0, *(7.0 * len(r.note) for r in rows)])
    most = max((r.total for r in rows), default=0.0) or 1.0
    parts = []
    for i, row in enumerate(rows):
        y = i * (height + gap) + 4
        middle = y + height / 2
        parts.append(text(label_width - 8, middle, shorten(row.label, 38), anchor="end", title=row.label))
        x = float(label_width)
        for name, value in sorted(row.segments, key=lambda s: ORDER.index(s[0]) if s[0] in ORDER else 99):
            w = value / most * room
            if w > 0.1:
                parts.append(rectangle(x, y, w, height, colour(name), f"{row.label}: {name} {figure(value)} {unit}"))
                told = name.replace("_", " ")
                if LETTER * len(told) + 8 < w:
                    parts.append(text(x + w / 2, middle, told, anchor="middle", kind="inside"))
            x += w
        parts.append(text(x + 6, middle, row.note or f"{figure(row.total)} {unit}", kind="dim"))
    figures = "; ".join(
        f"{row.label}: {', '.join(f'{name} {figure(v)} {unit}' for name, v in row.segments if v > 0)}" for row in rows
    )
    return svg(width, len(rows) * (height + gap) + 8, parts, label, figures)


def legend(names: Sequence[str]) -> str:
    """Colour keys of some primitives."""
    items = "".join(
        f'<span class="key"><i style="background:{colour(n)}"></i>{escape(n.replace("_", " "))}</span>'
        for n in sorted(set(names), key=lambda n: ORDER.index(n) if n in ORDER else 99)
    )
    return f'<div class="legend">{items}</div>'


def steps(levels: Sequence[int], groups: Sequence[tuple[str, int, int]], *, width: int = 940, height: int = 300) -> str:
    """Levels left over the ops of a circuit, with named bands (label, first op, last op + 1) behind."""
    left, right, top, bottom = 44, 10, 14, 74
    most = max([*levels, 1])
    count = max(len(levels), 1)
    inner_w, inner_h = width - left - right, height - top - bottom

    def x(i: float) -> float:
        return left + i / count * inner_w

    def y(level: float) -> float:
        return top + (1 - level / most) * inner_h

    parts = []
    for n, (label, first, last) in enumerate(groups):
        if n % 2 == 0:
            parts.append(rectangle(x(first), top, x(last) - x(first), inner_h, "var(--band)", label))
        if x(last) - x(first) > 11:
            at = (x(first) + x(last)) / 2
            name = escape(shorten(label, 16))
            parts.append(
                f'<text class="dim" transform="translate({at:.1f},{height - bottom + 10}) rotate(-35)" text-anchor="end">{name}</text>'
            )
    for level in ticks(most):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(text(left - 8, y(level), str(level), anchor="end", kind="dim"))
    path = "".join(f"{'M' if i == 0 else 'L'}{x(i):.1f},{y(v):.1f}H{x(i + 1):.1f}" for i, v in enumerate(levels))
    if levels:
        parts.append(f'<path d="{path}V{y(0):.1f}H{left}Z" fill="var(--accent)" fill-opacity=".12"/>')
        parts.append(f'<path d="{path}" fill="none" stroke="var(--accent)" stroke-width="2" stroke-linejoin="round"/>')
    ends = "; ".join(f"{name}: {levels[first]} to {levels[last - 1]}" for name, first, last in groups if first < last)
    return svg(width, height, parts, "Levels that each operator's result has left, over the circuit", ends)


def scatter(points: Sequence[tuple[float, float, str]], *, x_label: str, y_label: str, size: int = 380) -> str:
    """(x, y, label) on equal logarithmic axes, with the line on which both agree."""
    left = 52
    inner = size - left - 12
    values = [v for px, py, _ in points for v in (px, py) if v > 0]
    low = math.floor(math.log10(min(values))) if values else 0
    high = math.ceil(math.log10(max(values)) + 1e-9) if values else 1
    high = max(high, low + 1)

    def at(v: float) -> float:
        return (math.log10(v) - low) / (high - low) * inner

    parts = []
    for power in range(low, high + 1):
        p = at(10.0**power)
        parts.append(f'<line class="grid" x1="{left + p:.1f}" x2="{left + p:.1f}" y1="12" y2="{12 + inner}"/>')
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + inner}" y1="{12 + inner - p:.1f}" y2="{12 + inner - p:.1f}"/>'
        )
        parts.append(text(left + p, 12 + inner + 14, f"{10.0**power:g}", anchor="middle", kind="dim"))
        parts.append(text(left - 6, 12 + inner - p, f"{10.0**power:g}", anchor="end", kind="dim"))
    parts.append(
        f'<line x1="{left}" y1="{12 + inner}" x2="{left + inner}" y2="12" stroke="var(--muted)" stroke-dasharray="4 4"/>'
    )
    for px, py, label in points:
        if px > 0 and py > 0:
            parts.append(
                f'<circle cx="{left + at(px):.1f}" cy="{12 + inner - at(py):.1f}" r="4" fill="var(--accent)" fill-opacity=".6">'
                f"<title>{escape(label)}: {figure(px)} / {figure(py)}</title></circle>"
            )
    parts.append(text(left + inner / 2, size - 8, x_label, anchor="middle"))
    parts.append(
        f'<text transform="translate(12,{12 + inner / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    figures = "; ".join(f"{label}: {figure(px)} / {figure(py)}" for px, py, label in points)
    return svg(size, size, parts, f"{y_label} against {x_label}, logarithmic", figures)


def timeline(phases: Sequence[tuple[str, float]], *, width: int = 940) -> str:
    """One bar: what followed what, each as wide as it was long."""
    total = sum(s for _, s in phases) or 1.0
    parts, x, row_end = [], 0.0, [-1.0, -1.0, -1.0]
    for i, (name, seconds) in enumerate(phases):
        w = seconds / total * width
        parts.append(rectangle(x, 4, max(w - 1.5, 0.5), 22, f"var(--phase{i % 6})", f"{name}: {figure(seconds)} s"))
        label = f"{name} {figure(seconds)} s"
        length = 7.0 * len(label)
        start = min(x, width - length)
        for row, end in enumerate(row_end):
            if start > end:
                row_end[row] = start + length + 8
                parts.append(text(start, 40 + 17 * row, label, kind="dim"))
                break
        x += w
    figures = "; ".join(f"{name}: {figure(seconds)} s" for name, seconds in phases)
    return svg(width, 90, parts, "Seconds of each phase, one after the other", figures)


def svg(width: int, height: float, parts: Sequence[str], label: str, figures: str) -> str:
    """A chart in a box that scrolls sideways.

    Args:
        label: what the chart shows; figures: its data, as text for those who do not see it.
    """
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height:.0f}" style="min-width:{LEAST * width:.0f}px" role="img" '
        f'aria-label="{escape(label, quote=True)}" xmlns="http://www.w3.org/2000/svg"><desc>{escape(figures)}</desc>'
        f"{''.join(parts)}</svg></div>"
    )


def rectangle(x: float, y: float, w: float, h: float, fill: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" style="fill:{fill}">'
        f"<title>{escape(title)}</title></rect>"
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "", title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" dominant-baseline="central" text-anchor="{anchor}" class="{kind}">{escape(content)}{tip}</text>'


def shorten(label: str, most: int) -> str:
    """Keep the end of a long name: that is where names differ."""
    return label if len(label) <= most else "…" + label[-(most - 1) :]


SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(value: float) -> str:
    """A number with three significant digits; small and large ones as 3.9·10⁻⁶ and 3.9·10⁹."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 100 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 0.001 <= abs(value) < 100:
        return f"{value:.3g}"
    digits, power = f"{value:.2e}".split("e")
    return f"{digits}·10{str(int(power)).translate(SUPERSCRIPT)}"


def ticks(most: int) -> list[int]:
    """About five whole numbers from 0 to at most `most`."""
    step = max(1, math.ceil(most / 6))
    return list(range(0, most + 1, step))


def by_part(ops: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Seconds by primitive of some ops of a report."""
    total: dict[str, float] = {}
    for op in ops:
        parts = op.get("primitives")
        if isinstance(parts, Mapping):
            for name, value in parts.items():
                total[name] = total.get(name, 0.0) + float(value["seconds"])
    return total
