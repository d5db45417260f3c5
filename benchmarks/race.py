"""The operator race: four ways from scores to attention weights, under encryption, at equal error of the weights.

Each turns rows of scores s (standard normal, every key visible) into weights, and is a polynomial fitted on the calibrated
ranges to the same largest error relative to the largest weight; what it approximates is its own exact form.

    power      s^4 / (1 + sum s^4)                                           PowerSoftmax (methods.md 1.1)
    exp        exp(s) / sum exp(s), one reciprocal of the sum                as NEXUS, with Chebyshev instead of Taylor
    square     exp(s / 2^k), then k times: divide by the 2-norm and square   the square strategy, Cho et al., CCS 2024
    pointwise  gelu(s) / n: no row sum at all                                pointwise attention (methods.md 2.1)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Target
from polyformer.approx import Polynomial, fit, goldschmidt_start, goldschmidt_steps

from . import models, records, requests
from .registry import Record, Settings

Array = np.ndarray
LENGTHS = (16, 64, 256, 1024)
SCORES = 1 << 14  # measured at once: rows x keys
ERROR = 1e-3  # of a weight, relative to the largest weight
MARGIN = 1.15  # by which a fitted interval is wider than what the samples filled
MAX_DEGREE = 15
EPS = 1.0  # of PowerSoftmax, on the sum of powers: the models' default
SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way: its exact form, and the same as an ONNX graph fitted to samples."""

    name: str
    exact: Callable[[Array], Array]  # scores [..., n] -> weights [..., n]
    build: Callable[[models.Builder, Array, float], str]  # builder, samples, tolerance -> output


def race(settings: Settings) -> Record:
    """Every way at every length: seconds, depth, refreshes, error."""
    lengths = (16,) if settings.quick else LENGTHS
    rows: list[dict[str, Any]] = []
    for n in lengths:
        for way in WAYS:
            step = len(rows)

            def progress(
                done: int, total: int, what: str, step: int = step, label: str = f"{way.name}, {n} keys"
            ) -> None:
                settings.progress(step * total + done, len(lengths) * len(WAYS) * total, f"{label}: {what}")

            rows.append(_one(way, n, settings, progress))
            settings.keep(_record(rows, settings.repeats))
    return _record(rows, settings.repeats)


def _record(rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    params = {"scores": SCORES, "error": ERROR, "distribution": "standard normal, every key visible"}
    return records.record("operator-race", metrics={"rows": rows}, params=params, threads=2, seed=0, repeats=repeats)


def _one(way: Way, n: int, settings: Settings, progress: requests.Step) -> dict[str, Any]:
    samples = np.random.default_rng(0).normal(size=(SAMPLES, (256 if settings.quick else SCORES) // n, n))
    with tempfile.TemporaryDirectory() as place:
        path, error = fitted(way, samples, Path(place) / f"{way.name}.onnx")
        target = Target(
            max_memory_gb=16.0,
            max_error=0.25
            * ERROR
            * float(np.max(way.exact(samples))),  # of the encryption: little beside that of the fit
            insecure_log_n=10 if settings.quick else None,
        )
        repeats = 1 if settings.quick else settings.repeats
        record = requests.measure(
            way.name,
            path,
            samples.astype(np.float32),
            target=target,
            repeats=repeats,
            progress=progress,
            weights="none",
        )
    m, params = record["metrics"], record["params"]
    return {
        "name": f"{way.name}-{n}",
        "way": way.name,
        "keys": n,
        "rows": samples.shape[1],
        "evaluate_s": m["evaluate_s"],
        "evaluate_spread_s": m["evaluate_spread_s"],
        "levels": params["levels"],
        "log_n": params["log_n"],
        "refreshes": m["refreshes"],
        "operator_error": error,
        "encryption_error": m["max_abs_error"],
        "peak_gb": m["peak_gb"],
        "parameters": m["parameters"],
    }


def fitted(way: Way, samples: Array, path: Path) -> tuple[Path, float]:
    """An ONNX file of a way that keeps the error on the samples, and that error; inner tolerances shrink until it does.

    Raises:
        ValueError: no degree up to `MAX_DEGREE` keeps it.
    """
    exact = way.exact(samples)
    for shrink in (1.0, 0.5, 0.25, 0.1, 0.05, 0.02):
        builder = models.Builder(0)
        try:
            output = way.build(builder, samples, ERROR * shrink)
        except ValueError:
            break
        shape = (1, *samples.shape[1:])
        builder.save(path, shape, output, shape)
        found = np.stack([_run(path, x[None])[0] for x in samples])
        error = float(np.max(np.abs(found - exact)) / np.max(exact))
        if error <= ERROR:
            return path, error
    raise ValueError(
        f"{way.name} over {samples.shape[-1]} keys: no polynomial of degree <= {MAX_DEGREE} errs less than {ERROR}"
    )


def _run(path: Path, x: Array) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.astype(np.float32)})[0].astype(np.float64)


# --- The ways ---------------------------------------------------------------------------------------------------------


def _power_exact(s: Array) -> Array:
    powers = s**4
    return powers / (EPS + powers.sum(-1, keepdims=True))


def _power(b: models.Builder, s: Array, tolerance: float) -> str:
    square = b.op("Mul", "x", "x")
    powers = b.op("Mul", square, square, name="powers")
    return _divided(b, powers, (s**4).mean(-1), s.shape[-1], tolerance, EPS)


def _exp_exact(s: Array) -> Array:
    powers = np.exp(s - s.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _exp(b: models.Builder, s: Array, tolerance: float) -> str:
    bound = MARGIN * float(np.abs(s).max())
    p = least(lambda x: np.exp(x - bound), (-bound, bound), tolerance, relative=False)
    return _divided(b, polynomial(b, "x", p, "exp"), np.exp(s - bound).mean(-1), s.shape[-1], tolerance)


def _square(b: models.Builder, s: Array, tolerance: float) -> str:
    bound, n = MARGIN * float(np.abs(s).max()), s.shape[-1]
    halvings = max(1, math.ceil(math.log2(bound)))
    y, values = "x", np.exp(s / 2**halvings)
    p = least(lambda x: np.exp(x / 2**halvings), (-bound, bound), tolerance, relative=True)
    y = polynomial(b, y, p, "exp")
    for j in range(halvings):
        squares = b.op("Mul", y, y, name=f"squares{j}")
        mean = (values**2).mean(-1)
        total = b.op("Mul", b.op("ReduceSum", squares, np.array([-1]), keepdims=1), np.array(1.0 / n), name=f"mean{j}")
        # (y / |y|)^2 = y^2 / sum y^2: the product with the reciprocal of the sum, one level less than with the inverse root.
        r = least(lambda x: 1.0 / x, _interval(mean), tolerance, relative=True)
        scale = 1.0 / n if j == halvings - 1 else 1.0  # on the way the mean is kept at 1 instead of the sum
        y = b.op("Mul", squares, polynomial(b, total, r, f"reciprocal{j}", scale), name=f"normed{j}")
        values = values**2 / mean[..., None]
    return y


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _pointwise(b: models.Builder, s: Array, tolerance: float) -> str:
    bound, n = MARGIN * float(np.abs(s).max()), s.shape[-1]
    p = least(_gelu, (-bound, bound), tolerance * bound, relative=False)
    return polynomial(b, "x", p, "gelu", 1.0 / n)


WAYS = (
    Way(name="power", exact=_power_exact, build=_power),
    Way(name="exp", exact=_exp_exact, build=_exp),
    Way(name="square", exact=_exp_exact, build=_square),
    Way(name="pointwise", exact=lambda s: _gelu(s) / s.shape[-1], build=_pointwise),
)


# --- Fits -------------------------------------------------------------------------------------------------------------


def least(
    f: Callable[[Array], Array], interval: tuple[float, float], tolerance: float, *, relative: bool
) -> Polynomial:
    """The fit of lowest degree that keeps a tolerance.

    Raises:
        ValueError: none up to `MAX_DEGREE` does; names the best error.
    """
    for degree in range(1, MAX_DEGREE + 1):
        p = fit(f, degree, interval, kind="relative" if relative else "absolute")
        if p.error is not None and p.error <= tolerance:
            return p
    raise ValueError(f"degree {MAX_DEGREE} errs by {p.error or math.inf:.1e} on {interval}, more than {tolerance:.1e}")


def polynomial(b: models.Builder, x: str, p: Polynomial, name: str, factor: float = 1.0) -> str:
    """factor * p(x) by Horner's rule in the variable that maps p's interval to [-1, 1]."""
    c = np.polynomial.chebyshev.cheb2poly(p.coefficients) * factor
    u = b.op("Add", b.op("Mul", x, np.array(p.a)), np.array(p.b))
    y = b.op("Mul", u, np.array(c[-1]))
    for i, coefficient in enumerate(c[-2:0:-1]):
        y = b.op("Mul", u, b.op("Add", y, np.array(coefficient)), name=f"{name}.{i}")
    return b.op("Add", y, np.array(c[0]), name=name)


def _divided(b: models.Builder, powers: str, means: Array, n: int, tolerance: float, eps: float = 0.0) -> str:
    """powers / (eps + their sum): by the polynomial reciprocal of the mean, or by Goldschmidt's steps where it is wide."""
    mean = b.op("Mul", b.op("ReduceSum", powers, np.array([-1]), keepdims=1), np.array(1.0 / n))
    mean = b.op("Add", mean, np.array(eps / n), name="mean") if eps else mean
    lo, hi = _interval(means + eps / n)
    try:
        inverse = polynomial(
            b, mean, least(lambda x: 1.0 / x, (lo, hi), tolerance, relative=True), "reciprocal", 1.0 / n
        )
    except ValueError:
        inverse = _goldschmidt(b, mean, lo, hi, tolerance, 1.0 / n)
    return b.op("Mul", powers, inverse, name="weights")


def _goldschmidt(b: models.Builder, x: str, lo: float, hi: float, tolerance: float, factor: float) -> str:
    """factor / x: y <- y (1 + e), e <- e^2 from e = 1 - x y (methods.md 1.6)."""
    start = goldschmidt_start(lo, hi)
    e = b.op("Add", b.op("Mul", x, np.array(-start)), np.array(1.0), name="e0")
    y = b.op("Add", b.op("Mul", e, np.array(start * factor)), np.array(start * factor), name="y0")  # the first step
    for step in range(1, goldschmidt_steps(lo, hi, tolerance)):
        e = b.op("Mul", e, e, name=f"e{step}")
        y = b.op("Mul", y, b.op("Add", e, np.array(1.0)), name=f"y{step}")
    return y


def _interval(values: Array) -> tuple[float, float]:
    """What the samples fill, wider by the margin."""
    return float(values.min()) / MARGIN, float(values.max()) * MARGIN
