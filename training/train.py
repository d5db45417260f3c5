"""Train the softmax twin and the PowerSoftmax model from scratch: same seeds, same data, same number of steps unless
the recipe says so. A run that was adopted has a released checkpoint in the place of scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from polyformer.models import placed
from polyformer.reading import Reading
from training.classes import image_classes, text_classes
from training.data import EOT_ID, encode_documents, read_documents, split_docs, train_bpe
from training.examples import parts, read_images, read_texts
from training.folder import Folder
from training.loop import Schedule, discard_checkpoint, run_stage
from training.outcome import require_trainable
from training.recipe import Progress, Recipe
from training.sources import Source
from training.tasks import Task, next_tokens


def train(
    out: Path, recipe: Recipe, *, text: Path | None = None, device: str = "auto", progress: Progress | None = None
) -> dict[str, Any]:
    """Train both exact models into folder `out` and return the metrics; an interrupted run goes on where it stopped.

    Args: `text` is what the recipe's task asks for: a file or a folder of .txt files (None: the State of the Union excerpt of
    this package), a folder with a folder of texts for each class, or an .npz of images. `device`, as
    `polyformer.models.placed` has it, is where it runs, no part of what the run is.

    Raises:
        FileExistsError: the folder holds a run of another recipe, or of other data.
        ValueError: the recipe has no models, or none that becomes a polynomial; nothing has been written.
    """
    folder, files = Folder(out), "*/*.txt" if recipe.task == "texts" else "*.txt"
    if not folder.started:
        task, tokenizer = prepared(recipe, text)
        require_trainable(recipe, task)
        folder.start(recipe, task, tokenizer, Source.of(text, files=files))
    elif folder.recipe() != recipe:
        raise FileExistsError(f"{folder.path} holds a run of another recipe; choose an empty folder")
    else:
        require_source(folder, Source.of(text, files=files))
    return train_on(out, device=device, progress=progress)


def require_source(folder: Folder, given: Source) -> None:
    """Raise FileExistsError if the data of a run are others; equal ones may have moved."""
    own = folder.source()
    if own is not None and own.sha256 != given.sha256:
        raise FileExistsError(
            f"{folder.path} holds a run on {own.path} (SHA-256 {own.sha256[:12]}), and what {given.path} holds now is other data "
            f"({given.sha256[:12]}); give the same data, or choose an empty folder"
        )


def train_on(out: Path, *, device: str = "auto", progress: Progress | None = None) -> dict[str, Any]:
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
                placed(model, device),
                task.sampler(recipe, stage=0, noise=False),
                stage=name,
                schedule=schedule(recipe, steps, recipe.lr),
                folder=folder.checkpoints,
                log=folder.log,
                progress=progress,
            )
            folder.save_model(name, model)
        discard_checkpoint(folder.checkpoints, name)
        trained = placed(folder.load_model(name), device)
        figures = {f"{key}_{name}": value for key, value in task.quality(trained).items()}
        folder.update_metrics(**figures, parameters=trained.parameter_count())
    return folder.update_metrics()


def prepared(recipe: Recipe, text: Path | None) -> tuple[Task, Tokenizer | None]:
    """Return the task of a run from scratch, and the tokenizer that was trained for it.

    Raises:
        ValueError: there is nothing to learn classes from, or too little text for the vocabulary.
    """
    if recipe.task == "next tokens":
        docs, heldout = split_docs(read_documents(text), recipe.holdout)
        tokenizer = trained_bpe(docs, recipe.vocab)
        return next_tokens(recipe, encode_documents(tokenizer, docs), encode_documents(tokenizer, heldout)), tokenizer
    if text is None:
        raise ValueError(f"a run on classes of {recipe.task} needs data: give their folder or file")
    if recipe.task == "images":
        return image_classes(recipe, read_images(text)), None
    found = read_texts(text)
    train, _ = parts(len(found.labels), recipe.holdout)
    tokenizer = trained_bpe([found.examples[i] for i in train], recipe.vocab)
    reading = Reading(pad=EOT_ID, side="right", classes=found.names)
    return text_classes(recipe, found, tokenizer, reading), tokenizer


def trained_bpe(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Return a byte-level BPE of `vocab` tokens; raises ValueError if the texts do not give as many."""
    tokenizer = train_bpe(texts, vocab)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, the recipe asks for {vocab}; give more text, or a smaller "
            "vocabulary (--set vocab=...)"
        )
    return tokenizer


def schedule(recipe: Recipe, steps: int, lr: float) -> Schedule:
    return Schedule(
        steps=steps,
        lr=lr,
        warmup=min(recipe.warmup, max(1, steps // 4)),
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        checkpoint_every=recipe.checkpoint_every,
    )
