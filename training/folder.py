"""The folder of a run: what lies where, and how to read it back.

config.json          {"recipe": ..., "source": path and digest of the data, "task": ..., "models": {name of a model file: its
                     kind and config}}
tokenizer.json       byte-level BPE, or that of a released checkpoint
tokens.safetensors   token documents, train.0 ... and heldout.0 ...; of a classifier examples.safetensors instead
released.safetensors a checkpoint as `adopt` loaded it
softmax.safetensors  power.safetensors  polynomial.safetensors  pointwise.safetensors
train.jsonl          one line every ten steps
stages.jsonl         one line a stage of a conversion: held-out quality, ranges, share outside
metrics.json         held-out losses, ranges, per-stage quality
calibration.npz      `tokens` int64 [n, T] or `inputs` float32 [n, C, H, W], training data and what a user might give
checkpoints/         of an interrupted run
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from polyformer.models import Model, facts, from_facts
from training.classes import Classes
from training.data import EOT_ID
from training.recipe import Recipe
from training.sources import Source
from training.tasks import NextTokens, Task

MODELS = ("released", "softmax", "power", "polynomial", "pointwise")


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

    @property
    def started(self) -> bool:
        """Whether recipe, task and data are there: config.json is written last."""
        return (self.path / "config.json").exists()

    def start(self, recipe: Recipe, task: Task, tokenizer: Tokenizer | None, source: Source) -> None:
        """Write tokenizer, data and config of a new run, and where the data came from."""
        self.path.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(str(self.path / "tokenizer.json"))
        save_file({k: v.contiguous() for k, v in task.tensors().items()}, self.path / f"{task.file}.safetensors")
        self._write(
            "config.json",
            {
                "recipe": json.loads(recipe.to_json()),
                "source": asdict(source),
                "task": {"file": task.file, **task.facts()},
                "models": {},
            },
        )
        self.update_metrics(text=source.path)

    def source(self) -> Source | None:
        """Return where the data came from; None in folders from before that was kept."""
        values = self._read("config.json").get("source")
        return values and Source(**values)

    def recipe(self) -> Recipe:
        return Recipe.from_json(json.dumps(self._read("config.json")["recipe"]))

    def task(self) -> Task:
        """Return what the run is trained on; in folders from before there were several, the next tokens."""
        recipe, values = self.recipe(), self._read("config.json").get("task")
        if values is None:
            values = {
                "file": "tokens",
                "kind": "next tokens",
                "length": recipe.length,
                "vocab": recipe.vocab,
                "end": EOT_ID,
            }
        tensors = load_file(self.path / f"{values['file']}.safetensors")
        return Classes.loaded(values, tensors) if values["kind"] == "classes" else NextTokens.loaded(values, tensors)

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()

    def start_of(self, name: str) -> str:
        """Return the model that stands for `name` at the start of a conversion: the released one until it is trained on."""
        return "released" if name == "softmax" and not self.has(name) and self.has("released") else name

    def save_model(self, name: str, model: Model) -> None:
        config = self._read("config.json")
        config["models"][name] = facts(model)
        self._write("config.json", config)
        temporary = self.path / f"{name}.tmp"
        # a tied head is the embedding: this writes it once, where `save_file` refuses shared memory
        safetensors.save_model(model, str(temporary))
        temporary.replace(self.path / f"{name}.safetensors")

    def load_model(self, name: str) -> Model:
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
        if not self.has(name):
            step = {
                "polynomial": "convert", "pointwise": "convert --recipe pointwise", "released": "adopt"
            }.get(name, "train")  # fmt: skip
            raise FileNotFoundError(f"{self.path} has no {name}.safetensors yet; run `{step}` first")
        model = from_facts(self._read("config.json")["models"][name])
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


def load_model(out: Path, name: str) -> Model:
    """Return the `released`, `softmax`, `power` or `polynomial` model of a run, in evaluation mode."""
    return Folder(out).load_model(name)


def load_tokenizer(out: Path) -> Tokenizer:
    """Return the tokenizer of a run."""
    return Tokenizer.from_file(str(Path(out) / "tokenizer.json"))


def load_task(out: Path) -> Task:
    """Return what a run is trained on and judged by."""
    return Folder(out).task()
