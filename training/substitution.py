"""What the stages do to a model besides training it: row factors, targets of ranges, polynomials, and what a report
measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyformer.activations import EXACT, Activation, fit_activation
from polyformer.approx import inverse_sqrt, reciprocal
from polyformer.layers import PolynomialLayer, Tap
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig
from polyformer.models import M, Model, at_once, body, rebuilt
from polyformer.norms import Norm
from polyformer.ranges import Collector, Targets, log_mean_rows, measure, taps
from training.stages import Substitute
from training.tasks import Task

KINDS = ("division", "activation", "norm")  # of functions that a polynomial can replace


def with_config(model: M, config: ModelConfig) -> M:
    """Return a model of another body with the same parameters; what the new one adds keeps its start.

    Raises:
        ValueError: a model of that body lacks some of the parameters.
    """
    made = rebuilt(model, config)
    _, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    if unexpected:
        raise ValueError(
            f"the changed model has no place for {unexpected[:3]}; choose a mixer with the same parameters"
        )
    return made.train(model.training)


def with_rows(power: M, calibration: Tensor) -> M:
    """Return the same function in the form `rows`, factors chosen so that log denominators have mean 0 in every row.

    A model without PowerSoftmax comes back as a copy.
    """
    model = with_config(power, replace(body(power), form="rows")).eval()
    for name, log_T in log_mean_rows(model, calibration, batch=at_once(model)).items():
        mixer = model.get_submodule(name)
        assert isinstance(mixer, PowerSoftmax)
        # multiplying a row's factor by g multiplies its denominators by g^p
        mixer.row_T.mul_(torch.exp(-log_T / mixer.power).to(mixer.row_T.dtype))
    return model


def choose_targets(
    model: Model,
    calibration: Tensor,
    *,
    activation_bound: float,
    variance_ratio: float,
    denominator_target: tuple[float, float],
) -> dict[str, tuple[float, float]]:
    """Return the wanted interval of each tap; variances are centred on the geometric mean of what the model has.

    The norm that opens a post-norm stack has none: the client computes it, exactly.
    """
    fixed = {"activation": (-activation_bound, activation_bound), "denominator": denominator_target}
    targets: dict[str, tuple[float, float]] = {}
    for name, tap in taps(model).items():
        if tap.kind in fixed:
            targets[name] = fixed[tap.kind]
        elif name != "norm" or body(model).order == "pre":
            targets[name] = (variance_ratio**-0.5, variance_ratio**0.5)
    logs: dict[str, list[Tensor]] = {}
    with torch.no_grad(), Collector(model) as collector:
        for inputs in calibration.split(at_once(model)):
            model(inputs)
            for name, value in collector.passed():
                if collector.kind(name) == "variance":
                    logs.setdefault(name, []).append(value.log().flatten())
    for name in targets.keys() & logs.keys():
        centre = math.exp(float(torch.cat(logs[name]).mean()))
        targets[name] = (centre * targets[name][0], centre * targets[name][1])
    return targets


def fitted_interval(target: tuple[float, float], stage: Substitute, *, denominator: bool) -> tuple[float, float]:
    """Return the interval of a polynomial: the stage's own for denominators, else the target widened by the margin."""
    return stage.denominator_interval if denominator else widened(target, stage.margin)


def widened(interval: tuple[float, float], margin: float) -> tuple[float, float]:
    """Return an interval of values or, if it is positive, of scales, wider by the factor `margin` at both ends."""
    lo, hi = interval
    return (lo * margin, hi * margin) if lo < 0 else (lo / margin, hi * margin)


def polynomial_config(
    config: ModelConfig, kinds: Collection[str], *, division: int, activation: int, norm: int, newton: int = 0
) -> ModelConfig:
    """Return the config after a substitution of some kinds by polynomials of these degrees (`newton`: steps after that
    of a norm); what is a polynomial as it stands (square, affine) stays, and so does the norm that opens a post-norm
    stack, which the client computes.
    """
    if "division" in kinds:
        config = replace(config, reciprocal="polynomial", reciprocal_degree=division)
    if "activation" in kinds and config.activation not in ("square", "quartic"):
        config = replace(config, activation="polynomial", activation_degree=activation)
    if "norm" in kinds:
        opening = config.order == "post"
        norms = tuple(
            f"{n}_poly" if n in ("rms", "layer") and not (opening and i == 0) else n for i, n in enumerate(config.norms)
        )
        config = replace(config, norms=norms, norm_degree=norm, norm_newton=newton)
    return config


def with_polynomials(model: M, config: ModelConfig, intervals: Targets, *, spread: float | None = None) -> M:
    """Return a copy of a model around a body that has polynomials, each fitted on the interval of its tap, activations as
    `fit_activation` does with a `spread`; everything else is equal.

    Raises:
        ValueError: a polynomial has no interval to be fitted on.
    """
    made = with_config(model, config)
    for name in polynomial_taps(made):
        if name not in intervals:
            raise ValueError(f"{name} has no target; put a Ranges stage (steps may be 0) before the substitution")
        fill(made.get_submodule(name), body(model).activation, intervals[name], spread=spread)
    return made.eval()


def polynomial_taps(model: nn.Module) -> dict[str, Tap]:
    """Return the taps before a polynomial, by path."""
    owners = {name: model.get_submodule(name).children() for name in taps(model)}
    return {n: tap for n, tap in taps(model).items() if any(isinstance(part, PolynomialLayer) for part in owners[n])}


def fill(layer: nn.Module, activation: str, interval: tuple[float, float], *, spread: float | None = None) -> None:
    """Fit the polynomial of a layer on an interval, in place; `activation` is the function that it stands for there."""
    if isinstance(layer, PowerSoftmax) and layer.reciprocal is not None:
        layer.reciprocal.set(reciprocal(layer.reciprocal.degree, interval))
    elif isinstance(layer, Activation) and layer.polynomial is not None and activation in EXACT:
        layer.polynomial.set(fit_activation(activation, layer.polynomial.degree, interval, spread=spread))
    elif isinstance(layer, Norm) and layer.inverse_sqrt is not None:
        layer.inverse_sqrt.set(inverse_sqrt(layer.inverse_sqrt.degree, interval))


@torch.no_grad()
def cover(made: Model, inputs: Tensor, activation: str, margin: float, *, spread: float | None = None) -> None:
    """Fit the polynomials of a model again, in place, where these inputs leave their intervals, on what they show.

    All happens in forward passes, so that each is fitted to what it reads once all before it are polynomials: what one
    errs is in the range of the next. Denominators are covered from above alone: below an interval a reciprocal is finite
    and its row small, and a fit down to the least row, 1e-6 of the largest, would serve none of them.
    """

    def fit(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(tap: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
            lo, hi = widened((float(value.min()), float(value.max())), margin)
            old = fitted_intervals(made)[name]
            if polynomial_taps(made)[name].kind == "denominator":
                lo = old[0]
            if lo < old[0] or hi > old[1]:
                fill(made.get_submodule(name), activation, (min(lo, old[0]), max(hi, old[1])), spread=spread)

        return look

    handles = [tap.register_forward_hook(fit(name)) for name, tap in polynomial_taps(made).items()]
    try:
        for rows in inputs.split(at_once(made)):
            made(rows)
    finally:
        for handle in handles:
            handle.remove()


def substitute(ranged: M, stage: Substitute, targets: Targets, calibration: Tensor) -> M:
    """Return a copy of a ranged model with the chosen functions replaced by polynomials on its targets, widened, and if
    the stage says `cover` on what calibration inputs show.

    Raises:
        ValueError: a polynomial has no target, so nothing says on which interval to fit it.
    """
    config = polynomial_config(
        body(ranged),
        [kind for kind in KINDS if getattr(stage, kind)],
        division=stage.reciprocal_degree,
        activation=stage.activation_degree,
        norm=stage.norm_degree,
        newton=stage.norm_newton,
    )
    kinds = {name: tap.kind for name, tap in taps(ranged).items()}
    intervals = {
        name: fitted_interval(target, stage, denominator=kinds.get(name) == "denominator")
        for name, target in targets.items()
    }
    made = with_polynomials(ranged, config, intervals, spread=stage.activation_spread)
    if stage.cover:
        cover(made, calibration, body(ranged).activation, stage.margin, spread=stage.activation_spread)
    return made


def fitted_intervals(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the interval of every polynomial of a model, by the path of its tap."""
    owners = {name.rpartition(".")[0]: m for name, m in model.named_modules() if isinstance(m, PolynomialLayer)}
    return {name: m.polynomial().interval for name, m in owners.items()}


def ranges_report(model: Model, inputs: Tensor, intervals: Targets) -> dict[str, Any]:
    """Return, as plain data, the range of every tap on inputs and the share of values outside the intervals: by tap,
    and over all values of taps that have one.
    """
    found = measure(model, inputs, intervals=intervals, batch=at_once(model))
    bounded = [r for name, r in found.items() if name in intervals]
    count = sum(r.count for r in bounded)
    given = {name: list(interval) for name, interval in intervals.items()}
    return {
        "ranges": {name: asdict(r) | {"interval": given.get(name)} for name, r in found.items()},
        "outside": sum((r.below + r.above) * r.count for r in bounded) / count if count else 0.0,
    }


def levels(model: Model) -> int | None:
    """Return the multiplicative levels of a model, None where a part is not polynomial."""
    try:
        return model.levels
    except ValueError:
        return None


def report(model: Model, task: Task) -> dict[str, Any]:
    """Measure a polynomial model: quality, levels, ranges and excursions on held-out inputs and on stress inputs, largest
    logits.
    """
    intervals = fitted_intervals(model)
    figures: dict[str, Any] = {**task.quality(model), "levels": model.levels, "intervals": intervals}
    for name, inputs in (("heldout", task.heldout), ("stress", task.stress())):
        ranges = measure(model, inputs, intervals=intervals, batch=at_once(model))
        figures[f"ranges_{name}"] = {k: asdict(r) for k, r in ranges.items()}
        figures[f"outside_{name}"] = {k: {"below": r.below, "above": r.above} for k, r in ranges.items()}
        with torch.no_grad():
            figures[f"largest_logit_{name}"] = max(
                float(model(rows).abs().max()) for rows in inputs.split(at_once(model))
            )
    return figures
