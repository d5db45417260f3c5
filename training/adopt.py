"""Take a released checkpoint into the folder of a run, where training, the stages of a conversion and the export go on.

What a run needs beside the weights comes along: the tokenizer as it was released, the id that ends a document (in our own
tokenizers it is 0, in GPT-2's 0 is "!"), and the user's text in that tokenizer. The released weights stay as they are, in
`released.safetensors`; training writes others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyformer.architectures import family
from polyformer.model import Transformer
from polyformer.pretrained import load_pretrained, read_checkpoint
from training.data import encode_documents, read_documents, split_docs
from training.evaluate import bytes_per_token, language
from training.folder import Folder
from training.recipe import Recipe
from training.tasks import NextTokens
from training.vocabulary import checkpoint_tokenizer, document_end, require_rows

# Fields of a recipe that repeat what the checkpoint is; a window has its own option.
OF_THE_MODEL = (
    "vocab",
    "length",
    "width",
    "heads",
    "hidden",
    "blocks",
    "parallel",
    "activation",
    "exact_norms",
    "las_decay",
)
LENGTH = 128  # tokens of a window, where the checkpoint has as many


def adopt(
    checkpoint: Path,
    out: Path,
    *,
    text: Path | None = None,
    length: int | None = None,
    steps: int = 100,
    batch: int = 8,
    end: str | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a released causal model into the new folder `out` and return its metrics; whatever fails leaves nothing behind.

    Args:
        checkpoint: what `load_pretrained` takes: a Hugging Face folder or a .gguf file; also a safetensors file of such a folder.
        text: a file or folder of .txt files to train and judge on (None: the State of the Union excerpt of this package).
        length: window in tokens; None is the checkpoint's own, at most 128.
        steps, batch: of each stage of training.
        end: token, or its id, that ends a document; None is what the checkpoint says.
        changes: other numbers of the recipe, "name=value".

    Raises:
        FileExistsError: the folder is there; nothing in it is touched.
        FileNotFoundError: a file of the checkpoint is missing, the sentence says which.
        ValueError: architecture, vocabulary or text do not fit; says what to do.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists, and nothing in it is overwritten; choose another folder")
    checkpoint = checkpoint.parent if checkpoint.suffix == ".safetensors" else checkpoint
    values, _ = read_checkpoint(checkpoint)
    tokenizer = checkpoint_tokenizer(checkpoint)
    model = load_pretrained(checkpoint, length=length or min(LENGTH, family(values["model_type"]).longest(values)))
    require_predictions(model, checkpoint)
    require_rows(tokenizer, model.config.vocab, checkpoint)
    standard = Recipe.adopted(model.config, steps=steps, batch=batch)
    recipe = standard.changed(changes)
    for name in OF_THE_MODEL:
        if getattr(recipe, name) != getattr(standard, name):
            raise ValueError(f"{name} is {getattr(standard, name)!r} in the checkpoint and cannot be set")
    docs = read_documents(text)
    train, heldout = split_docs(docs, recipe.holdout)
    task = NextTokens(
        train=tuple(encode_documents(tokenizer, train)),
        docs=tuple(encode_documents(tokenizer, heldout)),
        length=recipe.length,
        vocab=recipe.vocab,
        end=document_end(tokenizer, values, end),
        measured=recipe.heldout,
        chosen=recipe.calibration,
    )
    figures = asdict(language(model, task.windows, bytes_per_token=bytes_per_token(tokenizer, heldout), batch=8))
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        folder = Folder(place)
        folder.start(recipe, task, tokenizer)
        folder.save_model("released", model)
        metrics = folder.update_metrics(
            released=str(checkpoint),
            text="state of the union 1993-2019" if text is None else str(text),
            parameters=model.parameter_count(),
            end=task.end,
            heldout_loss_released=figures["loss"],
            perplexity_released=figures["perplexity"],
            bits_per_byte_released=figures["bits_per_byte"],
        )
        place.chmod(0o755)  # mkdtemp's is for its owner alone
        place.rename(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return metrics


def require_predictions(model: Transformer, checkpoint: Path) -> None:
    """Raise ValueError for an encoder, which predicts no token."""
    if model.config.head == "none" or not model.config.causal:
        raise ValueError(
            f"{checkpoint} is an encoder: it gives states and predicts no next token, so there is nothing to train it on"
        )
