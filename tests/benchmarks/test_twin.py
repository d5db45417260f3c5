"""The quick size of the twin benchmark runs, and its gap is the one between the losses it reports."""

from __future__ import annotations

import pytest

from benchmarks import registry, twin


def test_quick_size_makes_a_record_that_can_be_shown() -> None:
    benchmark = registry.benchmarks()["demo-twin"]
    record = benchmark.measure(registry.Settings(seeds=(3, 4), quick=True))
    runs, summary = record["metrics"]["runs"], record["metrics"]["summary"]
    assert [(r["seed"], r["variant"]) for r in runs] == [(3, v) for v in twin.VARIANTS]
    assert runs[0]["levels"] == runs[1]["levels"]  # the decay costs none
    assert runs[0]["polynomial"] != runs[1]["polynomial"]
    expected = 100 * (runs[0]["polynomial"] / runs[0]["softmax"] - 1)
    assert summary["LaS decay"]["gap_percent"] == pytest.approx(expected)
    (table,) = twin.show(record)
    assert "LaS decay" in table.markdown()


def test_the_better_twin_is_the_one_with_the_lower_mean() -> None:
    runs = [
        {"variant": v, "softmax": s, "power": 1.0, "polynomial": p}
        for v, pairs in {"LaS decay": [(4.0, 4.0), (2.0, 2.6)], "no decay": [(2.0, 3.0), (2.0, 3.0)]}.items()
        for s, p in pairs
    ]
    found = twin.summary(runs)
    assert found["LaS decay"]["gap_percent"] == pytest.approx(10.0)
    assert found["LaS decay"]["gap_percent_better_twin"] == pytest.approx(65.0)
    assert found["no decay"]["softmax"]["sd"] == 0.0
