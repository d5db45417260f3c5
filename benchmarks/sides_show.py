"""Figures of two sides of one request (see `sides`), and how many times the second is the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What, key of a side's figures, by how much a figure is divided.
FIGURES = (
    ("evaluate, s", "evaluate_s", 1.0),
    ("evaluate, 2 threads, s", "evaluate_2_threads_s", 1.0),
    ("predicted evaluate, s", "predicted_evaluate_s", 1.0),
    ("encrypt + evaluate + decrypt, s", "total_s", 1.0),
    ("largest error", "max_abs_error", 1.0),
    ("promised error", "promised_error", 1.0),
    ("levels", "levels", 1),
    ("log2 N", "log_n", 1),
    ("bits of the scale", "scale_bits", 1),
    ("refreshes", "refreshes", 1),
    ("efficiency", "efficiency", 1.0),
    ("key generation, s", "keygen_s", 1.0),
    ("rotation keys", "rotation_keys", 1),
    ("evaluation keys as they travel, GB", "key_bytes", 1e9),
    ("request, MB", "request_bytes", 1e6),
    ("memory of this side, both parties, GB", "memory_gb", 1.0),
)
# Of these a ratio says nothing; errors follow the scale, which the compiler takes larger where that costs no time.
ALIKE = {"levels", "log_n", "scale_bits", "refreshes", "efficiency", "max_abs_error", "promised_error"}

Line = tuple[str, float | None, float | None, float | None]


def lines(first: Mapping[str, Any], second: Mapping[str, Any], ratio: float) -> list[Line]:
    """(what, first, second, second over first) of all figures that one of both has.

    Args:
        ratio: of the evaluations, from neighbouring turns.
    """
    found: list[Line] = []
    for what, key, unit in FIGURES:
        a, b = (_over(side.get(key), unit) for side in (first, second))
        if a is None and b is None:
            continue
        over = ratio if key == "evaluate_s" else None if key in ALIKE or not a or b is None else b / a
        found.append((what, a, b, over))
    return found


def _over(value: float | None, unit: float) -> float | None:
    return value if value is None or unit == 1 else value / unit
