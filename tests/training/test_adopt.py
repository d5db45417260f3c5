"""A released checkpoint becomes a run: its own tokenizer and end of documents, and every command from train to infer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from he_backend.circuit import Circuit, ClientSpec
from he_backend.owner import Opened
from he_backend.simulator import simulate
from polyformer import cli
from polyformer.certificate import certify
from polyformer.commands import infer
from polyformer.commands.models import export_checked
from tests.polyformer import originals
from tests.polyformer.originals import BERT, GPT2, LLAMA, VOCAB, compute, random_weights, write
from training import adopt, load_model, load_task, load_tokenizer
from training.folder import Folder
from training.recipe import Recipe
from training.vocabulary import document_end

END = VOCAB - 1  # as in GPT-2 the last id, and id 0 is text
FEW = ("power=2", "reciprocal_degree=2", "activation_degree=2", "norm_degree=2", "norm_newton=0", "threads=1")
D = 16
CHECKPOINTS = {
    "gpt2": GPT2 | {"n_layer": 1, "n_embd": D},
    "llama": LLAMA | {"num_hidden_layers": 1, "hidden_size": D, "intermediate_size": D},
}
ENCODER = BERT | {"num_hidden_layers": 1, "hidden_size": D, "intermediate_size": D}


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """The originals in a size that compiles in seconds."""
    for name, value in {"BLOCKS": 1, "D": D, "K": D // originals.HEADS}.items():
        monkeypatch.setattr(originals, name, value)


def words() -> Tokenizer:
    """w0 .. w21 and a mark at the end of the vocabulary."""
    vocab = {f"w{i}": i for i in range(END)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def released(folder: Path, config: dict) -> Path:
    write(folder, config, random_weights(config))
    words().save(str(folder / "tokenizer.json"))
    return folder


def texts(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / f"{i}.txt").write_text(" ".join(f"w{k}" for k in rng.integers(0, END, 60)))
    return folder


def run(*arguments: object) -> None:
    assert cli.run([str(a) for a in arguments]) == 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_command_goes_on_from_a_checkpoint(name, tmp_path, capsys):
    config, out = CHECKPOINTS[name], tmp_path / "run"
    folder = released(tmp_path / "checkpoint", config)
    settings = [x for change in FEW for x in ("--set", change)]
    run("adopt", folder, "--out", out, "--text", texts(tmp_path / "text"), "--length", 8, "--steps", 2, *settings)
    ids = [3, 22, 4, 7, 7, 19, 2, 12]
    with torch.no_grad():
        found = load_model(out, "released")(torch.tensor([ids]))[0]
    expected = compute(config, random_weights(config), ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    run("train", out)
    assert cli.run(["train", str(out), "--quick"]) == 1
    assert "was adopted, with its own text and recipe" in " ".join(capsys.readouterr().err.split())
    run("convert", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["end"] == END
    assert all(np.isfinite(metrics[f"heldout_loss_{m}"]) for m in ("released", "softmax", "polynomial"))
    swap, *_, tune = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
    assert swap["layers"][0]["matched"] < 0.5 * swap["layers"][0]["copied"]
    assert tune["outside"] < 0.01  # what calibration shows is covered
    polynomial = load_model(out, "polynomial")
    assert certify(polynomial).kind == "polynomial"

    export_checked(out, progress=lambda done, total, what: None)
    run("compile", out / "model.onnx", "--insecure-log-n", 10)
    circuit = Circuit.load(out / "model.circuit")
    spec, client = circuit.spec(), out / "model.client"
    x = infer.read_input(spec, client, "w5 w0 <|endoftext|> w21", None, None, None)
    padded = [END] * 4 + [5, 0, END, 21]
    np.testing.assert_allclose(x[circuit.inputs[0].name], spec.embed(np.array(padded)))
    [simulated] = simulate(circuit, x).outputs.values()
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    clear = session.run(None, {"tokens": np.array([padded])})[0][0]
    np.testing.assert_allclose(simulated, clear, rtol=1e-4, atol=1e-4 * np.abs(clear).max())
    capsys.readouterr()


def test_an_encoder_gets_a_head_and_its_opening_norm_goes_to_the_client(tmp_path, capsys):
    out, folder = tmp_path / "run", released(tmp_path / "bert", ENCODER)
    for name in ("even", "odd"):
        (tmp_path / "news" / name).mkdir(parents=True)
        for i in range(20):
            word = 2 * (i % 5) + (name == "odd") + 2
            (tmp_path / "news" / name / f"{i}.txt").write_text(f"w{word} " * (3 + i % 4) + "w20")
    settings = [x for change in (*FEW, "lr=0.01", "tune_lr=0.003") for x in ("--set", change)]
    run("adopt", folder, "--out", out, "--classes", tmp_path / "news", "--length", 4, "--steps", 20, *settings)
    with torch.no_grad():
        states = compute(ENCODER, random_weights(ENCODER), [3, 5, 7, 2])
        encoder = load_model(out, "released")
        expected = encoder.head(torch.tensor(states, dtype=torch.float32).mean(0))
        torch.testing.assert_close(encoder(torch.tensor([[3, 5, 7, 2]]))[0], expected, rtol=1e-4, atol=1e-5)
    run("train", out)
    run("convert", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["heldout_accuracy_softmax"] == metrics["heldout_accuracy_polynomial"] == 1.0
    polynomial, task = load_model(out, "polynomial"), load_task(out)
    assert polynomial.config.body.norms[0] == "layer" and certify(polynomial).kind == "polynomial"
    export_checked(out, progress=lambda done, total, what: None)
    run("compile", out / "model.onnx", "--insecure-log-n", 10)
    circuit = Circuit.load(out / "model.circuit")
    spec, client = ClientSpec.load(out / "model.client"), out / "model.client"
    x = infer.read_input(spec, client, "w4 w20", None, None, None)
    window = torch.tensor([task.reading.read(load_tokenizer(out), "w4 w20", 4)])
    [simulated] = simulate(circuit, x).outputs.values()
    with torch.no_grad():
        np.testing.assert_allclose(simulated.reshape(-1), polynomial(window)[0], rtol=1e-4, atol=1e-4)
    infer.show(spec, Opened(tensors={spec.outputs[0].name: simulated}, exact={}), client, None, 1, None, False)
    assert "even" in capsys.readouterr().out


def test_documents_end_and_are_padded_with_the_checkpoints_own_id(tmp_path):
    metrics = adopt(
        released(tmp_path / "gpt2", CHECKPOINTS["gpt2"]), tmp_path / "run", text=texts(tmp_path / "text"), length=8
    )
    task, tokenizer = load_task(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    assert tokenizer.to_str() == words().to_str()
    assert metrics["heldout_loss_released"] == pytest.approx(
        task.quality(load_model(tmp_path / "run", "released"))["heldout_loss"], rel=1e-5
    )
    x, _ = task.sampler(Recipe.quick().with_(batch=4, padded=4, length=8), stage=0, noise=False).batch()
    assert torch.all((x == END).sum(1) >= 1) and torch.all(x[:, 0] == END) and not torch.all(x == END)
    text = sum(len(d) // 8 for d in task.train)
    short = task.calibration()[text : text + 16]
    assert torch.all(short[:, 0] == END) and torch.all(short[:, -1] != END)
    assert (task.heldout == 0).any() and not (task.heldout == END).any()  # id 0 is a word and no mark


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop(path: Path, name: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))


def fewer_tensors(checkpoint: Path) -> None:
    weights = random_weights(CHECKPOINTS["gpt2"])
    del weights["transformer.h.0.mlp.c_fc.weight"]
    write(checkpoint, CHECKPOINTS["gpt2"], weights)


def fewer_rows(checkpoint: Path, vocab: int) -> None:
    config = CHECKPOINTS["gpt2"]
    weights = random_weights(config)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab]
    write(checkpoint, config | {"vocab_size": vocab}, weights)


REFUSED = {
    "no config": (lambda c: (c / "config.json").unlink(), FileNotFoundError, r"config\.json: give a folder"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), FileNotFoundError, r"model\.safetensors"),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), FileNotFoundError, "fetch it with the checkpoint"),
    "damaged tokenizer": (lambda c: (c / "tokenizer.json").write_text("{"), ValueError, "no tokenizer that"),
    "no size": (lambda c: drop(c / "config.json", "n_embd"), ValueError, "is not complete, 'n_embd' is missing"),
    "no tensor": (lambda c: fewer_tensors(c), ValueError, r"no tensor 'transformer\.h\.0\.mlp\.c_fc\.weight'"),
    "architecture": (lambda c: change(c / "config.json", model_type="mamba"), ValueError, "known: bert, gpt2"),
    "vocabulary": (
        lambda c: fewer_rows(c, 20),
        ValueError,
        r"ids up to 22, the model's table rows 0 to 19",
    ),
}  # fmt: skip


def test_each_kind_of_model_has_its_own_data(tmp_path):
    causal, encoder = released(tmp_path / "gpt2", CHECKPOINTS["gpt2"]), released(tmp_path / "bert", ENCODER)
    for options in ({}, {"text": texts(tmp_path / "text")}):
        with pytest.raises(ValueError, match=r"is an encoder.*--classes"):
            adopt(encoder, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"is a causal model.*--text"):
        adopt(causal, tmp_path / "run", classes=tmp_path)


@pytest.mark.parametrize(("damage", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_adopted_is_refused_and_leaves_nothing(damage, error, message, tmp_path):
    checkpoint, out = released(tmp_path / "gpt2", CHECKPOINTS["gpt2"]), tmp_path / "runs" / "mine"
    damage(checkpoint)
    with pytest.raises(error, match=message):
        adopt(checkpoint, out, text=texts(tmp_path / "text"), length=8)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_run_that_is_there_is_left_alone(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="choose another folder"):
        adopt(released(tmp_path / "gpt2", CHECKPOINTS["gpt2"]), out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "save_model", lambda self, name, model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adopt(
            released(tmp_path / "gpt2", CHECKPOINTS["gpt2"]),
            tmp_path / "runs" / "mine",
            text=texts(tmp_path / "text"),
            length=8,
        )
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["widht=3"], "no 'widht'; known: seed"),
        (["width=48"], "width is 16 in the checkpoint"),
        (["tune_steps=many"], "tune_steps is 100; 'many' is no int"),
        (["rotary=2"], "rotary is 0 in the checkpoint"),
        (["start=power", "power_steps=2"], "start is 'softmax' where a run starts from a checkpoint"),
        (["power_steps=2"], "power_steps is 0 where a run starts from a checkpoint"),
        (["power=3"], "power is 3; it must be even"),
    ],
    ids=["unknown", "of the checkpoint", "type", "shape", "start", "power steps", "power"],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        adopt(released(tmp_path / "gpt2", CHECKPOINTS["gpt2"]), tmp_path / "run", changes=settings)
    assert not (tmp_path / "run").exists()


def test_settings_are_read_by_the_type_of_their_field():
    changed = Recipe.quick().changed(
        ["lr=1", "activation_spread=null", 'exact_norms=["rms", "rms", "affine"]', "cover=true"]
    )
    assert (changed.lr, changed.activation_spread, changed.cover) == (1, None, True)
    assert changed.exact_norms == ("rms", "rms", "affine")


def test_the_end_of_a_document_is_what_is_wanted_or_what_the_checkpoint_says():
    tokenizer = words()
    assert document_end(tokenizer, {}) == END
    assert document_end(tokenizer, {"eos_token_id": 3}) == END  # of a chat model this ends a turn
    assert document_end(tokenizer, {}, "w7") == document_end(tokenizer, {}, "7") == 7
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert document_end(plain, {"eos_token_id": [1, 0]}) == 1
    with pytest.raises(ValueError, match=r"name one with --end"):
        document_end(plain, {"eos_token_id": None})
    with pytest.raises(ValueError, match=r"no token '99'; its special ones: <\|endoftext\|>"):
        document_end(words(), {}, "9" * 2)
