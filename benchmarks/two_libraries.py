"""OpenFHE and TenSEAL (SEAL) beside each other: the same ONNX file and the same input, both libraries in one process in turns A B A B.

Each library gets what the compiler finds best for it at 128 bits: ring, scale, digits and plan of rotations. What SEAL lacks (hoisting, the
extended basis, rings above 2^15, keys cut to a level) is part of the comparison; the binding's lock is, too, on two threads. The primitives
are compared besides at one ring, one chain and one digit a prime, where 128 bits leave SEAL most levels.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compiler import Target, compile_onnx
from compiler.plan import LARGEST_RING, levels_at_most
from he_backend.base import ParamsError
from he_backend.params import Params

from . import memory, models, ops, records
from .registry import Record, Settings
from .sides import Say, Side, opened, peak_gb, ratio, turn

LIBRARIES = ("openfhe", "tenseal")
THREADS = (1, 2)  # the tables are those of one thread: there a library is not charged for its binding's lock
MEMORY_GB = 9.0  # of each library, at most: both hold their keys at once
ROUNDS = 2  # of the primitives, in turns


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of `benchmarks.models`; `insecure_log_n` is the test ring of the quick size."""

    name: str
    about: str
    build: Callable[[Path], models.Built]
    repeats: int
    insecure_log_n: int | None = None


def block(folder: Path, *, blocks: int = 1, width: int = 32, hidden: int = 128, tokens: int = 16) -> models.Built:
    """The encoder that SEAL's levels allow: one block, no norms, power 2."""
    return models.encoder(folder, blocks=blocks, width=width, heads=2, hidden=hidden, tokens=tokens)


MODELS = (
    Model(name="mlp-784", about="784-128-10 with x^2", build=models.mlp_784, repeats=11),
    Model(
        name="cnn-28",
        about="two convolutions, two poolings, two dense layers, x^2, 28 x 28",
        build=models.cnn_28,
        repeats=3,
    ),
    Model(
        name="block-32x16",
        about="one transformer block, d = 32, 2 heads, 16 tokens, power 2, no norms",
        build=block,
        repeats=3,
    ),
)
QUICK = (
    Model(name="mlp-784", about="as it is", build=models.mlp_784, repeats=1, insecure_log_n=11),
    Model(
        name="block-8x8",
        about="one block, d = 8, 8 tokens",
        build=partial(block, width=8, hidden=16, tokens=8),
        repeats=1,
        insecure_log_n=11,
    ),
)


def measure(settings: Settings) -> Record:
    """The record `two-libraries`.

    Returns:
        Metrics: models, one entry a model with name, about, libraries {library: what `requests.figures` says of one thread, and
        evaluate_2_threads_s, levels, log_n, scale_bits, digits, rotation_keys, key_bytes (as they travel), request_bytes, memory_gb
        (peak above what was resident before this library began), compile_s, keygen_s, prepare_s}, ratio (TenSEAL over OpenFHE, of
        neighbouring turns: median, least, most) and peak_gb (of the process; SEAL's pool keeps what the models before had); levels,
        {library: most at its largest ring}; too_deep, what the compiler says of a second block; ring, {library: parameters}, and
        primitives_ms {primitive: {level: {library: ms}}} there.
    """
    chosen = QUICK if settings.quick else MODELS
    rows: list[dict[str, Any]] = []
    steps = len(chosen) + 1
    for i, model in enumerate(chosen):
        settings.progress(i, steps, model.name)
        rows.append(request(model, partial(_within, settings, i, steps, model.name)))
        settings.keep(_record(settings, rows, {}))
    settings.progress(len(chosen), steps, "primitives")
    ring = {name: one_ring(name, quick=settings.quick) for name in LIBRARIES}
    rest = {
        "levels": {name: levels_at_most(name, LARGEST_RING[name]) for name in LIBRARIES},
        "too_deep": too_deep(block),
        "ring": {name: params.to_json() for name, params in ring.items()},
        "primitives_ms": primitives(ring, repeats=1 if settings.quick else settings.repeats),
    }
    settings.progress(steps, steps, "done")
    return _record(settings, rows, rest)


def _within(settings: Settings, i: int, steps: int, name: str, what: str) -> None:
    settings.progress(i, steps, f"{name}: {what}")


def _record(settings: Settings, rows: Sequence[Mapping[str, Any]], rest: Mapping[str, Any]) -> dict[str, Any]:
    params = {"insecure": settings.quick, "max_memory_gb": MEMORY_GB, "libraries": list(LIBRARIES)}
    repeats = max(model.repeats for model in (QUICK if settings.quick else MODELS))
    return records.record(
        "two-libraries",
        metrics={"models": list(rows), **rest},
        params=params,
        threads=max(THREADS),
        seed=0,
        repeats=repeats,
        peak=max((row["peak_gb"] or 0.0 for row in rows), default=None),
    )


def request(model: Model, say: Say) -> dict[str, Any]:
    """One model in both libraries."""
    with tempfile.TemporaryDirectory() as place:
        path, samples = model.build(Path(place))
        sides = {}
        for name in LIBRARIES:
            say(f"compile for {name}")
            target = Target(
                backend=name, max_memory_gb=MEMORY_GB, threads=THREADS[0], insecure_log_n=model.insecure_log_n
            )
            sides[name] = Side.of(path, samples, target)
    one, more = THREADS
    with opened(sides, one, say):
        with memory.watch() as during:
            for i in range(model.repeats):
                turn(sides, THREADS, lambda what, i=i: say(f"turn {i + 1}, {what}"))  # type: ignore[misc]
        found = {
            name: {
                **side.figures(one),
                "evaluate_2_threads_s": statistics.median(t.wall_s for t in side.timings[more]),
            }
            for name, side in sides.items()
        }
    mine, other = (sides[name] for name in LIBRARIES)
    return {
        "name": model.name,
        "about": model.about,
        "weights": "random, seed 0",
        "repeats": model.repeats,
        "libraries": found,
        "ratio": ratio(other, mine, one),
        "peak_gb": peak_gb(mine.peak, other.peak, during),
    }


def too_deep(build: Callable[..., models.Built]) -> str:
    """What the compiler says of two blocks for TenSEAL: both numbers of levels, or "" if they fit."""
    with tempfile.TemporaryDirectory() as place:
        path, samples = build(Path(place), blocks=2)
        try:
            compile_onnx(path, samples[:-1], target=Target(backend="tenseal", max_memory_gb=MEMORY_GB))
        except ParamsError as error:
            return str(error)
    return ""


def one_ring(library: str, *, quick: bool) -> Params:
    """The ring at which primitives are compared: 128 bits leave room for one special prime, so one digit a prime in either library."""
    levels = 3 if quick else 19
    return Params(
        backend=library,
        log_n=10 if quick else 15,
        levels=levels,
        scale_bits=40,
        first_bits=46 if library == "openfhe" else 60,
        digits=levels + 1,
        insecure=quick,
    )


def primitives(ring: Mapping[str, Params], *, repeats: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Thread-milliseconds of every primitive of both, at the top, the middle and level 1, in turns; None: it has none."""
    top = min(params.levels for params in ring.values())
    levels = sorted({top, top // 2, 1}, reverse=True)
    seen: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in ring}
    for _ in range(ROUNDS):
        for name, params in ring.items():
            table = ops.measure(params, levels, repeats=repeats, two_threads=False, allow_insecure=params.insecure)
            seen[name].append(table["ms"])
    names = dict.fromkeys(p for rounds in seen.values() for p in rounds[0])
    return {
        p: {
            str(level): {
                name: _middle([ms.get(p, {}).get(str(level)) for ms in rounds]) for name, rounds in seen.items()
            }
            for level in levels
        }
        for p in names
    }


def _middle(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None
