"""LaS against its definition, the leak test, the equality AP(A) V = A (T V), and attention that is not causal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer import mixers
from polyformer.approx import reciprocal
from polyformer.export import export_onnx
from polyformer.las import LocalSmooth
from polyformer.mixers.base import Attention
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer

BASE = ModelConfig(vocab=16, length=9, width=12, heads=3, hidden=16, blocks=1, norms=("affine",) * 3, eps=0.7)


def make(**changes) -> Attention:
    torch.manual_seed(0)
    mixer = mixers.load(str(changes.pop("mixer", "power_softmax")))(replace(BASE, **changes)).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.5)
    if isinstance(mixer, PowerSoftmax) and mixer.reciprocal is not None:
        mixer.reciprocal.set(reciprocal(mixer.reciprocal.degree, (0.05, 60.0))).double()
    assert isinstance(mixer, Attention)
    return mixer


def inputs() -> Tensor:
    return torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def defined(mixer: Attention, x: Tensor, *, decay: float, width: int, p: int, eps: float) -> Tensor:
    """LaS written from methods.md 8.1, with loops: the weights [B, H, T, T] after pooling."""
    t, h, causal = x.shape[1], mixer.heads, mixer.causal
    q, k, _ = mixer.qkv(x)
    weights = torch.zeros(len(x), h, t, t, dtype=x.dtype)
    for c in range(h):
        alpha = 0.0 if c == 0 else decay / 2 ** (h - 1 - c)
        for i in range(t):
            seen = range(i + 1) if causal else range(t)
            s = [(q[:, c, i] * k[:, c, j]).sum(-1) / mixer.head_size**0.5 * np.exp(-alpha * abs(i - j)) for j in seen]
            e = [torch.exp(v) if p == 0 else v**p for v in s]
            for j in seen:
                weights[:, c, i, j] = e[j] / (sum(e) + eps)
    pooled = torch.zeros_like(weights)
    window = range(width) if causal else range(-(width // 2), width // 2 + 1)
    for j in range(t):
        for u in window:
            if 0 <= j + u < t:
                pooled[..., j] += weights[..., j + u] / width
    return pooled


OPTIONS = [
    pytest.param({"las_decay": 0.5}, id="local"),
    pytest.param({"las_width": 3}, id="smooth"),
    pytest.param({"las_decay": 0.5, "las_width": 3}, id="both"),
    pytest.param({}, id="neither"),
]
KINDS = [
    pytest.param({"mixer": "softmax"}, id="softmax"),
    pytest.param({"mixer": "pointwise"}, id="pointwise"),
    *[pytest.param({"form": f}, id=f"power-{f}") for f in ("exact", "stable", "mean", "rows")],
    pytest.param({"form": "mean", "reciprocal": "polynomial"}, id="power-polynomial"),
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-sides"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_reference_and_matrix(kind, option, causal):
    mixer, results = make(**kind, **option, causal=causal), []
    for run in (mixer.forward, mixer.reference):
        x = inputs().requires_grad_()
        mixer.zero_grad()
        y = run(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in mixer.parameters())))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    x = inputs()
    y = mixer.o(mixer.merge(mixer.matrix(x) @ mixer.split(mixer.v(x))))
    torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-sides"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("kind", "p", "eps"), [("softmax", 0, 0.0), ("power_softmax", 4, 0.7)])
def test_weights_are_those_of_the_definition(kind, p, eps, option, causal):
    mixer, x = (
        make(mixer=kind, form="mean", **option, causal=causal) if p else make(mixer=kind, **option, causal=causal),
        inputs(),
    )
    expected = defined(mixer, x, decay=option.get("las_decay", 0.0), width=option.get("las_width", 1), p=p, eps=eps)
    torch.testing.assert_close(mixer.matrix(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_leak_from_the_future(kind):
    mixer, x = make(**kind, las_decay=0.5, las_width=3), inputs()
    assert torch.all(mixer.matrix(x).triu(1) == 0.0)
    jacobian = torch.autograd.functional.jacobian(lambda row: mixer(row[None])[0].sum(-1), x[0]).abs().sum(-1)
    assert torch.all(jacobian.triu(1) == 0.0)


def test_centred_pooling_would_leak():
    # guards the test above: the form for encoders, put on a causal matrix, weighs future keys (methods.md 8.2)
    causal = make(las_decay=0.5).matrix(inputs())
    centred = LocalSmooth(3, decay=0.0, width=3, causal=False).pool(causal)
    assert centred.triu(1).sum() > 1.0


def test_smoothed_weights_are_an_average_pooling_and_move_to_the_values():
    a = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    v = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    las = LocalSmooth(3, decay=0.0, width=5, causal=False)
    pooled = F.avg_pool1d(a.flatten(0, 2)[:, None], 5, stride=1, padding=2).view_as(a)
    torch.testing.assert_close(las.pool(a), pooled)
    torch.testing.assert_close(pooled @ v, a @ las.smooth(v))


def test_first_head_never_decays_and_the_last_decays_most():
    las = LocalSmooth(4, decay=0.8, width=1, causal=True)
    assert las.alphas == pytest.approx((0.0, 0.2, 0.4, 0.8))
    assert torch.all(las.decay(5, torch.ones(1))[0] == 1.0)


def test_decay_silences_far_keys_under_powers_and_only_flattens_under_softmax():
    # equal scores of 2, distances 3..0, strong decay: the example of methods.md 8.2
    factor = LocalSmooth(2, decay=20.0, width=1, causal=True).decay(4, torch.ones(1, dtype=torch.float64))[1, 3]
    s = 2.0 * factor
    assert torch.softmax(s, -1).tolist() == pytest.approx([0.096, 0.096, 0.096, 0.711], abs=1e-3)
    assert (s**4 / (s**4).sum()).tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0], abs=1e-12)


def test_it_costs_no_level_and_no_degree():
    settings = {"form": "rows", "reciprocal": "polynomial"}
    plain, las = make(**settings), make(**settings, las_decay=0.5, las_width=3)
    assert (las.degree, las.depth) == (plain.degree, plain.depth)


@pytest.mark.parametrize("mixer", ["softmax", "power_softmax"])
def test_onnx_file_holds_decay_and_smoothing(mixer, tmp_path):
    torch.manual_seed(0)
    config = replace(BASE, mixer=mixer, form="mean", las_decay=0.5, las_width=3)
    model = Transformer(config).eval()
    assert ModelConfig.from_json(config.to_json()) == config
    export_onnx(model, tmp_path / "model.onnx")
    tokens = torch.randint(0, 16, (1, 9))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    plain = Transformer(replace(config, las_decay=0.0, las_width=1)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, expected, without = session.run(["logits"], {"tokens": tokens.numpy()})[0], model(tokens), plain(tokens)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert (expected - without).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"las_decay": -1.0}, "at least 0", id="negative"),
        pytest.param({"las_width": 0}, "at least 1", id="width"),
        pytest.param({"las_width": 2, "causal": False}, "odd", id="even"),
        pytest.param({"las_decay": 1.0, "heads": 1}, "2 heads", id="one-head"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)
