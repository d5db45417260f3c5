"""Milliseconds of every primitive at every level, on one thread of this machine: the compiler's cost table.

Times are processor time of the one thread, so that other work on the machine disturbs them little; run it on a quiet one
all the same. The parameters are those of a leveled circuit at N = 2^16 (about 1.5 GB of memory). `contention` is how much
longer one rotation takes, by the clock, while a second thread does the same.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from he_backend import keys
from he_backend.params import Params

from . import records

FOLDER = Path(__file__).parent / "costs"
PARAMS = Params(log_n=16, levels=34, scale_bits=40, first_bits=50, digits=5)
TERMS = 8  # of a weighted sum; its time is given a term

Progress = Callable[[int, int, str], None]


def measure(*, repeats: int = 3, progress: Progress, params: Params = PARAMS, step: int = 1) -> dict[str, Any]:
    """A record whose `ms` maps primitive -> level -> median milliseconds; `spread` is (slowest - fastest) / median.

    Args:
        step: measure every `step`-th level only.
    """
    quiet = records.quiet()
    evaluator, client = open_evaluator(params)
    ms: dict[str, dict[str, float]] = {}
    spreads: list[float] = []
    levels = sorted({*range(0, params.levels + 1, step), params.levels})
    for done, level in enumerate(levels):
        for name, call in primitives(evaluator, client, level).items():
            progress(done, len(levels), f"{name} at level {level}")
            call()  # warm-up: tables of this level, memory
            times = [timed(call) for _ in range(repeats)]
            median = statistics.median(times)
            ms.setdefault(name, {})[str(level)] = round(1000 * median / (TERMS if "weighted_sum" in name else 1), 4)
            spreads.append((max(times) - min(times)) / median)
    middle = primitives(evaluator, client, params.levels // 2)["rotate"]
    contention = contended(middle, repeats)
    progress(len(levels), len(levels), "done")
    evaluator.close()
    record = records.record(
        "ops",
        metrics={"spread": round(statistics.median(spreads), 3), "contention": round(contention, 3)},
        params=params.to_json(),
        threads=1,
        repeats=repeats,
        was_quiet=quiet,
    )
    return {**record, "cpu": record["machine"]["cpu"], "ms": ms, "contention": round(contention, 3)}


def open_evaluator(params: Params) -> tuple[Any, Any]:
    """Evaluator with a relinearisation key and the rotation key 1, and the client that made them."""
    module = keys.backend(params.backend)
    client = module.Client(params, allow_insecure=params.insecure)
    evaluator = module.Evaluator(params, key_id=client.key_id, allow_insecure=params.insecure)
    for kind, k in (("relin", 0), ("rotation", 1)):
        evaluator.load_key(kind, k, params.levels, client.make_key(kind, k, params.levels))
    return evaluator, client


def primitives(evaluator: Any, client: Any, level: int) -> dict[str, Callable[[], Any]]:
    """Every primitive that exists at this level, ready to be called."""
    rng = np.random.default_rng(level)
    values = rng.uniform(-1, 1, size=evaluator.slots)
    a = evaluator.import_ciphertext(client.export_ciphertext(client.encrypt(values, level=level)), level=level)
    scale = evaluator.scale
    plain = evaluator.encode(values, level=level, scale=scale)
    product = evaluator.mul(a, a)
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: evaluator.encode(values, level=level, scale=scale),
        "add": lambda: evaluator.add(a, a),
        "sub": lambda: evaluator.sub(a, a),
        "add_plain": lambda: evaluator.add_plain(a, plain),
        "add_scalar": lambda: evaluator.add_scalar(a, 0.5, scale=scale),
        "mul_plain": lambda: evaluator.mul_plain(a, plain),
        "mul_scalar": lambda: evaluator.mul_scalar(a, 0.5, scale=scale),
        "mul": lambda: evaluator.mul(a, a),
        "square": lambda: evaluator.square(a),
        "relinearize": lambda: evaluator.relinearize(product),
        "rotate": lambda: evaluator.rotate(a, 1),
    }
    if level:
        double = evaluator.mul_plain(a, plain)
        calls["rescale"] = lambda: evaluator.rescale(double)
        calls["drop"] = lambda: evaluator.drop(a, level=level - 1)
    if "hoisting" in evaluator.capabilities:
        digits = evaluator.hoist(a)
        calls["hoist"] = lambda: evaluator.hoist(a)
        calls["rotate_hoisted"] = lambda: evaluator.rotate_hoisted(a, digits, 1)
    if "double_hoisting" in evaluator.capabilities:
        wide = evaluator.encode(values, level=level, scale=scale, extended=True)
        rotated = evaluator.rotate_extended(a, digits, 1)
        summed = evaluator.weighted_sum([(rotated, wide)])
        calls["encode_extended"] = lambda: evaluator.encode(values, level=level, scale=scale, extended=True)
        calls["rotate_extended"] = lambda: evaluator.rotate_extended(a, digits, 1)
        calls["extend"] = lambda: evaluator.extend(a)
        calls["weighted_sum_extended"] = lambda: evaluator.weighted_sum([(rotated, wide)] * TERMS)
        calls["mod_down"] = lambda: evaluator.mod_down(summed)
    return calls


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> float:
    start = clock()
    call()
    return clock() - start


def contended(call: Callable[[], Any], repeats: int) -> float:
    """Time of a call while a second thread makes the same calls, against its time alone."""
    alone = statistics.median(timed(call, time.perf_counter) for _ in range(repeats + 2))
    stop = threading.Event()

    def other() -> None:
        while not stop.is_set():
            call()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        together = statistics.median(timed(call, time.perf_counter) for _ in range(repeats + 2))
    finally:
        stop.set()
        thread.join()
    return together / alone
