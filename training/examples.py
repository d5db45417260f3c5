"""Labelled examples from files: texts in folders named by their class, images in one .npz; duplicates out, a split by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0  # the split belongs to the data: runs of different seeds are judged on the same examples
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Labelled(Generic[T]):
    """Examples and the number of the class of each, in `names`."""

    examples: Sequence[T]
    labels: Sequence[int]
    names: tuple[str, ...]


def read_texts(folder: Path) -> Labelled[str]:
    """Return the texts folder/<class>/*.txt without exact duplicates; classes in alphabetical order.

    Raises:
        FileNotFoundError: there is no such folder, or none below it with texts.
        ValueError: there is one class alone.
    """
    found = {d.name: sorted(d.glob("*.txt")) for d in sorted(folder.glob("*")) if d.is_dir()}
    files = {name: paths for name, paths in found.items() if paths}
    if not files:
        raise FileNotFoundError(
            f"no {folder}/<class>/*.txt: give a folder that holds one folder of texts for each class"
        )
    if len(files) < 2:
        raise ValueError(f"{folder} holds texts of one class, {next(iter(files))!r}; at least 2 are needed")
    labels: dict[str, int] = {}
    for number, paths in enumerate(files.values()):
        for path in paths:
            labels.setdefault(path.read_text(encoding="utf-8", errors="replace"), number)
    return Labelled(examples=list(labels), labels=list(labels.values()), names=tuple(files))


def read_images(path: Path) -> Labelled[Tensor]:
    """Return images [C, H, W] as float32 from an .npz with `images` [n, H, W] or [n, C, H, W] and `labels` [n], integers;
    `names` are optional.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the arrays are missing or do not belong together.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: give an .npz with `images` [n, H, W] or [n, C, H, W] and `labels` [n]"
        )
    with np.load(path, allow_pickle=False) as file:
        if not {"images", "labels"} <= set(file):
            raise ValueError(f"{path} holds {', '.join(file) or 'nothing'}; `images` and `labels` are read")
        images, labels = np.asarray(file["images"]), np.asarray(file["labels"])
        names = [str(name) for name in file["names"]] if "names" in file else []
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim != 4 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: images of shape {images.shape} and labels of shape {labels.shape}, {labels.dtype}; images are "
            "[n, H, W] or [n, C, H, W], labels [n] integers"
        )
    names = names or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    if len(set(labels.tolist())) < 2 or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"{path}: labels run from {labels.min(initial=0)} to {labels.max(initial=0)}, {len(names)} names; at least 2 "
            "classes are needed, numbered from 0"
        )
    return Labelled(
        examples=list(torch.from_numpy(images.astype(np.float32))), labels=labels.tolist(), names=tuple(names)
    )


def parts(count: int, holdout: int) -> tuple[list[int], list[int]]:
    """Return the indices of the training and of the held-out side: every `holdout`-th of a fixed shuffle."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    return [i for k, i in enumerate(order) if k % holdout], order[::holdout]
