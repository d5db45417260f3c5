"""The results table of README.md, made from records; a test compares, so that it cannot grow stale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records
from .blocks import Table
from .summary import marks

README = records.ROOT / "README.md"
BEGIN = "<!-- results: made by `polyformer bench report --readme`, do not edit -->"
END = "<!-- end of results -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: which record, and in which words."""

    name: str
    what: str
    target_s: float | None = None  # of the encrypted evaluation


ROWS = (
    Row(name="demo", what="2 blocks, d = 128, 32 tokens, trained (`make demo`)", target_s=45),
    Row(name="request-2x128x32", what="encoder, 2 blocks, d = 128, 32 tokens, random weights", target_s=45),
    Row(name="request-2x128x128", what="encoder, 2 blocks, d = 128, 128 tokens, random weights", target_s=240),
    Row(name="request-4x256x64", what="encoder, 4 blocks, d = 256, 64 tokens, random weights", target_s=900),
    Row(
        name="request-6x512x128", what="encoder, 6 blocks, d = 512, 8 heads, 128 tokens, random weights", target_s=3600
    ),
    Row(name="generate-2x128", what="one more token, key/value state encrypted, trained", target_s=25),
    Row(name="cnn-28", what="LeNet-like CNN, one 28 x 28 image, random weights", target_s=1),
    Row(name="mlp-784", what="MLP 784-128-10, one input, random weights", target_s=0.03),
)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown table of all rows that have a record."""
    rows = []
    for row in ROWS:
        record = found.get(row.name)
        if record is None:
            continue
        m, params = record["metrics"], record["params"]
        error = m.get("max_abs_error")
        rows.append(
            (
                f"[{row.what}](benchmarks/results/{record['file']})",
                _seconds(m.get("evaluate_s")),
                _seconds(row.target_s),
                _seconds(m.get("predicted_evaluate_s")),
                "–" if m.get("peak_gb") is None else f"{m['peak_gb']:.1f} GB",
                "–" if error is None else f"{float(error):.1e}",
                f"2^{params['log_n']}" if "log_n" in params else "–",
                m.get("refreshes", 0),
                ", ".join(marks(record)) or "quiet",
            )
        )
    columns = (
        "model",
        "evaluation",
        "target",
        "predicted",
        "peak memory",
        "largest error",
        "ring",
        "refreshes",
        "machine",
    )
    return Table(caption="", columns=columns, rows=rows).markdown().strip()


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def updated(text: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """README's text with the table of these records.

    Raises:
        ValueError: the two lines between which it stands are not there.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md has no place for the results: a line {BEGIN!r}, later a line {END!r}")
    return f"{text[:begin]}{BEGIN}\n\n{table(found)}\n\n{text[end:]}"


def write(path: Path = README, results: Path = records.RESULTS) -> bool:
    """Bring README's table up to date; whether that changed it."""
    old = path.read_text(encoding="utf-8")
    new = updated(old, records.latest(results))
    path.write_text(new, encoding="utf-8")
    return new != old
