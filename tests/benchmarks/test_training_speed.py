"""Speed of training at its smallest size: every comparison is made, and both of its sides train the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry, training_speed
from benchmarks.registry import Settings
from polyformer.model import Transformer


def test_quick_run_has_a_row_a_comparison_and_partial_records_on_the_way():
    benchmark, kept, steps = registry.benchmarks()["training-speed"], [], []
    threads = torch.get_num_threads()
    record = benchmark.measure(
        Settings(repeats=2, quick=True, keep=kept.append, progress=lambda *step: steps.append(step))
    )
    rows = record["metrics"]["rows"]
    assert [r["comparison"] for r in rows] == list(training_speed.COMPARISONS)
    assert all(r["tokens_per_second"] > 0 and r["ratio_low"] <= r["ratio"] <= r["ratio_high"] for r in rows)
    assert record["metrics"]["least_ratio"] == {r["comparison"]: r["ratio"] for r in rows}
    assert [len(k["metrics"]["rows"]) for k in kept] == list(range(1, len(rows) + 1))
    assert steps[-1][0] == steps[-1][1] == len(rows) and torch.get_num_threads() == threads
    [table] = benchmark.blocks(record)
    assert len(table.rows) == len(rows) and "PowerSoftmax p=4" in table.markdown()


def test_ctrl_c_keeps_what_was_measured(monkeypatch):
    real, calls = training_speed.compare, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training_speed, "compare", stop_at_the_third)
    record = training_speed.measure(Settings(repeats=2, quick=True))
    assert record["status"] == "interrupted" and len(record["metrics"]["rows"]) == 2


def test_plain_model_has_the_shape_of_ours():
    shape = training_speed.QUICK[0]
    ours, plain = Transformer(shape.config("softmax")), training_speed.PlainModel(shape)
    assert ours.parameter_count() == sum(p.numel() for p in plain.parameters())
    tokens = torch.zeros(2, shape.length, dtype=torch.int64)
    assert plain(tokens).shape == ours(tokens).shape


@pytest.mark.parametrize("name", training_speed.COMPARISONS)
def test_both_sides_update_every_parameter(name, monkeypatch):
    """A side that left work out would be fast."""
    shape = training_speed.Shape(length=8, batch=4, width=16, blocks=1, heads=2, vocab=16, steps=2)
    made = []

    def remember(kind):
        def make(*arguments):
            made.append(kind(*arguments))
            return made[-1]

        return make

    monkeypatch.setattr(training_speed, "Transformer", remember(training_speed.Transformer))
    monkeypatch.setattr(training_speed, "PlainModel", remember(training_speed.PlainModel))
    sides = training_speed.COMPARISONS[name](shape, 0)
    assert len(made) == 2
    before = [[p.detach().clone() for p in model.parameters()] for model in made]
    for side in sides:
        side()
    for old, model in zip(before, made, strict=True):
        assert all((a - b).abs().max() > 0 for a, b in zip(old, model.parameters(), strict=True))
