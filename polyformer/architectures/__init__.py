"""How released checkpoints name and lay out their weights: one family a file, found by the `model_type` of config.json.

A family's file holds three functions: `longest` is the longest window, `config` translates its config.json into a
`ModelConfig`, `weights` takes its tensors out of a `Source` under their own names and returns them under ours. Nothing
here computes: the model that runs is `polyformer.model.Transformer`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from polyformer.architectures.source import Source
from polyformer.model import ModelConfig

__all__ = ["Family", "Source", "family"]

# model_type of config.json -> the file that knows its layout
FAMILIES = {
    "bert": "bert",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "llama": "llama",
    "roberta": "bert",
    "xlm-roberta": "bert",
}


class Family(Protocol):
    """What a file of this folder offers."""

    def longest(self, values: Mapping[str, Any]) -> int:
        """Return the longest window, in tokens, that the checkpoint was made for."""

    def config(self, values: Mapping[str, Any], length: int) -> ModelConfig:
        """Translate config.json for a window of `length` tokens; raises ValueError on a setting that we lack."""

    def weights(self, source: Source, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
        """Return our state dict; raises KeyError or ValueError where tensors and config differ."""


def family(model_type: str) -> Family:
    """Return the family of a model type; an unknown one lists the known ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    return importlib.import_module(f"{__name__}.{FAMILIES[model_type]}")
