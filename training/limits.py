"""What the numbers of a recipe may be: the bounds of each field, and what fields ask of one another.

What only a model can tell (heads that divide the width, an even power, layers that are no polynomials) is not repeated
here: `outcome.py` builds the models without weights, and they say it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polyformer.activations import EXACT

NORMS = ("affine", "rms", "layer", "batch")  # what training starts with; the polynomials come by a stage
LEAST = {
    "seed": 0,
    "threads": 1,
    "patch": 1,
    "vocab": 1,
    "length": 2,  # a shorter prompt needs a token and one of padding
    "holdout": 2,  # every document held out would leave none to train on
    "heldout": 0,
    "calibration": 4,  # a quarter of it are short windows
    "width": 1,
    "heads": 1,
    "hidden": 1,
    "blocks": 1,
    "kv_heads": 0,
    "activation_degree": 1,
    "norm_degree": 1,
    "norm_newton": 0,
    "reciprocal_degree": 1,
    "batch": 1,
    "padded": 0,
    "noise": 0,
    "warmup": 0,
    "softmax_steps": 0,
    "power_steps": 0,
    "matched": 0,
    "fit_steps": 0,
    "continue_steps": 0,
    "range_steps": 0,
    "tune_steps": 0,
    "checkpoint_every": 1,
    "variance_ratio": 1,
    "margin": 1,
    "las_decay": 0,
    "weight_decay": 0,
    "activation_weight": 0,
    "variance_weight": 0,
    "denominator_weight": 0,
}
MOST = {"seed": 10**12, "range_outside": 1}  # a generator takes 64 bits, a thousand stages a seed
POSITIVE = ("eps", "lr", "tune_lr", "clip", "activation_bound", "activation_spread")
INTERVALS = ("denominator_target", "denominator_interval")


def require_numbers(values: Mapping[str, Any]) -> None:
    """Take the fields of a recipe by name.

    Raises:
        ValueError: one cannot be; the sentence has the field, its value and what is allowed.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be a finite number")
        if value is None:
            continue
        least, most = LEAST.get(name, 0 if name in MOST else None), MOST.get(name)
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError(f"{name} is {value}; it must be {_between(least, most)}")
        if name in POSITIVE and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
        if name in INTERVALS and not _is_interval(value):
            raise ValueError(f"{name} is {list(value)}; it must be two numbers [low, high] with 0 < low < high")
    if values["padded"] > values["batch"]:
        raise ValueError(f"padded is {values['padded']}; it must be from 0 to {values['batch']}, which is the batch")
    if values["matched"] == 1:
        raise ValueError("matched is 1; it must be 0, or at least 2, one of them to measure on")
    if values["fit_steps"] and not values["matched"]:
        raise ValueError(
            f"fit_steps is {values['fit_steps']} and matched 0; fitting goes on from there: set matched too"
        )
    if values["activation"] not in EXACT:
        raise ValueError(f"activation is {values['activation']!r}; known: {', '.join(EXACT)}")
    _require_norms(values)


def _require_norms(values: Mapping[str, Any]) -> None:
    norms = values["exact_norms"]
    sites = values["blocks"] * (1 if values["parallel"] else 2) + 1
    if len(norms) != sites:
        raise ValueError(
            f"exact_norms is {list(norms)}, {len(norms)} in all; blocks={values['blocks']} and parallel={values['parallel']} have "
            f"{sites} places, the last one at the end of the stack"
        )
    unknown = [norm for norm in norms if norm not in NORMS]
    if unknown:
        raise ValueError(f"exact_norms holds {unknown[0]!r}; known: {', '.join(NORMS)}")


def _between(least: float | None, most: float | None) -> str:
    return f"at least {least}" if most is None else f"from {least} to {most}"


def _is_interval(value: Any) -> bool:
    numbers = len(value) == 2 and all(type(end) in (int, float) and math.isfinite(end) for end in value)
    return numbers and 0 < value[0] < value[1]
