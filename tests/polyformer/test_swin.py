"""Stages that merge patches: merging against its loop and a strided convolution, windows of each stage, folding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.fold import folded
from polyformer.model import ModelConfig
from polyformer.norms import BatchNorm
from polyformer.swin import PatchMerging, Swin, SwinConfig
from polyformer.windows import Windowed

BODY = ModelConfig(
    vocab=0, length=64, width=8, heads=2, hidden=12, blocks=4, norms=("rms",) * 9, causal=False, form="mean",
)  # fmt: skip
CONFIG = SwinConfig(body=BODY, classes=4, image=(16, 16), patch=2, window=4, stages=(2, 2))
STABLE = replace(BODY, norms=("batch",) * 9, mlp_norm=True, score_norm=True)
CASES = {
    "power-softmax": CONFIG,
    "softmax": replace(CONFIG, body=replace(BODY, mixer="softmax")),
    "no-windows": replace(CONFIG, window=0),
    "three-stages": replace(CONFIG, stages=(1, 2, 1), window=2),
    "batch-norms": replace(CONFIG, body=STABLE),
    "hyena-first": replace(CONFIG, body=replace(BODY, grid=(8, 8), mixers=("hyena_nd",) * 2 + ("power_softmax",) * 2)),
}
EVERY = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def make(config: SwinConfig) -> Swin:
    torch.manual_seed(0)
    return Swin(config)


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one bright 4 x 4 spot; the class is its quadrant."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 16, 16, generator=g) * 0.3
    y, x = torch.randint(0, 13, (n,), generator=g), torch.randint(0, 13, (n,), generator=g)
    for k in range(n):
        images[k, 0, y[k] : y[k] + 4, x[k] : x[k] + 4] += 1.5
    return images, (y > 6) * 2 + (x > 6) * 1


def test_a_small_picture_task_is_learned():
    body = replace(STABLE, blocks=2, norms=("batch",) * 5)
    model = make(replace(CONFIG, body=body, stages=(1, 1)))
    optimiser = torch.optim.Adam(model.parameters(), lr=6e-3)
    images, labels = pictures(256, 0)
    for step in range(48):
        at = slice(64 * (step % 4), 64 * (step % 4 + 1))
        loss = F.cross_entropy(model(images[at]), labels[at])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, labels = pictures(200, 1)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == labels).double().mean() > 0.7  # chance: 0.25


@EVERY
def test_every_parameter_has_a_gradient(config):
    model = make(config)
    images, labels = pictures(8, 0)
    F.cross_entropy(model(images), labels).backward()
    # a shift before a BatchNorm changes nothing: its gradient is rounding
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not missing


@EVERY
def test_config_survives_json_and_rebuilds_the_model(config):
    model = make(config).eval()
    again = SwinConfig.from_json(config.to_json())
    twin, images = Swin(again).eval(), pictures(2, 2)[0]
    twin.load_state_dict(model.state_dict())
    assert again == config and torch.equal(twin(images), model(images))


@pytest.mark.parametrize("grid", [(4, 6), (2, 2)])
def test_merging_equals_its_reference_and_a_strided_convolution(grid):
    torch.manual_seed(0)
    merge, results = PatchMerging(replace(BODY, norms=("affine",) * 9), grid).double(), []
    for run in (merge.forward, merge.reference):
        x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        y = run(x)
        results.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, merge.reduce.weight])))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    kernel = merge.reduce.weight.view(16, 2, 2, 8).permute(0, 3, 1, 2)
    expected = F.conv2d(x.transpose(1, 2).unflatten(2, grid), kernel, merge.reduce.bias, stride=2)
    torch.testing.assert_close(y, expected.flatten(2).transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_each_stage_has_its_grid_width_and_windows():
    model = make(replace(CONFIG, window=4))
    one, two = (CONFIG.stage(s) for s in (0, 1))
    assert (one.grid, two.grid) == ((8, 8), (4, 4)) and (one.body.width, two.body.width) == (8, 16)
    assert (one.body.heads, two.body.heads, two.body.hidden) == (2, 4, 24)
    mixers = [block.mixer for blocks in model.stages for block in blocks]
    assert all(isinstance(m, Windowed) for m in mixers)
    # the second block of the first stage is shifted; at the second stage one window holds the 4 x 4 grid
    assert [len(m.windows) for m in mixers] == [4, 9, 1, 1]


WIDE = replace(CONFIG, image=(16, 32), patch=4, body=replace(BODY, length=32, mixer="softmax"), window=4)


def columns_seen(config: SwinConfig, blocks: int, *, reference: bool) -> list[int]:
    """The places along the longer side that place 4 sees after so many blocks, by gradients."""
    model = make(config).double().eval()
    first = model.stages[0]
    assert isinstance(first, nn.ModuleList)
    for block in first:
        if reference:
            block.mixer.forward = block.mixer.reference  # type: ignore[union-attr]
    x = torch.randn(1, config.body.length, config.body.width, dtype=torch.float64, requires_grad=True)
    y = x
    for block in first[:blocks]:
        y = block(y)
    along = 0 if config.grid[0] == 8 else 1
    y.unflatten(1, config.grid).select(1 + along, 4).square().sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(-1).view(config.grid).sum(1 - along) > 0
    return seen.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("image", [(16, 32), (32, 16)], ids=["wide", "tall"])
@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_windows_shift_along_the_axis_that_they_do_not_cover(image, reference):
    """A grid of 4 x 8: windows are columns 0-3 and 4-7, then 0-1, 2-5 and 6-7, all rows in each."""
    config = replace(WIDE, image=image)
    assert columns_seen(config, 1, reference=reference) == [4, 5, 6, 7]
    assert columns_seen(config, 2, reference=reference) == list(range(8))


def test_the_matrix_of_a_shifted_window_is_its_mask():
    mixer = make(WIDE).stages[0][1].mixer
    with torch.no_grad():
        weights = mixer.matrix(torch.randn(1, 32, 8))[0, 0] > 0
    at = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2]).repeat(4)  # the window of each token of the 4 x 8 grid
    assert torch.equal(weights, at[:, None] == at)


def test_windows_longer_than_one_axis_equal_their_reference_and_matrix():
    mixer = make(replace(WIDE, body=replace(WIDE.body, mixer="power_softmax"))).stages[0][1].mixer.double()
    assert mixer.inner.length == 16 and [len(w) for w in mixer.windows] == [8, 16, 8]
    x = torch.randn(2, 32, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mixer.reference(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixer.project(mixer.matrix(x) @ mixer.value(x)), mixer(x), rtol=1e-10, atol=1e-10)


def test_norms_and_mixers_go_to_their_blocks_in_order():
    norms = ("rms", "layer", "rms", "layer", "affine", "affine", "layer", "layer", "rms")
    names = ("softmax", "softmax", "softmax", "power_softmax")
    body = CONFIG.stage(1).body
    assert body.norms == ("rms",) * 5
    body = replace(CONFIG, body=replace(BODY, norms=norms, mixers=names)).stage(1).body
    assert (body.norms, body.mixers) == (("affine", "affine", "layer", "layer", "rms"), names[2:])


def test_folding_keeps_the_model_and_leaves_only_norms_over_scores():
    model = make(CASES["batch-norms"])
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    for seed in range(3):
        model(pictures(16, seed)[0])
    plain, images = folded(model), pictures(4, 9)[0]
    torch.testing.assert_close(plain(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    left = [name for name, m in plain.named_modules() if isinstance(m, BatchNorm)]
    assert len(left) == 4 and all(name.endswith("score_norm") for name in left)
    assert SwinConfig.from_json(plain.config.to_json()) == plain.config


def test_a_polynomial_swin_has_a_certificate():
    body = replace(BODY, mixer="hyena_nd", grid=(8, 8), norms=("batch",) * 9, mlp_norm=True, activation="square")
    # four blocks of Hyena 6 and MLP 3, one merging, the head
    assert make(replace(CONFIG, body=body)).levels == 4 * (6 + 3) + 1 + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": (2, 1)}, "have 3 blocks, the body has 4"),
        ({"stages": (1, 1, 1, 1), "image": (12, 16), "body": replace(BODY, length=48)}, "cannot be halved 3 times"),
        ({"stages": ()}, "have 0 blocks"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **changes)
