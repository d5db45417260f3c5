"""Convert the model of a run into polynomials, by a recipe of stages (`stages.py`); what comes out stays in the folder.

powersoftmax   the PowerSoftmax model, or a softmax checkpoint with its attention swapped   -> polynomial.safetensors
pointwise      a model with sigma attention and no division, trained from scratch           -> pointwise.safetensors

The model is whatever the folder holds: a language model, trained here or released, an encoder with classes or a ViT.
stages.jsonl holds one report a stage (`machine.py`), metrics.json the figures of the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polyformer.models import placed
from training import machine
from training.folder import Folder
from training.outcome import require_polynomial
from training.recipe import Progress
from training.stages import conversion
from training.substitution import report
from training.train import schedule


def convert(
    out: Path, *, recipe: str = "powersoftmax", device: str = "auto", progress: Progress | None = None
) -> dict[str, Any]:
    """Convert a trained folder; write the polynomial model and return the metrics. An interrupted run goes on.

    Raises:
        FileNotFoundError: the model to start from is not trained; says how to get it.
        ValueError: the recipe is unknown; lists the known ones. Or the stages do not make a polynomial of the model.
    """
    kind = conversion(recipe)
    folder = Folder(out)
    numbers, task = folder.recipe(), folder.task()
    torch.set_num_threads(numbers.threads)
    torch.manual_seed(numbers.seed)
    place = folder.checkpoints / recipe
    if folder.has(kind.result):
        model = placed(folder.load_model(kind.result), device)
    else:
        name = folder.start_of(kind.start(numbers))
        if not folder.has(name) and not getattr(numbers, f"{name}_steps"):
            raise ValueError(
                f"the conversion starts from the {name} model, and {name}_steps is 0 in the recipe of {folder.path}: train a new "
                f"folder with {name}_steps above 0, or with another start"
            )
        start, stages = placed(folder.load_model(name), device), kind.stages(numbers)
        require_polynomial(start, stages)
        model, reports = machine.run(
            start,
            stages,
            machine.Material(
                sampler=lambda stage: task.sampler(numbers, stage=stage.sampler, noise=stage.noise),
                schedule=lambda stage: schedule(numbers, stage.steps, stage.lr),
                quality=task.quality,
                heldout=task.heldout,
                calibration=task.calibration(),
            ),
            place=place,
            log=folder.log,
            reports=folder.path / "stages.jsonl",
            progress=progress,
        )
        folder.update_metrics(**{_key("quality", kind.result): quality(reports)})
    figures = report(model, task)
    for name in [name for name in figures if name.startswith("heldout_")]:
        figures[f"{name}_{kind.result}"] = figures.pop(name)
    metrics = folder.update_metrics(**{_key(name, kind.result): value for name, value in figures.items()})
    # The model is last: while it is missing the states count, and all of this is done again.
    if not folder.has(kind.result):
        folder.save_model(kind.result, model)
    machine.finish(place)
    return metrics


def quality(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Return the held-out loss after every stage and every single substitution, from the reports."""
    losses: dict[str, float] = {}
    for facts in reports:
        losses |= {f"{facts['stage']} {kind}": q["heldout_loss"] for kind, q in facts.get("alone", {}).items()}
        losses[facts["stage"] + (" all" if "alone" in facts else "")] = facts["heldout_loss"]
    return losses


def _key(name: str, result: str) -> str:
    """The figures of the main result go by their plain names; those of another name it."""
    return name if result == "polynomial" or name.endswith(result) else f"{name}_{result}"
