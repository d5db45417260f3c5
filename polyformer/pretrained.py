"""Load a released checkpoint into our own `Transformer`: GPT-2, GPT-NeoX/Pythia, Llama-like, BERT/RoBERTa/MiniLM.

`load_pretrained(folder)` reads a local Hugging Face folder (config.json and safetensors), `load_pretrained(file.gguf)`
a Llama-like GGUF file, `load_pretrained(model)` a model of Hugging Face's `transformers` in memory; nothing is downloaded, and
`transformers` is needed by those alone who come with its models. The model that comes out is like one trained here: its attention is a
mixer, so `training.swap` can put PowerSoftmax in its place with the same parameters q, k, v, o. The families' names
and layouts are in `architectures/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from polyformer.architectures import Source, family
from polyformer.architectures.gguf_file import GGUFFile, LlamaNames, llama_config
from polyformer.architectures.safetensors_file import SafetensorsFiles
from polyformer.model import Transformer

MAX_DEFAULT_LENGTH = 1024  # every attention layer holds a mask of length^2


class Config(Protocol):
    """What is used of a `PretrainedConfig`."""

    def to_dict(self) -> dict[str, Any]: ...


class Released(Protocol):
    """What is used of a `PreTrainedModel`."""

    @property
    def config(self) -> Config: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


def load_pretrained(source: Path | str | Released, *, length: int | None = None) -> Transformer:
    """Return the model of a checkpoint, float32, softmax attention, in evaluation mode.

    Args:
        source: a folder with config.json and model.safetensors (or several and their index), a .gguf file, or a model of
            `transformers`, whose tensors are copied.
        length: window in tokens; None takes the checkpoint's own, at most 1024.

    Raises:
        FileNotFoundError: a file is missing, the sentence says which.
        KeyError, ValueError: the tensors are not those that the config implies, or it asks for what we lack.
    """
    if isinstance(source, (Path, str)):
        name, (values, tensors) = str(source), read_checkpoint(Path(source))
    else:
        name, values, tensors = type(source).__name__, source.config.to_dict(), source.state_dict()
    layout = family(values["model_type"])
    longest = layout.longest(values)
    if length is not None and not 1 <= length <= longest:
        raise ValueError(f"length is {length}; {name} was made for windows of 1 to {longest} tokens")
    config = layout.config(values, length or min(longest, MAX_DEFAULT_LENGTH))
    model = Transformer(config)
    model.load_state_dict(layout.weights(Source(tensors), values, config), assign=False)
    return model.eval()


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return config.json and the tensors, lazily, under the names of Hugging Face."""
    if path.suffix == ".gguf":
        file = GGUFFile(_existing(path, "give the path of a .gguf file"))
        return llama_config(file), LlamaNames(file)
    values = json.loads(
        _existing(path / "config.json", "give a folder in the layout of Hugging Face").read_text(encoding="utf-8")
    )
    if "model_type" not in values:
        raise ValueError(f"{path / 'config.json'} has no model_type; add it (for example 'gpt2')")
    return values, SafetensorsFiles(*_weight_files(path))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names {outside[0]!r}, which is not a file of its own folder")
        return [_existing(folder / name, f"{index.name} names it; fetch it too") for name in names]
    hint = "weights are read from safetensors alone"
    if list(folder.glob("*.bin")):
        hint += "; convert the .bin files (pickles, which may run code) with the safetensors package first"
    return [_existing(folder / "model.safetensors", hint)]


def _existing(path: Path, hint: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {hint}")
    return path
