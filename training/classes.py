"""The task of classifying texts or images: batches, quality (accuracy and loss), and inputs on which ranges are measured.

Every text fills its window: what is longer is cut, what is shorter is padded on the right (`Reading`), in training too, so that
no mask depends on the data. Batches mix in texts that were cut short (`padded` of the recipe's mix) and arbitrary inputs
without a label (`noise`), which only the range losses see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.model import ModelConfig
from polyformer.models import Model, at_once
from polyformer.reading import Reading
from polyformer.vision import VisionConfig, ViT
from training.data import IGNORE, Mix, noise_windows
from training.examples import Labelled, parts
from training.recipe import Recipe
from training.tasks import CALIBRATION_SEED, STRESS_SEED, spread


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Inputs x, token ids [N, T] or images [N, C, H, W], and their classes y [N].

    `reading` holds the names of the classes, and for texts how they become tokens; `vocab` is 0 for images, `patch` for texts.
    `measured` and `chosen` are the `heldout` and `calibration` of the recipe. Only a model whose batches hold arbitrary inputs
    (`noise`) has intervals for them.
    """

    train_x: Tensor = field(repr=False)
    train_y: Tensor = field(repr=False)
    heldout_x: Tensor = field(repr=False)
    heldout_y: Tensor = field(repr=False)
    reading: Reading
    vocab: int = 0
    patch: int = 0
    measured: int = 0
    chosen: int = 512
    noise: int = 0
    file: str = "examples"

    @property
    def heldout(self) -> Tensor:
        return spread(self.heldout_x, self.measured)

    def model(self, body: ModelConfig) -> Encoder | ViT:
        classes = len(self.reading.classes)
        if not self.patch:
            return Encoder(ClassifierConfig(body=body, classes=classes))
        channels, height, width = self.train_x.shape[1:]
        rows, columns = height // self.patch, width // self.patch
        grid = (rows, columns) if body.grid else ()
        body = replace(body, vocab=0, length=rows * columns, grid=grid)
        image = (height, width)
        return ViT(VisionConfig(body=body, classes=classes, image=image, patch=self.patch, channels=channels))

    def sampler(self, recipe: Recipe, *, stage: int, noise: bool) -> Examples:
        return Examples(self, recipe.mix(noise=noise), seed=recipe.seed * 1000 + stage)

    @torch.no_grad()
    def quality(self, model: Model) -> dict[str, float]:
        logits = torch.cat([model(x).cpu() for x in self.heldout.split(at_once(model))])
        y = spread(self.heldout_y, self.measured)
        return {
            "heldout_loss": float(F.cross_entropy(logits, y)),
            "heldout_accuracy": float((logits.argmax(-1) == y).double().mean()),
        }

    def calibration(self) -> Tensor:
        g = torch.Generator().manual_seed(CALIBRATION_SEED)
        order = torch.randperm(len(self.train_x), generator=g)
        few = self.chosen // 4
        whole, short = self.train_x[order[: self.chosen]], self.short(self.train_x[order[-few:]], g)
        return torch.cat([whole, short, self.arbitrary(few if self.noise else 0, g)])

    def stress(self) -> Tensor:
        g = torch.Generator().manual_seed(STRESS_SEED)
        return torch.cat([self.short(spread(self.heldout_x, self.chosen), g), self.arbitrary(2 * self.chosen, g)])

    def short(self, x: Tensor, g: torch.Generator) -> Tensor:
        """Return texts cut at a random place and padded again; images have no length and come back as they are."""
        if self.patch:
            return x
        kept = torch.randint(1, x.shape[1], (len(x), 1), generator=g)
        return torch.where(torch.arange(x.shape[1]) < kept, x, self.reading.pad)

    def arbitrary(self, count: int, g: torch.Generator) -> Tensor:
        """Return windows of arbitrary tokens, or images of arbitrary pixels, every second one of a single colour."""
        if not self.patch:
            return noise_windows(count, self.train_x.shape[1], self.vocab, g)
        low, high = float(self.train_x.min()), float(self.train_x.max())
        x = torch.rand(count, *self.train_x.shape[1:], generator=g)
        x[1::2] = x[1::2, :, :1, :1]
        return low + (high - low) * x

    def facts(self) -> dict[str, Any]:
        return {"kind": "classes", **{name: getattr(self, name) for name in NUMBERS}, **self.reading.metadata()}

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}

    @classmethod
    def loaded(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Classes:
        """Return the task of a folder."""
        numbers = {name: int(facts[name]) for name in NUMBERS}
        return cls(**{name: tensors[name] for name in PARTS}, reading=Reading.of(facts), **numbers)  # type: ignore[arg-type]


def text_classes(recipe: Recipe, found: Labelled[str], tokenizer: Tokenizer, reading: Reading) -> Classes:
    """Return the task of texts, in windows as `reading` makes them."""
    x = torch.tensor([reading.read(tokenizer, text, recipe.length) for text in found.examples])
    return _split(recipe, x, found.labels, reading=reading, vocab=recipe.vocab)


def image_classes(recipe: Recipe, found: Labelled[Tensor]) -> Classes:
    """Return the task of images, as they are.

    Raises:
        ValueError: the pixels are far from unit size, which is what training needs.
    """
    x = torch.stack(list(found.examples))
    largest = float(x.abs().max())
    if largest > LARGEST_PIXEL:
        raise ValueError(
            f"pixels reach {largest:.4g}, {LARGEST_PIXEL:g} is the most: scale the images to a deviation of about 1, and those "
            "that are asked about later in the same way"
        )
    return _split(recipe, x, found.labels, reading=Reading(classes=found.names), patch=recipe.patch)


def _split(
    recipe: Recipe, x: Tensor, labels: Sequence[int], *, reading: Reading, vocab: int = 0, patch: int = 0
) -> Classes:
    """Return the task of all examples, a part of them held out."""
    y = torch.tensor(labels)
    train, heldout = parts(len(y), recipe.holdout)
    return Classes(
        train_x=x[train],
        train_y=y[train],
        heldout_x=x[heldout],
        heldout_y=y[heldout],
        reading=reading,
        vocab=vocab,
        patch=patch,
        measured=recipe.heldout,
        chosen=recipe.calibration,
        noise=recipe.noise,
    )


LARGEST_PIXEL = 16.0
NUMBERS = ("vocab", "patch", "measured", "chosen", "noise")
PARTS = ("train_x", "train_y", "heldout_x", "heldout_y")


class Examples:
    """Draws batches of labelled examples; the whole state is one generator, so a run can resume exactly."""

    def __init__(self, task: Classes, mix: Mix, *, seed: int) -> None:
        self.task, self.mix = task, mix
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs [B, ...] and classes [B]; those of arbitrary inputs are -100."""
        g, noise, padded = self.generator, self.mix.noise, self.mix.padded
        at = torch.randint(0, len(self.task.train_y), (self.mix.batch,), generator=g)
        x, y = self.task.train_x[at], self.task.train_y[at]
        if noise:
            x[:noise], y[:noise] = self.task.arbitrary(noise, g), IGNORE
        if padded:
            x[noise : noise + padded] = self.task.short(x[noise : noise + padded], g)
        return x, y
