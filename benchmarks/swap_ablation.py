"""What a change of a trained model costs: attention swapped, then each non-polynomial function replaced.

Swap test (methods.md 1.8): train with softmax, put PowerSoftmax in its place, train on for 5, 10 and 20 % of the steps.
Controls: the softmax model trained on for as long, and PowerSoftmax from scratch with all the steps.

Substitution ablation: in a trained PowerSoftmax model the division, the activation, the norm, or all of them become
polynomials, after range training and after as many steps without range losses. In both arms the intervals are those
that training text shows, so the only difference is what the model was trained for. `tuned` trains on with the
polynomials in place, whose coefficients learn too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
from benchmarks.train_runs import Budget, Row, Text, fit, load_text, sweep, trained
from polyformer.model import Transformer
from training.evaluate import language
from training.substitution import KINDS, with_config, with_rows

if TYPE_CHECKING:
    from benchmarks.blocks import Block

SUBSTITUTION = "substitution"
BUDGET = Budget(steps=2_000, batch=16, length=32)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the benchmark."""

    budget: Budget = BUDGET
    vocab: int = 512
    width: int = 64
    blocks: int = 2
    heads: int = 4
    eps: float = 4.0
    windows: int = 512
    calibration: int = 256  # training windows on which intervals are measured
    powers: tuple[int, ...] = (2, 4)
    recovery: tuple[float, ...] = (0.05, 0.1, 0.2)  # of the steps
    substituted_power: int = 2
    range_steps: int = 600
    tune_steps: int = 400
    tune_lr: float = 1.5e-3
    degrees: Degrees = DEGREES
    wanted: Wanted = WANTED


QUICK = Setup(
    budget=Budget(steps=20, batch=2, length=8),
    vocab=300,
    width=16,
    blocks=1,
    heads=2,
    windows=8,
    calibration=8,
    powers=(2,),
    recovery=(0.5,),
    range_steps=10,
    tune_steps=10,
)


class Models:
    """Trained once a seed and kept, since the swap test and the ablation start from the same ones."""

    def __init__(self, setup: Setup, corpus: Text) -> None:
        self.setup, self.corpus = setup, corpus
        self._kept: dict[tuple[int, int], Transformer] = {}

    def trained(self, power: int, seed: int) -> Transformer:
        """Return the softmax model (power 0), or PowerSoftmax from scratch."""
        if any(s != seed for _, s in self._kept):
            self._kept.clear()
        if (power, seed) not in self._kept:
            s = self.setup
            torch.manual_seed(seed)  # the same first weights: all attention has the same parameters
            kind: dict[str, Any] = (
                {"mixer": "power_softmax", "power": power, "eps": s.eps} if power else {"mixer": "softmax"}
            )
            self._kept[power, seed], _ = trained(
                self.corpus, s.budget, seed, width=s.width, blocks=s.blocks, heads=s.heads, **kind
            )
        return self._kept[power, seed]


def measure(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    text: Path | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the swap test and the substitution ablation with every seed and return the record."""
    s = Setup() if setup is None else setup
    corpus = load_text(text, vocab=s.vocab)
    windows = corpus.windows(s.budget.length, s.windows)
    calibration = corpus.sampler(Budget(steps=1, batch=s.calibration, length=s.budget.length), 123).batch()[0]
    models = Models(s, corpus)
    cases = {**{f"swap power {p}": p for p in s.powers}, SUBSTITUTION: 0}

    def loss(model: Transformer) -> float:
        return language(model, windows, bytes_per_token=corpus.bytes_per_token).loss

    def swap(power: int, seed: int) -> list[Row]:
        original = models.trained(0, seed)
        config = replace(original.config, mixer="power_softmax", power=power, eps=s.eps)
        swapped = with_config(original, config)
        rows: list[Row] = [{"power": power, "share": 0.0, "swapped": loss(swapped), "softmax": loss(original)}]
        rows[0]["scratch"] = loss(models.trained(power, seed))
        for share in s.recovery:
            row: Row = {"power": power, "share": share}
            for name, kind in (("swapped", config), ("softmax", original.config)):
                model = with_config(original, kind).train()
                schedule = s.budget.schedule(steps=max(1, round(share * s.budget.steps)), lr=s.tune_lr)
                fit(model, corpus.sampler(s.budget, seed + 500), s.budget, schedule=schedule)
                row[name] = loss(model)
            rows.append(row)
        return rows

    def ablate(seed: int) -> list[Row]:
        rows = []
        for arm, weight in (("without range training", 0.0), ("with range training", s.wanted.weight)):
            model = with_rows(models.trained(s.substituted_power, seed), calibration)
            aims = targets(model, calibration, s.wanted)
            schedule = s.budget.schedule(steps=s.range_steps, lr=s.tune_lr)
            train_ranges(model, corpus.sampler(s.budget, seed + 600), s.budget, schedule, aims, weight)
            fitted = intervals(model, calibration, s.degrees)
            rows.append({"arm": arm, "replaced": "nothing", "heldout_loss": loss(model), "intervals": fitted})
            for kinds in (*((k,) for k in KINDS), KINDS):
                made = substituted(model, fitted, s.degrees, kinds)
                rows.append(
                    {
                        "arm": arm,
                        "replaced": kinds[0] if len(kinds) == 1 else "all",
                        "heldout_loss": loss(made),
                        "outside": outside(made, windows[:, :-1], fitted),
                    }
                )
            schedule = s.budget.schedule(steps=s.tune_steps, lr=s.tune_lr)
            train_ranges(made, corpus.sampler(s.budget, seed + 700), s.budget, schedule, aims, weight)
            rows.append(
                {
                    "arm": arm,
                    "replaced": "all, tuned",
                    "heldout_loss": loss(made),
                    "outside": outside(made, windows[:, :-1], fitted),
                }
            )
        return rows

    def run(case: str, seed: int) -> list[Row]:
        return ablate(seed) if case == SUBSTITUTION else swap(cases[case], seed)

    return sweep(
        "swap-ablation",
        tuple(cases),
        seeds,
        run,
        params={**asdict(s), "text": corpus.name},
        figures=("swapped", "softmax", "scratch", "heldout_loss", "outside"),
        by=("case", "share", "arm", "replaced"),
        keep=keep,
        progress=progress,
    )


def show(record: Record) -> Sequence[Block]:
    """Show the recovery after the swap, and what each replacement costs with and without range training."""
    from benchmarks.blocks import logarithmic, panels, picture
    from benchmarks.train_figures import by_name, categories, dots, lines, table

    summary = record["metrics"]["summary"]
    swaps = [e for e in summary if e["case"] != SUBSTITUTION]
    rest = [e for e in summary if e["case"] == SUBSTITUTION]
    drawing, (upper, lower) = panels(2)
    series = by_name(swaps, "swapped", x="share")
    controls = [e for e in swaps if e["case"] == swaps[0]["case"]]  # the same for every power
    for points in by_name(controls, "softmax", x="share").values():
        series["softmax, trained on"] = points
    lines(upper, series, x_label="continued training, share of the first steps", y_label="held-out loss, nats a token")
    names, arms = categories(rest, "heldout_loss", category="replaced", name="arm")
    dots(lower, names, arms, x_label="replaced by polynomials", y_label="held-out loss, nats a token")
    logarithmic(lower, "y")
    return [
        table(
            swaps,
            "Softmax swapped for PowerSoftmax, then trained on, mean over seeds.",
            {"case": "swap", "share": "share of the steps"},
            {"swapped": "swapped", "softmax": "softmax, trained on", "scratch": "PowerSoftmax from scratch"},
        ),
        table(
            rest,
            "Functions replaced by polynomials, mean over seeds.",
            {"arm": "before it", "replaced": "replaced"},
            {"heldout_loss": "held-out loss", "outside": "largest share outside an interval"},
        ),
        picture(drawing, "Recovery after the swap, and loss after each replacement (logarithmic)."),
    ]
