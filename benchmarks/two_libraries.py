"""OpenFHE and TenSEAL (SEAL) beside each other: the same ONNX file and the same input, both libraries in one process in turns A B A B.

Each library gets what the compiler finds best for it at 128 bits: ring, scale, digits and plan of rotations. What SEAL lacks (hoisting, the
extended basis, rings above 2^15, keys cut to a level) is part of the comparison; the binding's lock is, too, on two threads. The primitives
are compared besides at one ring, one chain and one digit a prime, where 128 bits leave SEAL most levels.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Compiled, Target, compile_onnx
from compiler.ir import evaluate as evaluate_graph
from compiler.plan import LARGEST_RING, levels_at_most
from he_backend.base import ParamsError
from he_backend.execute import Timing
from he_backend.params import Params

from . import memory, models, ops, records, requests
from .parties import Parties, parties
from .registry import Record, Settings

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


@dataclass(kw_only=True)
class Side:
    """One library's part in a model: its circuit, its parties and what their runs gave, by threads."""

    compiled: Compiled
    compile_s: float
    target: Target
    both: Parties | None = None
    peak: memory.Peak = field(default_factory=memory.Peak)
    timings: dict[int, list[Timing]] = field(default_factory=lambda: {n: [] for n in THREADS})
    totals: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in THREADS})
    results: list[np.ndarray] = field(default_factory=list)

    def ask(self, x: np.ndarray, threads: int, *, keep: bool = True) -> None:
        """One request on so many threads."""
        assert self.both is not None
        self.both.executor.threads = threads
        start = time.perf_counter()
        result, timing = self.both.ask({self.compiled.circuit.inputs[0].name: x})
        if keep:
            self.totals[threads].append(time.perf_counter() - start)
            self.timings[threads].append(timing)
            self.results.append(result)


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
    )


def request(model: Model, say: Callable[[str], None]) -> dict[str, Any]:
    """One model in both libraries."""
    with tempfile.TemporaryDirectory() as place:
        path, samples = model.build(Path(place))
        sides = {}
        for name in LIBRARIES:
            say(f"compile for {name}")
            target = Target(
                backend=name, max_memory_gb=MEMORY_GB, threads=THREADS[0], insecure_log_n=model.insecure_log_n
            )
            start = time.perf_counter()
            compiled = compile_onnx(path, samples[:-1], target=target)
            sides[name] = Side(compiled=compiled, compile_s=time.perf_counter() - start, target=target)
    x = samples[-1].astype(np.float64)
    peaks: list[memory.Peak] = []
    with ExitStack() as stack:
        for name, side in sides.items():
            say(f"keys and weights of {name}")
            with memory.watch() as side.peak:
                side.both = stack.enter_context(parties(side.compiled.circuit, threads=THREADS[0]))
                side.ask(x, THREADS[0], keep=False)  # to warm up
            peaks.append(side.peak)
        with memory.watch() as during:
            for turn in range(model.repeats):
                for threads in THREADS:
                    for name, side in sides.items():
                        say(f"turn {turn + 1}, {name}, {threads} thread{'s' * (threads > 1)}")
                        side.ask(x, threads)
        peaks.append(during)
        found = {name: _figures(side, x) for name, side in sides.items()}
    mine, other = (sides[name].timings[THREADS[0]] for name in LIBRARIES)
    pairs = [b.wall_s / a.wall_s for a, b in zip(mine, other, strict=True)]
    known = [peak.peak_gb for peak in peaks if peak.peak_gb is not None]
    return {
        "name": model.name,
        "about": model.about,
        "weights": "random, seed 0",
        "repeats": model.repeats,
        "libraries": found,
        "ratio": {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)},
        "peak_gb": max(known) if known else None,
    }


def _figures(side: Side, x: np.ndarray) -> dict[str, Any]:
    """What one library's runs say."""
    compiled, one, more = side.compiled, *THREADS
    circuit, both = compiled.circuit, side.both
    assert both is not None
    graph = compiled.graph
    clear = evaluate_graph(graph, x[None])[graph.output][0]
    worst = max(side.results, key=lambda result: float(np.max(np.abs(result - clear))))
    params = circuit.params
    return {
        **requests.figures(compiled, side.timings[one], side.totals[one], worst, clear, target=side.target),
        "evaluate_2_threads_s": statistics.median(t.wall_s for t in side.timings[more]),
        "levels": params.levels,
        "log_n": params.log_n,
        "scale_bits": params.scale_bits,
        "digits": params.digits,
        "rotation_keys": len(circuit.keys),
        "key_bytes": both.key_bytes,
        "request_bytes": both.traffic(circuit.inputs),
        "memory_gb": side.peak.grown_gb,
        "compile_s": side.compile_s,
        "keygen_s": both.keygen_s,
        "prepare_s": both.prepare_s,
        "costs": compiled.plan.costs,
        "onnx_sha256": circuit.model["onnx_sha256"],
        "params": params.to_json(),
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
