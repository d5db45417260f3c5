"""Where the tensors of a checkpoint come from: a mapping by name that is emptied, so that nothing is forgotten.

A family takes each tensor once, with the shape that it expects. What is left at the end and not known to be useless is
an error: a weight that was not loaded would be a wrong model without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


class Source:
    """Tensors by their original names. `tensors` may be lazy: a tensor is read when it is taken.

    `prefixes` are tried in order and the first under which some name is found is put before every name ("bert.", "").
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, prefixes: Sequence[str] = ("",), marker: str = "") -> None:
        self.tensors = tensors
        self.left = set(tensors)
        self.prefix = next((p for p in prefixes if p + marker in self.left), prefixes[-1])

    def under(self, *prefixes: str, marker: str) -> Source:
        """Return a view that puts before every name the first prefix under which `marker` exists."""
        source = Source(self.tensors, prefixes=prefixes, marker=marker)
        source.left = self.left
        return source

    def has(self, name: str) -> bool:
        return self.prefix + name in self.left

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor as float32 and cross it off.

        Raises:
            KeyError: there is none of that name.
            ValueError: its shape is not the one that the config implies.
        """
        full = self.prefix + name
        if full not in self.left:
            near = ", ".join(sorted(self.left)[:4])
            raise KeyError(
                f"the checkpoint has no tensor {full!r} (left: {near} ...); is it complete, and of this family?"
            )
        tensor = self.tensors[full]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{full} has shape {tuple(tensor.shape)}, its config implies {shape}; the two do not belong together"
            )
        self.left.discard(full)
        return tensor.to(torch.float32)

    def linear(
        self, name: str, target: str, inputs: int, outputs: int, *, biased: bool = True, fill: bool = False
    ) -> dict[str, Tensor]:
        """Take name.weight [out, in] and, if ours is biased, name.bias; `fill` puts zeros where there is none."""
        found = {f"{target}.weight": self.take(f"{name}.weight", outputs, inputs)}
        if biased:
            absent = fill and not self.has(f"{name}.bias")
            found[f"{target}.bias"] = torch.zeros(outputs) if absent else self.take(f"{name}.bias", outputs)
        return found

    def layer_norm(self, name: str, target: str, width: int) -> dict[str, Tensor]:
        """Take weight and bias of a LayerNorm; old TensorFlow conversions call them gamma and beta."""
        gamma, beta = ("gamma", "beta") if self.has(f"{name}.gamma") else ("weight", "bias")
        return {
            f"{target}.gamma": self.take(f"{name}.{gamma}", width),
            f"{target}.beta": self.take(f"{name}.{beta}", width),
        }

    def finish(self, *useless: str) -> None:
        """Raise ValueError if a tensor was not taken and matches none of the patterns `useless`."""
        forgotten = sorted(n for n in self.left if not any(re.search(pattern, n) for pattern in useless))
        if forgotten:
            raise ValueError(
                f"{len(forgotten)} tensors have no place in the model: {', '.join(forgotten[:4])}; "
                "loading without them would give another function"
            )


def activation(values: Mapping[str, Any], key: str) -> str:
    """Return our name of the activation that config.json gives under `key`."""
    name = values[key]
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown {key} {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def demand(values: Mapping[str, Any], **wanted: object) -> None:
    """Raise ValueError if config.json sets one of these fields to another value than ours; absent or null is fine."""
    for key, value in wanted.items():
        if values.get(key) not in (None, value):
            raise ValueError(f"config.json has {key}={values[key]!r}; only {value!r} is implemented")


def rope_base(values: Mapping[str, Any], *keys: str) -> float:
    """Return the base of rotary positions, from `keys` or from rope_parameters; refuse scaled variants."""
    found = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    for settings in (found, scaling):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json scales rotary positions ({kind!r}); only plain ones are implemented")
    named = [values[k] for k in keys if values.get(k) is not None]
    return float(found.get("rope_theta") or (named[0] if named else 10000.0))
