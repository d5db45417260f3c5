"""The figures of `agreement-100` from logits, and what `parties` keeps between steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import registry
from benchmarks.agreement import compare
from benchmarks.parties import parties
from benchmarks.trained import fingerprint, holds
from he_backend.openfhe_backend import available
from tests.he_backend.small_step import STEPS, running_sum
from training import Recipe

CLEAR = np.array([[[3.0, 1.0, 0.0], [0.0, 2.0, 1.5]]])


def test_agreement_counts_positions_whose_likeliest_token_stays() -> None:
    same = compare(CLEAR + 0.1, CLEAR)
    assert (same["agreement"], same["predictions"], same["closest_margin"]) == (1.0, 2.0, 0.5)
    assert same["mse"] == pytest.approx(0.01)
    assert same["max_abs_error"] == pytest.approx(0.1)
    swapped = CLEAR.copy()
    swapped[0, 1, 2] = 2.5
    assert compare(swapped, CLEAR)["agreement"] == 0.5
    assert compare(swapped, CLEAR)["mse"] == pytest.approx(1.0 / 6, abs=0.01)


@pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")
def test_every_token_is_kept_and_efficiency_is_that_of_requests() -> None:
    kept: list[Any] = []
    (benchmark,) = registry.select(["generate-2x128"])
    record = benchmark.measure(registry.Settings(quick=True, keep=kept.append))
    assert [k["repeats"] for k in kept] == list(range(1, record["repeats"] + 1))
    assert kept[0]["metrics"]["evaluate_spread_s"] is None and kept[-1]["metrics"]["evaluate_spread_s"] > 0
    m = record["metrics"]
    bound = sum(row["bound_s"] for row in m["operators"]) / record["machine"]["threads"]
    assert m["efficiency"] == pytest.approx(bound / m["evaluate_s"])
    shown = benchmark.blocks({**record, "version": benchmark.version})
    assert shown and len(shown) == 3


@pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")
def test_the_server_keeps_its_state_from_step_to_step() -> None:
    circuit = running_sum()
    circuit = type(circuit)(**{**vars(circuit), "predicted": {"plaintext_bytes": 0.0}})
    with parties(circuit, threads=1) as both:
        for _ in range(2):
            both.start()
            for step in range(STEPS):
                y, timing = both.ask({"x": np.array([0.25])}, step=step)
                assert y[0] == pytest.approx(0.25 * (step + 1) + step, abs=1e-3)
                assert timing.wall_s > 0
        n, level = 1 << circuit.params.log_n, circuit.inputs[0].level
        assert both.traffic(circuit.inputs) > 2 * (level + 1) * n * 4


def test_a_model_of_another_recipe_is_not_the_demo_s(tmp_path: Path) -> None:
    """A folder of a recipe of before LaS, as it was written then, holds that recipe and not today's."""
    fields = json.loads(Recipe.demo().to_json())
    del fields["las_decay"]
    (tmp_path / "config.json").write_text(json.dumps({"recipe": fields, "models": {}}))
    before = Recipe.demo().with_(las_decay=0.0)
    assert not holds(tmp_path, before), "nothing is trained yet"
    (tmp_path / "polynomial.safetensors").touch()
    assert holds(tmp_path, before)
    assert not holds(tmp_path, Recipe.demo())
    assert fingerprint(before) != fingerprint(Recipe.demo())
