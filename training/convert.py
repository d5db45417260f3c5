"""Staged conversion of a trained PowerSoftmax model into polynomials (methods.md 1.4, stages 3 and 4).

1 rows       fix one public factor a row, so that the denominators of all causal rows centre on 1; an exact change of
form 2 ranges     go on training with range losses until activations, variances and denominators lie in their targets 3
substitute put polynomials on intervals a margin wider than the targets; the loss after each single replacement is
recorded 4 tune       go on training with the polynomials in place and the range losses still on 5 report     held-out
loss, ranges on held-out text and on arbitrary tokens, share outside the fitted intervals, largest logit
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyformer.activations import Activation, fit_activation
from polyformer.approx import inverse_sqrt, reciprocal
from polyformer.layers import PolynomialLayer
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import Transformer
from polyformer.norms import Norm
from polyformer.ranges import Collector, Targets, log_mean_rows, measure, range_loss, taps
from training.folder import Folder, calibration_tokens, heldout_windows, stress_tokens
from training.loop import run_stage
from training.recipe import Progress, Recipe
from training.train import heldout_loss, schedule


def convert(out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Convert the power model of folder `out`; write polynomial.safetensors and return the metrics. An interrupted run
    goes on.
    """
    folder = Folder(out)
    recipe = folder.recipe()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    windows = heldout_windows(out)
    calibration = torch.from_numpy(calibration_tokens(out))

    if not folder.has("polynomial"):
        ranged, targets = _ranged(folder, recipe, calibration, progress)
        quality = {"ranges": heldout_loss(ranged, windows)}
        for kind in ("division", "activation", "norm"):
            only = {k: k == kind for k in ("division", "activation", "norm")}
            quality[f"substitute {kind}"] = heldout_loss(substitute(ranged, recipe, targets, **only), windows)
        model = substitute(ranged, recipe, targets)
        quality["substitute all"] = heldout_loss(model, windows)
        _train(model, folder, recipe, targets, "tune", recipe.tune_steps, progress)
        quality["tune"] = heldout_loss(model, windows)
        folder.save_model("polynomial", model)
        folder.update_metrics(quality=quality)
        (folder.checkpoints / "ranged.safetensors").unlink(missing_ok=True)
    return folder.update_metrics(
        **report(folder.load_model("polynomial"), windows, torch.from_numpy(stress_tokens(out)))
    )


def with_rows(power: Transformer, recipe: Recipe, calibration: Tensor) -> Transformer:
    """Return the same function in the form `rows`, factors chosen so that log denominators have mean 0 in every row."""
    model = Transformer(recipe.range_config())
    missing, unexpected = model.load_state_dict(power.state_dict(), strict=False)
    if unexpected or any(not name.endswith("row_T") for name in missing):
        raise ValueError(f"the power model does not fit the recipe: missing {missing}, unexpected {unexpected}")
    model.eval()
    for name, log_T in log_mean_rows(model, calibration).items():
        mixer = model.get_submodule(name)
        assert isinstance(mixer, PowerSoftmax)
        # multiplying a row's factor by g multiplies its denominators by g^p
        mixer.row_T.mul_(torch.exp(-log_T / recipe.power).to(mixer.row_T.dtype))
    return model


def choose_targets(model: Transformer, recipe: Recipe, calibration: Tensor) -> dict[str, tuple[float, float]]:
    """Return the wanted interval of each tap; variances are centred on the geometric mean of what the model has."""
    targets: dict[str, tuple[float, float]] = {}
    with torch.no_grad(), Collector(model) as collector:
        model(calibration)
        for name, value in collector.values.items():
            if collector.kind(name) == "activation":
                targets[name] = (-recipe.activation_bound, recipe.activation_bound)
            elif collector.kind(name) == "denominator":
                targets[name] = recipe.denominator_target
            else:
                centre = math.exp(float(value.log().mean()))
                targets[name] = (centre * recipe.variance_ratio**-0.5, centre * recipe.variance_ratio**0.5)
    return targets


def fitted_interval(target: tuple[float, float], recipe: Recipe, *, denominator: bool) -> tuple[float, float]:
    """Return the interval of a polynomial: the recipe's for denominators, else the target widened by the margin."""
    if denominator:
        return recipe.denominator_interval
    lo, hi = target
    return (lo * recipe.margin, hi * recipe.margin) if lo < 0 else (lo / recipe.margin, hi * recipe.margin)


def substitute(
    ranged: Transformer,
    recipe: Recipe,
    targets: Targets,
    *,
    division: bool = True,
    activation: bool = True,
    norm: bool = True,
) -> Transformer:
    """Return a copy of a ranged model with the chosen functions replaced by fitted polynomials; everything else is
    equal.
    """
    model = Transformer(recipe.polynomial_config(division=division, activation=activation, norm=norm))
    model.load_state_dict(ranged.state_dict(), strict=False)
    for name in taps(model):
        layer = model.get_submodule(name)
        interval = fitted_interval(targets[name], recipe, denominator=isinstance(layer, PowerSoftmax))
        if isinstance(layer, PowerSoftmax) and layer.reciprocal is not None:
            layer.reciprocal.set(reciprocal(layer.reciprocal.degree, interval))
        elif isinstance(layer, Activation) and layer.polynomial is not None:
            layer.polynomial.set(fit_activation(recipe.activation, layer.polynomial.degree, interval))
        elif isinstance(layer, Norm) and layer.inverse_sqrt is not None:
            layer.inverse_sqrt.set(inverse_sqrt(layer.inverse_sqrt.degree, interval))
    return model.eval()


def fitted_intervals(model: Transformer) -> dict[str, tuple[float, float]]:
    """Return the interval of every polynomial of a model, by the path of its tap."""
    owners = {name.rpartition(".")[0]: m for name, m in model.named_modules() if isinstance(m, PolynomialLayer)}
    return {name: m.polynomial().interval for name, m in owners.items()}


def report(model: Transformer, heldout: Tensor, stress: Tensor) -> dict[str, Any]:
    """Measure a polynomial model: loss, levels, ranges and excursions on held-out windows and on stress windows,
    largest logits.
    """
    intervals = fitted_intervals(model)
    figures: dict[str, Any] = {
        "heldout_loss_polynomial": heldout_loss(model, heldout),
        "levels": model.levels,
        "intervals": intervals,
    }
    for name, tokens in (("heldout", heldout[:, :-1]), ("stress", stress)):
        ranges = measure(model, tokens, intervals=intervals)
        figures[f"ranges_{name}"] = {k: asdict(r) for k, r in ranges.items()}
        figures[f"outside_{name}"] = {k: {"below": r.below, "above": r.above} for k, r in ranges.items()}
        with torch.no_grad():
            figures[f"largest_logit_{name}"] = max(float(model(rows).abs().max()) for rows in tokens.split(256))
    return figures


def _ranged(
    folder: Folder, recipe: Recipe, calibration: Tensor, progress: Progress | None
) -> tuple[Transformer, dict[str, tuple[float, float]]]:
    """Return the model after stage 2 and its targets; both are functions of the power model, so a resumed run finds
    the same.
    """
    model = with_rows(folder.load_model("power"), recipe, calibration)
    targets = choose_targets(model, recipe, calibration)
    done = folder.checkpoints / "ranged.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
    else:
        _train(model, folder, recipe, targets, "ranges", recipe.range_steps, progress)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, done)
    return model, targets


def _train(
    model: Transformer,
    folder: Folder,
    recipe: Recipe,
    targets: Targets,
    stage: str,
    steps: int,
    progress: Progress | None,
) -> None:
    with Collector(model) as collector:

        def ranges() -> Tensor:
            return range_loss(
                collector,
                targets,
                activation=recipe.activation_weight,
                variance=recipe.variance_weight,
                denominator=recipe.denominator_weight,
            )

        run_stage(
            model,
            folder.sampler(recipe, recipe.mix(noise=True), 1 if stage == "ranges" else 2),
            stage=stage,
            schedule=schedule(recipe, steps, recipe.tune_lr),
            folder=folder.checkpoints,
            log=folder.log,
            extra=ranges,
            progress=progress,
        )
