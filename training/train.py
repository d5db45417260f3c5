"""Train the softmax twin and the PowerSoftmax model from scratch: same seeds, same data, same number of steps unless
the recipe says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyformer.model import Transformer
from training.folder import Folder, calibration_tokens, heldout_windows
from training.loop import Schedule, discard_checkpoint, run_stage, token_loss
from training.recipe import Progress, Recipe


def train(out: Path, recipe: Recipe, *, text: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Train both exact models into folder `out` and return the metrics; an interrupted run goes on where it stopped.

    Args: `text` is a file or a folder of .txt files (None: the State of the Union excerpt of this package).
    """
    folder = Folder(out)
    folder.start(recipe, text)
    torch.set_num_threads(recipe.threads)
    if not (folder.path / "calibration.npz").exists():
        np.savez_compressed(folder.path / "calibration.npz", tokens=calibration_tokens(out))
    for name, config, steps in (
        ("softmax", recipe.softmax_config(), recipe.softmax_steps),
        ("power", recipe.power_config(), recipe.power_steps),
    ):
        if not folder.has(name):
            torch.manual_seed(recipe.seed)
            model = Transformer(config)
            run_stage(
                model,
                folder.sampler(recipe, recipe.mix(noise=False), 0),
                stage=name,
                schedule=schedule(recipe, steps, recipe.lr),
                folder=folder.checkpoints,
                log=folder.log,
                progress=progress,
            )
            folder.save_model(name, model)
        discard_checkpoint(folder.checkpoints, name)
        folder.update_metrics(**{f"heldout_loss_{name}": heldout_loss(folder.load_model(name), heldout_windows(out))})
    return folder.update_metrics(
        text="state of the union 1993-2019" if text is None else str(text), parameters=model_size(folder)
    )


def schedule(recipe: Recipe, steps: int, lr: float) -> Schedule:
    return Schedule(
        steps=steps,
        lr=lr,
        warmup=min(recipe.warmup, max(1, steps // 4)),
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        checkpoint_every=recipe.checkpoint_every,
    )


def model_size(folder: Folder) -> int:
    return folder.load_model("power").parameter_count()


@torch.no_grad()
def heldout_loss(model: Transformer, windows_NS: Tensor, *, batch: int = 256) -> float:
    """Mean cross entropy in nats a token over windows [n, T + 1]."""
    total = sum(float(token_loss(model(w[:, :-1]), w[:, 1:])) * len(w) for w in windows_NS.split(batch))
    return total / len(windows_NS)
