"""Tables of the record `security-estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .blocks import Block, Table
from .registry import Record


def show(record: Record) -> Sequence[Block]:
    """Bits of what is in use, the largest moduli, and our estimates beside those of others."""
    m, target = record["metrics"], record["params"]["target_bits"]
    judged = Table(
        caption="Bits of the cheapest attack on each ring, modulus and secret; optimistic: hybrid attacks with their overheads left out",
        columns=("log2 N", "log2 QP", "weight of the secret", "cost model", "bits", "bits, optimistic"),
        rows=[
            (r["log_n"], r["log_qp"], _weight(r["weight"]), r["model"], r["bits"], r["bits_optimistic"])
            for r in m["estimates"]
        ],
    )
    limits = Table(
        caption=f"The largest log2 QP that leaves {target} bits",
        columns=("log2 N", "weight of the secret", "cost model", "attacks", "largest log2 QP"),
        rows=[
            (
                r["log_n"],
                _weight(r["weight"]),
                r["model"],
                "optimistic too" if r["optimistic"] else "as published",
                r["log_qp"],
            )
            for r in m["largest_log_qp"]
        ],
    )
    compared = Table(
        caption="Ours beside figures of others, bits; difference: ours less theirs",
        columns=(
            "log2 N",
            "log2 Q",
            "weight of the secret",
            "attack",
            "cost model",
            "ours",
            "theirs",
            "difference",
            "source",
        ),
        rows=[
            (
                r["log_n"],
                r["log_q"],
                _weight(r["weight"]),
                *(r[key] for key in ("attack", "model", "ours", "theirs", "difference", "source")),
            )
            for r in m["compared"]
        ],
    )
    return [judged, limits, compared]


def _weight(weight: int | None) -> Any:
    return "uniform" if weight is None else str(weight)
