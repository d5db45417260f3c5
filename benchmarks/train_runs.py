"""Training benchmarks: a table of cases x seeds -> rows, measured one after another with `training`'s own loop.

A row is plain numbers: the case, the seed, and what its run measured. `sweep` writes `<name>.partial.json` after every
run; Ctrl-C ends a sweep and keeps what was measured (`interrupted` in the record says so). Seeds give each run its
first weights and its batches; every case sees the same batches of a seed. Runs use one thread, so that the tokens a
second of a small model do not hang on the number of cores.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from polyformer.model import ModelConfig
from training.data import Mix, Sampler, cut_windows, encode_documents, read_documents, split_docs, train_bpe
from training.evaluate import bytes_per_token, unigram_loss
from training.loop import Batches, ExtraLoss, Schedule, run_stage

Progress = Callable[[int, int, str], None]  # done, total, what comes next
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
    fields = {"hidden": 4 * width, "norms": ("layer",) * (2 * blocks + 1)} | changes
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

    @property
    def last_loss(self) -> float:
        return self.curve[-1][1]


def fit(
    model: nn.Module, batches: Batches, budget: Budget, *, schedule: Schedule | None = None, extra: ExtraLoss | None = None
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


def outcome(training: Training, heldout_loss: float, unigram: float) -> str:
    """Return `diverged` (a loss or gradient that is not finite, or a final loss more than 1 nat above the unigram's),
    `stuck` (no better than the unigram's), or `trained`.
    """
    if not training.finite or not math.isfinite(heldout_loss) or heldout_loss > unigram + 1.0:
        return "diverged"
    return "trained" if heldout_loss < unigram else "stuck"


def sweep(
    name: str,
    cases: Sequence[str],
    seeds: Sequence[int],
    run: Callable[[str, int], Row | Sequence[Row]],
    *,
    params: Mapping[str, Any],
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every case with every seed and return the record; seeds are the outer loop, so that an interrupted sweep
    has compared all cases before it repeats one.

    Args: `run` returns one row or several (which then name what they differ in); `folder` for the partial record.
    """
    was_quiet = records.quiet()
    rows: list[Row] = []
    partial = None if folder is None else folder / f"{name}.partial.json"
    pairs = [(case, seed) for seed in seeds for case in cases]
    interrupted = False

    def record() -> dict[str, Any]:
        return records.record(
            name,
            metrics={"rows": rows, "interrupted": interrupted or len(done) < len(pairs)},
            params={**params, "seeds": list(seeds), "cases": list(cases)},
            threads=1,
            seed=seeds[0],
            repeats=len(seeds),
            was_quiet=was_quiet,
        )

    done: list[tuple[str, int]] = []
    with one_thread():
        try:
            for case, seed in pairs:
                if progress is not None:
                    progress(len(done), len(pairs), f"{case}, seed {seed}")
                torch.manual_seed(seed)
                found = run(case, seed)
                rows.extend({"case": case, "seed": seed, **r} for r in ([found] if isinstance(found, dict) else found))
                done.append((case, seed))
                if partial is not None:
                    _write(partial, record())
        except KeyboardInterrupt:
            interrupted = True
    if progress is not None:
        progress(len(done), len(pairs), "interrupted" if interrupted else "done")
    if partial is not None:
        partial.unlink(missing_ok=True)  # the caller writes the record
    return record()


def summary(rows: Sequence[Row], figure: str, by: Sequence[str] = ("case",)) -> dict[tuple[Any, ...], Summary]:
    """Return mean and standard deviation of a figure over seeds, by the values of some columns, in order of appearance.
    Rows without the figure are left out; one that is not finite makes the mean so.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row.get(figure) is not None:
            groups.setdefault(tuple(row.get(b) for b in by), []).append(float(row[figure]))
    return {key: Summary.of(values) for key, values in groups.items()}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean, sample standard deviation (0 of a single run) and number of runs."""

    mean: float
    deviation: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        finite = all(math.isfinite(v) for v in values)
        return cls(
            mean=statistics.fmean(values) if finite else math.nan,
            deviation=statistics.stdev(values) if finite and len(values) > 1 else 0.0,
            runs=len(values),
        )


def tabled(record: dict[str, Any], figures: Sequence[str], by: Sequence[str] = ("case",)) -> dict[str, Any]:
    """Return a record with `metrics.summary`: one entry a group, with mean, deviation and runs of each figure."""
    rows = record["metrics"]["rows"]
    groups: dict[tuple[Any, ...], Row] = {}
    for figure in figures:
        for key, value in summary(rows, figure, by).items():
            groups.setdefault(key, dict(zip(by, key, strict=True)))[figure] = asdict(value)
    return {**record, "metrics": {**record["metrics"], "summary": list(groups.values())}}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)
