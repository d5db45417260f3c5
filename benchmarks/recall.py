"""In-context recall: softmax against PowerSoftmax and its fully polynomial form, same size, data, steps and seeds.

The tasks are those of `training/recall.py`: induction, key-value recall, and a few-shot map whose accuracy is measured
against the number of shots, beside the best that any reader could reach. `polynomial` is the model `power 4` of the
same seed, with range training, every function replaced and a short tuning: it has had more steps than the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.registry import Keep, Progress, Record
from benchmarks.substitution import (
    DEGREES,
    WANTED,
    Degrees,
    Wanted,
    intervals,
    outside,
    substituted,
    targets,
    train_ranges,
)
from benchmarks.train_runs import Budget, Row, fit, language_config, sweep
from polyformer.model import Transformer
from training.evaluate import answers
from training.recall import RecallSampler, RecallTask
from training.substitution import with_rows

if TYPE_CHECKING:
    from benchmarks.blocks import Block

POLYNOMIAL, SOURCE = "polynomial", "power 4"  # a model and what it is made of
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "power 2": {"mixer": "power_softmax", "power": 2},
    SOURCE: {"mixer": "power_softmax", "power": 4},
    POLYNOMIAL: {},  # made of SOURCE
}
TASKS = {
    "induction": RecallTask(kind="induction", symbols=16, shown=12, asked=6),
    "key-value": RecallTask(kind="key_value", symbols=8, shown=6, asked=3, answers=4),
    "few-shot": RecallTask(kind="few_shot", symbols=4, shown=16, answers=4),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the benchmark; the length of a window is the task's."""

    steps: int = 1_200
    batch: int = 32
    lr: float = 3e-3
    width: int = 64
    blocks: int = 2
    heads: int = 2
    test: int = 1024  # windows that are scored
    calibration: int = 256
    range_steps: int = 200
    tune_steps: int = 200
    tune_lr: float = 1.5e-3
    degrees: Degrees = DEGREES
    wanted: Wanted = WANTED
    tasks: Mapping[str, RecallTask] = field(default_factory=lambda: dict(TASKS))


QUICK = Setup(
    steps=20,
    batch=8,
    width=16,
    blocks=1,
    test=32,
    calibration=16,
    range_steps=10,
    tune_steps=10,
    tasks={
        "induction": RecallTask(kind="induction", symbols=6, shown=5, asked=2),
        "few-shot": RecallTask(kind="few_shot", symbols=2, shown=4, answers=2),
    },
)


def measure(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every model on every task with every seed and return the record."""
    s = Setup() if setup is None else setup
    cases = {f"{task}, {model}": (task, model) for task in s.tasks for model in MODELS}
    kept: dict[tuple[str, int], Transformer] = {}  # SOURCE of this task and seed

    def budget(task: RecallTask) -> Budget:
        return Budget(steps=s.steps, batch=s.batch, length=task.length, lr=s.lr, weight_decay=0.0)

    def fresh(task: RecallTask, model: str, seed: int) -> Transformer:
        torch.manual_seed(seed)
        b = budget(task)
        made = Transformer(
            language_config(b, task.vocab, width=s.width, blocks=s.blocks, heads=s.heads, **MODELS[model])
        )
        fit(made, RecallSampler(task, batch=s.batch, seed=1_000 + seed), b)
        return made

    def polynomial(task: RecallTask, name: str, seed: int) -> tuple[Transformer, float]:
        power = kept.get((name, seed)) or fresh(task, SOURCE, seed)
        b = budget(task)
        seen = task.draw(s.calibration, torch.Generator().manual_seed(7))[0]
        model = with_rows(power, seen)
        aims = targets(model, seen, s.wanted)

        def go_on(made: Transformer, steps: int, first: int) -> None:
            batches = RecallSampler(task, batch=s.batch, seed=first + seed)
            train_ranges(made, batches, b, b.schedule(steps=steps, lr=s.tune_lr), aims, s.wanted.weight)

        go_on(model, s.range_steps, 2_000)
        fitted = intervals(model, seen, s.degrees)
        made = substituted(model, fitted, s.degrees)
        go_on(made, s.tune_steps, 3_000)
        unseen = task.draw(s.test, torch.Generator().manual_seed(11))[0]
        return made, outside(made, unseen, fitted)

    def run(case: str, seed: int) -> list[Row]:
        name, kind = cases[case]
        task = s.tasks[name]
        row: Row = {"task": name, "model": kind, "chance": task.chance}
        if kind == POLYNOMIAL:
            model, row["outside"] = polynomial(task, name, seed)
            row["levels"] = model.levels
        else:
            model = fresh(task, kind, seed)
        if kind == SOURCE:
            kept.clear()
            kept[name, seed] = model
        right_NQ = answers(model, *task.draw(s.test, torch.Generator().manual_seed(11))).double()
        row |= {"accuracy": float(right_NQ.mean()), "parameters": model.parameter_count()}
        curve = zip(right_NQ.mean(0).tolist(), task.ceiling(), strict=True)
        return [
            row,
            *({"task": name, "model": kind, "shot": i, "at": a, "ceiling": c} for i, (a, c) in enumerate(curve)),
        ]

    return sweep(
        "recall",
        tuple(cases),
        seeds,
        run,
        params=asdict(s),
        figures=("accuracy", "chance", "at", "ceiling", "outside"),
        by=("task", "model", "shot"),
        keep=keep,
        progress=progress,
    )


def show(record: Record) -> Sequence[Block]:
    """Show accuracy by task, and the few-shot curve below its ceiling."""
    from benchmarks.blocks import legend, panels, picture
    from benchmarks.train_figures import by_name, categories, dots, lines, table

    summary = record["metrics"]["summary"]
    whole = [e for e in summary if "accuracy" in e]
    shots = [e for e in summary if e["task"] == "few-shot" and "at" in e]
    drawing, (upper, lower) = panels(2)
    tasks, models = categories(whole, "accuracy", category="task", name="model")
    dots(upper, tasks, models, x_label="task", y_label="accuracy, all questions")
    upper.set_ylim(0, 1.05)
    lines(lower, by_name(shots, "at", x="shot", name="model"), x_label="shots in the window", y_label="accuracy")
    for best in list(by_name(shots, "ceiling", x="shot", name="model").values())[:1]:
        lower.plot([p[0] for p in best], [p[1] for p in best], color="0.5", linestyle=":", label="best possible")
        legend(lower)
    lower.set_ylim(0, 1.05)
    return [
        table(
            whole,
            "Answers that stand only in the window, mean over seeds.",
            {"task": "task", "model": "model"},
            {"accuracy": "accuracy", "chance": "chance", "outside": "largest share outside an interval"},
        ),
        picture(drawing, "Accuracy by task, and of the few-shot task against the number of shots."),
    ]
