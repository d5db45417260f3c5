"""A fully polynomial model against its softmax twin at an equal number of optimiser steps, with and without LaS: the demo's
model of 2 blocks, and a deep one of 6.

The polynomial model's activation is a quadratic, which by itself may do better or worse than GELU. So there is a second,
stricter twin: softmax with x^2 for its activation.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training import Recipe, convert, train

from . import records
from .blocks import Block, Table
from .registry import Record, Settings

VARIANTS = ("LaS decay", "no decay")
FIGURES = ("softmax", "softmax_square", "polynomial")
TWINS = FIGURES[:2]

QUICK = Recipe.quick().with_(las_decay=1.0)


def measure(settings: Settings) -> Record:
    """Measure the demo's model."""
    return _measure(settings, "demo-twin", QUICK if settings.quick else Recipe.demo())


def measure_deep(settings: Settings) -> Record:
    """Measure the deep model; the quick size has its kinds of norms."""
    deep = Recipe.deep()
    norms = (deep.exact_norms[0], *deep.exact_norms[-2:])
    return _measure(settings, "deep-twin", QUICK.with_(exact_norms=norms) if settings.quick else deep)


def _measure(settings: Settings, name: str, recipe: Recipe) -> Record:
    """Train and convert a recipe for every seed, with its decay of scores and without; the twins follow suit."""
    seeds = settings.seeds[:1] if settings.quick else settings.seeds
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        for variant in VARIANTS:
            settings.progress(len(runs), len(seeds) * len(VARIANTS), f"seed {seed}, {variant}")
            decay = recipe.las_decay if variant == VARIANTS[0] else 0.0
            # One thread: nothing here is timed, and two benchmarks side by side are faster than one on two threads.
            runs.append({"variant": variant, **run(replace(recipe, seed=seed, las_decay=decay, threads=1))})
            settings.keep(_record(name, runs, recipe, seeds))
    return _record(name, runs, recipe, seeds)


def run(recipe: Recipe) -> dict[str, Any]:
    """One seed: held-out losses in nats a token, levels, and what leaves the fitted intervals."""
    with tempfile.TemporaryDirectory() as place:
        out, strict = Path(place, "model"), Path(place, "strict")
        train(out, recipe)
        metrics = convert(out)
        square = train(strict, replace(recipe, activation="square", power_steps=0))
    return {
        "seed": recipe.seed,
        **{name: metrics[f"heldout_loss_{name}"] for name in ("softmax", "polynomial", "power")},
        "softmax_square": square["heldout_loss_softmax"],
        "levels": metrics["levels"],
        "quality": metrics["quality"],
        "outside_heldout": _largest(metrics["outside_heldout"]),
        "outside_stress": _largest(metrics["outside_stress"]),
        "largest_logit_stress": metrics["largest_logit_stress"],
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds by variant; gaps of the polynomial model to its twin and to the best of all twins."""
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        mine = [r for r in runs if r["variant"] == variant]
        if mine:
            found[variant] = {
                name: {
                    "mean": statistics.fmean(r[name] for r in mine),
                    "sd": statistics.stdev(r[name] for r in mine) if len(mine) > 1 else None,
                }
                for name in FIGURES
            }
    best = min(v[name]["mean"] for v in found.values() for name in TWINS)
    for values in found.values():
        values["gap_percent"] = 100 * (values["polynomial"]["mean"] / values["softmax"]["mean"] - 1)
        values["gap_percent_best_twin"] = 100 * (values["polynomial"]["mean"] / best - 1)
    return found


def show(record: Record) -> Sequence[Block]:
    """One row a variant: losses, and the gap in percent."""
    rows = [
        (
            variant,
            *(values[name][figure] for name in FIGURES for figure in ("mean", "sd")),
            values["gap_percent"],
            values["gap_percent_best_twin"],
        )
        for variant, values in record["metrics"]["summary"].items()
    ]
    steps = record["params"]["softmax_steps"]
    caption = (
        f"Held-out loss in nats a token, mean over seeds {', '.join(map(str, record['params']['seeds']))}; softmax {steps:,} steps, "
        "polynomial as many in all its stages together, and as much text in each"
    )
    columns = (
        *(
            "attention",
            "softmax twin, GELU",
            "sd of it",
            "softmax twin, x^2",
            "sd of that",
            "polynomial",
            "sd of polynomial",
        ),
        *("gap to its twin, %", "gap to the best twin, %"),
    )
    return [Table(caption=caption, columns=columns, rows=rows)]


def _record(name: str, runs: Sequence[Mapping[str, Any]], recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    params = {
        "seeds": list(seeds),
        "softmax_steps": recipe.softmax_steps,
        "polynomial_steps": {"power": recipe.power_steps, "ranges": recipe.range_steps, "tune": recipe.tune_steps},
        "power": recipe.power,
        "las_decay": recipe.las_decay,
        "width": recipe.width,
        "blocks": recipe.blocks,
        "length": recipe.length,
        "norms": recipe.exact_norms[-1],
    }
    metrics = {"runs": list(runs), "summary": summary(runs)}
    return records.record(name, metrics=metrics, params=params, threads=1, repeats=len(seeds))


def _largest(shares: Mapping[str, Mapping[str, float]]) -> float:
    """The largest share of values of one tap outside its interval."""
    return max(s["below"] + s["above"] for s in shares.values())
