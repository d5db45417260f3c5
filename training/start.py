"""The model that a run at scale begins with: the recipe's own with random weights, or a checkpoint.

    checkpoints/pythia-70m          a released checkpoint: what `load_pretrained` takes, a Hugging Face folder or a .gguf file
    runs/mine/power.safetensors     a model of a run's folder: released, softmax, power, polynomial or pointwise

A checkpoint brings its shape, the recipe its attention: where another mixer is asked for than the checkpoint has, the
attention is swapped (`training.swap`); a model that has it already, converted or not, stays as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from polyformer.architectures import family
from polyformer.model import ModelConfig, Transformer
from polyformer.models import Model
from polyformer.pretrained import load_pretrained, read_checkpoint
from training.folder import MODELS, Folder
from training.recipes import ScaleRecipe
from training.swap import swap_attention


def begin(recipe: ScaleRecipe) -> tuple[ScaleRecipe, Transformer | None]:
    """Return the recipe with the shape that its model has, and on rank 0 the model, whole. All processes call this
    together; rank 0 alone reads.

    Raises:
        ValueError: on all processes alike, if rank 0 cannot read the checkpoint or it is no causal language model.
    """
    source: Transformer | None = None
    said = [recipe.model.to_json(), ""]  # config, and what went wrong
    if dist.get_rank() == 0:
        try:
            source = first_model(recipe)
            said = [source.config.to_json(), ""]
        except (ValueError, OSError) as error:
            said = ["", str(error)]
        except KeyError as error:  # of config.json or of the tensors
            said = ["", f"{recipe.start} is not complete, {error.args[0]!r} is missing; fetch it again"]
    dist.broadcast_object_list(said)
    config, failure = said
    if failure:
        raise ValueError(failure)
    return recipe.with_(model=ModelConfig.from_json(config)), source


def first_model(recipe: ScaleRecipe) -> Transformer:
    """Return the model of a recipe before its first step, whole; raises as `begin` says, and FileNotFoundError."""
    if recipe.start is None:
        torch.manual_seed(recipe.seed)
        return Transformer(recipe.model)
    asked, model = recipe.model, load(Path(recipe.start), length=recipe.model.length)
    if not isinstance(model, Transformer) or not model.config.causal or model.config.head == "none":
        raise ValueError(f"{recipe.start} is no causal language model with a head; only those learn next tokens")
    if set(model.config.layer_mixers) == {asked.mixer}:
        return model
    return swap_attention(model, mixer=asked.mixer, power=asked.power, eps=asked.eps, form=asked.form)


def load(path: Path, *, length: int) -> Model:
    """Return the model of a checkpoint, a released one with a window of at most `length` tokens."""
    folder = path.parent if path.suffix == ".safetensors" else path
    if (folder / "config.json").is_file() and "models" in json.loads((folder / "config.json").read_text("utf-8")):
        if folder == path:
            held = [f"{name}.safetensors" for name in MODELS if Folder(folder).has(name)]
            raise ValueError(
                f"{path} is the folder of a run; name one of its models: {', '.join(held) or 'it has none'}"
            )
        return Folder(folder).load_model(path.stem)
    values, _ = read_checkpoint(folder)
    return load_pretrained(folder, length=min(length, family(values["model_type"]).longest(values)))
