"""Polynomials keep the error that they state, and the closed forms and tables of methods.md 1.6 hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyformer.approx import (
    Polynomial,
    depth_of_degree,
    evaluate,
    fit,
    fit_weighted,
    goldschmidt_reciprocal,
    goldschmidt_start,
    goldschmidt_steps,
    inverse_sqrt,
    newton_error,
    newton_inverse_sqrt,
    reciprocal,
    reciprocal_error,
)


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


# a fit may use the grid it likes; the check uses other points
def worst(f, p: Polynomial) -> float:
    x = np.random.default_rng(0).uniform(*p.interval, 20_000)
    error = np.abs(p(x) - f(x))
    return float((error / np.abs(f(x)) if p.kind == "relative" else error).max())


FITS = [
    pytest.param(gelu, 4, (-3.0, 3.0), "absolute", 4.8e-2, id="gelu-3-deg4"),
    pytest.param(gelu, 8, (-5.0, 5.0), "absolute", 3.5e-2, id="gelu-5-deg8"),
    pytest.param(gelu, 16, (-8.0, 8.0), "absolute", 1.6e-2, id="gelu-8-deg16"),
    pytest.param(np.exp, 6, (-1.0, 1.0), "relative", 1e-5, id="exp-relative-deg6"),
    pytest.param(lambda x: x**-0.5, 7, (0.25, 4.0), "relative", 1.2e-2, id="rsqrt-deg7"),
    pytest.param(lambda x: x**-0.5, 15, (0.25, 4.0), "relative", 1.5e-4, id="rsqrt-deg15"),
]


@pytest.mark.parametrize(("f", "degree", "interval", "kind", "bound"), FITS)
@pytest.mark.parametrize("basis", ["chebyshev", "power"])
def test_fit_keeps_the_stated_error_and_beats_the_table(f, degree, interval, kind, bound, basis):
    p = fit(f, degree, interval, kind=kind, basis=basis)
    assert p.degree == degree and p.basis == basis
    assert worst(f, p) <= p.error * (1 + 1e-4) + 1e-12
    assert p.error <= bound


def test_a_weighted_fit_is_the_hermite_expansion_under_a_normal_density():
    # Stein: E[gelu'(x)] = 1/2, E[gelu''(x)]/2 = E[(2 - x^2) phi(x)]/2 = 3/(8 sqrt(pi)); the odd part of GELU is x/2
    p = fit_weighted(gelu, 2, (-8.0, 8.0), lambda x: np.exp(-(x**2) / 2)).to_power()
    curvature, slope = p.coefficients[2] * p.a**2, p.coefficients[1] * p.a
    assert curvature == pytest.approx(3 / (8 * math.sqrt(math.pi)), rel=1e-6)
    assert slope == pytest.approx(0.5, rel=1e-9)
    assert worst(gelu, p) == pytest.approx(p.error, rel=1e-3)  # that of the ends, which the weight hardly sees
    assert curvature > 2.5 * fit(gelu, 2, (-8.0, 8.0)).to_power().coefficients[2] * p.a**2


def test_fit_is_minimax_on_a_known_case():
    # best line for e^x on [0, 1]: error (e - 1)/2 * log(e - 1) style closed form, 0.105933...
    c = math.e - 1
    best = (1 - c + c * math.log(c)) / 2
    assert fit(np.exp, 1, (0.0, 1.0)).error == pytest.approx(abs(best), rel=1e-2)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("ratio", [2.0, 10.0, 30.0])
def test_reciprocal_is_the_closed_form(degree, ratio):
    p = reciprocal(degree, (0.5, 0.5 * ratio))
    assert p.error == pytest.approx(reciprocal_error(degree, ratio), rel=1e-6)
    assert worst(lambda x: 1 / x, p) <= p.error * (1 + 1e-6)
    x = np.linspace(*p.interval, 101)
    assert p.to_power()(x) == pytest.approx(p(x), rel=1e-9)


TABLE = [  # methods.md 1.6: steps for relative errors 1e-1 .. 1e-4
    pytest.param(0.5, 2.0, (3, 4, 4, 5), id="0.5-2"),
    pytest.param(0.1, 1.0, (4, 5, 6, 6), id="0.1-1"),
    pytest.param(0.01, 1.0, (7, 8, 9, 9), id="0.01-1"),
    pytest.param(0.1, 10.0, (7, 8, 9, 9), id="0.1-10"),
    pytest.param(0.001, 1.0, (11, 12, 12, 13), id="0.001-1"),
    pytest.param(0.01, 10.0, (11, 12, 12, 13), id="0.01-10"),
    pytest.param(0.001, 10.0, (14, 15, 16, 16), id="0.001-10"),
]


@pytest.mark.parametrize(("lo", "hi", "steps"), TABLE)
def test_goldschmidt_table(lo, hi, steps):
    x = np.geomspace(lo, hi, 4001)
    for error, k in zip((1e-1, 1e-2, 1e-3, 1e-4), steps, strict=True):
        assert goldschmidt_steps(lo, hi, error) == k
        measured = np.abs(1 - x * goldschmidt_reciprocal(x, goldschmidt_start(lo, hi), k)).max()
        one_less = np.abs(1 - x * goldschmidt_reciprocal(x, goldschmidt_start(lo, hi), k - 1)).max()
        assert measured <= error < one_less


def test_goldschmidt_start_at_the_divergence_point_never_converges_at_the_top():
    assert goldschmidt_reciprocal(np.array([10.0]), 2 / 10.0, 12)[0] * 10.0 == pytest.approx(0.0)


@pytest.mark.parametrize(("degree", "steps"), [(2, 1), (3, 2), (7, 1)])
def test_newton_refines_as_bounded(degree, steps):
    seed = inverse_sqrt(degree, (0.25, 4.0))
    x = np.linspace(0.25, 4.0, 2001)
    error = np.abs(newton_inverse_sqrt(x, seed(x), steps) * np.sqrt(x) - 1).max()
    assert error <= newton_error(seed.error, steps) * (1 + 1e-6)
    assert error < seed.error / 2


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9), st.floats(-1, 1), st.sampled_from(["power", "chebyshev"]))
def test_torch_numpy_and_definition_agree(coefficients, x, basis):
    p = Polynomial(coefficients=tuple(coefficients), interval=(-1, 1), basis=basis, a=0.5, b=0.25)
    u = 0.5 * x + 0.25
    terms = [u**k if basis == "power" else math.cos(k * math.acos(u)) for k in range(len(coefficients))]
    expected = sum(c * t for c, t in zip(coefficients, terms, strict=True))
    assert p(np.array([x]))[0] == pytest.approx(expected, abs=1e-10)
    assert float(p(torch.tensor([x], dtype=torch.float64))[0]) == pytest.approx(expected, abs=1e-10)
    assert evaluate(x, coefficients, 0.5, 0.25, basis) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("degree", "levels"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4)]
)
def test_depth(degree, levels):
    assert depth_of_degree(degree) == levels


@pytest.mark.parametrize(
    "make",
    [
        lambda: reciprocal(3, (0.0, 1.0)),
        lambda: inverse_sqrt(3, (-1.0, 1.0)),
        lambda: goldschmidt_start(0.0, 1.0),
        lambda: Polynomial(coefficients=(), interval=(0, 1)),
        lambda: Polynomial(coefficients=(1.0,), interval=(1, 1)),
        lambda: fit(np.sin, 3, (-1.0, 1.0), kind="relative"),
    ],
    ids=[
        "reciprocal-at-0",
        "rsqrt-negative",
        "goldschmidt-at-0",
        "no-coefficients",
        "empty-interval",
        "relative-with-zero",
    ],
)
def test_impossible_requests_are_refused(make):
    with pytest.raises(ValueError, match=r"\w"):
        make()
