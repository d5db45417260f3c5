"""The models that a run may hold and a stage may change: language models, encoders with classes, vision transformers, Swin.

What they have in common is a body, one `ModelConfig`. A change of mixer, norm or activation is a change of the body; all
around it (vocabulary, classes, patches) stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import nn

from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.model import ModelConfig, Transformer
from polyformer.swin import Swin, SwinConfig
from polyformer.vision import VisionConfig, ViT

Model = Transformer | Encoder | ViT | Swin
M = TypeVar("M", Transformer, Encoder, ViT, Swin, Model)

LARGEST_PASS = 1 << 27  # numbers of four bytes

KINDS: dict[str, tuple[type[Model], type[ModelConfig | ClassifierConfig]]] = {
    "transformer": (Transformer, ModelConfig),
    "encoder": (Encoder, ClassifierConfig),
    "vit": (ViT, VisionConfig),
    "swin": (Swin, SwinConfig),
}


def device_of(model: nn.Module) -> torch.device:
    """Return where a model lies; all of its parameters lie together."""
    return next(model.parameters()).device


def placed(model: M, name: str = "auto") -> M:
    """Move a model, in place, to the device of a name ("cpu", "cuda", "cuda:1"); "auto" moves one that lies on the CPU to CUDA
    where there is any.

    Raises:
        ValueError: torch does not see that device.
    """
    if name == "auto":
        name = "cuda" if device_of(model).type == "cpu" and torch.cuda.is_available() else str(device_of(model))
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, and torch sees {torch.cuda.device_count()} of CUDA here; use 'auto' or 'cpu'"
        )
    return model.to(name)


def body(model: Model) -> ModelConfig:
    """Return the config of the blocks, which is all there is to a language model."""
    return model.config if isinstance(model, Transformer) else model.config.body


def rebuilt(model: M, changed: ModelConfig) -> M:
    """Return a new model of the same kind around another body, on the same device; its parameters are at their start."""
    config = changed if isinstance(model, Transformer) else replace(model.config, body=changed)
    return type(model)(config).to(device_of(model))  # type: ignore[arg-type]


def at_once(model: Model) -> int:
    """Return how many inputs a forward pass may take, from 1 to 256, so that its logits and what the taps see, one block
    after the other, stay below half a GB.
    """
    config = body(model)
    outputs = config.length * config.vocab if isinstance(model, Transformer) else 0
    numbers = outputs + config.blocks * config.length * (config.hidden + 2 * config.width)
    return max(1, min(256, LARGEST_PASS // numbers))


def facts(model: Model) -> dict[str, Any]:
    """Return kind and config as plain data; a language model's has no kind, so that older files are read alike.

    Raises:
        TypeError: it is a model of no known kind.
    """
    kind = next((name for name, (cls, _) in KINDS.items() if isinstance(model, cls)), None)
    if kind is None:
        raise TypeError(f"{type(model).__name__} is no model that a run can hold; known: {', '.join(KINDS)}")
    return asdict(model.config) if kind == "transformer" else {"kind": kind, **asdict(model.config)}


def from_facts(values: Mapping[str, Any]) -> Model:
    """Return the model that `facts` describes, its parameters at their start.

    Raises:
        ValueError: the kind is unknown; lists the known ones.
    """
    rest = dict(values)
    kind = rest.pop("kind", "transformer")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of model {kind!r}; known: {', '.join(KINDS)}")
    cls, config = KINDS[kind]
    return cls(config.from_json(json.dumps(rest)))  # type: ignore[arg-type]
