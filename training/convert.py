"""Convert the model of a run into polynomials, by a recipe of stages (`stages.py`); what comes out stays in the folder.

powersoftmax   the PowerSoftmax model, or the softmax checkpoint with its attention swapped -> polynomial.safetensors
pointwise      a model with sigma attention and no division, trained from scratch           -> pointwise.safetensors

stages.jsonl holds one report a stage (`machine.py`), metrics.json the figures of the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from training import machine
from training.folder import Folder, calibration_tokens, heldout_windows, stress_tokens
from training.recipe import Progress
from training.stages import conversion
from training.substitution import report
from training.train import schedule


def convert(out: Path, *, recipe: str = "powersoftmax", progress: Progress | None = None) -> dict[str, Any]:
    """Convert a trained folder; write the polynomial model and return the metrics. An interrupted run goes on.

    Raises:
        ValueError: the recipe is unknown; lists the known ones.
    """
    kind = conversion(recipe)
    folder = Folder(out)
    numbers = folder.recipe()
    torch.set_num_threads(numbers.threads)
    torch.manual_seed(numbers.seed)
    windows = heldout_windows(out)
    place = folder.checkpoints / recipe
    if not folder.has(kind.result):
        model, reports = machine.run(
            folder.load_model(kind.start(numbers)),
            kind.stages(numbers),
            machine.Material(
                sampler=lambda stage: folder.sampler(numbers, numbers.mix(noise=stage.noise), stage.sampler),
                schedule=lambda stage: schedule(numbers, stage.steps, stage.lr),
                heldout_NS=windows,
                calibration_NT=torch.from_numpy(calibration_tokens(out)),
            ),
            place=place,
            log=folder.log,
            reports=folder.path / "stages.jsonl",
            progress=progress,
        )
        # The model is last: while it is missing the states count, and all of this is done again.
        folder.update_metrics(**{_key("quality", kind.result): quality(reports)})
        folder.save_model(kind.result, model)
    machine.finish(place)
    figures = report(folder.load_model(kind.result), windows, torch.from_numpy(stress_tokens(out)))
    figures[f"heldout_loss_{kind.result}"] = figures.pop("heldout_loss_polynomial")
    return folder.update_metrics(**{_key(name, kind.result): value for name, value in figures.items()})


def quality(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Return the held-out loss after every stage and every single substitution, from the reports."""
    losses: dict[str, float] = {}
    for facts in reports:
        losses |= {f"{facts['stage']} {kind}": loss for kind, loss in facts.get("alone", {}).items()}
        losses[facts["stage"] + (" all" if "alone" in facts else "")] = facts["heldout_loss"]
    return losses


def _key(name: str, result: str) -> str:
    """The figures of the main result go by their plain names; those of another name it."""
    return name if result == "polynomial" or name.endswith(result) else f"{name}_{result}"
