"""The operator race: four ways from scores to attention weights, under encryption, at equal error of the weights.

Each turns rows of scores s (standard normal, every key visible) into weights, and is a polynomial fitted on the calibrated
ranges (`race_fits`); what it approximates is its own exact form.

    power      s^4 / (1 + sum s^4)                                           PowerSoftmax (methods.md 1.1)
    exp        exp(s) / sum exp(s), one reciprocal of the sum                as NEXUS, with Chebyshev instead of Taylor
    square     exp(s / 2^k), then k times: divide by the 2-norm and square   the square strategy, Cho et al., CCS 2024
    pointwise  gelu(s) / n: no row sum at all                                pointwise attention (methods.md 2.1)

All errors are relative to the largest weight. Equal error means that of the decrypted weights against the exact form, fit and
encryption together, at most `ERROR`: three quarters are the fit's, and the compiler is asked to promise the last quarter. A promise
can be broken, so the decrypted weights are measured, and where they err too much the compiler is asked for less until they do not.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Target, compile_onnx
from he_backend.base import HEError
from polyformer.commands.isolated import isolated

from . import records, requests
from .race_fits import ERROR, WAYS, Array, Fitted, Way, fitted
from .registry import Progress, Record, Settings

LENGTHS = (16, 64, 128, 256, 1024)  # 128: the paper's, methods.md 1.5
SCORES, QUICK_SCORES = 1 << 14, 1 << 8  # measured at once: rows x keys
ASKED = (
    0.25,
    0.025,
    0.0025,
)  # shares of ERROR that encryption may add; the next is asked for where the one before is broken
SAMPLES = 8


def race(settings: Settings) -> Record:
    """Every way at every length: seconds, depth, refreshes, error, memory."""
    lengths = (16,) if settings.quick else LENGTHS
    rows: list[dict[str, Any]] = []
    for n in lengths:
        for way in WAYS:
            step = settings.within(len(rows), len(lengths) * len(WAYS), f"{way}, {n} keys")
            rows.append(row(way, n, settings.quick, settings.repeats, progress=step))
            settings.keep(_record(rows, settings))
    return _record(rows, settings)


def _record(rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    repeats = 1 if settings.quick else settings.repeats
    params = {
        "scores": _scores(settings.quick),
        "error": ERROR,
        "distribution": "standard normal, every key visible",
        "insecure": settings.quick,
    }
    return records.record("operator-race", metrics={"rows": rows}, params=params, threads=2, seed=0, repeats=repeats)


def row(name: str, n: int, quick: bool, repeats: int, *, progress: Progress) -> dict[str, Any]:
    """One row of the race. The fit is found in one process and every measurement has another, so that its peak of memory is its own.

    Returns:
        Errors relative to `largest_weight`: fit_error (exact form against the fit in the clear, all samples), encryption_error (fit
        in the clear against decrypted), total_error (exact form against decrypted), promised_error (the compiler's, of encryption),
        asked_error (what it was asked for). `kept`: total_error is at most ERROR. `division` says how the row is divided. `peak_gb`
        is of the process that compiled, made keys and evaluated.
    """
    largest = _largest(name, n, quick)
    with tempfile.TemporaryDirectory() as place:
        fit = isolated(found, name, n, quick, Path(place), progress=progress)
        for asked in ASKED:
            record = isolated(measured, name, n, quick, repeats, fit.path, asked, progress=progress)
            if record is None:
                break  # no parameters promise so little: what was measured before stays
            m, params, held = record["metrics"], record["params"], asked
            if m["total_error"] <= ERROR * largest:
                break
    return {
        "name": f"{name}-{n}",
        "way": name,
        "keys": n,
        "rows": _scores(quick) // n,
        "evaluate_s": m["evaluate_s"],
        "evaluate_spread_s": m["evaluate_spread_s"],
        "levels": params["levels"],
        "log_n": params["log_n"],
        "scale_bits": params["scale_bits"],
        "refreshes": m["refreshes"],
        "division": fit.division,
        "degrees": dict(fit.used),
        "largest_weight": largest,
        "fit_error": fit.error,
        "encryption_error": _two_digits(m["max_abs_error"] / largest),
        "total_error": _two_digits(m["total_error"] / largest),
        "promised_error": m["promised_error"] / largest,
        "asked_error": held * ERROR,
        "kept": bool(m["total_error"] <= ERROR * largest),
        "peak_gb": m["peak_gb"],
        "parameters": m["parameters"],
    }


def found(name: str, n: int, quick: bool, folder: Path, *, progress: Progress) -> Fitted:
    """The fit of a row, in the process that calls."""
    progress(0, 3, "fit")
    return cheapest(WAYS[name], samples(n, quick), folder, _target(ASKED[0], name, n, quick))


def measured(
    name: str, n: int, quick: bool, repeats: int, path: Path, asked: float, *, progress: Progress
) -> dict[str, Any] | None:
    """The record of one request of a fit, in the process that calls.

    Args:
        asked: of `ASKED`; None is returned where no parameters promise as little as one beyond the first.
    """
    x = samples(n, quick)
    try:
        return requests.measure(
            name,
            path,
            x.astype(np.float32),
            target=_target(asked, name, n, quick),
            repeats=1 if quick else repeats,
            progress=progress,
            weights="none",
            exact=WAYS[name].exact(x[-1]),
        )
    except HEError:
        if asked == ASKED[0]:
            raise
        return None


def samples(n: int, quick: bool) -> Array:
    """Scores [SAMPLES, rows, n]; the last one is the request."""
    return np.random.default_rng(0).normal(size=(SAMPLES, _scores(quick) // n, n))


def _scores(quick: bool) -> int:
    return QUICK_SCORES if quick else SCORES


def _largest(name: str, n: int, quick: bool) -> float:
    return float(np.max(WAYS[name].exact(samples(n, quick))))


def _target(asked: float, name: str, n: int, quick: bool) -> Target:
    error = asked * ERROR * _largest(name, n, quick)
    return Target(max_memory_gb=16.0, max_error=error, insecure_log_n=10 if quick else None)


def _two_digits(error: float) -> float:
    """An unrounded difference of a decryption belongs into no file."""
    return float(f"{error:.1e}")


def cheapest(way: Way, x: Array, folder: Path, target: Target) -> Fitted:
    """Of all divisions, the fit that the compiler thinks fastest.

    Raises:
        ValueError: no division keeps the error.
    """
    fits: list[Fitted] = []
    misses: list[str] = []
    for division in way.divisions:
        try:
            fits += fitted(way, x, folder, division)
        except ValueError as error:
            misses.append(str(error))
    if not fits:
        raise ValueError("; ".join(misses))
    for even in (False, True):
        priced = [(_predicted(fit, x, target), i) for i, fit in enumerate(fits) if fit.even == even]
        if priced and min(priced)[0] < math.inf:
            return fits[min(priced)[1]]
    return fits[0]  # whose compilation says what is missing


def _predicted(fit: Fitted, x: Array, target: Target) -> float:
    try:
        circuit = compile_onnx(fit.path, x[:-1].astype(np.float32), target=target).circuit
    except HEError:
        return math.inf
    return float(circuit.predicted["evaluate_s"])
