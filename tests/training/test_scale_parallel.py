"""What is applied from outside leaves names and mathematics alone; trackers and counters."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyformer import mixers
from polyformer.layers import Tap
from polyformer.model import Transformer
from training import accounts, parallel, recipes, scale, start, trackers
from training.loop import token_loss
from training.one_step import fit_polynomials, text_windows
from training.parallel import to_bfloat16

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
RECIPE = recipes.load("tiny_cpu")


def seeded() -> Transformer:
    torch.manual_seed(0)
    return Transformer(RECIPE.model)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    windows = text_windows(4, 33)
    model.zero_grad()
    token_loss(model(windows[:, :-1]).float(), windows[:, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and hides it in its own way
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(parallel.Plan(checkpointing=True), id="checkpointing"),
        pytest.param(parallel.Plan(compile="eager"), id="compile"),
        pytest.param(parallel.Plan(checkpointing=True, compile="eager"), id="both"),
    ],
)
def test_plans_change_neither_names_nor_gradients(plan):
    plain = seeded()
    planned = parallel.apply(seeded(), plan, None)
    assert planned.state_dict().keys() == plain.state_dict().keys()
    expected, found = gradients(plain), gradients(planned)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointing_runs_each_block_twice():
    calls = []
    for checkpointing in (False, True):
        model = seeded()
        model.blocks[0].mlp.up.register_forward_hook(lambda *_: calls.append(1))
        gradients(parallel.apply(model, parallel.Plan(checkpointing=checkpointing), None))
        assert len(calls) == (3 if checkpointing else 1)


@pytest.mark.parametrize("compiled", [None, "eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_recomputation_counts_no_batch_twice_in_running_statistics(compiled):
    config = replace(RECIPE.model, norms=("batch",) * 5, mlp_norm=True)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        plan = parallel.Plan(checkpointing=checkpointing, compile=compiled if checkpointing else None)
        model = parallel.apply(Transformer(config), plan, None).train()
        gradients(model)
        found.append(dict(model.named_buffers()))
        assert {norm.momentum for norm in parallel.batch_norms(model)} == {0.1}
    assert not torch.equal(found[0]["blocks.0.norm1.mean"], torch.zeros(32))
    for name, buffer in found[0].items():
        torch.testing.assert_close(found[1][name], buffer, msg=name)


def test_batch_norms_are_refused_where_processes_would_differ():
    mesh = types.SimpleNamespace(size=lambda: 2)
    model = accounts.on_meta(replace(RECIPE.model, norms=("batch",) * 5))
    with pytest.raises(ValueError, match="5 BatchNorms, whose running statistics are not reduced over the 2 processes"):
        parallel.apply(model, parallel.Plan(), mesh)


def test_powers_and_variances_are_float32_in_a_bfloat16_model():
    """Taps see float32, linears do not, and the logits are nearer to the exact ones than in bfloat16 throughout."""
    tokens = text_windows(4, 32)
    exact = seeded()(tokens)
    mixed, half = seeded(), seeded().bfloat16()
    to_bfloat16(mixed)
    parallel.apply(mixed, parallel.Plan(precision="bf16"), None)
    seen: dict[str, torch.dtype] = {}
    for name, module in mixed.named_modules():
        if isinstance(module, Tap) or name.endswith((".o", ".up")):
            module.register_forward_hook(lambda m, args, out, n=name: seen.__setitem__(n, out.dtype))
    error = (mixed(tokens).float() - exact).abs().mean()
    assert seen["blocks.0.mixer.tap"] == seen["blocks.1.norm1.tap"] == seen["norm.tap"] == torch.float32
    assert seen["blocks.0.mixer.o"] == seen["blocks.0.mlp.up"] == torch.bfloat16
    assert error < (half(tokens).float() - exact).abs().mean()
    assert error < 0.02 * exact.std()


EXACT = {
    "mamba": ("A_log_EN", "delta_bias_E"),
    "mamba2": ("A_log_H", "delta_bias_H"),
    "rwkv": ("rate_D", "bonus_D"),
    "griffin": ("lambda_D",),
    "polynomial_s6": ("c0_EN", "higher_GEN"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("name", "plan"),
    [*((name, {}) for name in EXACT), ("mamba2", {"checkpointing": True}), ("rwkv", {"checkpointing": True}),
     ("polynomial_s6", {"checkpointing": True, "compile": "eager"})],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_sharding_in_bfloat16_keeps_decays_and_polynomials_exact(name, plan):
    config = replace(RECIPE.model, mixer=name, activation="polynomial", blocks=1, norms=("rms",) * 3, state=2)
    torch.manual_seed(0)
    source, model = Transformer(config), accounts.on_meta(config)
    seen: dict[str, torch.Tensor] = {}

    def look(module, args, output) -> None:
        seen.update({n: p.detach().clone() for n, p in module.named_parameters(recurse=False)})

    block = model.blocks[0]
    for module in (block.mixer, block.mlp.act.polynomial, block.mixer.o):
        module.register_forward_hook(look)
    with parallel.processes() as mesh:
        parallel.apply(model, parallel.Plan(precision="bf16", **plan), mesh)
        parallel.materialise(model, source, torch.device("cpu"))
        windows = text_windows(2, 33)
        token_loss(model(windows[:, :-1]).float(), windows[:, 1:]).backward()
        assert seen["weight"].dtype == torch.bfloat16
        for part in EXACT[name]:
            assert torch.equal(seen[part], getattr(source.blocks[0].mixer, part))
        assert seen["coefficients"].dtype == torch.float32
        assert model.state_dict().keys() == source.state_dict().keys()
        missing = [
            n for n, p in model.named_parameters() if p.grad is None or not p.grad.full_tensor().isfinite().all()
        ]
        assert not missing


CAUSAL = [{"mixer": name} for name in mixers.names() if name != "hyena_nd"]


@pytest.mark.parametrize(
    "changes",
    [*CAUSAL, {"mixer": "hyena", "hyena_window": "learned"}, {"mixer": "hyena", "hyena_filter": "direct"}],
    ids=lambda c: "-".join(c.values()),
)
def test_every_causal_mixer_runs_in_bfloat16_sharded_and_whole(changes):
    config = replace(RECIPE.model, blocks=1, norms=("rms",) * 3, state=2, **changes)
    torch.manual_seed(0)
    source, sharded, whole = Transformer(config), accounts.on_meta(config), Transformer(config)
    whole.load_state_dict(source.state_dict())
    windows, plan = text_windows(2, 33), parallel.Plan(precision="bf16")
    exact = source(windows[:, :-1])
    with parallel.processes() as mesh:
        parallel.apply(sharded, plan, mesh)
        parallel.materialise(sharded, source, torch.device("cpu"))
        parallel.to_bfloat16(whole)
        for model in (sharded, parallel.apply(whole, plan, None)):
            logits = model(windows[:, :-1]).float()
            token_loss(logits, windows[:, 1:]).backward()
            assert (logits - exact).abs().mean() < 0.02 * exact.std()
            assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_a_hyena_filter_is_that_of_float32():
    """Also of a sharded model: positions near the end of a window differ by less than bfloat16 can say."""
    config = replace(RECIPE.model, mixer="hyena", hyena_window="learned", blocks=1, norms=("rms",) * 3)
    torch.manual_seed(0)
    source, sharded, whole = Transformer(config), accounts.on_meta(config), Transformer(config)
    whole.load_state_dict(source.state_dict())
    parallel.to_bfloat16(whole)
    with parallel.processes() as mesh:
        parallel.apply(sharded, parallel.Plan(precision="bf16"), mesh)
        parallel.materialise(sharded, source, torch.device("cpu"))
        for model in (sharded, whole):
            assert torch.equal(model.blocks[0].mixer.filter(), source.blocks[0].mixer.filter())


def test_polynomial_form_takes_the_same_treatment():
    torch.manual_seed(0)
    exact = Transformer(RECIPE.polynomial_config())
    fit_polynomials(exact, "gelu")
    mixed = Transformer(RECIPE.polynomial_config())
    mixed.load_state_dict(exact.state_dict())
    to_bfloat16(mixed)
    parallel.apply(mixed, parallel.Plan(precision="bf16", checkpointing=True), None)
    tokens = text_windows(2, 32)
    difference = (mixed.train()(tokens).float() - exact.train()(tokens)).abs().mean()
    assert difference < 0.03 * exact(tokens).std()
    assert mixed.blocks[0].mlp.act.polynomial.coefficients.dtype == torch.float32


def test_a_sharded_model_starts_with_the_values_of_the_whole_one():
    torch.manual_seed(RECIPE.seed)
    whole = Transformer(RECIPE.model)
    with parallel.processes() as mesh:
        sharded = scale.sharded_model(*start.begin(RECIPE), mesh)
        values = {name: p.full_tensor() for name, p in sharded.named_parameters()}
        assert values.keys() == dict(whole.named_parameters()).keys()
        assert all(torch.equal(values[name], p) for name, p in whole.named_parameters())
        buffers = dict(sharded.named_buffers())
        assert "blocks.0.mixer.mask_TT" in buffers
        assert all(torch.equal(buffers[name], b) for name, b in whole.named_buffers())
        windows = text_windows(2, 32)
        torch.testing.assert_close(sharded(windows), whole(windows))


def test_throughput_counts_tokens_seconds_and_the_share_of_the_peak():
    speed = scale.Throughput(flops_per_token=1000, peak_flops=1e6)
    assert speed.add(50, 0.1) == pytest.approx({"tokens_per_second": 500, "mfu": 0.5})
    speed.add(10, 0.1)
    assert speed.total() == pytest.approx({"tokens_per_second": 300, "mfu": 0.3})
    assert "mfu" not in scale.Throughput(flops_per_token=1, peak_flops=None).add(1, 1.0)


class Recorder:
    """Stands for both libraries: takes what they are called with."""

    def __init__(self, *args, **options) -> None:
        self.calls: list = [("open", args, options)]

    def add_scalar(self, name, value, step) -> None:
        self.calls.append((name, value, step))

    def log(self, figures, step) -> None:
        self.calls.extend((name, value, step) for name, value in figures.items())

    def close(self) -> None:
        self.calls.append("closed")

    finish = close


@pytest.mark.parametrize(
    ("name", "module", "opener"),
    [("tensorboard", "torch.utils.tensorboard", "SummaryWriter"), ("wandb", "wandb", "init")],
)
def test_trackers_speak_to_their_libraries(name, module, opener, tmp_path, monkeypatch):
    opened = []
    fake = types.ModuleType(module)
    setattr(fake, opener, lambda *args, **options: opened.append(Recorder(*args, **options)) or opened[-1])
    monkeypatch.setitem(sys.modules, module, fake)
    (tracker,) = trackers.open_all([name], tmp_path, run="tiny", first=3)
    tracker.write(4, {"loss": 1.5})
    tracker.close()
    assert opened[0].calls[1:] == [("loss", 1.5, 4), "closed"]
    expected = {"purge_step": 4} if name == "tensorboard" else {"resume": "allow", "name": "tiny"}
    assert expected.items() <= opened[0].calls[0][2].items()


def test_runs_of_one_name_in_two_folders_are_two_and_a_restart_is_the_same(tmp_path, monkeypatch):
    ids = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: ids.append(options["id"]) or Recorder()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run", Path("a/run")):
        folder.mkdir(parents=True, exist_ok=True)
        trackers.open_all(["wandb"], folder, run="tiny", first=0)
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_absent_trackers_name_the_install_command(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        trackers.open_all([name], tmp_path, run="tiny", first=0)
    with pytest.raises(ValueError, match="jsonl, tensorboard, wandb"):
        trackers.open_all(["mlflow"], tmp_path, run="tiny", first=0)


def test_json_lines_drop_what_a_resumed_run_will_write_again(tmp_path):
    lines = "".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in (1, 2, 3))
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 4, "lo')
    (tracker,) = trackers.open_all(["jsonl"], tmp_path, run="tiny", first=2)
    tracker.write(3, {"loss": 0.25})
    tracker.close()
    steps = [json.loads(t) for t in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
