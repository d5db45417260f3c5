"""Runs at scale that begin with a checkpoint, have range losses and a held-out measure: on one process as on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from polyformer.model import ModelConfig, Transformer
from polyformer.pretrained import load_pretrained
from polyformer.ranges import Collector, range_loss
from tests.polyformer.originals import BERT, LLAMA, NEOX, VOCAB, random_weights, write
from training import accounts, distributed, parallel, recipes, scale, start
from training.folder import Folder
from training.loop import token_loss
from training.one_step import fit_polynomials, text_windows
from training.recipes import RangeTargets
from training.shards import ShardReader, write_shards
from training.swap import swap_attention

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
ROOT = Path(__file__).parents[2]
RANGES = RangeTargets(activation=(-0.5, 0.5), variance=(0.8, 1.25), denominator=(1.5, 3.0))
RECIPE = recipes.load("tiny_cpu").with_(steps=4, checkpoint_every=2, evaluate_every=2, heldout_windows=6)
OPTIONS = "--steps 4 --checkpoint-every 2 --evaluate-every 2 --heldout-windows 6".split()


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A Llama-like checkpoint: grouped queries, a tied head, no biases."""
    folder = tmp_path_factory.mktemp("llama")
    write(folder, LLAMA, random_weights(LLAMA))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, g = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, tokens in (("train", 2000), ("heldout", 120)):
        write_shards(folder / name, [g.integers(1, VOCAB, tokens)], vocab=VOCAB)
    return folder


def run(recipe: recipes.ScaleRecipe, folder: Path, data: Path) -> scale.Outcome:
    with parallel.processes() as mesh:
        return scale.run(recipe, folder, data / "train", mesh, heldout=data / "heldout")


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(t) for t in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in found]


@pytest.mark.slow
def test_two_processes_start_from_a_checkpoint_and_give_the_curve_of_one(released, data, tmp_path):
    """With range losses and held-out losses, over a number of windows that does not divide by the processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "training.distributed", "--recipe", "tiny_cpu", *OPTIONS, "--from", str(released)]
    folders = ["--out", str(tmp_path / "two"), "--data", str(data / "train"), "--heldout", str(data / "heldout")]
    ranges = ["--ranges", "activation=-0.5,0.5", "variance=0.8,1.25", "denominator=1.5,3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*torchrun, *command, *folders, *ranges], cwd=ROOT, env=environment, check=True, timeout=500)
    outcome = run(RECIPE.with_(start=str(released), ranges=RANGES), tmp_path / "one", data)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [sorted(line) for line in one] == [sorted(line) for line in two]
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert [("heldout" in line, line["ranges"] > 0) for line in one] == [(False, True), (True, True)] * 2
    assert outcome.heldout == one[-1]["heldout"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_step_is_that_of_the_plain_model(released, data, tmp_path, checkpointing):
    """Token loss, range losses and gradient by hand; a tied head stays one with its table."""
    recipe = RECIPE.with_(
        start=str(released), ranges=RANGES, steps=1, checkpointing=checkpointing, micro_batch=8, optimiser="factored"
    )
    outcome = run(recipe, tmp_path / "run", data)
    model = swap_attention(load_pretrained(released, length=16)).train()
    reader = ShardReader(data / "train", length=16, seed=0)
    x_BT, y_BT = reader.batch(8)
    with Collector(model) as seen:
        loss = token_loss(model(x_BT), y_BT)
        targets = {name: getattr(RANGES, tap.kind) for name, tap in seen.taps.items()}
        ranges = range_loss(seen, targets, activation=0.3, variance=0.3, denominator=0.3)
    (loss + ranges).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    [line] = lines(tmp_path / "run")
    assert [line[k] for k in ("loss", "ranges", "gradient")] == pytest.approx(
        [loss.item(), ranges.item(), norm.item()], rel=1e-5
    )
    assert outcome.loss == line["loss"]


def test_held_out_losses_are_those_of_the_whole_model(released, data):
    recipe = RECIPE.with_(start=str(released))
    with parallel.processes() as mesh:
        recipe, source = start.begin(recipe)
        model = scale.sharded_model(recipe, source, mesh).train()
        assert model.head.weight is model.token.weight
        reader = ShardReader(data / "heldout", length=16, seed=0)
        windows = torch.stack([torch.from_numpy(reader.window(i)) for i in range(6)])
        found = scale.heldout_loss(model, reader, recipe, torch.device("cpu"))
        assert model.training
    assert found == pytest.approx(token_loss(source(windows[:, :-1]), windows[:, 1:]).item(), rel=1e-6)


def test_a_model_of_a_run_keeps_its_shape_and_what_it_converted(tmp_path):
    """Attention is swapped only where the recipe asks for another than the checkpoint has."""
    (tmp_path / "config.json").write_text('{"models": {}}')
    own = ModelConfig(vocab=VOCAB, length=8, width=8, heads=2, hidden=8, blocks=1, mixer="softmax", norms=("rms",) * 3)
    converted = replace(RECIPE.with_(model=replace(own, mixer="power_softmax")).polynomial_config(), power=6)
    for name, config in (("softmax", own), ("polynomial", converted)):
        torch.manual_seed(1)
        Folder(tmp_path).save_model(name, Transformer(config))
        found = start.first_model(RECIPE.with_(start=str(tmp_path / f"{name}.safetensors")))
        assert found.config == (replace(own, mixer="power_softmax") if config is own else converted)
        torch.manual_seed(1)
        assert torch.equal(found.token.weight, Transformer(config).token.weight)
    with pytest.raises(ValueError, match=r"name one of its models: softmax\.safetensors, polynomial\.safetensors"):
        start.first_model(RECIPE.with_(start=str(tmp_path)))


def test_what_cannot_start_a_run_is_refused_in_a_sentence(tmp_path, data):
    write(tmp_path / "bert", BERT, random_weights(BERT))
    write(tmp_path / "neox", NEOX, random_weights(NEOX))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "cut" / "model.safetensors").write_bytes((tmp_path / "neox" / "model.safetensors").read_bytes())
    common = ["--recipe", "tiny_cpu", "--out", str(tmp_path / "run"), "--data", str(data / "train")]
    for options, sentence in (
        (["--from", str(tmp_path / "bert")], "is no causal language model"),
        (["--from", str(tmp_path / "absent")], "no file"),
        (["--from", str(tmp_path / "cut")], "'max_position_embeddings' is missing; fetch it again"),
        (["--heldout", str(tmp_path / "absent")], r"shards\.json is missing"),
        (["--checkpoint-every", "0"], "checkpoint_every is 0; it must be at least 1"),
        (["--micro-batch", "0"], "micro_batch is 0; it must be at least 1"),
        (["--steps", "-1"], "steps is -1; it must be at least 1"),
        (["--ranges", "activation=3"], "must hold 2 numbers"),
        (["--ranges", "norm=1,2"], "unknown range"),
        (["--ranges", "variance=0,2"], "the target of variance is"),
        (["--ranges", "--compile"], "set compile=False"),
        (["--peak-tflops", "0"], "it must be positive"),
    ):
        with pytest.raises(SystemExit, match=sentence) as refusal:
            distributed.main([*common, *options])
        assert isinstance(refusal.value.code, str)  # which Python prints, with exit status 1
    with pytest.raises(SystemExit, match="give --data"):
        distributed.main([*common[:4], "--from", str(tmp_path / "neox")])


def test_a_run_is_extended_on_the_rates_of_the_longer_schedule(data, tmp_path, capsys):
    common = ["--recipe", "tiny_cpu", "--out", str(tmp_path), "--data", str(data / "train")]
    distributed.main([*common, "--steps", "6"])
    distributed.main([*common, "--steps", "9"])
    assert "extended from 6 to 9 steps: behind step 6 the learning rate was that of 9" in capsys.readouterr().err
    rates = [recipes.load("tiny_cpu").with_(steps=n).schedule().rate for n in (6, 9)]
    assert [line["lr"] for line in lines(tmp_path)] == [rates[i >= 6](i) for i in range(9)]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert [outcome[k] for k in ("steps", "resumed_from", "extended_from")] == [9, 6, 6]
    with pytest.raises(SystemExit, match="steps is 9 there and 8 here"):
        distributed.main([*common, "--steps", "8"])
    with pytest.raises(SystemExit, match="seed is 0 there and 1 here"):
        distributed.main([*common, "--steps", "12", "--seed", "1"])


@pytest.mark.parametrize("name", ["410m", "llama-7b-shape"])
def test_polynomial_forms_of_released_shapes_make_a_step(name):
    """In small: partial rotary positions, parallel blocks, LayerNorm; SwiGLU. All in bfloat16 and checkpointed."""
    big = recipes.load(name)
    small = {"vocab": 257, "length": 16, "width": 32, "heads": 2, "hidden": 48, "blocks": 2}
    norms = big.model.norms[: 3 if big.model.parallel else 5]
    recipe = big.with_(model=replace(big.model, **small, norms=norms, rotary=4), compile=False)
    config = recipe.polynomial_config()
    assert not {"rms", "layer"} & set(config.norms) and accounts.on_meta(config).levels > 0
    model = Transformer(config)
    fit_polynomials(model, recipe.model.activation)
    parallel.to_bfloat16(model)
    parallel.apply(model, parallel.Plan(precision="bf16", checkpointing=True), None).train()
    windows = text_windows(2, 17)
    token_loss(model(windows[:, :-1]).float(), windows[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
