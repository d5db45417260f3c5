"""A Swin passes the stages: its windows of several sizes in row factors and ranges, its state kept and taken up again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.certificate import certify
from polyformer.encoder import Classifier
from polyformer.export import export_onnx
from polyformer.model import ModelConfig
from polyformer.models import facts, from_facts
from polyformer.ranges import log_mean_rows, measure
from polyformer.swin import Swin, SwinConfig
from training import Recipe, machine
from training.distil import Fit, distil_layers
from training.folder import Folder
from training.loop import Schedule
from training.sources import Source
from training.stages import Continue, Ranges, Rows, Stage, Substitute, Swap, Tune
from training.tasks import NextTokens

BODY = ModelConfig(
    vocab=0, length=8, width=8, heads=2, hidden=8, blocks=3, norms=("affine",) * 6 + ("rms",), mixer="softmax", causal=False,
)  # fmt: skip
CONFIG = SwinConfig(body=BODY, classes=2, image=(4, 8), patch=2, window=2, stages=(2, 1))
STAGES: tuple[Stage, ...] = (
    Swap(name="swap", mixer="power_softmax", power=2, eps=1.0),
    Continue(name="continue", steps=4, lr=1e-2, sampler=0, noise=False),
    Rows(name="rows"),
    Ranges(
        name="ranges", steps=4, lr=3e-3, sampler=1, activation_bound=4.0, variance_ratio=4.0,
        denominator_target=(0.1, 4.0), activation_weight=1.0, variance_weight=1.0, denominator_weight=1.0,
    ),
    Substitute(
        name="substitute", activation_degree=2, norm_degree=2, norm_newton=0, reciprocal_degree=2, margin=1.5,
        denominator_interval=(0.1, 8.0), cover=True,
    ),
    Tune(name="tune", steps=4, lr=3e-3, sampler=2),
)  # fmt: skip
IMAGES = torch.randn(24, 1, 4, 8, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES[:, 0, :2, :2].mean((1, 2)) > 0).long()


class Pictures:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        at = torch.randint(8, 24, (8,), generator=self.generator)
        return IMAGES[at], LABELS[at]


def start() -> Swin:
    torch.manual_seed(0)
    return Swin(CONFIG).eval()


@torch.no_grad()
def quality(model) -> dict[str, float]:
    return {"heldout_loss": float(F.cross_entropy(model(IMAGES[:8]), LABELS[:8]))}


def go(place: Path, stages: tuple[Stage, ...]):
    place.mkdir(exist_ok=True)
    material = machine.Material(
        sampler=lambda stage: Pictures(stage.sampler),
        schedule=lambda stage: Schedule(
            steps=stage.steps, lr=stage.lr, warmup=2, weight_decay=0.0, clip=1.0, checkpoint_every=2
        ),
        quality=quality,
        heldout=IMAGES[:8],
        calibration=IMAGES[8:],
    )
    return machine.run(
        start(), stages, material, place=place / "states", log=place / "train.jsonl", reports=place / "stages.jsonl"
    )


def test_a_swin_becomes_a_polynomial_and_is_kept(tmp_path):
    go(tmp_path, STAGES[:4])
    model, reports = go(tmp_path, STAGES)  # taken up from the folder
    assert [r["stage"] for r in reports] == [s.name for s in STAGES]
    assert reports[-1]["levels"] == model.levels
    assert {name for name in reports[-1]["ranges"] if "mixer" in name} == {
        "stages.0.0.mixer.inner", "stages.0.1.mixer.inner", "stages.1.0.mixer.inner"
    }  # fmt: skip
    found = certify(model, rays=1)
    assert found.kind == "polynomial"
    assert [name for name, _ in found.growth] == ["stages.0.0", "stages.0.1", "stages.1.0"]
    assert [degree for _, degree in found.growth] == sorted({degree for _, degree in found.growth})

    folder = Folder(tmp_path / "run")
    folder.start(Recipe.quick(), NextTokens(train=(), docs=(), length=8, vocab=2), None, Source.of(None))
    folder.save_model("polynomial", model)
    again = folder.load_model("polynomial")
    assert isinstance(again, Swin) and torch.equal(again(IMAGES), model(IMAGES))
    with pytest.raises(TypeError, match=r"Swin has no ONNX form.*export a"):
        export_onnx(model, tmp_path / "swin.onnx")


def test_rows_centre_all_windows_and_ranges_see_every_size():
    body = replace(BODY, mixer="power_softmax", form="rows", power=2)
    torch.manual_seed(0)
    model = Swin(replace(CONFIG, body=body)).eval()
    mixer = model.stages[0][1].mixer
    seen: list[Tensor] = []
    handle = mixer.inner.tap.register_forward_hook(lambda tap, args, value: seen.append(value))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    name = "stages.0.1.mixer.inner"
    assert [v.shape[2] for v in seen] == [2, 4]  # 4 x 2 columns: halves at both ends
    rows = [torch.cat([v[:, :, i].double().log().flatten() for v in seen if v.shape[2] > i]).mean() for i in range(4)]
    torch.testing.assert_close(log_mean_rows(model, IMAGES, batch=7)[name], torch.stack(rows))
    found = measure(model, IMAGES, batch=24)[name]
    assert found.count == sum(v.numel() for v in seen)
    assert (found.low, found.high) == (float(min(v.min() for v in seen)), float(max(v.max() for v in seen)))


def test_what_a_run_cannot_hold_or_fit_is_said():
    assert isinstance(from_facts(facts(start())), Swin)
    with pytest.raises(TypeError, match="Classifier is no model that a run can hold; known: transformer, encoder, vit"):
        facts(Classifier(replace(CONFIG, stages=(3,)), []))
    with pytest.raises(ValueError, match="set matched=0"):
        distil_layers(start(), start(), IMAGES, fit=Fit(steps=0))
