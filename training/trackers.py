"""Where the figures of a run go, by name: `jsonl` always works; `tensorboard` and `wandb` when they are installed.

A tracker takes a step and its figures. `jsonl` is the record that tests and reports read; the others are for looking.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Figures = Mapping[str, float]


class Tracker(Protocol):
    def write(self, step: int, figures: Figures) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One line a step in `log.jsonl`. Lines beyond `first` are dropped at the start: a resumed log reads like an
    uninterrupted one.
    """

    def __init__(self, folder: Path, run: str, first: int) -> None:
        self.path = folder / "log.jsonl"
        keep_lines(self.path, lambda line: line["step"] <= first)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Figures) -> None:
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path, run: str, first: int) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ImportError("TensorBoard is not installed; run `pip install tensorboard`") from error
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def write(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars in a Weights & Biases run whose id is a digest of the folder's whole path, so that a restart goes on in the
    same run and folders of one name do not share one.
    """

    def __init__(self, folder: Path, run: str, first: int) -> None:
        try:
            module: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError("Weights & Biases is not installed; run `pip install wandb`") from error
        own = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        self._run = module.init(project="polyformer", name=run, id=own, resume="allow", dir=str(folder))

    def write(self, step: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, int], Tracker]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def open_all(names: Sequence[str], folder: Path, *, run: str, first: int) -> list[Tracker]:
    """Open trackers by name for a run that goes on after step `first`; an unknown name lists the known ones."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}; known: {', '.join(TRACKERS)}")
    return [TRACKERS[name](folder, run, first) for name in names]


def read_lines(path: Path) -> list[str]:
    """Return the whole lines of a log; the half line that a kill may leave at the end is dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines of a log, and a half one, in place and at once: a kill leaves the old log or the new one."""
    kept = [t for t in read_lines(path) if wanted(json.loads(t))]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(t + "\n" for t in kept), encoding="utf-8")
    temporary.replace(path)
