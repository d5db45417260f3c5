"""The operator race: fits keep the error that they promise, and all ways compile."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import race, race_show, registry
from compiler import Target, compile_onnx
from he_backend.simulator import simulate

KEYS = 16


def samples() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(race.SAMPLES, 8, KEYS))


@pytest.mark.parametrize("way", race.WAYS, ids=lambda w: w.name)
def test_way_keeps_its_error_through_the_compiler(way: race.Way, tmp_path: Path) -> None:
    s = samples()
    path, error = race.fitted(way, s, tmp_path / "way.onnx")
    exact = way.exact(s)
    assert error <= race.ERROR
    compiled = compile_onnx(path, s.astype(np.float32), target=Target(insecure_log_n=10))
    got = simulate(compiled.circuit, {"x": s[0]}).outputs["y"]
    assert np.max(np.abs(got - exact[0])) / np.max(exact) <= 1.05 * race.ERROR
    assert compiled.circuit.error_bound < np.max(exact)


@pytest.mark.parametrize("way", [w for w in race.WAYS if w.name != "pointwise"], ids=lambda w: w.name)
def test_weights_of_a_row_sum_to_one(way: race.Way) -> None:
    total = way.exact(samples()).sum(-1)
    assert np.all(total <= 1 + 1e-12) and np.all(total > 0.5)  # less than 1 by epsilon's share only


def test_no_degree_that_is_enough_is_said() -> None:
    with pytest.raises(ValueError, match=r"degree 15 errs by .* more than 1.0e-09"):
        race.least(np.abs, (-1.0, 1.0), 1e-9, relative=False)


def test_quick_size_makes_a_record_that_can_be_shown() -> None:
    (benchmark,) = registry.select(["operator-race"])
    record = benchmark.measure(registry.Settings(repeats=1, quick=True))
    rows = record["metrics"]["rows"]
    assert [row["way"] for row in rows] == list(race_show.WORDS)
    for row in rows:
        assert row["encryption_error"] <= race.ERROR
    blocks = benchmark.blocks(record)
    assert blocks and len(blocks) == 3
