"""The certificate's degrees against those that mixers, norms and activations state, against differences, and fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyformer import mixers
from polyformer.activations import ACTIVATIONS, DEGREES, Activation, fit_activation
from polyformer.approx import inverse_sqrt, reciprocal
from polyformer.certificate import certify, measured_degree
from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.field import PRIME, FieldTensor, Ray, inverse, residues
from polyformer.interpolation import degree_of_values, degrees_of_quotient
from polyformer.layers import PolynomialLayer
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer
from polyformer.norms import Norm, make_norm
from polyformer.vision import VisionConfig, ViT

SHAPE = (5, 8)
BASE = ModelConfig(
    vocab=16, length=5, width=8, heads=2, hidden=12, blocks=1, norms=("affine",) * 3, power=2, eps=0.7, state=3,
    form="rows", reciprocal="polynomial", activation="polynomial",
)  # fmt: skip


def disturbed(model: nn.Module) -> nn.Module:
    """No parameter and no polynomial coefficient stays trivial."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PolynomialLayer):
                module.coefficients.copy_(torch.randn_like(module.coefficients))
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model.eval()


def mixer(name: str, **changes) -> mixers.Mixer:
    torch.manual_seed(0)
    return disturbed(mixers.load(name)(replace(BASE, mixer=name, **changes)))  # type: ignore[return-value]


POLYNOMIAL = {
    "power-2": ("power_softmax", {}, 21),
    "power-4-rows": ("power_softmax", {"power": 4, "form": "rows"}, 41),
    "power-goldschmidt": ("power_softmax", {"reciprocal": "goldschmidt", "reciprocal_degree": 2, "form": "mean"}, 17),
    "power-las": ("power_softmax", {"las_decay": 1.0, "las_width": 3}, 21),
    "pointwise-square": ("pointwise", {"activation": "square"}, 5),
    "pointwise-3": ("pointwise", {"activation_degree": 3}, 7),
    "linear": ("linear", {}, 3),
    "gated-none": ("gated_linear", {"decay": "fixed", "output_gate": "none"}, 3),
    "gated-linear": ("gated_linear", {"decay": "fixed", "output_gate": "linear"}, 4),
    "s6-1": ("polynomial_s6", {"gate_degree": 1}, 7),
    "s6-2": ("polynomial_s6", {}, 11),
    "hyena-2": ("hyena", {}, 3),
    "hyena-3": ("hyena", {"hyena_order": 3}, 4),
}


@pytest.mark.parametrize(("name", "changes", "degree"), POLYNOMIAL.values(), ids=POLYNOMIAL)
def test_degree_of_a_mixer_is_what_it_states_and_what_differences_find(name, changes, degree):
    layer = mixer(name, **changes)
    found = certify(layer, shape=SHAPE)
    assert (found.kind, found.degree, found.levels) == ("polynomial", degree, layer.depth)
    assert found.degree == layer.degree == measured_degree(layer, shape=SHAPE, points=degree + 12)
    assert found.depth is not None and 2 ** (found.depth - 1) < degree <= 2**found.depth <= 2**layer.depth


def test_hyena_on_a_grid():
    layer = disturbed(mixers.load("hyena_nd")(replace(BASE, mixer="hyena_nd", length=6, grid=(2, 3), causal=False)))
    assert certify(layer, shape=(6, 8)).degree == layer.degree == 3


OFFENDING = {
    "softmax": ({}, "scaled_dot_product"),
    "pointwise": ({"activation": "gelu"}, "gelu"),
    "linear": ({"feature_map": "elu"}, "elu"),
    "gated_linear": ({}, "silu"),
    "mamba": ({}, "softplus"),
    "mamba2": ({}, "exp"),
    "rwkv": ({}, "sigmoid"),
    "griffin": ({}, "sqrt"),
}


@pytest.mark.parametrize(("name", "changes", "operation"), [(k, *v) for k, v in OFFENDING.items()], ids=OFFENDING)
def test_mixers_that_are_not_polynomial_name_the_operation(name, changes, operation):
    found = certify(mixer(name, **changes), shape=SHAPE)
    assert found.kind == "neither" and found.degree is None
    assert any(operation in what for _, what in found.offending)


@pytest.mark.parametrize("reciprocal", ["polynomial", "goldschmidt"])
def test_factors_that_depend_on_the_scores_take_no_polynomial_reciprocal(reciprocal):
    """R of a denominator over max|s|^p is no polynomial of x, and no export can write it with constants."""
    with pytest.raises(ValueError, match=r"form is 'stable'.*use form 'rows'"):
        mixer("power_softmax", reciprocal=reciprocal, form="stable")


@pytest.mark.parametrize("form", ["exact", "stable", "rows"])
def test_a_division_that_is_kept_makes_the_layer_rational(form):
    """One output sums both heads, so its denominator is the product of theirs: degree 2p each."""
    layer = mixer("power_softmax", reciprocal="exact", form=form)
    found = certify(layer, shape=SHAPE)
    assert (found.kind, found.numerator, found.denominator) == ("rational", 9, 8)
    assert found.divisions == ("PowerSoftmax",)


NORMS = {
    "affine": ("affine", {}, 1),
    "batch": ("batch", {}, 1),
    "rms_poly-2": ("rms_poly", {"degree": 2}, 5),
    "layer_poly-3": ("layer_poly", {"degree": 3}, 7),
    "rms_poly-newton": ("rms_poly", {"degree": 1, "newton": 1}, 9),  # y of degree 2 becomes 3 * 2 + 2, times x
}


@pytest.mark.parametrize(("kind", "options", "degree"), NORMS.values(), ids=NORMS)
def test_degree_of_a_norm(kind, options, degree):
    norm = disturbed(make_norm(8, kind, **options))
    found = certify(norm, shape=SHAPE)
    assert (found.kind, found.degree) == ("polynomial", degree)
    assert measured_degree(norm, shape=SHAPE, points=degree + 12) == degree


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_root_is_in_the_way(kind):
    assert certify(Norm(8, kind), shape=SHAPE).offending == (("Norm", "rsqrt"),)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_degree_of_an_activation(kind):
    found = certify(disturbed(Activation(kind, degree=3)), shape=SHAPE)
    expected = {"square": 2, "quartic": 4, "polynomial": 3}.get(kind)
    assert found.degree == expected
    assert (found.kind == "polynomial") == (kind in DEGREES or kind == "polynomial")


def fitted(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    for module in model.modules():
        if isinstance(module, PowerSoftmax) and module.reciprocal is not None:
            module.reciprocal.set(reciprocal(4, (0.1, 8.0)))
        elif isinstance(module, Activation) and module.polynomial is not None:
            module.polynomial.set(fit_activation("gelu", 2, (-4.0, 4.0)))
        elif isinstance(module, Norm) and module.inverse_sqrt is not None:
            module.inverse_sqrt.set(inverse_sqrt(2, (0.5, 2.0)))
    return model.eval()


def test_a_whole_model_its_growth_and_its_names():
    config = replace(BASE, blocks=2, norms=("affine", "rms_poly", "affine", "affine", "affine"))
    model = fitted(config)
    found = certify(model)
    assert found.growth == (("blocks.0", 21 * 5 * 2), ("blocks.1", 210 * 42))
    assert (found.degree, found.depth, found.levels) == (8820, 14, model.levels)
    assert str(found) == f"polynomial of degree 8,820, so of depth 14 at least; {model.levels} levels used"
    exact = Transformer(replace(config, mixers=("power_softmax", "softmax"), activation="gelu"))
    layers = {layer for layer, _ in certify(exact).offending}
    assert layers == {"blocks.0.mlp.act", "blocks.1.mlp.act", "blocks.1.mixer"}


def test_a_deep_model_has_an_exact_degree_beyond_the_prime():
    deep = fitted(replace(BASE, blocks=6, norms=("affine",) * 13))
    assert certify(deep).degree == 42**6 > PRIME


def test_a_post_norm_model_begins_behind_its_first_norm():
    norms = ("layer", "affine", "affine")
    assert certify(fitted(replace(BASE, order="post", norms=norms))).degree == 42


def test_encoder_and_vision_models():
    body = replace(BASE, causal=False)
    encoder = disturbed(Encoder(ClassifierConfig(body=body, classes=3)))
    body = replace(body, length=4, mixer="pointwise", norms=("batch",) * 3, mlp_norm=True, score_norm=True)
    image = VisionConfig(body=body, classes=3, image=(4, 4), patch=2)
    assert certify(encoder).degree == 42
    assert certify(disturbed(ViT(image))).degree == 5 * 2


def test_certifying_changes_nothing():
    model = fitted(BASE).train()
    tokens = torch.randint(0, 16, (2, 5))
    before, keys = model(tokens), set(vars(model)) | set(vars(model.blocks[0].mixer))
    certify(model)
    assert model.training and torch.equal(model(tokens), before)
    assert keys == set(vars(model)) | set(vars(model.blocks[0].mixer))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_certifying_leaves_every_part_in_its_own_mode():
    model = fitted(BASE).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    certify(model)
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def test_two_blocks_that_divide_say_how_many_points_were_too_few():
    config = replace(
        BASE, length=2, blocks=2, norms=("affine",) * 5, reciprocal="exact", activation="square", form="stable"
    )
    model = disturbed(Transformer(config))
    assert "512 points of a ray do not decide (certify with more)" in str(certify(model, rays=1))
    assert str(certify(model, rays=1, points=1024)).startswith("rational, degrees 484 / 480; divides in blocks.0.mixer")


class Cancelling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) * x - x * x + 3


def test_parts_that_cancel_do_not_count():
    assert certify(Cancelling(), shape=SHAPE).degree == 1


def test_a_module_that_is_no_layer_needs_a_shape():
    with pytest.raises(ValueError, match="give shape"):
        certify(nn.Linear(8, 8))


def test_residues_are_the_images_of_floats_as_fractions():
    torch.manual_seed(0)
    weight, x = torch.randn(3, 4), torch.randn(4, dtype=torch.float64) * 1e6
    weight[0, 0], x[1] = 0.0, 2.0**-40
    image = lambda q: q.numerator * pow(q.denominator, -1, PRIME) % PRIME  # noqa: E731
    exact = [sum(Fraction(float(w)) * Fraction(float(v)) for w, v in zip(row, x, strict=True)) for row in weight]
    got = FieldTensor(residues(x)[None], 0, Ray(leading=False, seed=0)) @ weight.T
    assert got.entries[0].tolist() == [image(q) for q in exact]
    assert (inverse(residues(x)) * residues(x) % PRIME).tolist() == [1.0] * 4


def test_degrees_come_out_of_values():
    t = np.arange(40)
    assert degree_of_values(t**3 + 5 * t) == 3
    assert degree_of_values(np.zeros(20)) == 0
    assert degree_of_values(np.array([pow(int(i), 35, PRIME) for i in t])) is None
    quotient = [(i**3 + 2) * pow(i**2 + i + 7, -1, PRIME) % PRIME for i in t.tolist()]
    assert degrees_of_quotient(np.array(quotient)) == (3, 2)
    assert degrees_of_quotient(np.array(quotient)[:8]) is None
