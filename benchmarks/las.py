"""LaS, local and smooth attention: decay of scores with distance, averaging of values, both, or neither (methods.md 8).

Where it should help: ListOps-lite (short expressions, `training.datasets.listops`), and digits read pixel by pixel where
their data are there. Where smoothing is expected to hurt: a language model, the control. All are causal models
of the same blocks; a class is a token that is asked at the last position, and shorter inputs are padded on the left.
The decay of PowerSoftmax is weaker by p, since the weight decays with exp(-p alpha |i - j|).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import Keep, Progress, Record
from benchmarks.train_runs import Budget, Row, Text, data_folder, fit, language_config, load_text, sweep, trained
from polyformer.model import Transformer
from training.data import IGNORE
from training.datasets import listops, mnist5k
from training.evaluate import accuracy, language

if TYPE_CHECKING:
    from benchmarks.blocks import Block

ATTENTION: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "power 4": {"mixer": "power_softmax", "power": 4},
}
VARIANTS = ("plain", "local", "smooth", "both")
SYMBOLS = ("[MIN", "[MAX", "[MED", "[SM", "]")
LEVELS = 8  # of grey, of a sequential digit
BUDGET = Budget(steps=600, batch=16, length=48)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the benchmark; `decay` is that of softmax, divided by p for a power."""

    budget: Budget = BUDGET  # the length of ListOps and of the language control; digits have one position a pixel
    vocab: int = 512
    width: int = 32
    blocks: int = 2
    heads: int = 4
    decay: float = 0.4
    pooled: int = 3  # positions that smoothing averages
    examples: int = 4_000
    test: int = 1_000
    windows: int = 256
    attention: tuple[str, ...] = tuple(ATTENTION)
    variants: tuple[str, ...] = VARIANTS
    digits: bool = True  # where the data are there


QUICK = Setup(
    budget=Budget(steps=10, batch=4, length=24),
    vocab=300,
    width=8,
    blocks=1,
    heads=2,
    examples=40,
    test=20,
    windows=8,
    attention=("power 4",),
    variants=("plain", "both"),
    digits=False,
)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Examples of a task: inputs [n, T] and targets that ask for the class at the last position."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    vocab: int

    @property
    def length(self) -> int:
        return self.train[0].shape[1]

    @property
    def majority(self) -> float:
        """Accuracy on the test side of always answering the commonest class of the training side."""
        commonest = self.train[1][:, -1].mode().values
        return float((self.test[1][:, -1] == commonest).double().mean())


class TableSampler:
    """Draws batches of fixed examples; the whole state is one generator."""

    def __init__(self, examples: tuple[Tensor, Tensor], *, batch: int, seed: int) -> None:
        self.examples, self.size = examples, batch
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        tokens, targets = self.examples
        rows = torch.randint(0, len(tokens), (self.size,), generator=self.generator)
        return tokens[rows], targets[rows]


def asked_last(rows: Sequence[Sequence[int]], labels: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Return tokens [n, length], padded on the left with 0, and targets that are -100 but at the last position."""
    tokens = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -1] = torch.tensor(labels)
    return tokens, targets


def listops_lite(length: int, *, train: int, test: int, seed: int = 0) -> Labelled:
    """Return ListOps of depth 3 and at most 4 arguments, cut to `length`: 0 pads, 1..10 are digits, then the symbols;
    expressions of the test side that the training side holds are drawn again.
    """
    rng = np.random.default_rng(seed)
    ids = {**{str(d): d + 1 for d in range(10)}, **{s: 11 + i for i, s in enumerate(SYMBOLS)}}

    def draw() -> tuple[tuple[int, ...], int]:
        tokens, value = listops(rng, depth=3, max_args=4, p_op=0.4, lo=8, hi=length)
        return tuple(ids[t] for t in tokens), value + 1

    seen = [draw() for _ in range(train)]
    known = {row for row, _ in seen}
    unseen: list[tuple[tuple[int, ...], int]] = []
    while len(unseen) < test:
        row, label = draw()
        if row not in known:
            unseen.append((row, label))
    sides = [asked_last([r for r, _ in side], [y for _, y in side], length) for side in (seen, unseen)]
    return Labelled(train=sides[0], test=sides[1], vocab=11 + len(SYMBOLS))


def sequential_digits(images: np.ndarray, labels: np.ndarray, *, test: int, seed: int = 0) -> Labelled:
    """Return digits of 28 x 28 as 7 x 7 tokens in raster order: 1..8 levels of grey, then the classes."""
    small = images.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(len(images), -1)
    grey = np.minimum(small * LEVELS / 256, LEVELS - 1).astype(np.int64) + 1
    order = np.random.default_rng(seed).permutation(len(grey))
    tokens, classes = grey[order], labels[order] + 1 + LEVELS
    sides = [
        asked_last(tokens[part].tolist(), classes[part].tolist(), tokens.shape[1])
        for part in (slice(test, None), slice(test))
    ]
    return Labelled(train=sides[0], test=sides[1], vocab=1 + LEVELS + 10)


def measure(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    text: Path | None = None,
    data: Path | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every variant on every task with every seed and return the record.

    Args: `data` is the folder of `shared/fetch-data`, by default what `data_folder` says; where it holds no digits, they
    are left out and the record says so.
    """
    s = Setup() if setup is None else setup
    corpus = load_text(text, vocab=s.vocab)
    windows = corpus.windows(s.budget.length, s.windows)
    tasks: dict[str, Labelled] = {"listops": listops_lite(s.budget.length, train=s.examples, test=s.test)}
    missing = ""
    if s.digits:
        try:
            tasks["digits"] = sequential_digits(*mnist5k(data_folder() if data is None else data), test=s.test)
        except FileNotFoundError as error:
            missing = str(error)
    measured: dict[str, Callable[[dict[str, Any], int], Row]] = {
        **{name: _classes(task, s) for name, task in tasks.items()},
        "language": _language(corpus, windows, s),
    }
    cases = {f"{t}, {a}, {v}": (t, a, v) for t in measured for a in s.attention for v in s.variants}

    def run(case: str, seed: int) -> Row:
        task, attention, variant = cases[case]
        fields = dict(ATTENTION[attention])
        if variant in ("local", "both"):
            fields["las_decay"] = s.decay / fields.get("power", 1)
        if variant in ("smooth", "both"):
            fields["las_width"] = s.pooled
        return {"task": task, "attention": attention, "variant": variant, **measured[task](fields, seed)}

    return sweep(
        "las-ablation",
        tuple(cases),
        seeds,
        run,
        params={
            **asdict(s),
            "text": corpus.name,
            "majority": {name: task.majority for name, task in tasks.items()},
            "missing": missing,
        },
        figures=("accuracy", "heldout_loss"),
        by=("task", "attention", "variant"),
        keep=keep,
        progress=progress,
    )


def _classes(task: Labelled, s: Setup) -> Callable[[dict[str, Any], int], Row]:
    budget = Budget(steps=s.budget.steps, batch=s.budget.batch, length=task.length, lr=s.budget.lr)

    def run(fields: dict[str, Any], seed: int) -> Row:
        model = Transformer(
            language_config(budget, task.vocab, width=s.width, blocks=s.blocks, heads=s.heads, **fields)
        )
        fit(model, TableSampler(task.train, batch=budget.batch, seed=1_000 + seed), budget)
        return {"accuracy": accuracy(model, *task.test)}

    return run


def _language(corpus: Text, windows_NS: Tensor, s: Setup) -> Callable[[dict[str, Any], int], Row]:
    def run(fields: dict[str, Any], seed: int) -> Row:
        model, _ = trained(corpus, s.budget, seed, width=s.width, blocks=s.blocks, heads=s.heads, **fields)
        return {"heldout_loss": language(model, windows_NS, bytes_per_token=corpus.bytes_per_token).loss}

    return run


def show(record: Record) -> Sequence[Block]:
    """Show accuracy of the tasks and the loss of the language control for each variant."""
    from benchmarks.blocks import panels, picture
    from benchmarks.train_figures import categories, dots, table

    named = [{**e, "name": f"{e['task']}, {e['attention']}"} for e in record["metrics"]["summary"]]
    drawing, (upper, lower) = panels(2)
    for axis, figure, label in (
        (upper, "accuracy", "accuracy"),
        (lower, "heldout_loss", "language: held-out loss, nats a token"),
    ):
        variants, series = categories(named, figure, category="variant", name="name")
        dots(axis, variants, series, x_label="LaS", y_label=label)
    for share in record["params"]["majority"].values():
        upper.axhline(share, color="0.5", linestyle=":")
    return [
        table(
            record["metrics"]["summary"],
            f"Local and smooth attention, mean over seeds. {record['params']['missing']}".strip(),
            {"task": "task", "attention": "attention", "variant": "LaS"},
            {"accuracy": "accuracy", "heldout_loss": "held-out loss"},
        ),
        picture(drawing, "Accuracy and, as a control, language loss by variant; dotted: the majority class."),
    ]
