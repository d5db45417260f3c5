"""Length scaling of pointwise attention: where the 1/L goes, and what happens at windows longer than trained.

Every scaling of `mixers/pointwise.py` trains on windows of T tokens, with rotary positions so that a longer window has
no untrained parameter, and reads held-out windows of T, 2T and 4T. S(L) is a constant of the window, so a longer
window can take its own S or keep that of training; both are measured. Softmax and PowerSoftmax need neither. Each
length scores the same held-out tokens: the longest windows, cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.registry import Keep, Progress, Record
from benchmarks.train_runs import Budget, Row, ended, load_text, sweep, trained
from polyformer.mixers.pointwise import SCALINGS, Pointwise
from polyformer.model import Transformer
from training.evaluate import language

if TYPE_CHECKING:
    from benchmarks.blocks import Block

CASES: dict[str, dict[str, Any]] = {
    **{f"pointwise, {name}": {"mixer": "pointwise", "length_scaling": name} for name in SCALINGS},
    "softmax": {"mixer": "softmax"},
    "power 4": {"mixer": "power_softmax", "power": 4},
}
OWN, TRAINED = "own", "trained"  # whose S a longer window takes


BUDGET = Budget(steps=1_500, batch=8, length=64)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the benchmark."""

    budget: Budget = BUDGET
    vocab: int = 512
    width: int = 64
    blocks: int = 2
    heads: int = 4
    factors: tuple[int, ...] = (1, 2, 4)  # of the trained length
    windows: int = 64  # of the longest length
    cases: tuple[str, ...] = tuple(CASES)


QUICK = Setup(
    budget=Budget(steps=10, batch=2, length=8),
    vocab=300,
    width=16,
    blocks=1,
    heads=2,
    factors=(1, 2),
    windows=8,
    cases=("pointwise, after_sqrt", "pointwise, none", "softmax"),
)


def measure(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    text: Path | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every scaling with every seed, measure it at every length, and return the record."""
    s = Setup() if setup is None else setup
    corpus = load_text(text, vocab=s.vocab)
    longest = corpus.windows(s.budget.length * max(s.factors), s.windows)
    unigram = corpus.unigram(longest)

    def run(case: str, seed: int) -> list[Row]:
        model, training = trained(
            corpus,
            s.budget,
            seed,
            width=s.width,
            blocks=s.blocks,
            heads=s.heads,
            positions="none",
            rotary=s.width // s.heads,
            **CASES[case],
        )
        rows = []
        for factor in s.factors:
            length = factor * s.budget.length
            for scale in (OWN, TRAINED) if model.config.mixer == "pointwise" else (OWN,):
                longer = at_length(model, length, keep_scale=scale == TRAINED)
                found = language(longer, cut(longest, length), bytes_per_token=corpus.bytes_per_token, batch=16)
                row = {"length": length, "scale": scale, "heldout_loss": found.loss}
                rows.append(row | ended(training, found.loss, unigram))
        return rows

    params = {**asdict(s), "text": corpus.name, "unigram_loss": unigram}
    return sweep(
        "length-scaling",
        s.cases,
        seeds,
        run,
        params=params,
        figures=("heldout_loss", "failed"),
        by=("case", "length", "scale"),
        keep=keep,
        progress=progress,
    )


def at_length(model: Transformer, length: int, *, keep_scale: bool) -> Transformer:
    """Return a copy of a model with rotary positions that reads windows of `length`; `keep_scale` leaves pointwise
    attention the constant of the window that it was trained on.
    """
    longer = Transformer(replace(model.config, length=length))
    longer.load_state_dict(model.state_dict())
    if keep_scale:
        for block, trained in zip(longer.blocks, model.blocks, strict=True):
            if isinstance(block.mixer, Pointwise) and isinstance(trained.mixer, Pointwise):
                block.mixer.before, block.mixer.after = trained.mixer.before, trained.mixer.after
    return longer.eval()


def cut(windows_NS: Tensor, length: int) -> Tensor:
    """Cut windows [n, k length + 1] into [n k, length + 1] that score the same targets."""
    return windows_NS.unfold(1, length + 1, length).flatten(0, 1)


def show(record: Record) -> Sequence[Block]:
    """Show held-out loss against the length of the window, for both choices of the constant."""
    from benchmarks.blocks import panels, picture
    from benchmarks.train_figures import by_name, lines, table

    summary = record["metrics"]["summary"]
    drawing, axes = panels(2)
    titles = {OWN: "constants of its own length", TRAINED: "constants of the trained length"}
    for axis, (scale, title) in zip(axes, titles.items(), strict=True):
        shown = [e for e in summary if e["scale"] == scale or not str(e["case"]).startswith("pointwise")]
        losses = by_name(shown, "heldout_loss", x="length")
        x_label = f"tokens a window, {title}"
        lines(axis, losses, x_label=x_label, y_label="held-out loss, nats a token", doubling=True)
        axis.axhline(record["params"]["unigram_loss"], color="0.5", linestyle=":")
    return [
        table(
            summary,
            "Windows of the trained length and longer ones over the same held-out tokens, mean over seeds.",
            {"case": "attention", "length": "tokens a window", "scale": "constants of length"},
            {"heldout_loss": "held-out loss", "failed": "share of runs that failed"},
        ),
        picture(drawing, "Loss against the length of the window; dotted: what token frequencies alone would give."),
    ]
