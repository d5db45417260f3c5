"""The evidence from training at a glance, for README: four figures of the newest records in one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import records
from .blocks import COLOURS, SMALL, bare
from .released_show import swap_curves
from .train_figures import bars, by_name, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
PICTURE = records.ROOT / "docs" / "training.png"
RATE = 0.01  # of the models of many depths that are shown
DPI = 150


def write(found: Mapping[str, Record], path: Path = PICTURE) -> None:
    """Draw the picture to a file, from records by name; a missing record leaves its place empty."""
    drawn(found).savefig(path, dpi=DPI, metadata={"Software": None})


def drawn(found: Mapping[str, Record]) -> Figure:
    """Return the picture: mixers at equal budget, depth, a language model after its swap, an encoder on its way to polynomials."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.6, 7.6), layout="constrained")
    for (name, (title, draw)), ax in zip(PANELS.items(), drawing.subplots(2, 2).flat, strict=True):
        bare(ax)
        ax.set_title(title, fontsize=10, loc="left", pad=34)  # above a legend of two lines
        if name in found:
            draw(ax, found[name])
        else:
            ax.text(0.5, 0.5, f"no record of {name}", ha="center", transform=ax.transAxes)
    return drawing


def _budget(ax: Any, record: Record) -> None:
    shown = [e for e in record["metrics"]["summary"] if "unstable" not in e["case"]]
    bars(ax, shown, "heldout_loss", label="held-out loss, nats a token", zero=False)


def _depth(ax: Any, record: Record) -> None:
    at_rate = [e for e in record["metrics"]["summary"] if e["rate"] == RATE]
    losses = by_name(at_rate, "heldout_loss", x="layers", name="mixer")
    lines(ax, losses, x_label=f"layers, learning rate {RATE:g}", y_label="held-out loss, nats a token", doubling=True)


def _encoder(ax: Any, record: Record) -> None:
    variants = record["metrics"]["variants"]
    for i, v in enumerate(variants):
        if v["accuracy"] is None:
            ax.text(0.02, i, "not finite", va="center", color=COLOURS[1], fontsize=SMALL)
        else:
            ax.barh(i, v["accuracy"], color=COLOURS[0 if v.get("levels") is None else 1], alpha=0.75)
    ax.set_yticks(range(len(variants)), [v["variant"] for v in variants])
    ax.invert_yaxis()
    ax.set_xlabel("probe accuracy on test documents")


PANELS: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "equal-budget": ("Mixers at an equal budget", _budget),
    "depth-stress": ("Depth", _depth),
    "smollm2-swap": ("SmolLM2-135M, attention swapped", swap_curves),
    "minilm-distil": ("MiniLM-L6, made a polynomial (orange)", _encoder),
}
