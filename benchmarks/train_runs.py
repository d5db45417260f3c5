"""Training benchmarks: a table of cases x seeds -> rows, measured one after another with `training`'s own loop.

A row is plain numbers: the case, the seed, and what its run measured; null is a number that is not finite. `sweep` hands
a record on after every run, and Ctrl-C ends it with what was measured (status `interrupted`). Seeds give each run its
first weights and its batches; every case sees the same batches of a seed. Runs use one thread, so that the tokens a
second of a small model do not hang on the number of cores.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.registry import Keep, Progress
from polyformer.model import ModelConfig, Transformer
from training.data import Mix, Sampler, cut_windows, encode_documents, read_documents, split_docs, train_bpe
from training.evaluate import bytes_per_token, unigram_loss
from training.loop import Batches, ExtraLoss, Schedule, run_stage

Row = dict[str, Any]
NEVER = 1 << 30  # steps between checkpoints of runs that take seconds


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every case of a table may spend: equal steps of equal batches, so equal tokens, under one schedule."""

    steps: int
    batch: int
    length: int
    lr: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0

    def schedule(self, *, steps: int | None = None, lr: float | None = None) -> Schedule:
        n = self.steps if steps is None else steps
        return Schedule(
            steps=n,
            lr=self.lr if lr is None else lr,
            warmup=min(self.warmup, max(1, n // 4)),
            weight_decay=self.weight_decay,
            clip=self.clip,
            checkpoint_every=NEVER,
        )


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus as tokens: training documents, held-out documents, and what is needed to read losses on it."""

    train: list[Tensor]
    heldout: list[Tensor]
    vocab: int
    bytes_per_token: float
    name: str

    def sampler(self, budget: Budget, seed: int) -> Sampler:
        return Sampler(
            self.train, length=budget.length, vocab=self.vocab, mix=Mix(batch=budget.batch), seed=1_000 + seed
        )

    def windows(self, length: int, most: int) -> Tensor:
        """Return at most `most` held-out windows [n, length + 1], spread evenly over the held-out text."""
        found = cut_windows(self.heldout, length + 1)
        return found[:: max(1, -(-len(found) // most))]

    def unigram(self, windows_NS: Tensor) -> float:
        return unigram_loss(self.train, windows_NS, vocab=self.vocab)


def data_folder() -> Path:
    """Return the folder that `shared/fetch-data` filled: the variable POLYFORMER_DATA, else the repository's `data`."""
    return Path(os.environ.get("POLYFORMER_DATA", records.ROOT / "data"))


def load_text(path: Path | None, *, vocab: int, holdout: int = 9) -> Text:
    """Return the tokens of a text (a file or a folder of .txt files; None: the State of the Union excerpt here), split
    by documents; the tokenizer is trained on the training side.
    """
    train, heldout = split_docs(read_documents(path), holdout)
    tokenizer = train_bpe(train, vocab)
    return Text(
        train=encode_documents(tokenizer, train),
        heldout=encode_documents(tokenizer, heldout),
        vocab=tokenizer.get_vocab_size(),
        bytes_per_token=bytes_per_token(tokenizer, heldout),
        name="state of the union 1993-2019" if path is None else str(path),
    )


def language_config(budget: Budget, vocab: int, *, width: int, blocks: int, heads: int, **changes: Any) -> ModelConfig:
    """Return a causal pre-norm model with LayerNorm and an MLP of four widths; `changes` are fields of its config."""
    fields: dict[str, Any] = {"hidden": 4 * width, "norms": ("layer",) * (2 * blocks + 1)} | changes
    return ModelConfig(vocab=vocab, length=budget.length, width=width, blocks=blocks, heads=heads, **fields)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a run went: seconds and tokens a second of the loop alone, and whether every logged loss and gradient was
    finite. `curve` holds (steps, training loss), every tenth step.
    """

    seconds: float
    tokens_per_second: float
    finite: bool
    curve: tuple[tuple[int, float], ...]

    def thinned(self, most: int = 12) -> list[tuple[int, float]]:
        """Return at most `most` points of the curve, the last one among them, to four digits: what a record keeps."""
        kept = self.curve[:: -max(1, -(-len(self.curve) // most))][::-1]
        return [(step, round(loss, 4)) for step, loss in kept]


def fit(
    model: nn.Module,
    batches: Batches,
    budget: Budget,
    *,
    schedule: Schedule | None = None,
    extra: ExtraLoss | None = None,
) -> Training:
    """Train a model in place for a budget, or for another schedule on its batches."""
    schedule = budget.schedule() if schedule is None else schedule
    curve: list[tuple[int, float]] = []
    bad: list[int] = []

    def watch(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        curve.append((done, figures["loss"]))
        if not all(math.isfinite(v) for v in figures.values()):
            bad.append(done)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        began = time.perf_counter()
        run_stage(
            model,
            batches,
            stage="run",
            schedule=schedule,
            folder=folder,
            log=folder / "train.jsonl",
            extra=extra,
            progress=watch,
        )
        seconds = time.perf_counter() - began
    tokens = schedule.steps * budget.batch * budget.length
    return Training(seconds=seconds, tokens_per_second=tokens / seconds, finite=not bad, curve=tuple(curve))


def trained(
    corpus: Text,
    budget: Budget,
    seed: int,
    *,
    width: int,
    blocks: int,
    heads: int,
    schedule: Schedule | None = None,
    **changes: Any,
) -> tuple[Transformer, Training]:
    """Return a small language model after its budget on a text, and how that went; `changes` as in `language_config`."""
    model = Transformer(language_config(budget, corpus.vocab, width=width, blocks=blocks, heads=heads, **changes))
    return model, fit(model, corpus.sampler(budget, seed), budget, schedule=schedule)


def outcome(training: Training, heldout_loss: float, unigram: float) -> str:
    """Return `diverged` (a loss or gradient that is not finite, or a final loss more than 1 nat above the unigram's),
    `stuck` (no better than the unigram's), or `trained`.
    """
    if not training.finite or not math.isfinite(heldout_loss) or heldout_loss > unigram + 1.0:
        return "diverged"
    return "trained" if heldout_loss < unigram else "stuck"


def ended(training: Training, heldout_loss: float, unigram: float) -> Row:
    """Return the columns `outcome` and `failed`, whose mean over seeds is the share of runs that did not train."""
    became = outcome(training, heldout_loss, unigram)
    return {"outcome": became, "failed": float(became != "trained")}


def sweep(
    name: str,
    cases: Sequence[str],
    seeds: Sequence[int],
    run: Callable[[str, int], Row | Sequence[Row]],
    *,
    params: Mapping[str, Any],
    figures: Sequence[str],
    by: Sequence[str] = ("case",),
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every case with every seed and return the record; seeds are the outer loop, so that an interrupted sweep
    has compared all cases before it repeats one.

    Args: `run` returns one row, or several that name what they differ in; `figures` are averaged over seeds `by` the
    values of some columns, see `table`.
    """

    def rows_of(case: str, seed: int) -> list[Row]:
        torch.manual_seed(seed)
        found = run(case, seed)
        return [plain({"case": case, "seed": seed, **r}) for r in ([found] if isinstance(found, dict) else found)]

    def record(rows: Sequence[Row]) -> dict[str, Any]:
        return records.record(
            name,
            metrics={"summary": table(rows, figures, by), "rows": list(rows)},
            params={**params, "seeds": list(seeds), "cases": list(cases)},
            threads=1,
            seed=seeds[0],
            repeats=len(seeds),
        )

    todo = [(f"{case}, seed {seed}", partial(rows_of, case, seed)) for seed in seeds for case in cases]
    return one_by_one(todo, record, keep=keep, progress=progress)


def one_by_one(
    todo: Sequence[tuple[str, Callable[[], Sequence[Row]]]],
    record: Callable[[Sequence[Row]], dict[str, Any]],
    *,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one run after another on one thread and return the record of their rows; Ctrl-C ends it with the rows so far.

    Args: `todo` holds (what progress shows, its run); `record` makes a record of rows, which is kept after every run.
    """
    rows: list[Row] = []
    with one_thread():
        try:
            for done, (what, run) in enumerate(todo):
                if progress is not None:
                    progress(done, len(todo), what)
                rows.extend(run())
                if keep is not None:
                    keep(record(rows))  # as complete: whoever finds it knows how the run ended
        except KeyboardInterrupt:
            return record(rows) | {"status": "interrupted"}
    if progress is not None:
        progress(len(todo), len(todo), "done")
    return record(rows)


def plain(value: Any) -> Any:
    """Return a value with null for every float that is not finite: JSON has no nan."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean and sample standard deviation over runs; a single run has none. Both are None if a run's figure is not
    finite: a mean over the runs that survived would flatter.
    """

    mean: float | None
    deviation: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Summary:
        finite = [v for v in values if v is not None]
        if len(finite) < len(values):
            return cls(mean=None, deviation=None, runs=len(values))
        return cls(
            mean=statistics.fmean(finite),
            deviation=statistics.stdev(finite) if len(finite) > 1 else None,
            runs=len(values),
        )


def table(rows: Sequence[Row], figures: Sequence[str], by: Sequence[str] = ("case",)) -> list[Row]:
    """Return one entry a group of rows that agree in the columns `by`, in order of appearance: those columns, and mean,
    deviation and runs of each figure that rows of the group have.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in by), []).append(row)
    entries = []
    for key, members in groups.items():
        entry: Row = {column: value for column, value in zip(by, key, strict=True) if value is not None}
        for figure in figures:
            values = [row[figure] for row in members if figure in row]
            if values:
                entry[figure] = asdict(Summary.of(values))
        entries.append(entry)
    return entries


def warm_up() -> None:
    """Train a model of nothing for a few steps: the first run of a process would pay for what torch loads late."""
    budget = Budget(steps=3, batch=1, length=4)
    docs = [torch.arange(8)]
    sampler = Sampler(docs, length=4, vocab=8, mix=Mix(batch=1), seed=0)
    with one_thread():
        fit(Transformer(language_config(budget, 8, width=4, blocks=1, heads=1, mixer="softmax")), sampler, budget)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
