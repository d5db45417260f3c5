"""Train the softmax twin and the PowerSoftmax model from scratch: same seeds, same data, same number of steps unless
the recipe says so. A run that was adopted has a released checkpoint in the place of scratch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training.data import encode_documents, read_documents, split_docs, train_bpe
from training.folder import Folder
from training.loop import Schedule, discard_checkpoint, run_stage
from training.recipe import Progress, Recipe
from training.tasks import NextTokens, Task


def train(out: Path, recipe: Recipe, *, text: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Train both exact models into folder `out` and return the metrics; an interrupted run goes on where it stopped.

    Args: `text` is a file or a folder of .txt files (None: the State of the Union excerpt of this package).

    Raises:
        FileExistsError: the folder holds a run of another recipe.
    """
    folder = Folder(out)
    if not folder.started:
        folder.start(recipe, *prepared(recipe, text))
    elif folder.recipe() != recipe:
        raise FileExistsError(f"{folder.path} holds a run of another recipe; choose an empty folder")
    folder.update_metrics(text="state of the union 1993-2019" if text is None else str(text))
    return train_on(out, progress=progress)


def train_on(out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train what the recipe of a started folder asks for and the folder lacks; return the metrics."""
    folder = Folder(out)
    recipe, task = folder.recipe(), folder.task()
    torch.set_num_threads(recipe.threads)
    for name, config, steps in (
        ("softmax", recipe.softmax_config(), recipe.softmax_steps),
        ("power", recipe.power_config(), recipe.power_steps),
    ):
        if not steps:
            continue
        if not folder.has(name):
            torch.manual_seed(recipe.seed)
            model = folder.load_model("released") if folder.has("released") else task.model(config)
            run_stage(
                model,
                task.sampler(recipe, stage=0, noise=False),
                stage=name,
                schedule=schedule(recipe, steps, recipe.lr),
                folder=folder.checkpoints,
                log=folder.log,
                progress=progress,
            )
            folder.save_model(name, model)
        discard_checkpoint(folder.checkpoints, name)
        trained = folder.load_model(name)
        figures = {f"{key}_{name}": value for key, value in task.quality(trained).items()}
        folder.update_metrics(**figures, parameters=trained.parameter_count())
    return folder.update_metrics()


def prepared(recipe: Recipe, text: Path | None) -> tuple[Task, Tokenizer]:
    """Return the task of a run from scratch, and the tokenizer that was trained for it."""
    train_docs, heldout_docs = split_docs(read_documents(text), recipe.holdout)
    tokenizer = train_bpe(train_docs, recipe.vocab)
    if tokenizer.get_vocab_size() != recipe.vocab:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, the recipe asks for {recipe.vocab}; give more text, "
            "or call training.train with a recipe of a smaller `vocab`"
        )
    task = NextTokens(
        train=tuple(encode_documents(tokenizer, train_docs)),
        docs=tuple(encode_documents(tokenizer, heldout_docs)),
        length=recipe.length,
        vocab=recipe.vocab,
        measured=recipe.heldout,
        chosen=recipe.calibration,
    )
    return task, tokenizer


def schedule(recipe: Recipe, steps: int, lr: float) -> Schedule:
    return Schedule(
        steps=steps,
        lr=lr,
        warmup=min(recipe.warmup, max(1, steps // 4)),
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        checkpoint_every=recipe.checkpoint_every,
    )
