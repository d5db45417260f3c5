"""Patches, windows that shift without wrapping, hybrids, and a small picture task learned by each kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.fold import folded
from polyformer.mixers.hyena_nd import HyenaNd
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig
from polyformer.norms import BatchNorm
from polyformer.vision import VisionConfig, ViT
from polyformer.windows import Windowed, spans

BODY = ModelConfig(
    vocab=0, length=16, width=16, heads=2, hidden=24, blocks=2, norms=("affine", "rms", "rms", "rms", "rms"),
    causal=False, form="mean",
)  # fmt: skip
CONFIG = VisionConfig(body=BODY, classes=4, image=(8, 8), patch=2)
HYENA = replace(BODY, mixer="hyena_nd", grid=(4, 4))
STABLE = replace(BODY, norms=("batch",) * 5, mlp_norm=True, score_norm=True)
CASES = [
    pytest.param(CONFIG, id="power-softmax"),
    pytest.param(replace(CONFIG, body=replace(BODY, mixer="softmax")), id="softmax"),
    pytest.param(replace(CONFIG, body=replace(BODY, length=17), pool="first"), id="class-token"),
    pytest.param(replace(CONFIG, body=STABLE), id="batch-norms"),
    pytest.param(replace(CONFIG, body=HYENA), id="hyena-2d"),
    pytest.param(replace(CONFIG, body=replace(HYENA, mixers=("hyena_nd", "power_softmax"))), id="hybrid"),
    pytest.param(replace(CONFIG, window=2), id="windows"),
    pytest.param(replace(CONFIG, window=3, body=replace(BODY, las_decay=0.3)), id="windows-local"),
]


def make(config: VisionConfig) -> ViT:
    torch.manual_seed(0)
    return ViT(config)


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one bright 3 x 3 spot; the class is the quadrant of its centre."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 8, 8, generator=g) * 0.3
    y, x = torch.randint(1, 7, (n,), generator=g), torch.randint(1, 7, (n,), generator=g)
    for k in range(n):
        images[k, 0, y[k] - 1 : y[k] + 2, x[k] - 1 : x[k] + 2] += 1.5
    return images, (y > 3) * 2 + (x > 3) * 1


@pytest.mark.parametrize("config", CASES)
def test_a_small_picture_task_is_learned(config):
    model = make(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    images, labels = pictures(512, 0)
    for step in range(80):
        at = slice(64 * (step % 8), 64 * (step % 8 + 1))
        loss = F.cross_entropy(model(images[at]), labels[at])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    images, labels = pictures(200, 1)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).double().mean() > 0.85  # chance: 0.25


@pytest.mark.parametrize("config", CASES)
def test_config_survives_json_and_rebuilds_the_model(config):
    model = make(config).eval()
    again = VisionConfig.from_json(config.to_json())
    assert again == config
    twin, images = ViT(again).eval(), pictures(3, 2)[0]
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(images), model(images), rtol=0, atol=0)


def test_patch_embedding_is_a_strided_convolution():
    model = make(replace(CONFIG, channels=3))
    images = torch.randn(2, 3, 8, 8)
    kernel = model.patch.weight.view(16, 3, 2, 2)
    expected = F.conv2d(images, kernel, model.patch.bias, stride=2).flatten(2).transpose(1, 2) + model.position
    torch.testing.assert_close(model.embed(images), expected, rtol=1e-4, atol=1e-5)


def windowed(
    name: str = "power_softmax", *, grid: tuple[int, int] = (5, 6), window: int = 3, shift: int = 1, **changes
):
    torch.manual_seed(0)
    mixer = Windowed(replace(BODY, width=8, **changes), name, grid=grid, window=window, shift=shift).double()
    for p in mixer.parameters():
        nn.init.normal_(p, std=0.5)
    return mixer


@pytest.mark.parametrize("name", ["power_softmax", "softmax"])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_equal_their_reference_and_matrix(name, shift):
    mixer, results = windowed(name, shift=shift), []
    for run in (mixer.forward, mixer.reference):
        x = torch.randn(2, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        mixer.zero_grad()
        y = run(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in mixer.parameters())))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    y = mixer.project(mixer.matrix(x) @ mixer.value(x))
    torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-10)


def test_windows_are_those_of_the_grid_and_do_not_wrap():
    # rows 0 | 1 2 3 | 4 and columns 0 | 1 2 3 | 4 5 share a window
    a = windowed("softmax").matrix(torch.randn(1, 30, 8, dtype=torch.float64))[0, 0] > 0
    rows, columns = [0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]
    label = torch.tensor([[r * 3 + c for c in columns] for r in rows]).flatten()
    assert torch.equal(a, label[:, None] == label)


@pytest.mark.parametrize(
    ("side", "window", "shift", "expected"),
    [(6, 3, 0, [(0, 3), (3, 6)]), (6, 3, 1, [(0, 1), (1, 4), (4, 6)]), (5, 3, 0, [(0, 3), (3, 5)])],
)
def test_spans(side, window, shift, expected):
    assert spans(side, window, shift) == expected


def test_one_window_over_everything_is_plain_attention():
    inside, x = windowed(grid=(4, 4), window=4, shift=0), torch.randn(2, 16, 8, dtype=torch.float64)
    torch.testing.assert_close(inside(x), inside.inner(x))
    assert inside.receptive_field is None  # nothing but the length bounds it


@pytest.mark.parametrize(("grid", "window", "shift"), [((5, 6), 3, 1), ((4, 4), 2, 0), ((6, 3), 3, 2)])
def test_windows_reach_as_far_as_their_matrix(grid, window, shift):
    mixer = windowed("softmax", grid=grid, window=window, shift=shift)
    i, j = (mixer.matrix(torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64))[0, 0] > 0).nonzero(as_tuple=True)
    assert mixer.receptive_field == int((i - j).max())


def test_the_reference_of_windows_runs_where_its_input_is():
    mixer = windowed("softmax").to("meta")
    assert mixer.reference(torch.randn(1, 30, 8, dtype=torch.float64, device="meta")).is_meta


def test_layers_are_what_the_config_says():
    config = replace(CONFIG, window=2, body=replace(HYENA, mixers=("hyena_nd", "power_softmax")))
    first, second = (block.mixer for block in make(config).blocks)
    assert isinstance(first, HyenaNd) and isinstance(second, Windowed) and isinstance(second.inner, PowerSoftmax)
    plain = make(replace(CONFIG, window=2))
    assert [len(block.mixer.windows) for block in plain.blocks] == [4, 9]  # the second is shifted by one


def test_a_polynomial_vision_model_has_a_certificate():
    body = replace(HYENA, norms=("batch",) * 5, mlp_norm=True, activation="quartic")
    assert make(replace(CONFIG, body=body)).levels == 2 * (6 + 4) + 1


def test_folding_keeps_the_model_and_leaves_only_norms_over_scores():
    model = make(replace(CONFIG, body=STABLE, window=2))
    for seed in range(3):
        model(pictures(32, seed)[0])
    plain, images = folded(model), pictures(4, 9)[0]
    torch.testing.assert_close(plain(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    left = [name for name, m in plain.named_modules() if isinstance(m, BatchNorm)]
    assert left == [f"blocks.{i}.mixer.inner.score_norm" for i in (0, 1)]
    assert VisionConfig.from_json(plain.config.to_json()) == plain.config


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        pytest.param(lambda: replace(CONFIG, patch=3), "multiple of the patch", id="patch"),
        pytest.param(lambda: replace(CONFIG, pool="first"), "length is 16, an image has 17", id="class-token"),
        pytest.param(lambda: replace(CONFIG, body=replace(BODY, grid=(2, 8))), r"\(2, 8\).*\(4, 4\)", id="grid"),
        pytest.param(lambda: replace(CONFIG, body=replace(BODY, length=17), pool="first", window=2), "mean", id="pool"),
        pytest.param(lambda: replace(CONFIG, body=replace(BODY, causal=True)), "causal=False", id="causal"),
        pytest.param(lambda: make(replace(CONFIG, window=5)), "window is 5", id="window"),
        pytest.param(lambda: windowed(shift=3), "shift is 3", id="shift"),
        pytest.param(lambda: windowed("hyena_nd"), "not an attention", id="no-attention"),
        pytest.param(lambda: make(CONFIG)(torch.zeros(1, 1, 8, 6)), r"\(1, 8, 6\)", id="image"),
    ],
)
def test_bad_settings_are_refused(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()
