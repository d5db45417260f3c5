"""What a norm costs under encryption: one block with RMSNorms as polynomials beside the same block with BatchNorms, which fold away.

Both are trained and converted by the demo's recipe, an eighth of its steps: the inverse square roots are polynomials fitted on the range
that training left the variances in. A BatchNorm is an affine map once training is over, so that it joins the weights behind it and
the table by node has no row for it; in a causal language model its statistics look ahead, so that its loss proves nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler import Target

from . import memory, operators, records
from .blocks import Table
from .registry import Record, Settings
from .sides import Side, opened, peak_gb, ratio, turn
from .sides_show import lines
from .two_tables import two_tables

NAME = "norm-1x128x32"
KINDS = {"BatchNorm": "batch", "RMSNorm": "rms"}  # name of a side -> kind of its norms while it is trained
BLOCKS, SITES = 1, 3  # a norm before attention, one before the feed-forward part, one before the head
MEMORY_GB = 10.0  # of each side at most: both hold their keys at once
THREADS = 2
QUICK_RING, QUICK_TOKENS = 13, 8  # the vocabulary of 300 times the tokens must fit the slots


def measure(settings: Settings) -> Record:
    """The record `norm-1x128x32`.

    Returns:
        Metrics: sides {BatchNorm, RMSNorm: what `Side.figures` says, with the tables `operators` and `primitives`, and the error after
        every node}; ratio (RMSNorm over BatchNorm, of neighbouring turns: median, least, most); peak_gb of the process before the
        errors were asked for. What is kept on the way has no errors.
    """
    repeats = 1 if settings.quick else settings.repeats
    steps = len(KINDS) + repeats + 2
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as place:
        for i, (name, kind) in enumerate(KINDS.items()):
            recipe = operators.recipe(quick=settings.quick).with_(blocks=BLOCKS, exact_norms=(kind,) * SITES)
            if settings.quick:
                recipe = recipe.with_(length=QUICK_TOKENS)
            path, windows = operators.trained(Path(place, name), recipe, progress=settings.within(i, steps, name))
            sides[name] = Side.of(path, windows, _target(settings))

    def made(turns: int, errors: Mapping[str, Mapping[int, float]], *more: memory.Peak) -> dict[str, Any]:
        found = {name: side.figures(THREADS, errors.get(name)) for name, side in sides.items()}
        peak = peak_gb(*(side.peak for side in sides.values()), *more)
        metrics = {
            "sides": found,
            "ratio": ratio(sides["RMSNorm"], sides["BatchNorm"], THREADS),
            "warm_ups": 1,
            "peak_gb": peak,
        }
        params = {"insecure": settings.quick, "max_memory_gb": MEMORY_GB, "blocks": BLOCKS, "norms": dict(KINDS)}
        return records.record(NAME, metrics=metrics, params=params, threads=THREADS, seed=0, repeats=turns, peak=peak)

    with opened(sides, THREADS, lambda what: settings.progress(len(KINDS), steps, what)):
        with memory.watch() as during:
            for i in range(repeats):
                at = len(KINDS) + 1 + i
                turn(sides, (THREADS,), lambda what, at=at: settings.progress(at, steps, what))  # type: ignore[misc]
                settings.keep(made(i + 1, {}))
        settings.progress(steps - 1, steps, "errors by node")
        return made(repeats, {name: side.errors(THREADS) for name, side in sides.items()}, during)


def _target(settings: Settings) -> Target:
    return Target(max_memory_gb=MEMORY_GB, threads=THREADS, insecure_log_n=QUICK_RING if settings.quick else None)


def show(record: Record) -> Sequence[Table]:
    """Both requests beside each other, then the two tables of each."""
    m, threads = record["metrics"], record["machine"]["threads"]
    first, second = m["sides"].values()
    middle, least, most = (m["ratio"][key] for key in ("median", "least", "most"))
    table = Table(
        caption=f"One block with BatchNorms, which fold into the weights, beside the same with RMSNorms as polynomials, {threads} threads; "
        f"evaluate: median over neighbouring turns A B A B ({least:.2f} to {most:.2f} times)",
        columns=("figure", *m["sides"], "ratio"),
        rows=lines(first, second, middle),
    )
    return [table, *(t for name, side in m["sides"].items() for t in two_tables(side, threads, f"; {name}"))]
