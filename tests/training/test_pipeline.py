"""Checkpoints resume bit for bit, interrupted runs end where uninterrupted ones do, substitution does what it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from polyformer.export import export_onnx
from polyformer.ranges import measure
from training import Recipe, convert, load_model, load_task, load_tokenizer, train
from training.folder import Folder
from training.stages import Substitute, powersoftmax
from training.substitution import choose_targets, fitted_interval, fitted_intervals, substitute, with_rows

RECIPE = Recipe.quick().with_(threads=1)
NORMED = RECIPE.with_(exact_norms=("affine", "rms", "rms"))


class InterruptedRunError(Exception):
    pass


def stop_at(stage: str, step: int):
    def progress(name: str, done: int, total: int, figures: dict[str, float]) -> None:
        if (name, done) == (stage, step):
            raise InterruptedRunError

    return progress


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(out, RECIPE)
    convert(out)
    return out


@pytest.fixture(scope="module")
def normed_run(tmp_path_factory) -> Path:
    """Trained and not converted, with RMS norms, which the quick recipe lacks."""
    out = tmp_path_factory.mktemp("normed")
    train(out, NORMED)
    return out


def stage_of(recipe: Recipe, kind):
    return next(stage for stage in powersoftmax(recipe) if isinstance(stage, kind))


def wanted_of(recipe: Recipe):
    return {name: getattr(recipe, name) for name in ("activation_bound", "variance_ratio", "denominator_target")}


def train_and_convert(out, progress):
    train(out, RECIPE, progress=progress)
    convert(out, progress=progress)


@pytest.mark.parametrize(("stage", "step"), [("softmax", 20), ("power", 20), ("ranges", 20), ("tune", 20)])
def test_interrupted_run_ends_bit_for_bit_where_the_other_did(run, tmp_path, stage, step):
    with pytest.raises(InterruptedRunError):
        train_and_convert(tmp_path, progress=stop_at(stage, step))
    torch.manual_seed(12345)  # whatever the process did in between must not matter
    train(tmp_path, RECIPE)
    convert(tmp_path)
    for name in ("softmax", "power", "polynomial"):
        expected, found = load_file(run / f"{name}.safetensors"), load_file(tmp_path / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (tmp_path / "train.jsonl").read_text() == (run / "train.jsonl").read_text()


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    """A short training and nothing else."""
    out = tmp_path_factory.mktemp("short")
    train(out, SHORT)
    return out


SHORT = RECIPE.with_(softmax_steps=12, power_steps=12, range_steps=12, tune_steps=12)


def killed_at_saving(monkeypatch, when: str) -> None:
    """Have Folder.save_model raise before or after its work, once."""
    save = Folder.save_model

    def dies(self, name, model):
        monkeypatch.setattr(Folder, "save_model", save)
        if when == "after":
            save(self, name, model)
        raise InterruptedRunError

    monkeypatch.setattr(Folder, "save_model", dies)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_saving_costs_no_stage(trained_once, tmp_path, monkeypatch, when):
    killed_at_saving(monkeypatch, when)
    with pytest.raises(InterruptedRunError):
        train(tmp_path, SHORT)
    steps = []
    train(tmp_path, SHORT, progress=lambda stage, done, total, figures: steps.append((stage, done)))
    assert [done for stage, done in steps if stage == "softmax"] == ([12] if when == "before" else [])
    assert not list((tmp_path / "checkpoints").iterdir())
    for name in ("softmax", "power"):
        expected, found = load_file(trained_once / f"{name}.safetensors"), load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (tmp_path / "train.jsonl").read_text() == (trained_once / "train.jsonl").read_text()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_conversion_killed_around_saving_has_all_its_metrics_in_the_end(trained_once, tmp_path, monkeypatch, when):
    out = tmp_path / "run"
    shutil.copytree(trained_once, out)
    killed_at_saving(monkeypatch, when)
    with pytest.raises(InterruptedRunError):
        convert(out)
    metrics = convert(out)
    assert set(metrics["quality"]) >= {"rows", "ranges", "tune"} and "levels" in metrics
    assert not list((out / "checkpoints").iterdir())


def test_half_a_line_at_the_end_of_the_log_is_dropped_when_a_run_goes_on(trained_once, tmp_path):
    with pytest.raises(InterruptedRunError):
        train(tmp_path, SHORT, progress=stop_at("power", 12))
    with (tmp_path / "train.jsonl").open("a") as log:
        log.write('{"stage": "power", "st')
    train(tmp_path, SHORT)
    assert (tmp_path / "train.jsonl").read_text() == (trained_once / "train.jsonl").read_text()


def test_a_text_too_short_for_the_vocabulary_says_what_to_do(tmp_path):
    (tmp_path / "mine.txt").write_text("aaaa bbbb " * 200)
    with pytest.raises(ValueError, match=r"tokens, the recipe asks for 300; give more text, or a smaller vocabulary"):
        train(tmp_path / "out", RECIPE, text=tmp_path / "mine.txt")


def test_training_lowers_the_loss_and_everything_is_written(run):
    metrics = json.loads((run / "metrics.json").read_text())
    uniform = np.log(RECIPE.vocab)
    for name in ("softmax", "power", "polynomial"):
        assert metrics[f"heldout_loss_{name}"] < uniform - 0.8
    assert set(metrics["quality"]) == {
        "rows",
        "ranges",
        "substitute division",
        "substitute activation",
        "substitute norm",
        "substitute all",
        "tune",
    }
    assert {
        "ranges_heldout",
        "outside_heldout",
        "outside_stress",
        "largest_logit_heldout",
        "levels",
        "intervals",
    } <= set(metrics)
    stages = [json.loads(line)["stage"] for line in (run / "train.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["softmax", "power", "ranges", "tune"]
    assert not list((run / "checkpoints").iterdir())


def test_reported_ranges_are_those_of_the_heldout_text(run):
    metrics = json.loads((run / "metrics.json").read_text())
    model = load_model(run, "polynomial")
    found = measure(model, load_task(run).heldout, intervals=fitted_intervals(model))
    for name, r in found.items():
        assert metrics["ranges_heldout"][name]["high"] == pytest.approx(r.high, rel=1e-4)
        assert metrics["outside_heldout"][name] == pytest.approx({"below": r.below, "above": r.above}, abs=1e-6)


def test_tokens_are_windows_of_the_right_documents(run):
    tokenizer, task = load_tokenizer(run), load_task(run)
    heldout, calibration = task.heldout, task.calibration()
    assert heldout.dtype == calibration.dtype == torch.int64
    assert heldout.shape[1] == calibration.shape[1] == RECIPE.length
    assert torch.equal(calibration, load_task(run).calibration())
    assert tokenizer.decode(heldout[0].tolist()).startswith("Mr. President, Mr.")


def test_row_factors_change_the_form_and_not_the_function(run):
    power, tokens = load_model(run, "power").double(), load_task(run).heldout[:8]
    rows = with_rows(load_model(run, "power"), tokens).double()
    torch.testing.assert_close(rows(tokens), power(tokens), rtol=1e-6, atol=1e-6)
    factors = rows.get_buffer("blocks.0.mixer.row_T")
    assert not torch.allclose(factors, torch.ones(()).double())


KINDS = ["division", "activation", "norm"]


@pytest.mark.parametrize("kind", [*KINDS, "nothing"])
def test_substitution_replaces_one_kind_within_its_error(normed_run, kind):
    """With high degrees on intervals that hold all values, the substituted model is the model."""
    tokens = load_task(normed_run).heldout[:16]
    recipe = NORMED.with_(activation_degree=24, norm_degree=12, reciprocal_degree=24, margin=1.05)
    ranged = with_rows(load_model(normed_run, "power"), tokens)
    seen = measure(ranged, tokens)
    targets = {
        name: (-max(-r.low, r.high), max(-r.low, r.high)) if r.low < 0 else (r.low, r.high) for name, r in seen.items()
    }
    stage = stage_of(recipe.with_(denominator_interval=targets["blocks.0.mixer"]), Substitute)
    model = substitute(ranged, replace(stage, **{k: k == kind for k in KINDS}), targets, tokens)
    replaced = {
        "division": ["blocks.0.mixer"],
        "activation": ["blocks.0.mlp.act"],
        "norm": ["blocks.0.norm2", "norm"],
        "nothing": [],
    }[kind]
    assert sorted(fitted_intervals(model)) == replaced
    for name in replaced:
        expected = fitted_interval(targets[name], stage, denominator=kind == "division")
        assert fitted_intervals(model)[name] == pytest.approx(expected, rel=1e-5)
    difference = (model(tokens) - ranged(tokens)).abs().max()
    assert difference < 0.02
    assert (difference == 0) == (kind == "nothing")


def test_a_spread_gives_activations_the_curvature_of_gelu_near_zero(run):
    """And the interval that the range losses and the clamp of training go by stays what it was."""
    tokens = load_task(run).heldout[:16]
    ranged = with_rows(load_model(run, "power"), tokens)
    targets = choose_targets(ranged, tokens, **wanted_of(RECIPE))
    curvatures, intervals = [], []
    for spread in (None, 0.5):
        model = substitute(ranged, stage_of(RECIPE.with_(activation_spread=spread), Substitute), targets, tokens)
        p = model.blocks[0].mlp.act.polynomial.polynomial()
        curvatures.append(float(p(1e-2) - 2 * p(0.0) + p(-1e-2)) / 1e-4)
        intervals.append(fitted_intervals(model)["blocks.0.mlp.act"])
    exact = 2 * (2 * np.pi) ** -0.5  # GELU'' (0)
    assert curvatures[0] < 0.3 * exact and 0.7 * exact < curvatures[1] < exact
    assert intervals[0] == intervals[1]


def test_targets_follow_the_recipe(normed_run):
    tokens = load_task(normed_run).heldout[:16]
    ranged = with_rows(load_model(normed_run, "power"), tokens)
    targets = choose_targets(ranged, tokens, **wanted_of(NORMED))
    assert targets["blocks.0.mlp.act"] == (-NORMED.activation_bound, NORMED.activation_bound)
    assert targets["blocks.0.mixer"] == NORMED.denominator_target
    assert targets["norm"][1] / targets["norm"][0] == pytest.approx(NORMED.variance_ratio)


def test_exported_polynomial_model_equals_torch(run, tmp_path):
    model, tokens = load_model(run, "polynomial"), load_task(run).heldout[:1]
    export_onnx(model, tmp_path / "model.onnx")
    logits = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"tokens": tokens.numpy()})[0]
    np.testing.assert_allclose(logits, model(tokens).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_folder_of_another_recipe_is_refused(run):
    with pytest.raises(FileExistsError, match="another recipe"):
        train(run, RECIPE.with_(seed=1))


def test_missing_and_unknown_models_name_the_next_step(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert(tmp_path)
    with pytest.raises(ValueError, match="polynomial"):
        load_model(run, "poly")


def test_recipe_round_trips_through_json():
    for recipe in (Recipe.demo(), Recipe.quick(), replace(Recipe.quick(), exact_norms=("layer",) * 3)):
        assert Recipe.from_json(recipe.to_json()) == recipe


def test_text_of_ones_own(tmp_path):
    (tmp_path / "mine.txt").write_text("All work and no play makes Jack a dull boy. " * 400)
    recipe = RECIPE.with_(vocab=270, softmax_steps=2, power_steps=2, range_steps=2, tune_steps=2)
    metrics = train(tmp_path / "out", recipe, text=tmp_path / "mine.txt")
    assert metrics["text"].endswith("mine.txt") and load_task(tmp_path / "out").heldout.shape[1] == recipe.length
