"""The stage machine: recipes are lists, each stage reports what it says, a killed conversion ends where another does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch

from polyformer.export import export_onnx
from polyformer.model import ModelConfig, Transformer
from polyformer.ranges import measure
from training import Recipe, convert, load_model, load_task, machine, train
from training.data import Mix, Sampler
from training.evaluate import heldout_loss
from training.folder import Folder
from training.loop import Schedule
from training.stages import CONVERSIONS, Continue, Ranges, Rows, Stage, Substitute, Swap, Training, Tune

CONFIG = ModelConfig(
    vocab=13, length=8, width=16, heads=2, hidden=16, blocks=1, mixer="softmax", norms=("affine", "affine", "rms"),
    head="tied", head_bias=False,
)  # fmt: skip
RANGES = Ranges(
    name="ranges", steps=20, lr=3e-3, sampler=1, activation_bound=4.0, variance_ratio=4.0,
    denominator_target=(0.1, 4.0), activation_weight=1.0, variance_weight=1.0, denominator_weight=1.0,
)  # fmt: skip
SUBSTITUTE = Substitute(
    name="substitute", activation_degree=4, norm_degree=3, norm_newton=0, reciprocal_degree=4, margin=1.5,
    denominator_interval=(0.1, 8.0),
)  # fmt: skip
STAGES: tuple[Stage, ...] = (
    Swap(name="swap", mixer="power_softmax", power=2, eps=1.0),
    Continue(name="continue", steps=60, lr=1e-2, sampler=0, noise=False),
    Rows(name="rows"),
    RANGES,
    SUBSTITUTE,
    Tune(name="tune", steps=20, lr=3e-3, sampler=2),
)


class KilledError(Exception):
    pass


def documents() -> list[torch.Tensor]:
    """Texts in which each token is the one two places before it plus one."""
    g = torch.Generator().manual_seed(0)
    docs = []
    for _ in range(30):
        ids = torch.randint(1, 13, (2,), generator=g).tolist()
        while len(ids) < 30:
            ids.append(ids[-2] % 12 + 1)
        docs.append(torch.tensor(ids))
    return docs


HELDOUT = torch.stack([d[:9] for d in documents()[:6]])


def material() -> machine.Material:
    docs = documents()

    def sampler(stage: Training) -> Sampler:
        return Sampler(docs[6:], length=8, vocab=13, mix=Mix(batch=8, noise=2 * stage.noise), seed=stage.sampler)

    def schedule(stage: Training) -> Schedule:
        return Schedule(steps=stage.steps, lr=stage.lr, warmup=2, weight_decay=0.0, clip=1.0, checkpoint_every=5)

    return machine.Material(
        sampler=sampler,
        schedule=schedule,
        quality=lambda model: {"heldout_loss": heldout_loss(model, HELDOUT)},
        heldout=HELDOUT[:, :-1],
        calibration=torch.stack([d[:8] for d in docs[6:]]),
    )


def start() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


def go(place: Path, stages=STAGES, kill: tuple[str, int] | None = None):
    def progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if (stage, done) == kill:
            raise KilledError

    place.mkdir(exist_ok=True)
    return machine.run(
        start(), stages, material(),
        place=place / "states", log=place / "train.jsonl", reports=place / "stages.jsonl", progress=progress,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    return *go(place), place


@pytest.mark.parametrize("stage", ["continue", "ranges", "tune"])
def test_a_killed_conversion_ends_bit_for_bit_where_the_other_does(whole, tmp_path, stage):
    model, reports, place = whole
    with pytest.raises(KilledError):
        go(tmp_path, kill=(stage, 10))
    torch.manual_seed(999)
    again, found = go(tmp_path)
    assert found == reports
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    for name in ("train.jsonl", "stages.jsonl"):
        assert (tmp_path / name).read_text() == (place / name).read_text()


def test_a_stage_killed_before_its_state_is_saved_repeats_its_last_steps_alone(whole, tmp_path, monkeypatch):
    model, reports, _ = whole
    save = machine._save

    def dies(place, state, stages):
        if state.reports[-1]["stage"] == "continue":
            raise KilledError
        save(place, state, stages)

    monkeypatch.setattr(machine, "_save", dies)
    with pytest.raises(KilledError):
        go(tmp_path)
    monkeypatch.setattr(machine, "_save", save)
    again, found = go(tmp_path, kill=("continue", 20))  # a stage that starts anew would come to step 20
    assert found == reports
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_finished_conversion_is_not_run_again(whole):
    model, reports, place = whole
    again, found = go(place, kill=("continue", 10))  # training would raise
    assert found == reports
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_every_stage_reports_what_the_model_is_at_that_point(whole):
    model, reports, place = whole
    assert [r["stage"] for r in reports] == [s.name for s in STAGES]
    assert reports == [json.loads(line) for line in (place / "stages.jsonl").read_text().splitlines()]
    by_name = {r["stage"]: r for r in reports}
    for name, levels in {"swap": None, "ranges": None, "substitute": model.levels, "tune": model.levels}.items():
        assert by_name[name]["levels"] == levels
    data = material()
    last = by_name["tune"]
    assert last["heldout_loss"] == pytest.approx(heldout_loss(model, HELDOUT))
    assert set(last["ranges"]) == {"blocks.0.mixer", "blocks.0.mlp.act", "norm"}
    intervals = {name: tuple(r["interval"]) for name, r in last["ranges"].items()}
    assert intervals["blocks.0.mixer"] == pytest.approx(SUBSTITUTE.denominator_interval)
    assert intervals["blocks.0.mlp.act"] == pytest.approx((-6.0, 6.0))
    seen = measure(model, data.heldout, intervals=intervals)
    assert last["ranges"]["norm"]["high"] == pytest.approx(seen["norm"].high)
    out = sum((r.below + r.above) * r.count for r in seen.values()) / sum(r.count for r in seen.values())
    assert last["outside"] == pytest.approx(out)
    assert set(by_name["substitute"]["alone"]) == {"division", "activation", "norm"}
    assert by_name["rows"]["heldout_loss"] == pytest.approx(by_name["continue"]["heldout_loss"], abs=1e-5)


def test_swapping_costs_and_each_training_stage_repays(whole):
    losses = {r["stage"]: r["heldout_loss"] for r in whole[1]}
    assert losses["continue"] < losses["swap"]
    assert losses["tune"] < losses["substitute"]


@pytest.mark.parametrize(("share", "steps", "met"), [(1.0, 10, True), (-1.0, 20, False), (None, 20, None)])
def test_a_range_stage_ends_at_its_target(tmp_path, share, steps, met):
    _, reports = go(tmp_path, (*STAGES[:3:2], replace(RANGES, outside=share, every=10)))
    assert (reports[-1]["steps"], reports[-1]["met"]) == (steps, met)


def test_stages_that_cannot_run_say_why(whole, tmp_path):
    with pytest.raises(ValueError, match="share a name"):
        go(tmp_path, (*STAGES, Rows(name="rows")))
    with pytest.raises(ValueError, match="use form 'rows' \\(a Rows stage before the substitution\\)"):
        go(tmp_path / "no rows", (STAGES[0], SUBSTITUTE))
    with pytest.raises(ValueError, match="has no target; put a Ranges stage"):
        go(tmp_path / "no ranges", (STAGES[0], STAGES[2], SUBSTITUTE))
    other = (STAGES[0], replace(STAGES[1], steps=30), *STAGES[2:])
    with pytest.raises(ValueError, match="stage 2 is another; remove"):
        go(whole[2], other)


QUICK = Recipe.quick().with_(
    softmax_steps=20, power_steps=20, continue_steps=10, range_steps=20, tune_steps=20, start="softmax"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("folder")
    train(out, QUICK)
    return out


@pytest.mark.parametrize("recipe", CONVERSIONS)
def test_both_recipes_convert_a_folder_to_polynomials_that_export(folder, tmp_path, recipe):
    metrics = convert(folder, recipe=recipe)
    result = CONVERSIONS[recipe].result
    model, tokens = load_model(folder, result), load_task(folder).heldout[:1]
    assert model.config.mixer == {"powersoftmax": "power_softmax", "pointwise": "pointwise"}[recipe]
    assert metrics["levels" if recipe == "powersoftmax" else "levels_pointwise"] == model.levels
    assert metrics[f"heldout_loss_{result}"] == pytest.approx(
        load_task(folder).quality(model)["heldout_loss"], rel=1e-5
    )
    names = [s.name for s in CONVERSIONS[recipe].stages(QUICK)]
    lines = [json.loads(line)["stage"] for line in (folder / "stages.jsonl").read_text().splitlines()]
    assert [name for name in lines if name in names] == names
    assert not (folder / "checkpoints" / recipe).exists()
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    logits = torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])
    torch.testing.assert_close(logits, model(tokens).detach(), rtol=1e-4, atol=1e-4)


def test_unknown_recipes_list_the_known(folder):
    with pytest.raises(ValueError, match="powersoftmax, pointwise"):
        convert(folder, recipe="softmax")


def test_a_model_with_a_tied_head_is_saved_once_and_stays_tied(folder):
    model = Transformer(replace(load_model(folder, "softmax").config, head="tied", head_bias=False)).eval()
    place = Folder(folder)
    before = (folder / "softmax.safetensors").stat().st_size
    place.save_model("softmax", model)
    size = model.token.weight.numel() * 4
    assert before - (folder / "softmax.safetensors").stat().st_size >= size
    loaded = load_model(folder, "softmax")
    assert loaded.head.weight is loaded.token.weight
    tokens = load_task(folder).heldout[:2]
    assert torch.equal(loaded(tokens), model(tokens))


def test_inspect_shows_a_certificate_of_each_model(folder, capsys):
    from polyformer import cli

    convert(folder)
    assert cli.run(["inspect", str(folder), "--json"]) == 0
    certificates = json.loads(capsys.readouterr().out)["certificates"]
    assert certificates["polynomial"].startswith("polynomial of degree 42, so of depth 6 at least")
    assert "blocks.0.mlp.act (gelu)" in certificates["power"]
    assert cli.run(["inspect", str(folder)]) == 0
    assert "polynomial: polynomial of degree 42" in capsys.readouterr().out


def test_the_command_knows_the_recipes(folder, capsys):
    from polyformer import cli
    from polyformer.commands.models import Conversion

    assert {kind.value for kind in Conversion} == set(CONVERSIONS)
    assert cli.run(["convert", str(folder), "--recipe", "bogus"]) == 2
    assert cli.run(["convert", str(folder), "--recipe", "pointwise", "--json"]) == 0
    assert "heldout_loss_pointwise" in capsys.readouterr().out
