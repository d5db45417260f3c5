"""Encrypted latency and memory against tokens, width, depth and threads: predicted by the compiler, and measured where that is quick."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Target, compile_onnx
from he_backend.base import HEError
from polyformer.commands.console import Failure
from polyformer.commands.isolated import isolated

from . import models, records, requests
from .registry import Progress, Record, Settings

NAME = "encrypted-scaling"
HEADS = 4
LIMIT_S = 40.0  # predicted; what takes longer is not measured
REPEAT_S = 10.0  # predicted; what takes longer is measured once
MEMORY_GB = 16.0
FIGURES = ("evaluate_s", "peak_gb")


@dataclass(frozen=True, kw_only=True)
class Size:
    """One encoder (`models.encoder`, 4 heads, feed-forward of 4 widths) and the threads that it runs on."""

    tokens: int = 32
    width: int = 64
    blocks: int = 1
    threads: int = 2

    def __str__(self) -> str:
        return f"{self.blocks} x {self.width}, {self.tokens} tokens, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Lines through one size: each axis is varied alone."""

    base: Size = Size()
    tokens: tuple[int, ...] = (16, 32, 64, 128)
    width: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (1, 2)
    threads: tuple[int, ...] = (1, 2)
    log_n: int | None = None  # test ring; None for 128 bits

    def sizes(self) -> list[Size]:
        """Every size once, the base first."""
        lines = [replace(self.base, **{axis: n}) for axis in AXES for n in getattr(self, axis)]
        return list(dict.fromkeys([self.base, *lines]))

    def line(self, axis: str, points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The points that differ from the base in nothing but an axis, ascending."""
        base = asdict(self.base)
        own = [p for p in points if all(p[other] == base[other] for other in AXES if other != axis)]
        return sorted(own, key=lambda p: p[axis])


AXES = ("tokens", "width", "blocks", "threads")
FULL = Grid()
QUICK = Grid(base=Size(tokens=8, width=16), tokens=(8, 16), width=(16,), blocks=(1,), log_n=10)


def scaling(settings: Settings) -> Record:
    """Predict every size of the grid, measure the quick ones."""
    grid = QUICK if settings.quick else FULL
    sizes = grid.sizes()
    points: list[dict[str, Any]] = []
    for i, size in enumerate(sizes):
        points.append(point(size, grid, settings.repeats, settings.within(i, len(sizes), str(size))))
        settings.keep(_record(grid, points, settings.repeats))
    return _record(grid, points, settings.repeats)


def point(size: Size, grid: Grid, repeats: int, progress: Progress) -> dict[str, Any]:
    """One size: figures predicted, and measured in a process of its own so that the peak of its memory is its own."""
    found: dict[str, Any] = asdict(size) | dict.fromkeys((*FIGURES, *(f"predicted_{f}" for f in FIGURES), "why"))
    progress(0, 4, "predict")
    try:
        found |= predicted(size, grid)
    except HEError as error:
        return found | {"why": f"does not compile: {str(error).splitlines()[0]}"}
    seconds = found["predicted_evaluate_s"]
    if seconds > LIMIT_S:
        return found | {"why": f"predicted {seconds:.0f} s, measured are those below {LIMIT_S:.0f} s"}
    try:
        return found | isolated(measured, size, grid, repeats if seconds < REPEAT_S else 1, progress=progress)
    except Failure as error:  # its process was killed: the others still count
        return found | {"why": str(error)}


def predicted(size: Size, grid: Grid) -> dict[str, Any]:
    """What the compiler says of a size."""
    with tempfile.TemporaryDirectory() as place:
        path, samples = _model(Path(place), size)
        circuit = compile_onnx(path, samples, target=_target(size, grid)).circuit
    return {
        "predicted_evaluate_s": circuit.predicted["evaluate_s"],
        "predicted_peak_gb": circuit.predicted["memory_gb"],
        "parameters": circuit.params.name,
        "refreshes": circuit.refreshes,
    }


def measured(size: Size, grid: Grid, repeats: int, *, progress: Progress) -> dict[str, Any]:
    """One request of a size, in the process that calls."""
    with tempfile.TemporaryDirectory() as place:
        path, samples = _model(Path(place), size)
        record = requests.measure(
            str(size),
            path,
            samples,
            target=_target(size, grid),
            repeats=repeats,
            progress=progress,
            weights="random, seed 0",
        )
    wanted = (
        *FIGURES,
        "evaluate_spread_s",
        "max_abs_error",
        "promised_error",
        "compile_s",
        "keygen_s",
        "key_gb",
        "efficiency",
    )
    nodes = record["metrics"]["operators"]
    return {name: record["metrics"][name] for name in wanted} | {
        "repeats": repeats,
        "levels": record["params"]["levels"],
        "log_n": record["params"]["log_n"],
        # Thread-seconds by node of the model, in the run of median time.
        "nodes_s": {row["name"]: row["seconds"] for row in nodes},
        "nodes_levels": {row["name"]: row["levels"] for row in nodes},
    }


def _model(folder: Path, size: Size) -> models.Built:
    return models.encoder(
        folder, blocks=size.blocks, width=size.width, heads=HEADS, hidden=4 * size.width, tokens=size.tokens
    )


def _target(size: Size, grid: Grid) -> Target:
    return Target(max_memory_gb=MEMORY_GB, threads=size.threads, insecure_log_n=grid.log_n)


def exponent(points: Sequence[Mapping[str, Any]], axis: str, figure: str) -> float | None:
    """e of figure ~ axis^e, by least squares of the logarithms; None if fewer than two points have the figure."""
    known = [(p[axis], p[figure]) for p in points if p[figure] is not None]
    if len({x for x, _ in known}) < 2:
        return None
    x, y = (np.array([math.log(pair[i]) for pair in known]) for i in (0, 1))
    return float(np.polyfit(x, y, 1)[0])


def exponents(grid: Grid, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fits of every axis and figure; `predicted_at_measured` is the prediction's over the measured points alone."""
    rows = []
    for axis in AXES:
        line = grid.line(axis, points)
        for figure in FIGURES:
            both = [p for p in line if p[figure] is not None]
            rows.append(
                {
                    "axis": axis,
                    "figure": figure,
                    "predicted": exponent(line, axis, f"predicted_{figure}"),
                    "predicted_at_measured": exponent(both, axis, f"predicted_{figure}"),
                    "measured": exponent(line, axis, figure),
                    "predicted_points": sum(p[f"predicted_{figure}"] is not None for p in line),
                    "measured_points": len(both),
                }
            )
    return rows


def _record(grid: Grid, points: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    return records.record(
        NAME,
        metrics={"points": points, "exponents": exponents(grid, points)},
        params=asdict(grid)
        | {
            "insecure": grid.log_n is not None,
            "heads": HEADS,
            "hidden": "4 widths",
            "limit_s": LIMIT_S,
            "max_memory_gb": MEMORY_GB,
        },
        threads=max(grid.threads),
        seed=0,
        repeats=repeats,
    )
