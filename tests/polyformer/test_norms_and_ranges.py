"""Norms against torch's own, polynomial norms inside their interval, and range losses that lower ranges."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyformer.activations import ACTIVATIONS, Activation, fit_activation
from polyformer.approx import inverse_sqrt, newton_error
from polyformer.layers import PolynomialLayer
from polyformer.model import ModelConfig, Transformer
from polyformer.norms import Norm
from polyformer.ranges import Collector, log_mean_rows, measure, range_loss, taps

CONFIG = ModelConfig(
    vocab=30, length=8, width=16, heads=2, hidden=24, blocks=1, norms=("affine", "rms", "rms"), form="rows"
)


def x_btd() -> torch.Tensor:
    return torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.3 + 0.2


def filled(kind: str, **options: int) -> Norm:
    torch.manual_seed(0)
    norm = Norm(16, kind, **options).double()
    torch.nn.init.normal_(norm.gamma)
    if norm.beta is not None:
        torch.nn.init.normal_(norm.beta)
    return norm


def test_exact_norms_are_those_of_torch():
    x, rms, layer, affine = x_btd(), filled("rms"), filled("layer"), filled("affine")
    torch.testing.assert_close(rms(x), F.rms_norm(x, (16,), rms.gamma, 1e-5))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (16,), layer.gamma, layer.beta, 1e-5))
    torch.testing.assert_close(affine(x), x * affine.gamma + affine.beta)


@pytest.mark.parametrize("exact", ["rms", "layer"])
@pytest.mark.parametrize(("degree", "newton"), [(2, 0), (3, 0), (3, 2), (7, 1)])
def test_polynomial_norm_errs_as_its_inverse_root_does(exact, degree, newton):
    x, reference = x_btd(), filled(exact)
    norm = filled(f"{exact}_poly", degree=degree, newton=newton)
    p = inverse_sqrt(degree, (0.3, 5.0))
    norm.inverse_sqrt.set(p).double()
    norm.load_state_dict(reference.state_dict(), strict=False)
    reference.eps = 0.0
    shift = 0 if reference.beta is None else reference.beta
    error = ((norm(x) - shift) / (reference(x) - shift) - 1).abs().max()
    assert 0 < error <= newton_error(p.error, newton) * 1.001 + 1e-9


@pytest.mark.parametrize(("kind", "depth"), [("affine", 0), ("rms_poly", 3), ("layer_poly", 3)])
def test_norm_depth(kind, depth):
    assert Norm(8, kind, degree=2).depth == depth
    assert Norm(8, "rms_poly", degree=1).depth == 2
    assert Norm(8, "rms_poly", degree=4, newton=1).depth == 6


@pytest.mark.parametrize("kind", [k for k in ACTIVATIONS if k not in ("polynomial", "square", "quartic")])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_fitted_activation_is_as_close_as_it_says(kind, degree):
    p = fit_activation(kind, degree, (-3.0, 3.0))
    layer = Activation("polynomial", degree=degree).eval()
    layer.polynomial.set(p)
    x = torch.linspace(-3, 3, 997)
    assert (layer(x) - Activation(kind)(x)).abs().max() <= p.error * 1.001 + 1e-6
    assert layer.depth == p.depth


def test_polynomial_layer_round_trips_and_refuses_another_degree():
    p = inverse_sqrt(3, (0.2, 2.0))
    layer = PolynomialLayer(3).double().set(p).eval()
    assert layer.polynomial().coefficients == pytest.approx(p.coefficients)
    x = torch.tensor([0.5, 1.5], dtype=torch.float64)
    before = layer(x)
    layer.rescale_input(4.0)
    torch.testing.assert_close(layer(4 * x), before)
    with pytest.raises(ValueError, match="degree 3"):
        PolynomialLayer(2).set(p)


def test_inputs_are_clamped_in_training_alone():
    p = inverse_sqrt(3, (0.25, 2.0))
    layer, x = PolynomialLayer(3).double().set(p), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), p(x.clamp(0.25, 2.0)))
    torch.testing.assert_close(layer.eval()(x), p(x))


def test_taps_are_named_by_their_layers():
    found = {name: tap.kind for name, tap in taps(Transformer(CONFIG)).items()}
    assert found == {
        "blocks.0.mixer": "denominator",
        "blocks.0.norm2": "variance",
        "blocks.0.mlp.act": "activation",
        "norm": "variance",
    }


def test_measure_finds_extremes_and_the_share_outside():
    model = Transformer(CONFIG).eval()
    tokens = torch.randint(0, 30, (20, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Collector(model) as c:
        model(tokens)
        value = c.values["blocks.0.mlp.act"][0]
    r = measure(model, tokens, intervals={"blocks.0.mlp.act": (-1.0, 1.0)}, batch=7)["blocks.0.mlp.act"]
    assert (r.low, r.high) == pytest.approx((float(value.min()), float(value.max())))
    assert r.below == pytest.approx(float((value < -1).double().mean()), abs=1e-6) and r.below > 0
    assert r.above == pytest.approx(float((value > 1).double().mean()), abs=1e-6) and r.above > 0
    assert r.count == value.numel()


@pytest.mark.parametrize("kind", ["activation", "variance", "denominator"])
def test_range_loss_lowers_ranges(kind):
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.blocks[0].mixer.q.weight.mul_(8)
    tokens = torch.randint(0, 30, (16, 8), generator=torch.Generator().manual_seed(0))
    targets = {
        "activation": {"blocks.0.mlp.act": (-0.5, 0.5)},
        "variance": {"norm": (0.9, 1.1)},
        "denominator": {"blocks.0.mixer": (0.05, 1.3)},
    }[kind]
    name, (lo, hi) = next(iter(targets.items()))
    weights = {k: float(k == kind) for k in ("activation", "variance", "denominator")}

    def excess() -> float:
        r = measure(model, tokens)[name]
        return max(r.high / hi, r.low / lo if lo < 0 else lo / r.low)

    before, optimiser = excess(), torch.optim.Adam(model.parameters(), lr=3e-3)
    with Collector(model) as collector:
        for _ in range(60):
            model(tokens)
            loss = range_loss(collector, targets, **weights)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert before > 1.3
    assert excess() - 1 < 0.5 * (before - 1)


def test_range_loss_is_zero_inside_and_ignores_other_kinds():
    model = Transformer(CONFIG)
    targets = {name: (-1e6, 1e6) if tap.kind == "activation" else (1e-9, 1e9) for name, tap in taps(model).items()}
    with Collector(model) as c:
        with torch.no_grad():
            model(torch.zeros(2, 8, dtype=torch.int64))
        assert float(range_loss(c, targets, activation=1.0, variance=1.0, denominator=1.0)) == 0.0
        tight = {"norm": (1e-9, 1e-8)}
        assert float(range_loss(c, tight, activation=1.0, variance=0.0, denominator=1.0)) == 0.0
        assert float(range_loss(c, tight, activation=0.0, variance=1.0, denominator=0.0)) > 1.0


def test_log_mean_rows_is_the_mean_over_windows_and_heads():
    model = Transformer(CONFIG).eval()
    tokens = torch.randint(0, 30, (10, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Collector(model) as c:
        model(tokens)
        expected = c.values["blocks.0.mixer"][0].double().log().mean((0, 1))[:, 0]
    torch.testing.assert_close(log_mean_rows(model, tokens, batch=3)["blocks.0.mixer"], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Norm(4, "batch"),
        lambda: Activation("tanh"),
        lambda: ModelConfig(vocab=4, length=4, width=10, heads=4),
        lambda: ModelConfig(vocab=4, length=4, norms=("rms",)),
    ],
    ids=["norm", "activation", "heads", "sites"],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"known|multiple|sites"):
        make()


def test_exact_layer_norm_is_the_same_with_and_without_a_listener_at_its_tap():
    """Without one torch's own kernel runs; the formula is the other path, and both have the same gradients."""
    torch.manual_seed(0)
    norm, results = Norm(12, "layer", eps=1e-3).double(), []
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.beta)
    for listen in (False, True):
        x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        seen: list[torch.Tensor] = []
        if listen:
            norm.tap.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        y = norm(x)
        assert bool(seen) == listen
        results.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, norm.gamma, norm.beta])))
    for fused, formula in zip(*results, strict=True):
        torch.testing.assert_close(fused, formula, rtol=1e-10, atol=1e-12)


def test_what_is_no_number_lies_outside():
    model = nn.Sequential(Activation("square"))
    x = torch.tensor([[0.0, float("nan"), 2.0, -2.0]])
    (found,) = measure(model, x, intervals={"0": (-1.0, 1.0)}).values()
    assert (found.below, found.above) == (0.25, 0.5)
