"""Take a released checkpoint into the folder of a run, where training, the stages of a conversion and the export go on:
a causal model on next tokens, an encoder with a new head on classes of texts.

What a run needs beside the weights comes along: the tokenizer as it was released, the id that ends a document (in our own
tokenizers it is 0, in GPT-2's 0 is "!"), and the user's text in that tokenizer. The released weights stay as they are, in
`released.safetensors`; training writes others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyformer.architectures import family
from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.model import Transformer
from polyformer.models import Model, at_once, device_of, placed
from polyformer.pretrained import load_pretrained, read_checkpoint
from polyformer.reading import Reading
from training.classes import text_classes
from training.data import encode_documents, read_documents, split_docs
from training.evaluate import bytes_per_token, language
from training.examples import read_texts
from training.folder import Folder
from training.outcome import require_polynomial
from training.recipe import SHARED, Recipe
from training.sources import Source
from training.stages import powersoftmax
from training.tasks import Task, next_tokens
from training.vocabulary import checkpoint_tokenizer, document_end, require_rows

# Fields of a recipe that repeat what the checkpoint is; a window has its own option.
OF_THE_MODEL = (*(name for name in SHARED if name not in ("power", "eps")), "exact_norms", "mixers")
# A released model has softmax: the conversion swaps it, and there is no power model to train before that.
OF_THE_START = ("task", "start", "power_steps")
LENGTH = 128  # tokens of a window, where the checkpoint has as many


def adopt(
    checkpoint: Path,
    out: Path,
    *,
    text: Path | None = None,
    classes: Path | None = None,
    length: int | None = None,
    steps: int = 100,
    batch: int = 8,
    end: str | None = None,
    device: str = "auto",
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a released model into the new folder `out` and return its metrics; whatever fails leaves nothing behind.

    Args:
        checkpoint: what `load_pretrained` takes: a Hugging Face folder or a .gguf file; also a safetensors file of such a folder.
        text: a file or folder of .txt files to train and judge a causal model on (None: the State of the Union excerpt of this
            package).
        classes: a folder with a folder of .txt files for each class, which an encoder is to tell.
        length: window in tokens; None is the checkpoint's own, at most 128.
        steps, batch: of each stage of training.
        end: token, or its id, that ends a document; None is what the checkpoint says.
        device: where the model is measured, as `polyformer.models.placed` has it.
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
    try:
        longest = family(values["model_type"]).longest(values)
        released = placed(load_pretrained(checkpoint, length=length or min(LENGTH, longest)), device)
    except KeyError as error:  # of config.json or of the tensors
        raise ValueError(f"{checkpoint} is not complete, {error.args[0]!r} is missing; fetch it again") from error
    require_task(released, checkpoint, text=text, classes=classes)
    require_rows(tokenizer, released.config.vocab, checkpoint)
    standard = Recipe.adopted(released.config, steps=steps, batch=batch)
    recipe = standard.changed(changes)
    for name in OF_THE_MODEL:
        if getattr(recipe, name) != getattr(standard, name):
            raise ValueError(f"{name} is {getattr(standard, name)!r} in the checkpoint and cannot be set")
    for name in OF_THE_START:
        if getattr(recipe, name) != getattr(standard, name):
            raise ValueError(
                f"{name} is {getattr(standard, name)!r} where a run starts from a checkpoint with softmax and cannot be set; "
                "continue_steps train the swapped model"
            )
    require_polynomial(released, powersoftmax(recipe))
    model: Model
    task: Task
    if classes is not None:
        found = read_texts(classes)
        pad = values.get("pad_token_id") or 0
        reading = Reading(pad=pad, side="right", special=True, classes=found.names)
        task = text_classes(recipe, found, tokenizer, reading)
        model = with_classes(released, len(found.names), seed=recipe.seed)
        figures = {f"{name}_released": value for name, value in task.quality(model).items()}
    else:
        train, heldout = split_docs(read_documents(text), recipe.holdout)
        mark = document_end(tokenizer, values, end)
        task = next_tokens(recipe, encode_documents(tokenizer, train), encode_documents(tokenizer, heldout), end=mark)
        model = released
        measured = language(
            released, task.windows, bytes_per_token=bytes_per_token(tokenizer, heldout), batch=at_once(model)
        )
        figures = {
            "end": mark,
            "heldout_loss_released": measured.loss,
            "perplexity_released": measured.perplexity,
            "bits_per_byte_released": measured.bits_per_byte,
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        folder = Folder(place)
        source = Source.of(classes or text, files="*.txt" if classes is None else "*/*.txt")
        folder.start(recipe, task, tokenizer, source)
        folder.save_model("released", model)
        metrics = folder.update_metrics(
            released=str(checkpoint),
            parameters=model.parameter_count(),
            **figures,
        )
        place.chmod(0o755)  # mkdtemp's is for its owner alone
        place.rename(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return metrics


def require_task(model: Transformer, checkpoint: Path, *, text: Path | None, classes: Path | None) -> None:
    """Raise ValueError unless a causal model has text, or an encoder has classes."""
    encoder = model.config.head == "none" or not model.config.causal
    if encoder and (classes is None or text is not None):
        raise ValueError(
            f"{checkpoint} is an encoder: it predicts no next token; give it classes to tell, --classes with a folder of texts "
            "for each, and no --text"
        )
    if classes is not None and not encoder:
        raise ValueError(
            f"{checkpoint} is a causal model: it is trained on next tokens; give --text instead of --classes"
        )


def with_classes(model: Transformer, classes: int, *, seed: int) -> Encoder:
    """Return an encoder with a new head around the blocks of a released one; token type 0 joins the positions."""
    torch.manual_seed(seed)
    body = replace(model.config, token_types=0, head="linear")
    made = Encoder(ClassifierConfig(body=body, classes=classes)).to(device_of(model))
    state = model.state_dict()
    if "segment.weight" in state:
        state["position"] = state["position"] + state.pop("segment.weight")[0]
    head = {name: value for name, value in made.state_dict().items() if name.startswith("head.")}
    made.load_state_dict(state | head)
    return made.eval()
