"""A recipe that cannot be says so before anything is written; hybrid stacks and released shapes go the whole way."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from polyformer import cli
from polyformer.certificate import certify
from polyformer.commands.models import export_checked
from training import Recipe, convert, load_model, train, train_on
from training.folder import Folder
from training.stages import Rows, powersoftmax

FEW = Recipe.quick().with_(vocab=270, softmax_steps=2, power_steps=2, range_steps=2, tune_steps=2, calibration=16)
HYBRID = {"blocks": 2, "exact_norms": ("affine",) * 5}


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "mine.txt").write_text("All work and no play makes Jack a dull boy. " * 400)
    return tmp_path / "mine.txt"


WRONG = {
    "seed=-1": "seed is -1; it must be from 0 to 1000000000000",
    "threads=0": "threads is 0; it must be at least 1",
    "length=1": "length is 1; it must be at least 2",
    "holdout=0": "holdout is 0; it must be at least 2",
    "holdout=1": "holdout is 1; it must be at least 2",
    "heldout=-2": "heldout is -2; it must be at least 0",
    "calibration=0": "calibration is 0; it must be at least 4",
    "batch=0": "batch is 0; it must be at least 1",
    "padded=40": "padded is 40; it must be from 0 to 16, which is the batch",
    "lr=-1": "lr is -1; it must be above 0",
    "lr=NaN": "lr is nan; it must be a finite number",
    "softmax_steps=-3": "softmax_steps is -3; it must be at least 0",
    "checkpoint_every=0": "checkpoint_every is 0; it must be at least 1",
    "matched=1": "matched is 1; it must be 0, or at least 2",
    "fit_steps=3": "fit_steps is 3 and matched 0",
    "range_outside=2": "range_outside is 2; it must be from 0 to 1",
    "activation_spread=0": "activation_spread is 0; it must be above 0",
    "denominator_target=[1]": r"denominator_target is \[1\]; it must be two numbers",
    'denominator_interval=["a", 2]': r"denominator_interval is \['a', 2\]; it must be two numbers",
    "eps=-1": "eps is -1; it must be above 0",
    "activation=foo": "activation is 'foo'; known: gelu",
    'exact_norms=["rms"]': r"exact_norms is \['rms'\], 1 in all; blocks=1 and parallel=False have 3 places",
    'exact_norms=["rms", "rms", "rms_poly"]': "exact_norms holds 'rms_poly'; known: affine",
    "power=3": "power is 3; it must be even",
    "width=31": "width 31 is not a multiple of heads 2",
    "kv_heads=3": "heads 2 is not a multiple of kv_heads 3",
    "rotary=5": "rotary is 5; it must be even",
    'mixers=["mamba"]': "block 0 does not become a polynomial: mamba holds exponentials",
    'mixers=["gated_linear"]': "block 0 does not become a polynomial: gated linear attention with decay 'data'",
    'mixers=["softmin"]': "unknown mixer 'softmin'",
    "length=2000": "no document has",
}


@pytest.mark.parametrize(("setting", "message"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_is_refused_before_anything_is_written(setting, message, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", FEW.changed([setting]).with_(las_decay=0.0), text=text)
    assert not (tmp_path / "out").exists()


def test_images_that_are_no_multiple_of_the_patch_are_refused_before_anything_is_written(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", images=rng.normal(size=(40, 8, 8)).astype(np.float32), labels=np.arange(40) % 2)
    with pytest.raises(ValueError, match=r"image \(8, 8\) is not a multiple of the patch, 3"):
        train(tmp_path / "out", Recipe.images(quick=True).with_(patch=3), text=tmp_path / "x.npz")
    assert not (tmp_path / "out").exists()


MODELS = {
    "hyena and softmax": FEW.with_(**HYBRID, mixers=("hyena", "softmax")),
    "gated linear alone": FEW.with_(mixers=("gated_linear",), decay="fixed", output_gate="linear", las_decay=0.0),
    "grouped queries, rotary, gated": FEW.with_(heads=4, kv_heads=2, rotary=4, gated=True, positions="none"),
}


@pytest.mark.parametrize("start", ["power", "softmax"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_family_become_certified_polynomials_that_export(name, start, text, tmp_path):
    out, recipe = tmp_path / "out", MODELS[name].with_(start=start, continue_steps=2)
    assert Recipe.from_json(recipe.to_json()) == recipe
    train(out, recipe, text=text)
    metrics = convert(out)
    model = load_model(out, "polynomial")
    twin, ours = load_model(out, "softmax").config.layer_mixers, model.config.layer_mixers
    assert twin == (recipe.mixers or ("softmax",))
    assert ours == tuple("power_softmax" if mixer == "softmax" else mixer for mixer in twin)
    assert (model.config.kv_heads, model.config.rotary, model.config.gated) == (
        recipe.kv_heads,
        recipe.rotary,
        recipe.gated,
    )
    assert certify(model).kind == "polynomial" and metrics["levels"] == model.levels
    export_checked(out, progress=lambda done, total, what: None)


def test_the_pointwise_recipe_keeps_what_is_no_attention(text, tmp_path):
    train(tmp_path / "out", FEW.with_(**HYBRID, mixers=("hyena", "softmax")), text=text)
    convert(tmp_path / "out", recipe="pointwise")
    model = load_model(tmp_path / "out", "pointwise")
    assert model.config.layer_mixers == ("hyena", "pointwise") and certify(model).kind == "polynomial"


def test_an_encoder_and_images_take_hybrid_stacks(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", images=rng.normal(size=(40, 8, 8)).astype(np.float32), labels=np.arange(40) % 2)
    recipe = Recipe.images(quick=True).with_(
        blocks=2, exact_norms=("batch",) * 5, mixers=("hyena_nd", "softmax"), softmax_steps=2, continue_steps=2
    )
    train(tmp_path / "out", recipe, text=tmp_path / "x.npz")
    convert(tmp_path / "out")
    model = load_model(tmp_path / "out", "polynomial")
    assert model.config.body.grid == (2, 2) and certify(model).kind == "polynomial"


def test_fields_at_their_defaults_change_no_file():
    assert list(json.loads(Recipe.demo().to_json()))[-1] == "range_outside"
    assert json.loads(Recipe.demo().with_(rotary=2).to_json())["rotary"] == 2


def test_a_run_stays_with_its_data_wherever_they_lie(text, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("Something else altogether, and nothing else. " * 400)
    assert train(out, FEW, text=text)["text"] == str(text)
    with pytest.raises(FileExistsError, match=r"a run on .*mine\.txt .*other\.txt holds now is other data"):
        train(out, FEW, text=other)
    with pytest.raises(FileExistsError, match="state of the union"):
        train(out, FEW)
    with pytest.raises(FileNotFoundError, match=r"no data at .*gone\.txt"):
        train(out, FEW, text=tmp_path / "gone.txt")
    text.rename(tmp_path / "moved.txt")
    assert train(out, FEW, text=tmp_path / "moved.txt")["text"] == str(text)
    (tmp_path / "moved.txt").write_text(other.read_text())
    with pytest.raises(FileExistsError, match="is other data"):
        train(out, FEW, text=tmp_path / "moved.txt")


def test_a_folder_of_texts_is_known_by_its_files(tmp_path):
    place = tmp_path / "news"
    for name in ("even", "odd"):
        (place / name).mkdir(parents=True)
        for i in range(20):
            (place / name / f"{i}.txt").write_text(f"{name} {i} " * 30)
    recipe = Recipe.texts(quick=True).with_(vocab=257, softmax_steps=1)
    train(tmp_path / "out", recipe, text=place)
    shutil.copytree(place, tmp_path / "copy")
    train(tmp_path / "out", recipe, text=tmp_path / "copy")
    (place / "odd" / "3.txt").rename(place / "even" / "33.txt")
    with pytest.raises(FileExistsError, match="is other data"):
        train(tmp_path / "out", recipe, text=place)


def test_a_conversion_checks_its_start_and_leaves_the_folder_whole(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train(out, FEW, text=text)
    folder = Folder(out)
    folder.save_model("power", folder.load_model("softmax"))  # what stood there under this name by mistake
    with pytest.raises(ValueError, match="block 0 does not become a polynomial: softmax is not polynomial"):
        convert(out)
    assert not (out / "stages.jsonl").exists() and not folder.has("polynomial")
    (out / "power.safetensors").unlink()
    train_on(out)
    monkeypatch.setattr(import_module("training.convert"), "report", lambda model, task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(out)
    assert not folder.has("polynomial") and list((out / "checkpoints").iterdir())  # nothing is lost
    monkeypatch.undo()
    assert convert(out)["levels"] == load_model(out, "polynomial").levels


def test_a_start_that_was_never_to_be_trained_is_named(text, tmp_path):
    train(tmp_path / "out", FEW.with_(power_steps=0), text=text)
    with pytest.raises(ValueError, match="starts from the power model, and power_steps is 0 in the recipe"):
        convert(tmp_path / "out")


def test_rows_and_layers_are_in_the_stages():
    assert powersoftmax(FEW)[0] == Rows(name="rows")
    swap = powersoftmax(MODELS["hyena and softmax"].with_(start="softmax"))[0]
    assert swap.change()["layers"] == (1,)


def test_the_command_takes_a_hybrid(text, tmp_path):
    settings = ["vocab=270", "blocks=2", 'exact_norms=["affine","affine","affine","affine","affine"]']
    settings += ['mixers=["hyena","softmax"]', "softmax_steps=1", "power_steps=1"]
    options = [x for setting in settings for x in ("--set", setting)]
    assert cli.run(["train", str(tmp_path / "out"), "--quick", "--text", str(text), *options]) == 0
    assert cli.run(["train", str(tmp_path / "out"), "--quick", "--text", str(text), *options]) == 0
