"""A model on another device takes inputs from the CPU and creates nothing beside itself there.

The meta device stands for the other one: it has shapes without numbers, and refuses tensors of the CPU as any other does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from polyformer import mixers, models
from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.model import ModelConfig, Transformer
from polyformer.models import Model, device_of, placed, rebuilt
from polyformer.ranges import Collector, log_mean_rows, range_loss, taps
from polyformer.swin import Swin, SwinConfig
from polyformer.vision import VisionConfig, ViT
from training import distil
from training.classes import Classes
from training.loop import token_loss

BASE = ModelConfig(
    vocab=11, length=8, width=8, heads=2, hidden=8, blocks=2, norms=("layer", "rms", "rms_poly", "layer_poly", "affine")
)
POWER = {"form": "rows", "reciprocal": "polynomial", "activation": "polynomial"}
LANGUAGE = {
    **{name: {"mixer": name} for name in mixers.names() if name != "hyena_nd"},
    "stable": {},
    "mean": {"form": "mean"},
    "rows": POWER,
    "goldschmidt": {**POWER, "reciprocal": "goldschmidt"},
    "las": {"las_decay": 0.5, "las_width": 3, **POWER},
    "released": {"mixer": "softmax", "kv_heads": 1, "rotary": 2, "gated": True, "head": "tied", "positions": "none"},
    "post": {"order": "post", "token_types": 2, "causal": False},
    "fixed-decay": {"mixer": "gated_linear", "decay": "fixed"},
}
SEEN = replace(BASE, causal=False, norms=("batch",) * 5, mlp_norm=True, score_norm=True, form="rows")
IMAGE = VisionConfig(body=SEEN, classes=3, image=(4, 8), patch=2, window=2)
VISION = {
    "vit": IMAGE,
    "class-token": replace(IMAGE, window=0, pool="first", body=replace(SEEN, length=9)),
    "grid": replace(IMAGE, window=0, body=replace(SEEN, mixer="hyena_nd", grid=(2, 4), score_norm=False, form="stable")),
    "swin": SwinConfig(body=SEEN, classes=3, image=(4, 8), patch=2, window=2, stages=(1, 1)),
}  # fmt: skip


def step(model: Model, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """What a step of training does, range losses included."""
    aims = {name: (-1.0, 1.0) if tap.kind == "activation" else (0.5, 2.0) for name, tap in taps(model).items()}
    with Collector(model) as collector:
        logits = model.train()(inputs)
        loss = token_loss(logits, targets) + range_loss(collector, aims, activation=1.0, variance=1.0, denominator=1.0)
    loss.backward()
    assert logits.device.type == "meta"
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", LANGUAGE.values(), ids=LANGUAGE)
def test_a_language_model_trains_where_it_is(changes):
    model = Transformer(replace(BASE, **changes)).to("meta")
    step(model, torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("config", VISION.values(), ids=VISION)
def test_a_vision_model_trains_where_it_is(config):
    model = (Swin if isinstance(config, SwinConfig) else ViT)(config).to("meta")
    step(model, torch.zeros(2, 1, 4, 8), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", sorted(mixers.names()))
def test_the_reference_of_a_mixer_runs_where_its_input_is(name):
    layer = mixers.load(name)(
        replace(BASE, mixer=name, grid=(2, 4) if name == "hyena_nd" else (), causal=name != "hyena_nd")
    )
    x = torch.zeros(2, 8, 8, device="meta")
    assert layer.to("meta").eval().reference(x).device.type == layer.matrix(x).device.type == "meta"


def test_an_encoder_hidden_keys_and_token_types_come_along():
    tokens, visible = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
    encoder = Encoder(ClassifierConfig(body=replace(BASE, causal=False), classes=3)).to("meta")
    step(encoder, tokens, torch.zeros(2, dtype=torch.int64))
    model = Transformer(replace(BASE, **LANGUAGE["post"])).to("meta")
    assert model(tokens, visible_BT=visible, types_BT=tokens).device.type == "meta"


def test_what_a_conversion_measures_and_fits_is_where_the_model_is():
    model = Transformer(replace(BASE, form="rows")).to("meta").eval()
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    assert device_of(rebuilt(model, replace(BASE, mixer="softmax"))).type == "meta"
    assert {v.device.type for v in log_mean_rows(model, tokens, batch=3).values()} == {"meta"}
    x_NTD = distil.first_states(model, tokens)
    read, answer, _ = distil.run_block(model.blocks[0], x_NTD, None)
    assert distil._error(model.blocks[0].mixer, read, answer, None).device.type == "meta"


def test_quality_comes_back_to_the_labels():
    """The logits are brought to the CPU, where labels lie; meta has no numbers to bring, so a stand-in says where they are."""

    class Logits(nn.Module):
        config = replace(IMAGE, body=SEEN)
        brought = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outer = self

            class Elsewhere(torch.Tensor):
                def cpu(self) -> torch.Tensor:  # type: ignore[override]
                    outer.brought = True
                    return self.as_subclass(torch.Tensor)

            return torch.zeros(len(x), 3).as_subclass(Elsewhere)

    x, y = torch.zeros(4, 1, 4, 8), torch.zeros(4, dtype=torch.int64)
    task = Classes(train_x=x, train_y=y, heldout_x=x, heldout_y=y, reading=None, patch=2)
    model = Logits()
    assert task.quality(model)["heldout_accuracy"] == 1.0 and model.brought


@pytest.fixture
def moved(monkeypatch) -> list[str]:
    """Where models are asked to go; they stay."""
    found: list[str] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, name: found.append(name) or self)  # type: ignore[func-returns-value]
    return found


def cuda(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_is_cuda_where_there_is_any(monkeypatch, moved):
    model = nn.Linear(2, 2)
    cuda(monkeypatch, 0)
    placed(model)
    cuda(monkeypatch, 2)
    placed(model)
    placed(model, "cpu")
    placed(model, "cuda:1")
    placed(nn.Linear(2, 2, device="meta"))  # a model that someone has put elsewhere stays there
    assert moved == ["cpu", "cuda", "cpu", "cuda:1", "meta"]


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:1", 1)])
def test_a_device_that_is_not_there_is_refused(monkeypatch, moved, name, count):
    cuda(monkeypatch, count)
    with pytest.raises(ValueError, match=f"device is '{name}', and torch sees {count} of CUDA here"):
        models.placed(nn.Linear(2, 2), name)
    assert not moved
