"""The two tables of a request, by node and by primitive, from the rows of `he_backend.efficiency.tables`: as a record and the demo's
report both show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Table
from .charts import figure as digits

COLUMNS = ("calls", "thread-s", "share", "levels", "bound, thread-s", "efficiency")
UNITS = "; errors in the model's units, over all slots of the node's last value; predicted as the promise is, with its margin"
ERRORS = {"predicted_error": "predicted error", "error": "largest error"}


def two_tables(found: Mapping[str, Any], threads: int, more: str = "") -> Sequence[Table]:
    """By node with errors, where they were predicted or measured, and by primitive.

    Args:
        found: evaluate_s, bound_s, efficiency, operators and primitives; more: words for the end of the caption.
    """
    caption = (
        f"evaluation {digits(found['evaluate_s'])} s on {threads} threads; bound {digits(found['bound_s'])} s, efficiency "
        f"{found['efficiency']:.2f}{more}"
    )
    # The promise's margin is on the predicted errors, so that a measured one should stay below its neighbour.
    known = [key for key in ERRORS if any(row.get(key) is not None for row in found["operators"])]
    return (
        Table(
            caption=f"By node of the model: {caption}{UNITS if known else ''}",
            columns=("node", *COLUMNS, *(ERRORS[key] for key in known)),
            rows=[(*cells(row), *(row.get(key) for key in known)) for row in found["operators"]],
        ),
        Table(
            caption=f"By CKKS primitive, the same run{more}",
            columns=("primitive", *COLUMNS),
            rows=[cells(row) for row in found["primitives"]],
        ),
    )


def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row as it is shown, without its errors."""
    high, low = row["levels"]
    numbers = row["seconds"], f"{row['share']:.0%}", f"{high} → {low}", row["bound_s"], row["efficiency"]
    return (row["name"], row["count"], *numbers)


def of_record(record: Mapping[str, Any]) -> Sequence[Table]:
    """The tables of a record of `requests.measure`."""
    m = record["metrics"]
    return two_tables(m, record["machine"]["threads"], f"; weights: {m['weights']}")
