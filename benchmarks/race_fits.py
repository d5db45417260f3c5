"""Fits of the operator race: each way as an ONNX graph of the cheapest polynomials that keep the error on samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from polyformer.approx import Polynomial, fit, goldschmidt_start, goldschmidt_steps, reciprocal

from . import models
from .refresh_functions import gelu

Array = np.ndarray
ERROR = 1e-3  # of a decrypted weight against the exact form, relative to the largest weight
FIT_ERROR = 0.75 * ERROR  # of the fit alone
MARGIN = 1.15  # by which a fitted interval is wider than what the samples filled
MAX_DEGREE = 15
EVEN = 4  # fits by one tolerance, at most
EPS = 1.0  # of PowerSoftmax, on the sum of powers: the models' default
LOOSE_TO_TIGHT = (100.0, 30.0, 10.0, 3.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02)  # tolerances of the parts, over FIT_ERROR
EVENLY = (3.0, 2.0, 1.3, 0.9, 0.6, 0.3)  # the same, of fits by one tolerance
STEPS = "steps"  # the part that is a number of Goldschmidt's steps; all others are degrees of polynomials
POLYNOMIAL, GOLDSCHMIDT = "polynomial", "Goldschmidt"


@dataclass(kw_only=True)
class Effort:
    """How much each part of a way takes: the degree of a polynomial, or Goldschmidt's steps.

    tolerance  each part takes the least that keeps it
    wanted     part -> what it takes instead, whatever it errs
    used       what the parts of the last build took
    known      fits by part and degree, so that none is made twice
    """

    tolerance: float
    division: str = ""
    wanted: Mapping[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    known: dict[tuple[str, int], Polynomial] = field(default_factory=dict, repr=False)

    def fit(self, part: str, make: Callable[[int], Polynomial]) -> Polynomial:
        """The polynomial of a part."""

        def once(degree: int) -> Polynomial:
            if (part, degree) not in self.known:
                self.known[part, degree] = make(degree)
            return self.known[part, degree]

        p = once(self.wanted[part]) if part in self.wanted else least(once, self.tolerance)
        self.used[part] = len(p.coefficients) - 1
        return p

    def steps(self, lo: float, hi: float) -> int:
        """Goldschmidt's steps to 1/x on [lo, hi]."""
        self.used[STEPS] = self.wanted.get(STEPS, max(1, goldschmidt_steps(lo, hi, self.tolerance)))
        return self.used[STEPS]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way: its exact form, the same as an ONNX graph, and how it can divide by the sum of a row ("": there is no choice)."""

    name: str
    exact: Callable[[Array], Array]  # scores [..., n] -> weights [..., n]
    build: Callable[[models.Builder, Array, Effort], str]  # builder, samples, effort -> output
    divisions: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """An ONNX file of a way, its error on the samples relative to the largest weight, and what its parts took."""

    path: Path
    error: float
    used: Mapping[str, int]
    even: bool = False  # by one tolerance for all parts: some may take more than the error needs

    @property
    def division(self) -> str:
        """How it divides, in words."""
        if STEPS in self.used:
            return f"Goldschmidt, {self.used[STEPS]} step{'s' * (self.used[STEPS] > 1)}"
        degrees = [str(n) for part, n in self.used.items() if part.startswith("reciprocal")]
        if not degrees:
            return "none"
        return f"polynomial{'s' * (len(degrees) > 1)} of degree {', '.join(degrees)}"


def fitted(way: Way, samples: Array, folder: Path, division: str = "") -> list[Fitted]:
    """Fits that keep `FIT_ERROR` on the samples and of which no part can take less depth; the first has the lowest degrees too.

    Tolerances of all parts shrink together until the error is kept. Then each part is made as shallow as the error allows while the
    others have the highest degree of their depth, which costs no level; then each degree is lowered as far as the error allows. The
    second fit, if it is another, has the highest degrees of the same depths. The last, `even`, keep one tolerance in all parts, ever
    tighter. They are for where the compiler finds no parameters for the others: it evaluates a polynomial of degree 4 or less by its
    roots, in the unscaled sum of a row, and results may then outgrow the modulus.

    Raises:
        ValueError: no degree up to `MAX_DEGREE` keeps it.
    """
    exact = way.exact(samples)
    effort = Effort(tolerance=0.0, division=division)
    lean, full = (folder / f"{way.name}-{division}-{what}.onnx" for what in ("lean", "full"))

    def error(wanted: Mapping[str, int], path: Path = lean) -> float:
        effort.wanted, effort.used = wanted, {}
        builder = models.Builder(0)
        shape = (1, *samples.shape[1:])
        builder.save(path, shape, way.build(builder, samples, effort), shape)
        return float(np.max(np.abs(_run(path, samples) - exact)) / np.max(exact))

    least_error = math.inf
    for loose in LOOSE_TO_TIGHT:
        effort.tolerance = loose * FIT_ERROR
        least_error = min(least_error, error({}))
        if least_error <= FIT_ERROR:
            break
    else:
        raise ValueError(
            f"{way.name} over {samples.shape[-1]} keys{' by ' * bool(division)}{division}: degrees up to {MAX_DEGREE} err by "
            f"{least_error:.1e} at least, more than {FIT_ERROR:.1e}"
        )
    kept = dict(effort.used)
    tops = {part: _top(part, n) for part, n in kept.items()}
    if error(tops) <= FIT_ERROR:
        kept = tops
    for part in kept:
        while (n := _shallower(part, kept[part])) >= 1 and error({**kept, part: n}) <= FIT_ERROR:
            kept[part] = n
    tops = {part: _top(part, n) for part, n in kept.items()}
    for part in kept:
        while kept[part] > 1 and error({**kept, part: kept[part] - 1}) <= FIT_ERROR:
            kept[part] -= 1
    found = [Fitted(path=lean, error=error(kept), used=kept)]
    if tops != kept and (largest := error(tops, full)) <= FIT_ERROR:
        found.append(Fitted(path=full, error=largest, used=tops))
    for i, loose in enumerate(EVENLY):
        effort.tolerance, path = loose * FIT_ERROR, folder / f"{way.name}-{division}-even{i}.onnx"
        largest, used = error({}, path), dict(effort.used)
        if largest <= FIT_ERROR and all(used != other.used for other in found):
            found.append(Fitted(path=path, error=largest, used=used, even=True))
    return found[: 2 + EVEN]


def _top(part: str, n: int) -> int:
    """The highest degree of the same depth."""
    return n if part == STEPS else min(MAX_DEGREE, 2 ** n.bit_length() - 1)


def _shallower(part: str, n: int) -> int:
    """A step less, or the highest degree of the depth below."""
    return n - 1 if part == STEPS else _top(part, n) // 2


def _run(path: Path, samples: Array) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [session.run(None, {"x": x[None].astype(np.float32)})[0][0] for x in samples]
    return np.stack(found).astype(np.float64)


# --- The ways ---------------------------------------------------------------------------------------------------------


def _power_exact(s: Array) -> Array:
    powers = s**4
    return powers / (EPS + powers.sum(-1, keepdims=True))


def _power(b: models.Builder, s: Array, effort: Effort) -> str:
    square = b.op("Mul", "x", "x")
    powers = b.op("Mul", square, square, name="powers")
    return _divided(b, powers, (s**4).mean(-1), s.shape[-1], effort, EPS)


def _exp_exact(s: Array) -> Array:
    powers = np.exp(s - s.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _exp(b: models.Builder, s: Array, effort: Effort) -> str:
    bound = MARGIN * float(np.abs(s).max())
    p = effort.fit("exp", lambda degree: fit(lambda x: np.exp(x - bound), degree, (-bound, bound)))
    return _divided(b, polynomial(b, "x", p, "exp"), np.exp(s - bound).mean(-1), s.shape[-1], effort)


def _square(b: models.Builder, s: Array, effort: Effort) -> str:
    bound, n = MARGIN * float(np.abs(s).max()), s.shape[-1]
    halvings = max(1, math.ceil(math.log2(bound)))
    y, values = "x", np.exp(s / 2**halvings)
    p = effort.fit(
        "exp", lambda degree: fit(lambda x: np.exp(x / 2**halvings), degree, (-bound, bound), kind="relative")
    )
    y = polynomial(b, y, p, "exp")
    for j in range(halvings):
        squares = b.op("Mul", y, y, name=f"squares{j}")
        mean = (values**2).mean(-1)
        total = b.op("Mul", b.op("ReduceSum", squares, np.array([-1]), keepdims=1), np.array(1.0 / n), name=f"mean{j}")
        # (y / |y|)^2 = y^2 / sum y^2: the product with the reciprocal of the sum, one level less than with the inverse root.
        r = effort.fit(f"reciprocal{j}", partial(_reciprocal, _interval(mean)))
        scale = 1.0 / n if j == halvings - 1 else 1.0  # on the way the mean is kept at 1 instead of the sum
        y = b.op("Mul", squares, polynomial(b, total, r, f"reciprocal{j}", scale), name=f"normed{j}")
        values = values**2 / mean[..., None]
    return y


def _pointwise(b: models.Builder, s: Array, effort: Effort) -> str:
    bound, n = MARGIN * float(np.abs(s).max()), s.shape[-1]
    p = effort.fit("gelu", lambda degree: fit(gelu, degree, (-bound, bound)))
    return polynomial(b, "x", p, "gelu", 1.0 / n)


WAYS = {
    way.name: way
    for way in (
        Way(name="power", exact=_power_exact, build=_power, divisions=(POLYNOMIAL, GOLDSCHMIDT)),
        Way(name="exp", exact=_exp_exact, build=_exp, divisions=(POLYNOMIAL, GOLDSCHMIDT)),
        Way(name="square", exact=_exp_exact, build=_square),
        Way(name="pointwise", exact=lambda s: gelu(s) / s.shape[-1], build=_pointwise),
    )
}


# --- Parts ------------------------------------------------------------------------------------------------------------


def least(make: Callable[[int], Polynomial], tolerance: float) -> Polynomial:
    """The fit of lowest degree that keeps a tolerance, or of `MAX_DEGREE` if none does: what that errs is measured on the samples.

    Args:
        make: degree -> polynomial, with its error measured.
    """
    for degree in range(1, MAX_DEGREE):
        p = make(degree)
        if p.error is not None and p.error <= tolerance:
            return p
    return make(MAX_DEGREE)


def _reciprocal(ends: tuple[float, float], degree: int) -> Polynomial:
    return reciprocal(degree, ends)


def polynomial(b: models.Builder, x: str, p: Polynomial, name: str, factor: float = 1.0) -> str:
    """factor * p(x) by Horner's rule in the variable that maps p's interval to [-1, 1]."""
    c = np.polynomial.chebyshev.cheb2poly(p.coefficients) * factor
    u = b.op("Add", b.op("Mul", x, np.array(p.a)), np.array(p.b))
    y = b.op("Mul", u, np.array(c[-1]))
    for i, coefficient in enumerate(c[-2:0:-1]):
        y = b.op("Mul", u, b.op("Add", y, np.array(coefficient)), name=f"{name}.{i}")
    return b.op("Add", y, np.array(c[0]), name=name)


def _divided(b: models.Builder, powers: str, means: Array, n: int, effort: Effort, eps: float = 0.0) -> str:
    """powers / (eps + their sum): by a polynomial reciprocal of the mean, or by Goldschmidt's steps."""
    mean = b.op("Mul", b.op("ReduceSum", powers, np.array([-1]), keepdims=1), np.array(1.0 / n))
    mean = b.op("Add", mean, np.array(eps / n), name="mean") if eps else mean
    lo, hi = _interval(means + eps / n)
    if effort.division == GOLDSCHMIDT:
        inverse = _goldschmidt(b, mean, lo, hi, effort, 1.0 / n)
    else:
        r = effort.fit("reciprocal", partial(_reciprocal, (lo, hi)))
        inverse = polynomial(b, mean, r, "reciprocal", 1.0 / n)
    return b.op("Mul", powers, inverse, name="weights")


def _goldschmidt(b: models.Builder, x: str, lo: float, hi: float, effort: Effort, factor: float) -> str:
    """factor / x: y <- y (1 + e), e <- e^2 from e = 1 - x y (methods.md 1.6)."""
    start = goldschmidt_start(lo, hi)
    e = b.op("Add", b.op("Mul", x, np.array(-start)), np.array(1.0), name="e0")
    y = b.op("Add", b.op("Mul", e, np.array(start * factor)), np.array(start * factor), name="y0")  # the first step
    for step in range(1, effort.steps(lo, hi)):
        e = b.op("Mul", e, e, name=f"e{step}")
        y = b.op("Mul", y, b.op("Add", e, np.array(1.0)), name=f"y{step}")
    return y


def _interval(values: Array) -> tuple[float, float]:
    """What the samples fill, wider by the margin."""
    return float(values.min()) / MARGIN, float(values.max()) * MARGIN
