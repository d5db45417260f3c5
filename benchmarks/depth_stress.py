"""Depth stress: the same narrow model from 4 to 32 layers, attention with a normaliser against attention without.

Three learning rates: the one that the other tables use, and two above it, since what a missing normaliser costs first
is the margin before training breaks.

The small form of the 32-layer claim (methods.md 1.5 and 1.8): with pointwise attention the authors of PowerSoftmax
could not train 32-layer models, and blamed the missing normalisation of scores. A run counts as diverged or stuck by
`train_runs.outcome`; both are reported beside the loss, since a mean over the runs that survived would flatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.registry import Keep, Progress, Record
from benchmarks.train_runs import Budget, Row, ended, load_text, sweep, trained
from training.evaluate import language

if TYPE_CHECKING:
    from benchmarks.blocks import Block

MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "power 4": {"mixer": "power_softmax", "power": 4},
    "pointwise": {"mixer": "pointwise", "length_scaling": "after_sqrt"},
    "pointwise, no scaling": {"mixer": "pointwise", "length_scaling": "none"},
}


BUDGET = Budget(steps=130, batch=8, length=32)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the benchmark."""

    budget: Budget = BUDGET
    vocab: int = 512
    width: int = 32
    heads: int = 2
    layers: tuple[int, ...] = (4, 8, 16, 32)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # learning rates
    windows: int = 256
    mixers: tuple[str, ...] = tuple(MIXERS)


QUICK = Setup(
    budget=Budget(steps=10, batch=2, length=16),
    vocab=300,
    layers=(1, 2),
    rates=(3e-3,),
    windows=8,
    mixers=("softmax", "pointwise"),
)


def measure(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    text: Path | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every mixer at every depth with every seed and return the record."""
    setup = Setup() if setup is None else setup
    corpus = load_text(text, vocab=setup.vocab)
    windows = corpus.windows(setup.budget.length, setup.windows)
    unigram = corpus.unigram(windows)
    cases = {
        f"{name}, {n} layers, rate {rate:g}": (name, n, rate)
        for n in setup.layers
        for rate in setup.rates
        for name in setup.mixers
    }

    def run(case: str, seed: int) -> Row:
        name, layers, rate = cases[case]
        model, training = trained(
            corpus,
            setup.budget,
            seed,
            width=setup.width,
            blocks=layers,
            heads=setup.heads,
            schedule=setup.budget.schedule(lr=rate),
            **MIXERS[name],
        )
        loss = language(model, windows, bytes_per_token=corpus.bytes_per_token).loss
        return {
            "mixer": name,
            "layers": layers,
            "rate": rate,
            "heldout_loss": loss,
            **ended(training, loss, unigram),
            "seconds": training.seconds,
            "curve": training.thinned(),
        }

    params = {**asdict(setup), "text": corpus.name, "unigram_loss": unigram}
    return sweep(
        "depth-stress",
        tuple(cases),
        seeds,
        run,
        params=params,
        figures=("heldout_loss", "failed"),
        by=("mixer", "layers", "rate"),
        keep=keep,
        progress=progress,
    )


def show(record: Record) -> Sequence[Block]:
    """Show held-out loss and the share of failed runs against depth."""
    from benchmarks.blocks import panels, picture
    from benchmarks.train_figures import by_name, lines, table

    summary, rates = record["metrics"]["summary"], record["params"]["rates"]
    drawing, axes = panels(len(rates) + 1)
    for axis, rate in zip(axes, rates, strict=False):
        losses = by_name([e for e in summary if e["rate"] == rate], "heldout_loss", x="layers", name="mixer")
        lines(axis, losses, x_label=f"layers, learning rate {rate:g}", y_label="held-out loss", doubling=True)
        axis.axhline(record["params"]["unigram_loss"], color="0.5", linestyle=":")
    worst = [e for e in summary if e["rate"] == max(rates)]
    shares = by_name(worst, "failed", x="layers", name="mixer")
    shares = {name: [(x, mean, 0.0) for x, mean, _ in points] for name, points in shares.items()}
    x_label = f"layers, learning rate {max(rates):g}"
    lines(axes[-1], shares, x_label=x_label, y_label="share of runs that failed", doubling=True)
    axes[-1].set_ylim(-0.05, 1.05)
    return [
        table(
            summary,
            "Narrow models after the same steps, mean over seeds.",
            {"mixer": "mixer", "layers": "layers", "rate": "learning rate"},
            {"heldout_loss": "held-out loss", "failed": "share of runs that failed"},
        ),
        picture(drawing, "Loss and failed runs against depth; dotted: what token frequencies alone would give."),
    ]
