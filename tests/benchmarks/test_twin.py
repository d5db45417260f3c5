"""The quick size of the twin benchmark runs, and its gap is the one between the losses it reports."""

from __future__ import annotations

import pytest

from benchmarks import registry, twin
from training import Recipe


@pytest.mark.parametrize("name", ["demo-twin", "deep-twin"])
def test_quick_size_makes_a_record_that_can_be_shown(name: str) -> None:
    benchmark = registry.benchmarks()[name]
    record = benchmark.measure(registry.Settings(seeds=(3, 4), quick=True))
    runs, summary = record["metrics"]["runs"], record["metrics"]["summary"]
    assert [(r["seed"], r["variant"]) for r in runs] == [(3, v) for v in twin.VARIANTS]
    assert runs[0]["levels"] == runs[1]["levels"]  # the decay costs none
    assert runs[0]["polynomial"] != runs[1]["polynomial"]
    expected = 100 * (runs[0]["polynomial"] / runs[0]["softmax"] - 1)
    assert summary["LaS decay"]["gap_percent"] == pytest.approx(expected)
    assert record["name"] == name and record["params"]["norms"] == {"demo-twin": "affine", "deep-twin": "rms"}[name]
    (table,) = twin.show(record)
    assert "LaS decay" in table.markdown()


@pytest.mark.parametrize("recipe", [Recipe.demo(), Recipe.deep()], ids=["demo", "deep"])
def test_the_polynomial_model_has_the_steps_and_the_text_of_its_twin(recipe: Recipe) -> None:
    assert recipe.power_steps + recipe.range_steps + recipe.tune_steps == recipe.softmax_steps
    text = [mix.batch - mix.noise for mix in (recipe.mix(noise=False), recipe.mix(noise=True))]
    assert text == [recipe.batch, recipe.batch]
    assert recipe.mix(noise=True).noise > 0


def test_the_best_twin_is_the_one_with_the_lowest_mean() -> None:
    runs = [
        {"variant": v, "softmax": s, "softmax_square": s + 1.0, "power": 1.0, "polynomial": p}
        for v, pairs in {"LaS decay": [(4.0, 4.0), (2.0, 2.6)], "no decay": [(2.0, 3.0), (2.0, 3.0)]}.items()
        for s, p in pairs
    ]
    found = twin.summary(runs)
    assert found["LaS decay"]["gap_percent"] == pytest.approx(10.0)
    assert found["LaS decay"]["gap_percent_best_twin"] == pytest.approx(65.0)
    assert found["no decay"]["softmax"]["sd"] == 0.0
    assert found["no decay"]["softmax_square"]["mean"] == 3.0
    strict = [{**r, "softmax_square": 1.5} for r in runs]
    assert twin.summary(strict)["no decay"]["gap_percent_best_twin"] == pytest.approx(100.0)
