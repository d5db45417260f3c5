"""The operator race: fits keep the error that they promise, and all ways compile."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import models, race, race_fits, race_show, registry, requests
from compiler import Target, compile_onnx
from he_backend.simulator import simulate

KEYS = 16


WAYS = list(race_fits.WAYS.values())
FOUND = race.found


def samples() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(race.SAMPLES, 8, KEYS))


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.name)
def test_way_keeps_its_error_through_the_compiler(way: race_fits.Way, tmp_path: Path) -> None:
    s = samples()
    exact = way.exact(s)
    fit = race.cheapest(way, s, tmp_path, Target(insecure_log_n=10))
    assert fit.error <= race_fits.FIT_ERROR
    compiled = compile_onnx(fit.path, s.astype(np.float32), target=Target(insecure_log_n=10))
    got = simulate(compiled.circuit, {"x": s[0]}).outputs["y"]
    assert np.max(np.abs(got - exact[0])) / np.max(exact) <= race_fits.ERROR
    assert compiled.circuit.error_bound < np.max(exact)


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.name)
def test_no_part_of_a_fit_can_take_less(way: race_fits.Way, tmp_path: Path) -> None:
    """At its best: a step or a degree less anywhere breaks the target. The first fit that keeps it need not be that."""
    s = samples()
    fit, *_ = race_fits.fitted(way, s, tmp_path, way.divisions[-1])
    exact = way.exact(s)
    for part, n in fit.used.items():
        if n == 1:
            continue
        effort = race_fits.Effort(tolerance=1.0, division=way.divisions[-1], wanted={**fit.used, part: n - 1})
        builder = models.Builder(0)
        path = builder.save(tmp_path / "less.onnx", (1, 8, KEYS), way.build(builder, s, effort), (1, 8, KEYS))
        error = np.max(np.abs(race_fits._run(path, s) - exact)) / np.max(exact)
        assert error > race_fits.FIT_ERROR, f"{part} could be {n - 1}"


def test_the_row_says_how_it_divides(tmp_path: Path) -> None:
    words = {
        way.name: [race_fits.fitted(way, samples(), tmp_path, d)[0].division for d in way.divisions[-1:]]
        for way in WAYS
    }
    assert words["power"][0].startswith("Goldschmidt, ") and words["power"][0].endswith(" steps")
    assert words["square"][0].startswith("polynomials of degree ") and words["square"][0].count(",") >= 1
    assert words["pointwise"] == ["none"]


def test_a_broken_promise_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where decrypted weights err more than the target, the compiler is asked for a smaller error until they do not."""
    asked: list[float] = []

    def measured(name: str, path: Path, calibration: np.ndarray, *, target: Target, exact: np.ndarray, **how: object):
        asked.append(target.max_error)
        error = 0.5 if len(asked) == 1 else 0.9 * race_fits.ERROR * np.max(exact)
        figures = ("evaluate_s", "evaluate_spread_s", "refreshes", "peak_gb", "parameters")
        metrics = dict.fromkeys(figures, 1) | {
            "max_abs_error": error,
            "total_error": error,
            "promised_error": asked[-1],
        }
        return {"metrics": metrics, "params": {"levels": 1, "log_n": 10, "scale_bits": 40}}

    monkeypatch.setattr(requests, "measure", measured)
    monkeypatch.setattr(race, "isolated", lambda function, *given, progress: function(*given, progress=progress))
    row = race.row("pointwise", KEYS, True, 1, progress=lambda done, total, what: None)
    assert len(asked) == 2 and asked[1] == pytest.approx(asked[0] / 10)
    assert row["kept"] and row["total_error"] <= race_fits.ERROR
    assert row["asked_error"] == pytest.approx(race.ASKED[1] * race_fits.ERROR)
    assert row["promised_error"] == pytest.approx(row["asked_error"])  # both relative to the largest weight
    monkeypatch.setattr(race, "ASKED", race.ASKED[:1])
    asked.clear()
    assert not race.row("pointwise", KEYS, True, 1, progress=lambda done, total, what: None)["kept"]


def test_every_measurement_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its peak of memory is the largest of all that came before it. Here this process and the fit's hold a GB each, of which
    none counts.
    """
    held = np.ones(1 << 27)
    monkeypatch.setattr(race, "found", hungry)
    row = race.row("pointwise", KEYS, True, 1, progress=lambda done, total, what: None)
    assert 0.05 < row["peak_gb"] < 0.9 < held.nbytes / 1e9


def hungry(*given: Any, progress: registry.Progress) -> race_fits.Fitted:
    """`race.found` in a process that held a gigabyte; importable, because another process calls it."""
    held = np.ones(1 << 27)
    fit = FOUND(*given, progress=progress)
    assert len(held) == 1 << 27
    return fit


@pytest.mark.parametrize("way", [w for w in WAYS if w.name != "pointwise"], ids=lambda w: w.name)
def test_weights_of_a_row_sum_to_one(way: race_fits.Way) -> None:
    total = way.exact(samples()).sum(-1)
    assert np.all(total <= 1 + 1e-12) and np.all(total > 0.5)  # less than 1 by epsilon's share only


def test_no_degree_that_is_enough_is_said(tmp_path: Path) -> None:
    """A polynomial reciprocal of PowerSoftmax's sums over few keys: their range is too wide."""
    with pytest.raises(
        ValueError, match=r"power over 16 keys by polynomial: degrees up to 15 err by .* more than 7.5e-04"
    ):
        race_fits.fitted(race_fits.WAYS["power"], samples(), tmp_path, race_fits.POLYNOMIAL)


def test_quick_size_makes_a_record_that_can_be_shown() -> None:
    (benchmark,) = registry.select(["operator-race"])
    record = benchmark.measure(registry.Settings(repeats=1, quick=True))
    rows = record["metrics"]["rows"]
    assert [row["way"] for row in rows] == list(race_show.WORDS)
    for row in rows:
        assert row["kept"] and row["total_error"] <= race_fits.ERROR
        assert row["total_error"] <= 1.1 * (row["fit_error"] + row["encryption_error"])
        assert row["promised_error"] <= row["asked_error"]
        assert row["division"]
    blocks = benchmark.blocks({**record, "version": benchmark.version})
    assert blocks and len(blocks) == 3
    shown = blocks[1].markdown()
    for column in ("division", "total error", "promised of it", "equal error"):
        assert column in shown
    assert all(row["division"] in shown for row in rows)
    assert benchmark.blocks(record) is None, "a record of version 1 has other figures"
