"""Table and figure of the operator race."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block, Table, legend, logarithmic, look, panels, picture
from .registry import Record

WORDS = {"power": "PowerSoftmax", "exp": "exp + reciprocal", "square": "square strategy", "pointwise": "pointwise"}
# Softmax operator of 6 layers, d = 512, on one A100, seconds: square strategy, Taylor + Goldschmidt, PowerSoftmax (methods.md 1.5).
PAPER = {128: (7.42, 3.6, 2.7), 1024: (173.4, 83.9, 8.6)}


def race(record: Record) -> Sequence[Block]:
    """Seconds against the length of a row, and everything beside it; ratios to PowerSoftmax."""
    rows = record["metrics"]["rows"]
    own = {row["keys"]: row["evaluate_s"] for row in rows if row["way"] == "power"}
    drawing, (ax,) = panels()
    for i, way in enumerate(WORDS):
        mine = [row for row in rows if row["way"] == way]
        ax.plot(
            [row["keys"] for row in mine],
            [row["evaluate_s"] for row in mine],
            label=WORDS[way],
            **look(i),
        )
    logarithmic(ax, "x", [row["keys"] for row in rows])
    logarithmic(ax, "y")
    ax.set_xlabel("keys in a row")
    ax.set_ylabel("seconds, encrypted")
    legend(ax)
    scores = record["params"]["scores"]
    table = Table(
        caption=f"{scores:,} scores; all errors relative to the largest weight, the total (exact form against decrypted weights) at "
        f"most {record['params']['error']:g}, else the row is marked; ratio: seconds over PowerSoftmax's",
        columns=(
            "way",
            "keys",
            "s",
            "ratio",
            "levels",
            "log2 N",
            "scale bits",
            "refreshes",
            "division",
            "error of the fit",
            "error of the encryption",
            "promised of it",
            "total error",
            "equal error",
            "peak GB",
        ),
        rows=[
            (
                WORDS[row["way"]],
                row["keys"],
                row["evaluate_s"],
                row["evaluate_s"] / own[row["keys"]] if row["keys"] in own else None,
                row["levels"],
                row["log_n"],
                row["scale_bits"],
                row["refreshes"],
                row["division"],
                row["fit_error"],
                row["encryption_error"],
                row["promised_error"],
                row["total_error"],
                "yes" if row["kept"] else "NO: above the target",
                row["peak_gb"],
            )
            for row in rows
        ],
    )
    paper = Table(
        caption="The paper's operator, one A100, HElayers over HEaaN: ratios over its PowerSoftmax (arXiv 2410.09457)",
        columns=("keys", "square strategy", "Taylor degree 8 + Goldschmidt"),
        rows=[(keys, square / power, taylor / power) for keys, (square, taylor, power) in PAPER.items()],
    )
    caption = f"{scores:,} encrypted scores to attention weights against the length of a row, log-log."
    return [picture(drawing, caption), table, paper]
