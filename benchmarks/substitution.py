"""Polynomials in place of divisions, activations and norms of a trained model, on intervals measured on training text.

A plain rendering of stages 3 and 4 of methods.md 1.4 for ablations: every kind can be replaced alone, and range
training can be left out. The pipeline that makes the models of the demonstration is `training`'s own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_runs import Budget, Training, fit
from polyformer.activations import Activation, fit_activation
from polyformer.approx import inverse_sqrt, reciprocal
from polyformer.layers import PolynomialLayer
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import Transformer
from polyformer.norms import Norm
from polyformer.ranges import Collector, Targets, log_mean_rows, measure, range_loss
from training.loop import Batches, Schedule

KINDS = ("division", "activation", "norm")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Degrees of the polynomials, and the factor by which their intervals exceed what training text showed."""

    division: int = 4
    activation: int = 4
    norm: int = 3
    margin: float = 1.2


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Targets of the range losses: activations within +-`activation`, the others within a ratio hi/lo."""

    activation: float = 4.0
    variance_ratio: float = 4.0
    denominator: tuple[float, float] = (0.05, 3.0)  # below is harmless: the numerator is smaller still
    weight: float = 0.3


DEGREES, WANTED = Degrees(), Wanted()


def with_config(model: Transformer, **changes: Any) -> Transformer:
    """Return a model of a changed config with the same parameters; what the new one adds keeps its start."""
    made = Transformer(replace(model.config, **changes))
    _, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    if unexpected:
        raise ValueError(
            f"the changed model has no place for {unexpected[:3]}; choose a mixer with the same parameters"
        )
    return made.train(model.training)


def in_rows(model: Transformer, tokens_NT: Tensor) -> Transformer:
    """Return a PowerSoftmax model in the form `rows`, the factors such that log denominators have mean 0 in each row:
    an exact change of form.
    """
    made = with_config(model, form="rows").eval()
    for name, log_T in log_mean_rows(made, tokens_NT).items():
        mixer = made.get_submodule(name)
        assert isinstance(mixer, PowerSoftmax)
        mixer.row_T.mul_(torch.exp(-log_T / mixer.power).to(mixer.row_T.dtype))
    return made


def targets(model: Transformer, tokens_NT: Tensor, wanted: Wanted) -> dict[str, tuple[float, float]]:
    """Return the wanted interval of each tap; those of variances are centred on what the model has."""
    found: dict[str, tuple[float, float]] = {}
    with torch.no_grad(), Collector(model) as collector:
        model(tokens_NT)
        for name, value in collector.values.items():
            kind = collector.kind(name)
            if kind == "activation":
                found[name] = (-wanted.activation, wanted.activation)
            elif kind == "denominator":
                found[name] = wanted.denominator
            else:
                centre, half = math.exp(float(value.log().mean())), math.sqrt(wanted.variance_ratio)
                found[name] = (centre / half, centre * half)
    return found


def train_ranges(
    model: Transformer, batches: Batches, budget: Budget, schedule: Schedule, aims: Targets, weight: float
) -> Training:
    """Train on in place with the range losses; weight 0 is the control, as many steps without them."""
    with Collector(model) as collector:

        def extra() -> Tensor:
            return range_loss(collector, aims, activation=weight, variance=weight, denominator=weight)

        return fit(model, batches, budget, schedule=schedule, extra=extra)


def intervals(model: Transformer, tokens_NT: Tensor, degrees: Degrees) -> dict[str, tuple[float, float]]:
    """Return what each tap shows on tokens, widened by the margin: activations symmetric, the others by a factor."""
    found = {}
    for name, seen in measure(model.eval(), tokens_NT).items():
        if seen.low < 0:
            bound = max(-seen.low, seen.high) * degrees.margin
            found[name] = (-bound, bound)
        else:
            found[name] = (seen.low / degrees.margin, seen.high * degrees.margin)
    return found


def substituted(
    model: Transformer, fitted: Mapping[str, tuple[float, float]], degrees: Degrees, kinds: tuple[str, ...] = KINDS
) -> Transformer:
    """Return a copy of a model in the form `rows` whose functions of some kinds are polynomials; the rest is equal."""
    changes: dict[str, Any] = {}
    if "division" in kinds:
        changes |= {"reciprocal": "polynomial", "reciprocal_degree": degrees.division}
    if "activation" in kinds:
        changes |= {"activation": "polynomial", "activation_degree": degrees.activation}
    if "norm" in kinds:
        changes |= {"norms": tuple(f"{n}_poly" for n in model.config.norms), "norm_degree": degrees.norm}
    made = with_config(model, **changes)
    for name, interval in fitted.items():
        layer = made.get_submodule(name)
        if isinstance(layer, PowerSoftmax) and isinstance(layer.reciprocal, PolynomialLayer):
            layer.reciprocal.set(reciprocal(degrees.division, interval))
        elif isinstance(layer, Activation) and layer.polynomial is not None:
            layer.polynomial.set(fit_activation(model.config.activation, degrees.activation, interval))
        elif isinstance(layer, Norm) and layer.inverse_sqrt is not None:
            layer.inverse_sqrt.set(inverse_sqrt(degrees.norm, interval))
    return made.eval()


def outside(model: Transformer, tokens_NT: Tensor, fitted: Mapping[str, tuple[float, float]]) -> float:
    """Return the largest share of values that leave the interval of their tap."""
    return max(r.below + r.above for r in measure(model, tokens_NT, intervals=fitted).values())
