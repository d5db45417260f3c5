"""What a run is trained on and judged by: the next tokens of documents, or the classes of texts and images.

A task belongs to a folder: `config.json` holds its `facts`, its tensors lie beside. It gives what training and the stages
of a conversion ask for: batches, inputs on which ranges are measured, and the quality of a model on what was held out.

Shapes: N examples, T positions, S = T + 1, CHW channels, height and width of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from polyformer.model import ModelConfig, Transformer
from polyformer.models import Model, at_once
from polyformer.reading import Reading
from training.data import EOT_ID, Sampler, cut_windows, noise_windows, padded_windows
from training.evaluate import heldout_loss
from training.loop import Batches
from training.recipe import Recipe

CALIBRATION_SEED, STRESS_SEED = 123_456_789, 987_654_321


class Task(Protocol):
    """What training and a conversion need to know."""

    @property
    def file(self) -> str:
        """Name of its tensors in the folder of a run."""

    @property
    def heldout(self) -> Tensor:
        """Inputs [N, ...] that nothing was trained on."""

    @property
    def reading(self) -> Reading:
        """How a client makes inputs of a text and reads the outputs."""

    def model(self, body: ModelConfig) -> Model:
        """Return a new model of this task around a body."""

    def sampler(self, recipe: Recipe, *, stage: int, noise: bool) -> Batches:
        """Return the batches of a stage: its number is their seed; `noise` mixes arbitrary inputs in."""

    def quality(self, model: Model) -> dict[str, float]:
        """Return figures of what was held out, `heldout_loss` (nats) the first."""

    def calibration(self) -> Tensor:
        """Return inputs that choose row factors, targets and intervals: of the training side, short ones, arbitrary ones."""

    def stress(self) -> Tensor:
        """Return unseen inputs of every kind that a user may give."""

    def facts(self) -> dict[str, Any]:
        """Return what `loaded` needs beside the tensors, as plain data."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the data."""


@dataclass(frozen=True, kw_only=True)
class NextTokens:
    """Documents as token ids, one int64 vector each, in windows of `length` tokens.

    `end` ends a document and pads; `measured` and `chosen` are the `heldout` and `calibration` of the recipe.
    """

    train: tuple[Tensor, ...] = field(repr=False)
    docs: tuple[Tensor, ...] = field(repr=False)  # held out
    length: int
    vocab: int
    end: int = EOT_ID
    measured: int = 0
    chosen: int = 512
    file: str = "tokens"

    @property
    def windows(self) -> Tensor:
        """Held-out text in windows [N, S] without overlap, inputs and targets in one."""
        return spread(cut_windows(self.docs, self.length + 1), self.measured)

    @property
    def heldout(self) -> Tensor:
        return self.windows[:, :-1]

    @property
    def reading(self) -> Reading:
        return Reading(pad=self.end)

    def model(self, body: ModelConfig) -> Transformer:
        return Transformer(body)

    def sampler(self, recipe: Recipe, *, stage: int, noise: bool) -> Sampler:
        return Sampler(
            self.train,
            length=self.length,
            vocab=self.vocab,
            mix=recipe.mix(noise=noise),
            seed=recipe.seed * 1000 + stage,
            end=self.end,
        )

    def quality(self, model: Model) -> dict[str, float]:
        return {"heldout_loss": heldout_loss(model, self.windows, batch=at_once(model))}

    def calibration(self) -> Tensor:
        g = torch.Generator().manual_seed(CALIBRATION_SEED)
        windows = cut_windows(self.train, self.length)
        text = windows[torch.randperm(len(windows), generator=g)[: self.chosen]]
        short = padded_windows(self.train, self.length, end=self.end)
        short = short[torch.randperm(len(short), generator=g)[: self.chosen // 4]]
        return torch.cat([text, short, noise_windows(self.chosen // 4, self.length, self.vocab, g)])

    def stress(self) -> Tensor:
        """Short prompts of every length from held-out text, and windows of arbitrary tokens."""
        g = torch.Generator().manual_seed(STRESS_SEED)
        noise = noise_windows(2 * self.chosen, self.length, self.vocab, g)
        return torch.cat([spread(padded_windows(self.docs, self.length, end=self.end), self.chosen), noise])

    def facts(self) -> dict[str, Any]:
        return {"kind": "next tokens", **{name: getattr(self, name) for name in NUMBERS}}

    def tensors(self) -> dict[str, Tensor]:
        train = {f"train.{i}": d for i, d in enumerate(self.train)}
        return train | {f"heldout.{i}": d for i, d in enumerate(self.docs)}

    @classmethod
    def loaded(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NextTokens:
        """Return the task of a folder."""

        def part(name: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            return tuple(tensors[f"{name}.{i}"] for i in range(count))

        return cls(
            train=part("train"),
            docs=part("heldout"),
            **{name: facts[name] for name in NUMBERS if name in facts},
        )


NUMBERS = ("length", "vocab", "end", "measured", "chosen")


def next_tokens(recipe: Recipe, train: Sequence[Tensor], heldout: Sequence[Tensor], *, end: int = EOT_ID) -> NextTokens:
    """Return the task of token documents, measured as the recipe says."""
    return NextTokens(
        train=tuple(train),
        docs=tuple(heldout),
        length=recipe.length,
        vocab=recipe.vocab,
        end=end,
        measured=recipe.heldout,
        chosen=recipe.calibration,
    )


def spread(rows: Tensor, most: int) -> Tensor:
    """Return at most `most` rows, evenly spaced; 0 returns all."""
    return rows[:: -(-len(rows) // most)] if most else rows
