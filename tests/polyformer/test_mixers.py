"""The laws of PowerSoftmax (methods.md 1.8), and fast path = slow reference for every mixer, gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polyformer import mixers
from polyformer.approx import goldschmidt_start, reciprocal
from polyformer.mixers.power_softmax import PowerSoftmax, integer_power
from polyformer.model import ModelConfig

BASE = ModelConfig(vocab=16, length=12, width=16, heads=2, hidden=16, blocks=1, norms=("affine",) * 3, eps=0.7)


def make(**changes):
    """A mixer in float64 with scores of order one, the same weights for every form."""
    torch.manual_seed(0)
    mixer = mixers.load(str(changes.pop("mixer", "power_softmax")))(replace(BASE, **changes)).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.5)
    return mixer


def with_reciprocal(mixer: PowerSoftmax) -> PowerSoftmax:
    if mixer.reciprocal is not None:
        mixer.reciprocal.set(reciprocal(mixer.reciprocal.degree, (0.05, 60.0))).double()
    if mixer.steps:
        mixer.goldschmidt_start_T.fill_(goldschmidt_start(0.05, 60.0))
    return mixer


def inputs(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


FORMS = ["exact", "stable", "mean", "rows"]
POWERS = [2, 4, 6, 8, 10, 12]
VARIANTS = [
    pytest.param({"mixer": "softmax"}, id="softmax"),
    *[pytest.param({"form": f, "power": p}, id=f"{f}-p{p}") for f in FORMS for p in (2, 4, 6)],
    pytest.param({"form": "rows", "reciprocal": "polynomial", "reciprocal_degree": 3}, id="rows-polynomial3"),
    pytest.param(
        {"form": "mean", "power": 2, "reciprocal": "polynomial", "reciprocal_degree": 8}, id="mean-polynomial8"
    ),
    pytest.param({"form": "mean", "reciprocal": "goldschmidt", "reciprocal_degree": 4}, id="mean-goldschmidt4"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_forward_and_gradients_equal_the_reference(changes):
    mixer = with_reciprocal(make(**changes)) if changes.get("mixer") != "softmax" else make(**changes)
    results = []
    for run in (mixer.forward, mixer.reference):
        x = inputs().requires_grad_()
        mixer.zero_grad()
        y = run(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y.detach(), x.grad, mixer.q.weight.grad.clone(), mixer.v.weight.grad.clone()))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", VARIANTS)
def test_matrix_is_the_mixer(changes):
    mixer = with_reciprocal(make(**changes)) if changes.get("mixer") != "softmax" else make(**changes)
    x = inputs()
    y = mixer.o(mixer.merge(mixer.matrix(x) @ mixer.split(mixer.v(x))))
    torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0], ids=["tiny", "one", "large"])
def test_forms_are_one_function(power, scale):
    exact = make(form="exact", power=power).matrix(inputs() * scale)
    for form in ("stable", "mean", "rows"):
        other = make(form=form, power=power)
        if form == "rows":
            other.row_T.copy_(torch.linspace(0.3, 2.0, 12))
        torch.testing.assert_close(other.matrix(inputs() * scale), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_sum_to_share_of_the_sink_and_hidden_keys_weigh_nothing(form, power):
    mixer, x = make(form=form, power=power), inputs()
    q, k, _ = mixer.qkv(x)
    sums = (mixer.scores(q, k) ** power).sum(-1)
    weights = mixer.matrix(x)
    torch.testing.assert_close(weights.sum(-1), sums / (sums + mixer.eps), rtol=1e-12, atol=1e-12)
    assert torch.all(weights.triu(1) == 0.0)
    assert torch.all(weights >= 0)


@pytest.mark.parametrize("form", FORMS)
def test_sign_symmetry(form):
    mixer, x = make(form=form), inputs()
    before = mixer.matrix(x)
    with torch.no_grad():
        mixer.q.weight.neg_()
        mixer.q.bias.neg_()
    torch.testing.assert_close(mixer.matrix(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_common_scale_of_scores_is_a_scale_of_eps(form, power):
    c = 1.7
    mixer, x = make(form=form, power=power, eps=0.7), inputs()
    before = mixer.matrix(x)
    scaled = make(form=form, power=power, eps=0.7 * c**power)
    with torch.no_grad():
        scaled.q.weight.mul_(c)
        scaled.q.bias.mul_(c)
    torch.testing.assert_close(scaled.matrix(x), before, rtol=1e-11, atol=1e-12)


def test_unscaled_eps_in_the_stable_form_would_be_wrong():
    # the trap of methods.md 1.7: guards the test above against passing for any eps
    mixer, x = make(form="exact", eps=1.28), inputs()
    q, k, _ = mixer.qkv(x)
    s = mixer.scores(q, k)
    u = (s / s.abs().amax(-1, keepdim=True)) ** 4
    wrong = u / (1.28 + u.sum(-1, keepdim=True))
    assert (wrong - mixer.matrix(x)).abs().max() > 0.05


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("form", FORMS)
def test_all_zero_rows_have_zero_weights_and_finite_gradients_in_float32(form, power):
    mixer = make(form=form, power=power).float()
    with torch.no_grad():
        mixer.q.weight.zero_()
        mixer.q.bias.zero_()
    x = inputs().float().requires_grad_()
    y = mixer(x)
    y.sum().backward()
    assert torch.all(mixer.matrix(x) == 0)
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters()) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("power", POWERS)
def test_integer_power(power):
    x = torch.tensor([-1.3, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(integer_power(x, power), x**power)


@pytest.mark.parametrize(
    ("power", "n", "degree", "depth"), [(2, 2, 13, 7), (2, 4, 21, 8), (4, 4, 41, 9), (8, 8, 145, 11)]
)
def test_certificate(power, n, degree, depth):
    mixer = make(power=power, form="rows", reciprocal="polynomial", reciprocal_degree=n)
    assert (mixer.degree, mixer.depth) == (degree, depth)


def test_degree_certificate_is_exact_along_a_line():
    # values of a polynomial of degree n at n + 2 points have a vanishing divided difference of order n + 1, and of
    # order n none
    mixer = with_reciprocal(make(power=2, form="rows", reciprocal="polynomial", reciprocal_degree=2))
    x, step = inputs(1, 3), inputs(1, 3).flip(1)
    n = mixer.degree
    u = torch.cos(torch.arange(40, dtype=torch.float64) * torch.pi / 39)
    with torch.no_grad():
        y = torch.stack([mixer(x * 0.5 + t * 0.5 * step)[0, -1, 0] for t in u])
    basis = torch.stack([torch.cos(k * torch.acos(u.clamp(-1, 1))) for k in range(30)], 1)
    c = torch.linalg.lstsq(basis, y[:, None]).solution[:, 0].abs()
    assert c[n] > 1e-8 * c.max()
    assert torch.all(c[n + 1 :] < 1e-12 * c.max())


def test_exact_division_and_softmax_have_no_certificate():
    for mixer in (make(), make(mixer="softmax")):
        with pytest.raises(ValueError, match="polynomial"):
            _ = mixer.degree


def test_registry_lists_what_it_knows():
    assert {"softmax", "power_softmax"} <= set(mixers.names())
    with pytest.raises(ValueError, match="power_softmax"):
        mixers.load("powersoftmax")


@pytest.mark.parametrize(
    "changes",
    [{"power": 3}, {"power": 14}, {"eps": 0.0}, {"form": "other"}, {"reciprocal": "other"}],
    ids=["odd", "too-high", "no-eps", "form", "reciprocal"],
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=r"even|positive|known"):
        make(**changes)
