"""Polynomials as values with a contract: coefficients, interval, basis, degree, depth and error.

Everything that replaces a non-polynomial function is a `Polynomial` made here: minimax fits (Lawson's iteration), the
closed-form minimax reciprocal, and the inverse square root seed. Newton and Goldschmidt are given as plain iterations,
because the compiler may prefer their product structure to the composed polynomial. Spec: methods.md 1.6; Goldschmidt
error |e0|^(2^k) with e = 1 - a y.

Every evaluation uses only +, - and *, so the same code runs on torch tensors, numpy arrays and floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.polynomial import chebyshev

Basis = Literal["power", "chebyshev"]
Kind = Literal["absolute", "relative"]
T = TypeVar("T")

GRID = 4001  # points on which errors are measured; they include both ends


def depth_of_degree(degree: int) -> int:
    """Return the multiplicative levels of a degree-n polynomial, ceil(log2 n); constants and affine maps are free
    (they fold).
    """
    return max(0, (max(degree, 1) - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """A polynomial sum_k c_k B_k(a x + b) on a public interval.

    `basis` is B_k: powers u^k or Chebyshev polynomials T_k(u). `error` is the largest error measured at fitting time
    over `interval`, absolute or relative as `kind` says; None where the polynomial approximates nothing. Outside the
    interval nothing is promised.
    """

    coefficients: tuple[float, ...]
    interval: tuple[float, float]
    basis: Basis = "chebyshev"
    a: float = 1.0
    b: float = 0.0
    error: float | None = None
    kind: Kind = "absolute"

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise ValueError("a Polynomial needs at least one coefficient")
        if not self.interval[0] < self.interval[1]:
            raise ValueError(f"empty interval {self.interval}: the lower end must be below the upper end")
        if self.basis not in ("power", "chebyshev"):
            raise ValueError(f"unknown basis {self.basis!r}; known: power, chebyshev")

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    @property
    def depth(self) -> int:
        return depth_of_degree(self.degree)

    def __call__(self, x: T) -> T:
        """Evaluate elementwise on a tensor, an array or a number."""
        return evaluate(x, self.coefficients, self.a, self.b, self.basis)

    def to_power(self) -> Polynomial:
        """Return the same polynomial in the power basis of the same u (exact in real arithmetic; ill-conditioned above
        degree 20).
        """
        if self.basis == "power":
            return self
        return Polynomial(
            coefficients=tuple(chebyshev.cheb2poly(np.asarray(self.coefficients)).tolist()),
            interval=self.interval,
            basis="power",
            a=self.a,
            b=self.b,
            error=self.error,
            kind=self.kind,
        )


def evaluate(x: Any, coefficients: Sequence[Any], a: Any, b: Any, basis: str) -> Any:
    """Evaluate sum_k c_k B_k(a x + b) by Horner (power) or Clenshaw (chebyshev). Coefficients may be floats or 0-d
    tensors.
    """
    u = x * a + b
    if len(coefficients) == 1:
        return u * 0 + coefficients[0]
    if basis == "power":
        y = u * coefficients[-1] + coefficients[-2]
        for c in reversed(coefficients[:-2]):
            y = y * u + c
        return y
    two_u = u + u
    b1, b2 = coefficients[-1], 0.0
    for c in reversed(coefficients[1:-1]):
        b1, b2 = two_u * b1 + c - b2, b1
    return u * b1 + coefficients[0] - b2


def unit_map(lo: float, hi: float) -> tuple[float, float]:
    """Return (a, b) such that a x + b maps [lo, hi] onto [-1, 1]."""
    return 2.0 / (hi - lo), -(hi + lo) / (hi - lo)


def _measured(f: Callable[[np.ndarray], np.ndarray], p: Polynomial) -> Polynomial:
    x = np.linspace(*p.interval, GRID)
    y = f(x)
    err = np.abs(p(x) - y)
    if p.kind == "relative":
        err = err / np.abs(y)
    return Polynomial(
        coefficients=p.coefficients,
        interval=p.interval,
        basis=p.basis,
        a=p.a,
        b=p.b,
        error=float(err.max()),
        kind=p.kind,
    )


def fit(
    f: Callable[[np.ndarray], np.ndarray],
    degree: int,
    interval: tuple[float, float],
    *,
    kind: Kind = "absolute",
    basis: Basis = "chebyshev",
    iterations: int = 300,
) -> Polynomial:
    """Fit the (near) minimax polynomial of f on an interval, in absolute or relative error.

    Lawson's iteration: least squares in the Chebyshev basis on Chebyshev-spaced points, each point reweighted by its
    own error, until the error is level. The best iterate is kept, so more iterations never hurt. The measured error is
    stored in the result. Source: C. Lawson (1961); Rice and Usow (1968).
    """
    lo, hi = interval
    u = np.cos(np.linspace(0.0, np.pi, max(401, 20 * (degree + 1))))
    x = (u * (hi - lo) + (hi + lo)) / 2
    y = f(x)
    scale = np.abs(y) if kind == "relative" else np.ones_like(y)
    if kind == "relative" and not (np.all(y > 0) or np.all(y < 0)):
        raise ValueError(f"a relative fit needs a function without zeros on [{lo}, {hi}]")
    basis_ND = chebyshev.chebvander(u, degree) / scale[:, None]
    target_N = y / scale
    weight_N = np.full_like(u, 1.0 / len(u))
    best, best_error = None, np.inf
    for _ in range(iterations):
        root_N = np.sqrt(weight_N)
        c = np.linalg.lstsq(basis_ND * root_N[:, None], target_N * root_N, rcond=None)[0]
        err_N = np.abs(basis_ND @ c - target_N)
        if err_N.max() < best_error:
            best, best_error = c, float(err_N.max())
        weight_N = weight_N * err_N
        if weight_N.sum() < 1e-300:
            break
        weight_N = np.maximum(weight_N / weight_N.sum(), 1e-12)
    assert best is not None
    a, b = unit_map(lo, hi)
    p = Polynomial(coefficients=tuple(best.tolist()), interval=(lo, hi), a=a, b=b, kind=kind)
    return _measured(f, p if basis == "chebyshev" else p.to_power())


def fit_weighted(
    f: Callable[[np.ndarray], np.ndarray],
    degree: int,
    interval: tuple[float, float],
    weight: Callable[[np.ndarray], np.ndarray],
) -> Polynomial:
    """Fit f by least squares under a weight (a density on x, of any scale) in the Chebyshev basis of an interval.

    The largest absolute error over the interval is measured and stored; it is that of the tails where the weight is small.
    """
    lo, hi = interval
    x = np.linspace(lo, hi, max(GRID, 20 * (degree + 1)))
    a, b = unit_map(lo, hi)
    root = np.sqrt(weight(x))
    c = np.linalg.lstsq(chebyshev.chebvander(a * x + b, degree) * root[:, None], f(x) * root, rcond=None)[0]
    return _measured(f, Polynomial(coefficients=tuple(c.tolist()), interval=interval, a=a, b=b))


def reciprocal(degree: int, interval: tuple[float, float]) -> Polynomial:
    """Return the minimax polynomial of 1/x in relative error on [lo, hi] > 0, in closed form.

    1 - x p(x) = T_{n+1}(u(x)) / T_{n+1}(u(0)), so the relative error is exactly 1 / T_{n+1}((k + 1)/(k - 1)) for the
    ratio k = hi/lo.
    """
    lo, hi = interval
    if lo <= 0:
        raise ValueError(f"1/x needs a positive interval, got [{lo}, {hi}]")
    a, b = unit_map(lo, hi)
    top = np.zeros(degree + 2)
    top[-1] = 1.0
    numerator = -top / chebyshev.chebval(b, top)
    numerator[0] += 1.0
    # x = (u - b)/a, so p = numerator * a / (u - b): an exact division
    quotient, _ = chebyshev.chebdiv(numerator, np.array([-b, 1.0]))
    p = Polynomial(coefficients=tuple((quotient * a).tolist()), interval=(lo, hi), a=a, b=b, kind="relative")
    return _measured(lambda x: 1.0 / x, p)


def reciprocal_error(degree: int, ratio: float) -> float:
    """Return the relative error of the best degree-n polynomial of 1/x on an interval of ratio hi/lo."""
    return float(1.0 / np.cosh((degree + 1) * np.arccosh((ratio + 1) / (ratio - 1))))


def inverse_sqrt(degree: int, interval: tuple[float, float]) -> Polynomial:
    """Return the near minimax polynomial of x^(-1/2) in relative error on [lo, hi] > 0: the seed of Newton's
    iteration, or all of it.
    """
    if interval[0] <= 0:
        raise ValueError(f"x^(-1/2) needs a positive interval, got {interval}")
    return fit(lambda x: 1.0 / np.sqrt(x), degree, interval, kind="relative")


def newton_inverse_sqrt(x: T, y: T, steps: int) -> T:
    """Refine y ~ x^(-1/2) by `steps` Newton steps y <- y (3 - x y^2) / 2; two levels a step when x y and y^2 run in
    parallel.
    """
    for _ in range(steps):
        y = (y * 1.5) - (x * y) * (y * y) * 0.5  # type: ignore[operator]
    return y


def newton_error(seed_error: float, steps: int) -> float:
    """Bound the relative error after Newton steps: e <- (3 e^2 + e^3) / 2."""
    for _ in range(steps):
        seed_error = (3 * seed_error**2 + seed_error**3) / 2
    return seed_error


def goldschmidt_reciprocal(x: T, start: Any, steps: int) -> T:
    """Return y ~ 1/x by Goldschmidt: e = 1 - x y, then y <- y (1 + e), e <- e^2. `start` is public and strictly below
    2/max(x).

    The relative error is |e0|^(2^steps), the degree 2^steps - 1; both products of a step run in parallel.
    """
    e = 1.0 - x * start
    y = start + e * 0.0
    for step in range(steps):
        y = y * (1.0 + e)
        if step + 1 < steps:
            e = e * e
    return y


def goldschmidt_start(lo: float, hi: float) -> float:
    """Return the start that levels the first error over [lo, hi]: 2/(lo + hi), always below the divergence point
    2/hi.
    """
    if lo <= 0:
        raise ValueError(f"Goldschmidt needs a positive interval, got [{lo}, {hi}]")
    return 2.0 / (lo + hi)


def goldschmidt_steps(lo: float, hi: float, error: float) -> int:
    """Return the least number of steps with |e0|^(2^k) <= error on [lo, hi] (the table of methods.md 1.6)."""
    e0 = (hi - lo) / (hi + lo)
    steps, e = 0, e0
    while e > error * (1 + 1e-12):
        e, steps = e * e, steps + 1
    return steps
