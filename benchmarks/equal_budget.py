"""Equal budget: one small language model for each sequence mixer, same data, steps, batches and seeds (methods.md 1.8).

Held-out loss, bits a byte, tokens a second of training, and what became of the run. PowerSoftmax comes in every even
power with and without the stable form, whose only difference is arithmetic: in exact numbers the two are one map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.registry import Keep, Progress, Record
from benchmarks.train_runs import Budget, Row, ended, load_text, sweep, trained, warm_up
from training.evaluate import language

if TYPE_CHECKING:
    from benchmarks.blocks import Block

CASES: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    **{
        f"power {p}{'' if form == 'stable' else ' unstable'}": {"mixer": "power_softmax", "power": p, "form": form}
        for p in (2, 4, 6, 8, 12)
        for form in ("stable", "exact")
    },
    "pointwise": {"mixer": "pointwise"},
    "linear": {"mixer": "linear"},
    "gated linear": {"mixer": "gated_linear"},
    "hyena": {"mixer": "hyena"},
    "rwkv": {"mixer": "rwkv"},
    "griffin": {"mixer": "griffin"},
    "mamba": {"mixer": "mamba", "state": 4},
    "mamba2": {"mixer": "mamba2", "state": 4},
    "polynomial s6": {"mixer": "polynomial_s6", "state": 4},
}


BUDGET = Budget(steps=500, batch=8, length=64)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the benchmark."""

    budget: Budget = BUDGET
    vocab: int = 512
    width: int = 64
    blocks: int = 2
    heads: int = 4
    windows: int = 256  # held-out windows that are scored
    cases: tuple[str, ...] = tuple(CASES)


QUICK = Setup(
    budget=Budget(steps=10, batch=2, length=16), vocab=300, width=16, windows=8, cases=("softmax", "power 4", "mamba")
)


def measure(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    text: Path | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every case with every seed and return the record."""
    setup = Setup() if setup is None else setup
    corpus = load_text(text, vocab=setup.vocab)
    windows = corpus.windows(setup.budget.length, setup.windows)
    unigram = corpus.unigram(windows)
    warm_up()

    def run(case: str, seed: int) -> Row:
        model, training = trained(
            corpus, setup.budget, seed, width=setup.width, blocks=setup.blocks, heads=setup.heads, **CASES[case]
        )
        quality = language(model, windows, bytes_per_token=corpus.bytes_per_token)
        return {
            "heldout_loss": quality.loss,
            "bits_per_byte": quality.bits_per_byte,
            "tokens_per_second": training.tokens_per_second,
            "parameters": model.parameter_count(),
            **ended(training, quality.loss, unigram),
            "curve": training.thinned(),
        }

    params = {**asdict(setup), "text": corpus.name, "bytes_per_token": corpus.bytes_per_token, "unigram_loss": unigram}
    return sweep(
        "equal-budget",
        setup.cases,
        seeds,
        run,
        params=params,
        figures=("heldout_loss", "bits_per_byte", "tokens_per_second", "failed"),
        keep=keep,
        progress=progress,
    )


def show(record: Record) -> Sequence[Block]:
    """Show held-out loss, bits a byte and tokens a second of each case, with the runs that did not train."""
    from benchmarks.blocks import legend, panels, picture
    from benchmarks.train_figures import bars, table

    summary = record["metrics"]["summary"]
    drawing, (upper, lower) = panels(2, height=0.2 * len(summary) + 1.0)
    bars(upper, summary, "heldout_loss", label="held-out loss, nats a token", zero=False)
    upper.axvline(record["params"]["unigram_loss"], color="0.5", linestyle=":", label="token frequencies alone")
    legend(upper)
    bars(lower, summary, "tokens_per_second", label="training tokens a second, one thread")
    figures = {
        "heldout_loss": "held-out loss",
        "bits_per_byte": "bits a byte",
        "tokens_per_second": "tokens a second",
        "failed": "share of runs that failed",
    }
    return [
        table(summary, "Each mixer after the same steps, mean over seeds.", {"case": "mixer"}, figures),
        picture(drawing, "Held-out loss and training speed of each mixer; bars are one standard deviation over seeds."),
    ]
