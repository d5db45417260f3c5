"""Functions that a refresh may evaluate, on stored values within [-1, 1] and with results within [-1, 1], and the polynomials
that a circuit would evaluate after a plain refresh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from compiler.polynomials import prepare
from polyformer import approx

Curve = Callable[[np.ndarray], np.ndarray]
ACCURATE = 2.0**-13  # what a plain refresh leaves in its worst slot is 2^-14
DEGREES = (5, 7, 9, 11, 13, 15, 19, 23, 27, 31)  # of polynomials that are accurate
DEGREE = 4  # of the models' activations and reciprocals
RATIO = 16.0  # of the ends of a trained denominator's range


@dataclass(frozen=True, kw_only=True)
class Function:
    """One function.

    exact       what the refresh evaluates
    polynomial  what a circuit evaluates in its place: attributes of a `polynomial` op, and the factor of its result
    degree, error  of the polynomial: its largest difference from `exact`
    """

    name: str
    exact: Curve
    polynomial: dict[str, Any]
    factor: float
    degree: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Where a model's polynomials have to be right: |argument| of an activation, and ends of a denominator's range."""

    activation: float
    denominator: tuple[float, float]

    @classmethod
    def of_recipe(cls) -> Ranges:
        """Those that the package's models are trained for."""
        from training.recipe import Recipe  # it imports torch, which the process that refreshes has no room for

        recipe = Recipe()
        return cls(activation=recipe.activation_bound * recipe.margin, denominator=recipe.denominator_interval)


def functions(ranges: Ranges) -> tuple[Function, ...]:
    """The models' own polynomials, and two functions that no low degree reaches."""
    bound, (low, high) = ranges.activation, ranges.denominator
    activation = approx.fit(gelu, DEGREE, (-bound, bound))
    division = approx.reciprocal(DEGREE, (low, high))
    return (
        _own(f"gelu on ±{bound:g}, degree {DEGREE}", activation, -bound, bound),
        _own(f"1/x on {low:g} to {high:g}, degree {DEGREE}", division, low, high),
        _hard(f"gelu on ±{bound:g}", gelu, -bound, bound),
        _hard(f"1/x on a ratio of {RATIO:g}", lambda x: 1.0 / x, 1.0 / RATIO, 1.0),
    )


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415)."""
    from scipy.special import ndtr

    result: np.ndarray = x * ndtr(x)
    return result


def _stored(f: Curve, low: float, high: float) -> Curve:
    """f on [low, high] as a function of [-1, 1] whose largest value is 1."""
    middle, half = (low + high) / 2.0, (high - low) / 2.0
    peak = float(np.abs(f(np.linspace(low, high, 4001))).max())
    return lambda u: f(middle + half * u) / peak


def _own(name: str, p: approx.Polynomial, low: float, high: float) -> Function:
    return _function(name, _stored(p, low, high), _stored(p, low, high), p.degree)


def _hard(name: str, f: Curve, low: float, high: float) -> Function:
    curve = _stored(f, low, high)
    for degree in DEGREES:
        p = approx.fit(curve, degree, (-1.0, 1.0), iterations=100)
        if p.error is not None and p.error <= ACCURATE:
            return _function(name, curve, p, degree)
    raise ValueError(f"{name}: no polynomial of degree {DEGREES[-1]} or less is within {ACCURATE:.2g}")


def _function(name: str, exact: Curve, p: Curve, degree: int) -> Function:
    power = Chebyshev.interpolate(p, degree).convert(kind=Polynomial).coef
    attrs, factor = prepare([float(c) for c in power], 1.0, (-1.0, 1.0), 1.0)
    x = np.linspace(-1.0, 1.0, 4001)
    error = float(np.abs(p(x) - exact(x)).max())
    return Function(name=name, exact=exact, polynomial=attrs, factor=factor, degree=degree, error=error)
