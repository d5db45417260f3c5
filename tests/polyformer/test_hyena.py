"""Hyena in one and more axes: fast path = definition, reach of each direction, exact degree, and a task that needs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer import mixers
from polyformer.filters import ImplicitFilter
from polyformer.mixers.hyena import Hyena, fft_convolve
from polyformer.model import ModelConfig, Transformer

BASE = ModelConfig(
    vocab=16,
    length=12,
    width=8,
    heads=2,
    hidden=16,
    blocks=1,
    norms=("affine",) * 3,
    mixer="hyena",
    hyena_filter="joint",
)
PLANE = replace(BASE, mixer="hyena_nd", causal=False, grid=(3, 4))


def make(config: ModelConfig) -> Hyena:
    torch.manual_seed(0)
    mixer = mixers.load(config.mixer)(config).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    assert isinstance(mixer, Hyena)
    return mixer


def inputs(length: int = 12) -> Tensor:
    return torch.randn(2, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


DIRECTIONS = ["standard", "parallel", "4dir", "4dirp"]
VARIANTS = [
    *[pytest.param(replace(BASE, hyena_order=o), id=f"causal-order{o}") for o in (2, 3, 4)],
    *[pytest.param(replace(BASE, hyena_window=w), id=f"causal-window-{w}") for w in ("learned", "none")],
    *[pytest.param(replace(PLANE, hyena_filter=f), id=f"plane-{f}") for f in ("product", "joint", "direct")],
    *[pytest.param(replace(PLANE, hyena_direction=d), id=f"plane-{d}") for d in DIRECTIONS],
    pytest.param(replace(PLANE, hyena_direction="seq", hyena_order=3), id="plane-seq"),
    pytest.param(replace(PLANE, hyena_direction="4dirp", hyena_order=3), id="plane-4dirp-order3"),
    pytest.param(replace(PLANE, grid=(12,)), id="line"),
    pytest.param(replace(PLANE, grid=(2, 3, 2), hyena_filter="product"), id="volume"),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_forward_and_gradients_equal_the_reference(config):
    mixer, results = make(config), []
    for run in (mixer.forward, mixer.reference):
        x = inputs().requires_grad_()
        mixer.zero_grad()
        y = run(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert all(p.grad is not None for p in mixer.parameters())
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in mixer.parameters())))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", VARIANTS)
def test_matrix_is_the_mixer(config):
    mixer, x = make(config), inputs()
    y = mixer.project(mixer.matrix(x) @ mixer.value(x))
    torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
def test_no_position_sees_the_future(order):
    mixer = make(replace(BASE, hyena_order=order))
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x[None])[0].sum(-1), inputs()[0]).abs().sum(-1)
    # FFTs leave rounding behind where the sum has exact zeros
    assert jacobian.triu(1).max() < 1e-12 * jacobian.max()
    assert torch.all(jacobian.tril() + torch.ones_like(jacobian).triu(1) > 1e-8)
    assert torch.all(mixer.matrix(inputs()).triu(1).abs() < 1e-12)


def test_a_shorter_sequence_is_a_prefix():
    mixer, x = make(BASE), inputs()
    torch.testing.assert_close(mixer(x[:, :7]), mixer(x)[:, :7], rtol=1e-11, atol=1e-11)


def without_short_convolution(mixer: Hyena) -> None:
    """Leave the middle tap alone, so that the reach of the long convolutions shows."""
    with torch.no_grad():
        mixer.short.zero_()
        mixer.short[:, :, 1, 1] = 1.0


REACH = [  # which offsets (dy, dx) of a 5 x 5 grid the convolution carries from the middle
    pytest.param("standard", 2, lambda dy, dx: dy >= 0 and dx >= 0, id="standard"),
    pytest.param("seq", 3, lambda dy, dx: True, id="seq"),
    pytest.param("4dir", 2, lambda dy, dx: True, id="4dir"),
    pytest.param("4dirp", 2, lambda dy, dx: True, id="4dirp"),
]


@pytest.mark.parametrize(("direction", "order", "expected"), REACH)
def test_reach_of_a_direction(direction, order, expected):
    mixer = make(replace(BASE, mixer="hyena_nd", causal=False, grid=(5, 5), length=25, hyena_direction=direction,
                         hyena_order=order))  # fmt: skip
    without_short_convolution(mixer)
    column = mixer.matrix(inputs(25))[0, 0, :, 12].abs().view(5, 5) > 1e-10
    assert all(bool(column[y, x]) == expected(y - 2, x - 2) for y in range(5) for x in range(5))


def test_parallel_groups_look_into_the_four_quadrants():
    mixer = make(replace(BASE, mixer="hyena_nd", causal=False, grid=(5, 5), length=25, hyena_direction="parallel"))
    without_short_convolution(mixer)
    seen = mixer.matrix(inputs(25))[0, ::2, :, 12].abs().view(4, 5, 5) > 1e-10
    for group, (ys, xs) in enumerate([(1, 1), (1, -1), (-1, 1), (-1, -1)]):
        assert all(
            bool(seen[group, y, x]) == ((y - 2) * ys >= 0 and (x - 2) * xs >= 0) for y in range(5) for x in range(5)
        )


def test_seq_turns_round_between_convolutions():
    mixer = make(replace(PLANE, hyena_direction="seq", hyena_order=3))
    assert [mixer.orientations(step)[0][1] for step in (1, 2)] == [[], [-2, -1]]


@pytest.mark.parametrize("axes", [1, 2])
def test_fft_convolution_does_not_wrap_around(axes):
    v = torch.randn(2, 3, *([5] * axes), dtype=torch.float64)
    h = torch.randn(3, *([5] * axes), dtype=torch.float64)
    convolution = {1: F.conv1d, 2: F.conv2d}[axes]
    direct = convolution(F.pad(v, (4, 0) * axes), h.flip(list(range(1, axes + 1)))[:, None], groups=3)
    torch.testing.assert_close(fft_convolve(v, h, axes), direct, rtol=1e-11, atol=1e-11)
    narrow = fft_convolve(v.bfloat16(), h.bfloat16(), axes)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - direct).abs().max() < 0.05 * direct.abs().max()


def test_windows_fall_to_a_hundredth_at_their_share_of_the_side():
    w = ImplicitFilter((40,), 3, kind="direct", window="decay").envelope()
    ratio = w / w[:, :1]
    assert float(ratio[0, 12]) == pytest.approx(1e-2, rel=1e-4)  # 0.3 of 40
    assert float(ratio[1, 36]) == pytest.approx(1e-2, rel=1e-4)  # 0.9 of 40
    assert float(ratio[2, 39]) == pytest.approx(100 ** (-39 / 60), rel=1e-4)
    torch.testing.assert_close(w.square().sum(1), torch.ones(3))


@pytest.mark.parametrize(("config", "order"), [(BASE, 2), (BASE, 4), (PLANE, 2), (PLANE, 3)])
def test_certificate_is_exact_along_a_line(config, order):
    mixer, x = make(replace(config, hyena_order=order)), inputs()
    u = torch.cos(torch.arange(30, dtype=torch.float64) * torch.pi / 29)
    with torch.no_grad():
        y = torch.stack([mixer(x * (1 + t))[0, -1, 0] for t in u])
    basis = torch.stack([torch.cos(k * torch.acos(u.clamp(-1, 1))) for k in range(15)], 1)
    c = torch.linalg.lstsq(basis, y[:, None]).solution[:, 0].abs()
    assert mixer.degree == order + 1 and mixer.depth == 2 * order + 2
    assert c[order + 1] > 1e-8 * c.max()
    assert torch.all(c[order + 2 :] < 1e-12 * c.max())


def test_a_language_model_of_hyena_learns_to_look_back_four_tokens():
    torch.manual_seed(0)
    config = replace(BASE, vocab=8, length=16, width=24, hidden=32, blocks=1, norms=("affine", "rms", "rms"))
    model = Transformer(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 8, (160, 16))
    for step in range(201):
        batch = tokens[:32] if step == 200 else torch.randint(0, 8, (32, 16))
        loss = F.cross_entropy(model(batch)[:, 4:].flatten(0, 1), batch[:, :-4].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.3  # chance: log 8 = 2.08


def test_config_round_trip():
    assert ModelConfig.from_json(PLANE.to_json()) == PLANE


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(replace(BASE, hyena_order=1), "at least 2", id="order"),
        pytest.param(replace(BASE, hyena_filter="mlp"), "joint", id="filter"),
        pytest.param(replace(BASE, hyena_window="wide"), "decay", id="window"),
        pytest.param(replace(PLANE, hyena_direction="up"), "4dirp", id="direction"),
        pytest.param(replace(PLANE, causal=True), "causal=False", id="causal"),
        pytest.param(replace(PLANE, grid=(3, 3)), "9 tokens on 2 axes, length is 12", id="grid"),
        pytest.param(replace(PLANE, hyena_direction="seq"), "order 3", id="seq"),
        pytest.param(replace(PLANE, hyena_direction="parallel", width=6), "multiple of 4", id="parallel"),
    ],
)
def test_bad_settings_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        make(config)
