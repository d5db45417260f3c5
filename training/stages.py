"""The stages of a conversion into polynomials, as data: a recipe is a tuple of them, `machine.py` runs it.

    Swap         put another mixer in, on the parameters of the checkpoint or on fresh ones
    Continue     train on the task: next tokens, or classes
    Rows         give each row of PowerSoftmax one public factor: an exact change of form
    Ranges       train with the range losses, to targets
    Substitute   put fitted polynomials in the place of what is not polynomial
    Tune         train with the polynomials in place, the range losses still on; left out, nothing is tuned

`powersoftmax` is the recipe of arXiv 2410.09457 (methods.md 1.4: swap, continue, shrink the ranges, substitute),
`pointwise` that of arXiv 2311.08610 (methods.md 2.3: rebuild and train from scratch, range losses, substitute). Both
papers are silent on, or do without, training after the substitution; `tune_steps=0` is that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all stages have: a name, unique in its recipe, for logs, checkpoints and reports."""

    name: str

    def facts(self) -> dict[str, Any]:
        """Return the stage as plain data, its kind included."""
        return {"kind": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Swap(Stage):
    """Replace the mixers of blocks; all other parameters stay, and those of the mixer if it takes them.

    `fresh` starts over with new parameters from this seed: the model keeps its shape alone. `matched` calibration inputs
    rewrite queries and keys so that the powers follow the exponentials (`power_match.py`), and `fit` steps a layer go on
    from there (`distil.py`): without either, a swapped checkpoint has forgotten which keys repelled a query. `layers` are the
    blocks that it is done to, the others keep their mixers; None is all.
    """

    mixer: str
    power: int = 4
    eps: float = 1.0
    form: str = "stable"
    fresh: int | None = None
    matched: int = 0
    fit: int = 0
    layers: tuple[int, ...] | None = None

    def change(self) -> dict[str, Any]:
        """Return what `swapped_config` asks for; what is matched needs biases."""
        same = {name: getattr(self, name) for name in ("mixer", "power", "eps", "form", "layers")}
        return same | {"biases": self.fresh is None and self.matched > 0}


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """`steps` optimiser steps at the peak learning rate `lr`; 0 steps leave the model as it is."""

    steps: int
    lr: float
    sampler: int  # its number in the folder of the run: the seed of the batches
    noise: bool = True  # batches hold arbitrary inputs, so that range losses see what a user may give


@dataclass(frozen=True, kw_only=True)
class Continue(Training):
    """Train on the task, with exact functions and no other loss."""


@dataclass(frozen=True, kw_only=True)
class Rows(Stage):
    """Fix the public factor of each row so that the denominators of all rows centre on 1; the function is the same."""


@dataclass(frozen=True, kw_only=True)
class Ranges(Training):
    """Train with the range losses until the ranges lie in their targets, or for all `steps`.

    Targets: activations within +-`activation_bound`; variances within the ratio `variance_ratio`, centred on what the
    model has; denominators within `denominator_target`. Weights of 0 leave a kind alone.
    `outside`: stop once at most this share of all values on calibration inputs lies outside the targets, looked at
    every `every` steps; None: never, the schedule runs to its end.
    """

    activation_bound: float
    variance_ratio: float
    denominator_target: tuple[float, float]
    activation_weight: float
    variance_weight: float
    denominator_weight: float
    outside: float | None = None
    every: int = 50


@dataclass(frozen=True, kw_only=True)
class Substitute(Stage):
    """Put polynomials on intervals a factor `margin` wider than the targets, denominators on `denominator_interval`.

    `activation_spread`: fit activations where their inputs are, weighted by a normal density of this deviation, instead
    of evenly over the interval (None). A model that is tuned long afterwards needs the curvature near 0, not the tails.
    `cover`: where calibration inputs show more than the target, fit on that, widened. The range losses of a few steps do not
    bring a released model into narrow targets, and outside its interval a polynomial explodes.
    The switches replace one kind alone, to see what each substitution costs.
    """

    activation_degree: int
    norm_degree: int
    norm_newton: int
    reciprocal_degree: int
    margin: float
    denominator_interval: tuple[float, float]
    activation_spread: float | None = None
    cover: bool = False
    division: bool = True
    activation: bool = True
    norm: bool = True


@dataclass(frozen=True, kw_only=True)
class Tune(Training):
    """Train with the polynomials in place; the losses of the last Ranges stay on."""


def powersoftmax(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of the PowerSoftmax recipe on the softmax checkpoint of a run; on its power model, which has
    been trained as such, the first two are not needed (`recipe.start`).
    """
    swap = (
        Swap(
            name="swap",
            mixer="power_softmax",
            power=recipe.power,
            eps=recipe.eps,
            matched=recipe.matched,
            fit=recipe.fit_steps,
            layers=recipe.swapped_layers(),
        ),
        Continue(name="continue", steps=recipe.continue_steps, lr=recipe.tune_lr, sampler=3, noise=False),
    )
    return (
        *(swap if recipe.start == "softmax" else ()),
        Rows(name="rows"),
        _ranges(recipe, "ranges", 1),
        _substitute(recipe, "substitute"),
        Tune(name="tune", steps=recipe.tune_steps, lr=recipe.tune_lr, sampler=2),
    )


def pointwise(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of the pointwise recipe: rebuilt with sigma attention scaled by 1/sqrt(L) and trained from
    scratch, as many steps as the other models in all stages together.
    """
    before = recipe.power_steps if recipe.start == "power" else recipe.softmax_steps + recipe.continue_steps
    return (
        Swap(name="pointwise-swap", mixer="pointwise", fresh=recipe.seed, layers=recipe.swapped_layers()),
        Continue(name="pointwise-train", steps=before, lr=recipe.lr, sampler=0, noise=False),
        _ranges(recipe, "pointwise-ranges", 1),
        _substitute(recipe, "pointwise-substitute"),
        Tune(name="pointwise-tune", steps=recipe.tune_steps, lr=recipe.tune_lr, sampler=2),
    )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A recipe of stages by name: the model it starts from, and the name under which a folder keeps its result."""

    stages: Callable[[Recipe], tuple[Stage, ...]]
    start: Callable[[Recipe], str]
    result: str


CONVERSIONS = {
    "powersoftmax": Conversion(stages=powersoftmax, start=lambda recipe: recipe.start, result="polynomial"),
    "pointwise": Conversion(stages=pointwise, start=lambda recipe: "softmax", result="pointwise"),
}


def conversion(name: str) -> Conversion:
    """Return a conversion by name; an unknown name lists the known ones."""
    if name not in CONVERSIONS:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(CONVERSIONS)}")
    return CONVERSIONS[name]


def _ranges(recipe: Recipe, name: str, sampler: int) -> Ranges:
    return Ranges(
        name=name,
        steps=recipe.range_steps,
        lr=recipe.tune_lr,
        sampler=sampler,
        activation_bound=recipe.activation_bound,
        variance_ratio=recipe.variance_ratio,
        denominator_target=recipe.denominator_target,
        activation_weight=recipe.activation_weight,
        variance_weight=recipe.variance_weight,
        denominator_weight=recipe.denominator_weight,
        outside=recipe.range_outside,
    )


def _substitute(recipe: Recipe, name: str) -> Substitute:
    return Substitute(
        name=name,
        activation_degree=recipe.activation_degree,
        norm_degree=recipe.norm_degree,
        norm_newton=recipe.norm_newton,
        reciprocal_degree=recipe.reciprocal_degree,
        margin=recipe.margin,
        denominator_interval=recipe.denominator_interval,
        activation_spread=recipe.activation_spread,
        cover=recipe.cover,
    )
