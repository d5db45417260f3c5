"""`polyformer generate`: from a model to text, through `serve` in a process of its own, on real ciphertexts of a test ring."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from he_backend.openfhe_backend import available
from polyformer import cli
from polyformer.commands import generate
from polyformer.commands import models as models_command
from polyformer.commands.console import Failure
from polyformer.export_step import export_step
from polyformer.model import Transformer
from tests.compiler.test_step import CASES, sane
from tests.he_backend.running import free_port, running
from tests.he_backend.small_circuit import TEST_PARAMS, mlp
from tests.he_backend.small_step import running_sum
from training.tasks import NextTokens

CONFIG, LOG_N = CASES["LaS decay, 4 heads"]
PROMPT = "w7 w3 w21"
TOKENS = 3


def expected(model: Transformer, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens by the whole model in torch, each on the full prefix."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")
def test_text_from_an_encrypted_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """compile, keygen, serve, generate: what comes out is what the whole model says in clear."""
    model = sane(CONFIG)
    export_step(model, tmp_path / "step.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "calibration.npz", tokens=rng.integers(0, CONFIG.vocab, (8, CONFIG.length)))
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(CONFIG.vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    client, keys = tmp_path / "step.client", tmp_path / "keys"
    assert cli.run(["compile", str(tmp_path / "step.onnx"), "--insecure-log-n", str(LOG_N)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"at most 8 steps, 2 tensors kept at levels \d+ to \d+, .* at the worst; a sequence fails .* times 8", said
    )
    assert cli.run(["inspect", str(client.with_suffix(".circuit")), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"scores", "QKV", "state"} <= set(facts["predicted error after"])
    assert len(facts["states"]) == 2 and facts["steps"].startswith("at most 8 ")
    assert cli.run(["keygen", str(client), "--out", str(keys), "--insecure"]) == 0
    port = free_port()
    serve = ["-m", "polyformer", "serve", str(client.with_suffix(".circuit")), "--folder", str(tmp_path / "server")]
    with running([*serve, "--port", str(port), "--insecure"], port):
        capsys.readouterr()
        ask = ["generate", str(client), "--keys", str(keys), "--url", f"http://127.0.0.1:{port}", "--json"]
        assert cli.run([*ask, "--text", PROMPT, "--tokens", str(TOKENS)]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert cli.run([*ask, "--prompt-ids", "7", "--tokens", "1", "--temperature", "1.0", "--seed", "3"]) == 0
        drawn = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == [7, 3, 21]
    assert answer["tokens"] == expected(model, answer["prompt"], TOKENS)
    assert answer["text"].split() == [f"w{i}" for i in answer["prompt"] + answer["tokens"]]
    assert len(answer["seconds"]) == len(answer["prompt"]) + TOKENS - 1, "the last token is never fed"
    assert 0 <= drawn["tokens"][0] < CONFIG.vocab
    count = json.loads((keys / "secret" / "decryptions.json").read_text())
    assert count == {"decryptions": TOKENS + 1}, "tokens of the prompt are not decrypted"


def test_export_holds_the_step_against_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """export --step: the file is the model at every place, or there is a sentence that says by how much it is not."""
    model = sane(CONFIG)
    docs = torch.randint(0, CONFIG.vocab, (5, CONFIG.length + 1), generator=torch.Generator().manual_seed(0)).unbind()
    task = NextTokens(train=docs, docs=docs, length=CONFIG.length, vocab=CONFIG.vocab)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("training.load_model", lambda out, name: model)
    monkeypatch.setattr("training.load_task", lambda out: task)
    assert cli.run(["export", str(tmp_path), "--step"]) == 0
    assert np.array_equal(np.load(tmp_path / "calibration.npz")["tokens"], task.calibration())
    other = sane(CONFIG)
    other.get_parameter("head.bias").data.add_(1e-3)
    monkeypatch.setattr(
        "polyformer.export_step.export_step", lambda network, path, **kw: export_step(other, path, **kw)
    )
    with pytest.raises(Failure, match="is not the model"):
        models_command.export_step_checked(tmp_path, progress=lambda done, total, what: None)


def test_a_whole_window_circuit_is_refused_with_the_way_to_a_step(tmp_path: Path) -> None:
    spec = mlp(TEST_PARAMS).spec()
    spec.save(tmp_path / "m.client")
    with pytest.raises(Failure, match="polyformer export --step"):
        generate.generate(tmp_path / "m.client", tmp_path / "keys", text="a")
    running_sum().spec().save(tmp_path / "step.client")
    with pytest.raises(Failure, match="keygen"):
        generate.generate(tmp_path / "step.client", tmp_path / "keys", text="a")


def test_the_prompt_must_fit_the_window() -> None:
    assert generate.fitted([1, 2, 3], 2, 4) == [1, 2, 3]
    assert generate.fitted([1, 2, 3, 4, 5], 2, 4) == [3, 4, 5]
    assert generate.fitted([1, 2], 4, 4) == [2]
    with pytest.raises(Failure, match="5 tokens do not fit: the model's window holds 4"):
        generate.fitted([1], 5, 4)
    with pytest.raises(Failure, match="empty"):
        generate.fitted([], 1, 4)


def test_tokens_are_picked_by_temperature() -> None:
    logits, rng = np.array([0.0, 1.0, 3.0]), np.random.default_rng(0)
    assert {generate.pick(logits, 0.0, rng) for _ in range(9)} == {2}
    drawn = np.bincount([generate.pick(logits, 2.0, rng) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, np.exp(logits / 2) / np.exp(logits / 2).sum(), atol=0.03)


@pytest.mark.parametrize("value", [17.0, -17.0, math.nan, math.inf])
def test_logits_beyond_calibration_are_refused(value: float) -> None:
    spec = running_sum().spec()
    generate.check_logits(np.array([16.0]), spec)
    with pytest.raises(Failure, match="its error bound does not hold"):
        generate.check_logits(np.array([value, 0.0]), spec)
