"""Kinds of refresh beside each other: their circuits in simulation, one kind under encryption, and what is concluded."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import fourier, refresh_kinds
from benchmarks.refresh_functions import Function, Ranges, functions
from benchmarks.refresh_kinds import NAMES, cases, comparisons, decision, one_kind, params_of, show
from he_backend import security
from he_backend.params import Params
from he_backend.simulator import simulate

RANGES = Ranges(activation=6.0, denominator=(0.15, 8.0))
SQUARE = Function(
    name="square", exact=lambda u: u**2, polynomial={"factors": [[0.0, 0.0]]}, factor=1.0, degree=2, error=0.0
)


def test_the_range_of_a_model_is_that_of_its_recipe():
    from training.recipe import Recipe

    ranges = Ranges.of_recipe()
    assert ranges.activation == Recipe().margin * Recipe().activation_bound
    assert ranges.denominator == Recipe().denominator_interval


def test_functions_are_stored_within_one_and_polynomials_are_theirs():
    x = np.linspace(-1.0, 1.0, 501)
    found = functions(RANGES)
    assert [f.degree for f in found[:2]] == [4, 4] and all(f.degree > 8 for f in found[2:])
    for f in found:
        assert 0.9 < np.abs(f.exact(x)).max() <= 1.0 + 1e-9
        if "factors" in f.polynomial:
            value = np.prod([(x + a) ** 2 + b for a, b in f.polynomial["factors"]], axis=0)
        else:
            value = np.polynomial.chebyshev.chebval(x, f.polynomial["chebyshev"])
        assert np.abs(f.factor * value - f.exact(x)).max() <= f.error + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_kinds_keep_within_the_limit(name):
    params = params_of(name, quick=False)
    assert security.check(params) <= security.limit(params)


@pytest.mark.parametrize("name", NAMES)
def test_a_circuit_computes_what_it_is_compared_with(name):
    for case in cases(replace(params_of(name, quick=True), log_n=10), [SQUARE]):
        clear = simulate(case.circuit, case.inputs).outputs
        assert set(clear) == set(case.exact)
        for output, exact in case.exact.items():
            np.testing.assert_allclose(clear[output] * case.factor, exact, rtol=0, atol=1e-6)


def test_a_fit_weighs_noise_against_its_own_error():
    def steep(x: np.ndarray) -> np.ndarray:
        return 0.0625 / (0.53125 + 0.46875 * x)

    fine, coarse = fourier.fit(steep, 14, 2.0**-40), fourier.fit(steep, 14, 2.0**-12)
    assert fine.error < coarse.error and fine.size > 2 * coarse.size
    x = np.linspace(-1.0, 1.0, 101)
    value = sum(
        2 * (re * np.cos(np.pi * j * x / 2) - im * np.sin(np.pi * j * x / 2))
        for j, (re, im) in enumerate(fine.coefficients)
    )
    assert np.abs(value - steep(x)).max() < 1.1 * fine.error


def test_one_kind_under_encryption(monkeypatch):
    small = replace(params_of("functional, scale 46", quick=True), log_n=10)
    monkeypatch.setattr(refresh_kinds, "params_of", lambda name, *, quick: small)
    monkeypatch.setattr(refresh_kinds, "functions", lambda ranges: (SQUARE,))
    seen = []
    kind = one_kind("functional, scale 46", True, 1, RANGES, progress=lambda *step: seen.append(step))
    assert (kind["level_before"], kind["level_after"], kind["levels"]) == (5, 8, 3)
    assert [case["name"] for case in kind["cases"]] == ["identity", "square"] and seen[-1][:2] == (2, 2)
    assert kind["wall_s"] > 0 and kind["key_bytes"] > 0 and kind["peak_gb"] > 0
    for case in kind["cases"]:
        assert abs(case["mean_bits"] - case["predicted_mean_bits"]) < 3.0
        assert 12.0 < case["worst_bits"] < case["mean_bits"]


def kinds(functional_s: float) -> list[dict]:
    """Invented figures: a plain refresh of 10 s between which 6 levels lie, two functions of depth 2 and 6."""

    def case(name: str, depth: int, seconds: float) -> dict:
        bits = {f"{when}{which}_bits": 14.0 for when in ("", "predicted_") for which in ("worst", "mean")}
        return {"name": name, "depth": depth, "polynomial_cpu_s": seconds, "fit_error": 2.0**-13, **bits}

    def kind(name: str, wall: float, params: Params, *rows: dict) -> dict:
        before = params.refresh_input + (params.refresh_terms > 0)
        return {
            "name": name,
            "params": params.to_json(),
            "wall_s": 2 * wall,  # a busy machine decides nothing
            "cpu_s": wall,
            "level_before": before,
            "level_after": params.refresh_output,
            "levels": params.refresh_output - before,
            "slots": params.refresh_period,
            "values": 1,
            "key_bytes": 1,
            "matrix_bytes": 1,
            "matrix_bytes_seen": 1,
            "peak_gb": 1.0,
            "cases": [case("identity", 0, 0.0), *rows],
        }

    plain, other = params_of("plain", quick=False), params_of("functional, scale 54", quick=False)
    return [
        kind("plain", 10.0, plain, case("low", 2, 1.0), case("high", 6, 1.0)),
        kind("functional", functional_s, other, case("low", 0, 0.0), case("high", 0, 0.0)),
    ]


def test_levels_that_a_polynomial_takes_are_paid_in_refreshes():
    found = {row["function"]: row for row in comparisons(kinds(10.0))}
    assert set(found) == {"low", "high"}
    assert found["low"]["functional_levels"] == 1 and found["low"]["plain_levels"] == 4
    assert found["low"]["same_work_s"] == pytest.approx(1.0 + 10.0 * 3 / 6)
    assert found["low"]["ratio"] == pytest.approx(0.6)
    assert found["high"]["ratio"] == pytest.approx((1.0 + 10.0 * 7 / 6) / 10.0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.0, "pays for high, low:"), (10.0, "pays for high:"), (20.0, "pays for none")]
)
def test_the_sentence_follows_from_the_figures(seconds, words):
    found = comparisons(kinds(seconds))
    assert words in decision(found)
    blocks = show({"metrics": {"kinds": kinds(seconds), "comparisons": found}})
    assert words in blocks[-1].markdown() and "| plain |" in blocks[0].markdown()
