"""The folder of a run: what lies where, and how to read it back.

config.json          {"recipe": ..., "models": {name of a model file: ModelConfig}}
tokenizer.json       byte-level BPE
tokens.safetensors   token documents, train.0 ... and heldout.0 ...
softmax.safetensors  power.safetensors  polynomial.safetensors  pointwise.safetensors
train.jsonl          one line every ten steps
stages.jsonl         one line a stage of a conversion: held-out loss, ranges, share outside
metrics.json         held-out losses, ranges, per-stage quality
calibration.npz      `tokens` int64 [n, T], windows of training text and of what a user might type
checkpoints/         of an interrupted run
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from polyformer.model import ModelConfig, Transformer
from training.data import (
    Mix,
    Sampler,
    cut_windows,
    encode_documents,
    noise_windows,
    padded_windows,
    read_documents,
    split_docs,
    train_bpe,
)
from training.recipe import Recipe

MODELS = ("softmax", "power", "polynomial", "pointwise")
CALIBRATION_WINDOWS = 512


class Folder:
    """Paths and plain reads and writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def log(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def start(self, recipe: Recipe, text: Path | None) -> None:
        """Write config, tokenizer and tokens of a new run; accept a folder that holds the same recipe, refuse
        another.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "config.json").exists():
            if self.recipe() != recipe:
                raise FileExistsError(f"{self.path} holds a run of another recipe; choose an empty folder")
            return
        train_docs, heldout_docs = split_docs(read_documents(text), recipe.holdout)
        tokenizer = train_bpe(train_docs, recipe.vocab)
        if tokenizer.get_vocab_size() != recipe.vocab:
            raise ValueError(
                f"the text gives {tokenizer.get_vocab_size()} tokens, the recipe asks for {recipe.vocab}; give more text, "
                "or call training.train with a recipe of a smaller `vocab`"
            )
        tokenizer.save(str(self.path / "tokenizer.json"))
        tokens = {f"train.{i}": d for i, d in enumerate(encode_documents(tokenizer, train_docs))}
        tokens.update({f"heldout.{i}": d for i, d in enumerate(encode_documents(tokenizer, heldout_docs))})
        save_file(tokens, self.path / "tokens.safetensors")
        self._write("config.json", {"recipe": json.loads(recipe.to_json()), "models": {}})

    def recipe(self) -> Recipe:
        return Recipe.from_json(json.dumps(self._read("config.json")["recipe"]))

    def documents(self, part: str) -> list[Tensor]:
        """Return the token documents of `train` or `heldout`, in order."""
        found = {k: v for k, v in load_file(self.path / "tokens.safetensors").items() if k.startswith(f"{part}.")}
        return [found[f"{part}.{i}"] for i in range(len(found))]

    def sampler(self, recipe: Recipe, mix: Mix, stage: int) -> Sampler:
        return Sampler(
            self.documents("train"), length=recipe.length, vocab=recipe.vocab, mix=mix, seed=recipe.seed * 1000 + stage
        )

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()

    def save_model(self, name: str, model: Transformer) -> None:
        config = self._read("config.json")
        config["models"][name] = asdict(model.config)
        self._write("config.json", config)
        temporary = self.path / f"{name}.tmp"
        # a tied head is the embedding: this writes it once, where `save_file` refuses shared memory
        safetensors.save_model(model, str(temporary))
        temporary.replace(self.path / f"{name}.safetensors")

    def load_model(self, name: str) -> Transformer:
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
        if not self.has(name):
            step = {"polynomial": "convert", "pointwise": "convert --recipe pointwise"}.get(name, "train")
            raise FileNotFoundError(f"{self.path} has no {name}.safetensors yet; run `{step}` first")
        model = Transformer(ModelConfig.from_json(json.dumps(self._read("config.json")["models"][name])))
        safetensors.load_model(model, str(self.path / f"{name}.safetensors"))
        return model.eval()

    def update_metrics(self, **figures: Any) -> dict[str, Any]:
        metrics = self._read("metrics.json") if (self.path / "metrics.json").exists() else {}
        metrics.update(figures)
        self._write("metrics.json", metrics)
        return metrics

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: {self.path} is not the folder of a run")
        return json.loads(path.read_text(encoding="utf-8"))

    def _write(self, name: str, value: dict[str, Any]) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path / name)


def load_model(out: Path, name: str) -> Transformer:
    """Return the `softmax`, `power` or `polynomial` model of a run, in evaluation mode."""
    return Folder(out).load_model(name)


def load_tokenizer(out: Path) -> Tokenizer:
    """Return the tokenizer of a run."""
    return Tokenizer.from_file(str(Path(out) / "tokenizer.json"))


def heldout_windows(out: Path) -> Tensor:
    """Return int64 [n, T + 1]: all held-out text in windows without overlap, inputs and targets in one."""
    folder = Folder(out)
    return cut_windows(folder.documents("heldout"), folder.recipe().length + 1)


def heldout_tokens(out: Path) -> np.ndarray:
    """Return int64 [n, T], the inputs of all held-out windows."""
    return heldout_windows(out)[:, :-1].numpy().copy()


def stress_tokens(out: Path) -> np.ndarray:
    """Return int64 [n, T]: short prompts of every length from held-out text, and 1024 windows of arbitrary tokens, all
    unseen.
    """
    folder = Folder(out)
    recipe = folder.recipe()
    noise = noise_windows(1024, recipe.length, recipe.vocab, torch.Generator().manual_seed(987_654_321))
    return torch.cat([padded_windows(folder.documents("heldout"), recipe.length), noise]).numpy()


def calibration_tokens(out: Path) -> np.ndarray:
    """Return int64 [n, T] for fitting and checking ranges: windows of training text, short prompts and arbitrary
    tokens.
    """
    folder = Folder(out)
    recipe = folder.recipe()
    g = torch.Generator().manual_seed(123_456_789)
    docs = folder.documents("train")
    windows = cut_windows(docs, recipe.length)
    text = windows[torch.randperm(len(windows), generator=g)[:CALIBRATION_WINDOWS]]
    short = padded_windows(docs, recipe.length)
    short = short[torch.randperm(len(short), generator=g)[: CALIBRATION_WINDOWS // 4]]
    return torch.cat([text, short, noise_windows(CALIBRATION_WINDOWS // 4, recipe.length, recipe.vocab, g)]).numpy()
