"""What a conversion makes of a model, on the meta device: every form that it passes through, without a single weight. What
cannot be built, or ends as no polynomial, says so here, before anything is trained or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from polyformer.models import Model, body, rebuilt
from training.recipe import Recipe
from training.stages import Rows, Stage, Substitute, Swap, powersoftmax
from training.substitution import KINDS, polynomial_config
from training.swap import swapped_config
from training.tasks import Task


def require_trainable(recipe: Recipe, task: Task) -> None:
    """Build both exact models of a recipe and what it makes of them, and ask its data for all that stages will.

    Raises:
        ValueError: a model cannot be, or does not become a polynomial, or the data are too few.
    """
    with torch.device("meta"):
        twin, power = task.model(recipe.softmax_config()), task.model(recipe.power_config())
    require_polynomial(twin if recipe.start == "softmax" else power, powersoftmax(recipe))
    task.sampler(recipe, stage=0, noise=True).batch()
    task.calibration()
    if not len(task.heldout):
        raise ValueError(f"nothing of the data is held out at holdout={recipe.holdout}; give more, or hold out more")


def require_polynomial(start: Model, stages: Sequence[Stage]) -> None:
    """Raise ValueError, naming the block, unless these stages make a polynomial of a model."""
    made = outcome(start, stages)
    for i, block in enumerate(made.blocks):  # type: ignore[arg-type]
        try:
            block.depth  # noqa: B018  it raises where a part is no polynomial
        except ValueError as error:
            raise ValueError(f"block {i} does not become a polynomial: {error}") from error
    made.levels  # noqa: B018  the norm outside the blocks


def outcome(start: Model, stages: Sequence[Stage]) -> Model:
    """Return, on the meta device, the model that stages make of another one; training changes no form."""
    config = body(start)
    with torch.device("meta"):
        made: Model = type(start)(start.config)  # type: ignore[arg-type]
        for stage in stages:
            if isinstance(stage, Swap):
                config = swapped_config(config, **stage.change())
            elif isinstance(stage, Rows):
                config = replace(config, form="rows")
            elif isinstance(stage, Substitute):
                config = polynomial_config(
                    config,
                    [kind for kind in KINDS if getattr(stage, kind)],
                    division=stage.reciprocal_degree,
                    activation=stage.activation_degree,
                    norm=stage.norm_degree,
                    newton=stage.norm_newton,
                )
            else:
                continue
            made = rebuilt(made, config)
    return made
