"""The fused form of PowerSoftmax equals rows written out, with gradients for every use, and keeps no T x T value."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polyformer import power_sums as fused
from polyformer.approx import goldschmidt_start
from polyformer.mixers.power_softmax import PowerSoftmax, integer_power
from polyformer.model import ModelConfig
from polyformer.power_sums import power_sums

EPS = 0.7
BASE = ModelConfig(vocab=4, length=150, width=24, heads=4, hidden=8, blocks=1, norms=("affine",) * 3, eps=EPS)


def inputs(b: int = 2, h: int = 3, t: int = 150, k: int = 8, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(b, h, t, k, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def plain(q: Tensor, k: Tensor, v: Tensor, f_T1: Tensor | None, *, power: int, causal: bool, divide: bool):
    """The definition on whole matrices."""
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    s = s.tril() if causal else s
    f = 1 / s.detach().abs().amax(-1, keepdim=True).clamp_min(EPS ** (1 / power)) if f_T1 is None else f_T1
    w = integer_power(s * f, power)
    n, d = w @ v, w.sum(-1, keepdim=True) + EPS * f**power
    return (n / d if divide else n), d


def gradients(run, tensors: list[Tensor]) -> list[Tensor]:
    y, d = run()
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + (d.log() ** 2).sum()
    return [y.detach(), d.detach(), *torch.autograd.grad(loss, tensors)]


# 150 positions are two whole tiles of rows and a part of one.
@pytest.mark.parametrize("divide", [False, True], ids=["sums", "divided"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-sides", "causal"])
@pytest.mark.parametrize("power", [2, 4, 6, 8, 10, 12])
@pytest.mark.parametrize("stable", [False, True], ids=["factors", "stable"])
def test_tiles_equal_whole_matrices(power, causal, divide, stable):
    x = inputs()
    f_T1 = None if stable else torch.rand(150, 1, dtype=torch.float64) + 0.5
    options = {"power": power, "causal": causal, "divide": divide}
    fast = gradients(lambda: power_sums(*x, f_T1, eps=EPS, **options), x)
    slow = gradients(lambda: plain(*x, f_T1, **options), x)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divide", [False, True], ids=["sums", "divided"])
@pytest.mark.parametrize("power", [2, 4, 6])
def test_gradients_are_those_of_finite_differences(power, divide):
    """With public factors: those of the stable form are detached, so differences are not its gradient."""
    f_T1 = torch.rand(7, 1, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(
        lambda q, k, v: power_sums(q, k, v, f_T1, power=power, eps=EPS, causal=True, divide=divide),
        inputs(2, 2, 7, 3),
    )


@pytest.mark.parametrize("scores", [1, 600, 1200, 5000, 1 << 18])
def test_any_size_of_tiles_gives_the_same(monkeypatch, scores):
    """Tiles of few rows, of some heads of one sequence, of whole sequences and of all; odd numbers of each."""
    x, options = inputs(3, 5, 29, 4), {"power": 4, "eps": EPS, "causal": True, "divide": True}
    whole = gradients(lambda: power_sums(*x, None, **options), x)
    monkeypatch.setattr(fused, "SCORES", scores)
    monkeypatch.setattr(fused, "QUERIES", 10)
    for ours, theirs in zip(gradients(lambda: power_sums(*x, None, **options), x), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_exact_and_stable_form_are_one_map():
    x = inputs()
    exact = power_sums(*x, torch.ones(1, 1), power=4, eps=EPS, causal=True, divide=True)[0]
    stable = power_sums(*x, None, power=4, eps=EPS, causal=True, divide=True)[0]
    torch.testing.assert_close(stable, exact, rtol=1e-12, atol=1e-12)


def test_narrow_types_keep_sums_in_float32():
    """Without float32 sums of 150 powers, of which most are below half a unit of the largest, would stop growing."""
    x = inputs(dtype=torch.bfloat16)
    y, d = power_sums(*x, None, power=6, eps=EPS, causal=True, divide=True)
    assert y.dtype == torch.bfloat16 and d.dtype == torch.float32
    expected = plain(*(t.detach().double() for t in x), None, power=6, causal=True, divide=True)
    torch.testing.assert_close(d.double(), expected[1], rtol=0.06, atol=0)
    torch.testing.assert_close(y.double(), expected[0], rtol=0, atol=0.05)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in x)


def test_rows_without_any_score_are_zero_with_finite_gradients():
    q, k, v = inputs(1, 1, 5, 2, dtype=torch.float32)
    y, d = power_sums(q * 0, k, v, None, power=12, eps=1e-3, causal=True, divide=True)
    (y.sum() + d.sum()).backward()
    assert torch.equal(y, torch.zeros_like(y)) and all(t.grad.isfinite().all() for t in (q, k, v))


def test_kept_for_backward_is_linear_in_the_length():
    def kept(t: int) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        q, k, v = inputs(1, 1, t, 4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            power_sums(q, k, v, None, power=4, eps=EPS, causal=True, divide=True)
        return sum(storages.values())

    assert kept(256) == 2 * kept(128) == 256 * 8 * (4 * 4 + 2)  # q, k, v, y of 4 channels, f and d


KINDS = {
    "stable": {},
    "rows": {"form": "rows"},
    "goldschmidt": {"form": "mean", "reciprocal": "goldschmidt", "reciprocal_degree": 9},
}
SHAPES = {"plain": {}, "grouped-rotary": {"kv_heads": 2, "rotary": 4}, "both-sides": {"causal": False}}


@pytest.mark.parametrize(("kind", "shape"), list(itertools.product(KINDS, SHAPES)))
@pytest.mark.parametrize("padded", [False, True], ids=["all-visible", "padded"])
def test_the_mixer_in_tiles_equals_its_whole_matrices(kind, shape, padded):
    """`powers`, `invert` and @ are the form with T x T values; `reference` is compared in test_attention.py."""
    torch.manual_seed(0)
    mixer = PowerSoftmax(replace(BASE, **KINDS[kind], **SHAPES[shape])).double()
    if mixer.steps:
        mixer.goldschmidt_start_T.fill_(goldschmidt_start(0.01, 50.0))
    x = torch.randn(2, 150, 24, dtype=torch.float64).requires_grad_()
    visible_BT = torch.arange(150).expand(2, 150) < torch.tensor([[150], [70]]) if padded else None

    def whole() -> tuple[Tensor, Tensor]:
        q, k, v = mixer.qkv(x)
        u_BHTT, d_BHT1 = mixer.powers(q, k, visible_BT)
        return mixer.o(mixer.merge((u_BHTT @ v) * mixer.invert(d_BHT1))), d_BHT1

    def tiled() -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = mixer.tap.register_forward_hook(lambda module, args, out: seen.append(out))
        y = mixer(x, visible_BT)
        handle.remove()
        return y, seen[0]

    some = [x, mixer.q.weight, mixer.k.weight, mixer.v.weight]
    for ours, theirs in zip(gradients(tiled, some), gradients(whole, some), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
