"""The quick size of the step benchmark: a polynomial model learns from it, and the record says on what."""

import math

from benchmarks import registry


def test_the_quick_step_makes_a_record_whose_losses_are_finite() -> None:
    record = registry.benchmarks()["one-step-1.4b"].measure(registry.Settings(quick=True))
    figures = record["metrics"]
    assert math.isfinite(figures["loss_before"] + figures["loss_after"]) and figures["peak_gb"] > 0.1
    assert figures["forward_seconds"] > 0 and figures["parameters"] > 10_000
    assert record["params"] == {
        "recipe": "tiny_cpu",
        "batch": 1,
        "tokens": 32,
        "optimiser": "factored",
        "lr": record["params"]["lr"],
    }
