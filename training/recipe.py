"""The recipe of a model as one frozen value, with two presets: `demo` (minutes, shown to people) and `quick` (seconds,
for tests).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from polyformer.mixers import unread
from polyformer.model import ModelConfig
from training.data import Mix
from training.limits import require_numbers

TASKS = ("next tokens", "texts", "images")
MAY_BE_NONE = ("activation_spread", "range_outside")
SHARED = (  # fields that go to `ModelConfig` as they are
    *("vocab", "length", "width", "heads", "hidden", "blocks", "parallel", "power", "eps", "las_decay", "activation"),
    *("mlp_norm", "score_norm", "kv_heads", "rotary", "gated", "positions", "hyena_order", "decay", "output_gate"),
)
Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, done, total, figures (e.g. loss)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a run. Steps are optimiser steps; a stage of 0 steps is skipped.

    Targets of the range losses: activations within +-`activation_bound`; variances within a ratio hi/lo of
    `variance_ratio`, centred on what the model has. Their fitted intervals are the targets widened by the factor
    `margin` at both ends. Denominators have a target and a fitted interval of their own, because their ends differ:
    a denominator above the interval makes the reciprocal polynomial explode; one below it is harmless (the
    numerator is smaller still, and the polynomial is finite at 0), so the lower target lies below the lower end of
    the fit.
    """

    seed: int = 0
    threads: int = 2
    # data
    task: str = "next tokens"  # or the class of texts, of images
    patch: int = 4  # side in pixels, of images; their tokens are the patches, so `vocab` and `length` are not read
    vocab: int = 1024
    length: int = 32
    holdout: int = 9  # every k-th document
    heldout: int = 0  # held-out windows that quality and ranges are measured on, evenly spread; 0: all of them
    calibration: int = (
        512  # windows of training text that choose ranges, beside a quarter as many short and arbitrary ones
    )
    # model
    width: int = 128
    heads: int = 4
    hidden: int = 512
    blocks: int = 2
    parallel: bool = False
    power: int = 2
    eps: float = 4.0
    las_decay: float = 1.0  # LaS: the largest decay of scores with distance, of both twins; it costs no level
    activation: str = "gelu"
    exact_norms: tuple[str, ...] = ("affine",) * 5
    mlp_norm: bool = False  # the BatchNorms that stabilise a vision model, which fold away
    score_norm: bool = False
    # polynomial form
    activation_degree: int = 2
    activation_spread: float | None = 0.5  # fit activations under a normal density; None: evenly over the interval
    norm_degree: int = 2
    norm_newton: int = 0
    reciprocal_degree: int = 4
    # optimiser
    batch: int = 64
    padded: int = 4
    noise: int = 4  # windows of arbitrary tokens beside a batch, conversion only
    lr: float = 3e-3
    tune_lr: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.1
    clip: float = 1.0
    # The polynomial model has as many steps in all its stages as the softmax twin, nearly all of them with the polynomials
    # in place: training goes to where it ends.
    softmax_steps: int = 1200
    power_steps: int = 100
    start: str = "power"  # what the conversion starts from: power, or softmax with its attention swapped
    matched: int = 0  # windows on which the powers are matched to the exponentials at that swap; 0: q and k are copied
    fit_steps: int = 0  # of each layer after that
    continue_steps: int = 100  # after that swap, in place of `power_steps`
    range_steps: int = 50
    tune_steps: int = 1050
    checkpoint_every: int = 200
    # ranges
    activation_bound: float = 4.0
    variance_ratio: float = 4.0
    margin: float = 1.5
    denominator_target: tuple[float, float] = (0.05, 3.0)  # the row factors centre log denominators on 0
    denominator_interval: tuple[float, float] = (0.15, 8.0)
    activation_weight: float = 0.3
    variance_weight: float = 0.3
    denominator_weight: float = 0.3
    cover: bool = False  # fit polynomials on what calibration shows, where that is wider than the targets
    range_outside: float | None = None  # end the range stage early, at this share of values outside their targets
    # Other models of the family, by the names that `ModelConfig` has for them. Fields from here on are written to JSON only
    # where they differ from their default, so that adding one changes no folder that exists.
    mixers: tuple[str, ...] = ()  # of the twin, one a block: a hybrid stack, whose softmax layers alone are converted
    kv_heads: int = 0
    rotary: int = 0
    gated: bool = False
    positions: str = "learned"
    hyena_order: int = 2
    decay: str = "data"  # of gated linear attention, which is a polynomial with "fixed" and another gate than "silu"
    output_gate: str = "silu"

    def __post_init__(self) -> None:
        if self.start not in ("power", "softmax"):
            raise ValueError(f"start is {self.start!r}; the conversion starts from 'power' or from 'softmax'")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; known: {', '.join(TASKS)}")
        require_numbers(vars(self))

    @classmethod
    def demo(cls) -> Recipe:
        """The model of the demonstration: 2 blocks, width 128, 32 tokens, 23 levels; a few minutes on 2 cores."""
        return cls()

    @classmethod
    def deep(cls) -> Recipe:
        """The demo's conversion at a depth that needs refreshes: 6 blocks, width 64, RMS norms of degree 2, 93 levels."""
        return cls(width=64, hidden=256, blocks=6, exact_norms=("rms",) * 13)

    @classmethod
    def quick(cls) -> Recipe:
        """The same shape of pipeline in seconds: 1 block, width 32, 16 tokens. Its loss means nothing."""
        return cls(
            vocab=300,
            length=16,
            width=32,
            heads=2,
            hidden=64,
            blocks=1,
            exact_norms=("affine",) * 3,
            threads=1,
            eps=2.0,
            denominator_weight=1.0,
            batch=16,
            padded=1,
            noise=1,
            tune_lr=1.5e-3,
            activation_spread=None,
            softmax_steps=30,
            power_steps=30,
            range_steps=60,
            tune_steps=40,
            warmup=5,
            checkpoint_every=10,
        )

    @classmethod
    def texts(cls, *, quick: bool = False) -> Recipe:
        """An encoder that tells texts by class: LayerNorm, softmax attention that is swapped on the way."""
        whole = cls(
            task="texts",
            length=128,
            width=64,
            hidden=128,
            las_decay=0.0,
            exact_norms=("layer",) * 5,
            activation_spread=None,
            activation_degree=4,
            norm_degree=3,
            batch=32,
            padded=2,
            noise=2,
            lr=2e-3,
            tune_lr=1e-3,
            warmup=20,
            softmax_steps=500,
            power_steps=0,
            start="softmax",
            continue_steps=150,
            range_steps=100,
            tune_steps=250,
            checkpoint_every=100,
            cover=True,
            range_outside=0.001,
        )
        return whole.short() if quick else whole

    @classmethod
    def images(cls, *, quick: bool = False) -> Recipe:
        """A vision transformer whose BatchNorms fold away (methods.md 2.2): nothing is left but one division a row."""
        whole = cls(
            task="images",
            patch=4,
            width=48,
            hidden=96,
            las_decay=0.0,
            exact_norms=("batch",) * 5,
            mlp_norm=True,
            score_norm=True,
            activation_spread=None,
            activation_degree=4,
            power=4,
            batch=64,
            padded=0,
            noise=0,  # arbitrary pixels would be in the statistics of the norms
            lr=4e-3,
            tune_lr=1e-3,
            warmup=30,
            weight_decay=0.05,
            softmax_steps=300,
            power_steps=0,
            start="softmax",
            continue_steps=100,
            range_steps=60,
            tune_steps=140,
            checkpoint_every=100,
            cover=True,
            range_outside=0.001,
        )
        return whole.short() if quick else whole

    def short(self) -> Recipe:
        """Return the same with one block and some steps a stage, for tests: its quality means nothing."""
        norms = (*self.exact_norms[:2], self.exact_norms[-1])
        return replace(
            self, threads=1, vocab=300, length=8, width=16, heads=2, hidden=16, blocks=1, exact_norms=norms, batch=8,
            softmax_steps=20, continue_steps=6, range_steps=6, tune_steps=6, warmup=3, checkpoint_every=10, calibration=64,
            activation_degree=2, reciprocal_degree=2, norm_degree=2, power=2, mixers=self.mixers[:1],
        )  # fmt: skip

    @classmethod
    def adopted(cls, body: ModelConfig, *, steps: int, batch: int) -> Recipe:
        """A released model, whose `body` this repeats: each stage trains for `steps` at a small rate. Its activations and
        variances spread more than those of a model that was trained for its polynomials, so degrees and targets are higher.
        """
        return cls(
            task="next tokens" if body.causal else "texts",
            vocab=body.vocab,
            length=body.length,
            heldout=64 if body.causal else 256,
            calibration=64 if body.causal else 256,
            width=body.width,
            heads=body.heads,
            hidden=body.hidden,
            blocks=body.blocks,
            parallel=body.parallel,
            kv_heads=body.kv_heads,
            rotary=body.rotary,
            gated=body.gated,
            positions=body.positions,
            power=8,
            eps=1.0,
            matched=32,
            las_decay=0.0,
            activation=body.activation,
            exact_norms=body.norms,
            activation_degree=31,
            activation_spread=None,
            norm_degree=7,
            norm_newton=1,
            reciprocal_degree=7,
            batch=batch,
            padded=min(1, batch - 1),
            noise=1,
            lr=1e-4,
            tune_lr=1e-4,
            warmup=10,
            weight_decay=0.0,
            softmax_steps=steps,
            power_steps=0,
            start="softmax",
            continue_steps=steps,
            range_steps=steps,
            tune_steps=steps,
            checkpoint_every=50,
            activation_bound=8.0,
            variance_ratio=16.0,
            cover=True,
        )

    def with_(self, **changes: object) -> Recipe:
        """Return a copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def changed(self, settings: Sequence[str]) -> Recipe:
        """Return a copy with fields set as "name=value", as a command line gives them; values are JSON, lists in brackets.

        Raises:
            ValueError: a field is unknown, or a value is of another type; says what there is.
        """
        known = asdict(self)
        changes: dict[str, Any] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in known:
                raise ValueError(f"the recipe has no {name!r}; known: {', '.join(known)}")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            value = tuple(value) if isinstance(value, list) else value
            old = known[name]
            fits = {type(old), int} if isinstance(old, float) else {type(old)}
            if old is not None and type(value) not in fits and not (value is None and name in MAY_BE_NONE):
                raise ValueError(f"{name} is {old!r}; {text!r} is no {type(old).__name__}")
            changes[name] = value
        return replace(self, **changes)

    def softmax_config(self) -> ModelConfig:
        """The twin: same sizes and parameters, softmax, exact functions."""
        return self._config("softmax")

    def power_config(self) -> ModelConfig:
        return self._config("power_softmax")

    def _config(self, attention: str) -> ModelConfig:
        """Return the config with this attention in the place of softmax; the other mixers of a hybrid stack stay."""
        layers = tuple(attention if name == "softmax" else name for name in self.mixers)
        return ModelConfig(
            **{name: getattr(self, name) for name in SHARED},
            norms=self.exact_norms,
            mixer=attention,
            mixers=layers,
            form="stable",
            causal=self.task == "next tokens" or "causal" in unread(layers or (attention,)),
            grid=(self.length,) if "hyena_nd" in layers else (),
        )

    def swapped_layers(self) -> tuple[int, ...] | None:
        """Return the blocks of a hybrid stack whose attention is to become another; None is all of them."""
        return tuple(i for i, name in enumerate(self.mixers) if name == "softmax") if self.mixers else None

    def mix(self, *, noise: bool) -> Mix:
        """Windows of arbitrary tokens come on top, so that every step of every model sees as much text."""
        extra = self.noise if noise else 0
        return Mix(batch=self.batch + extra, padded=self.padded, noise=extra)

    def to_json(self) -> str:
        unset = {f.name for f in fields(self)[FIRST_LATER:] if getattr(self, f.name) == f.default}
        return json.dumps({name: value for name, value in asdict(self).items() if name not in unset}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        values: dict[str, Any] = {"las_decay": 0.0, "activation_spread": None}  # of recipes from before these fields
        for name, value in json.loads(text).items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


FIRST_LATER = [f.name for f in fields(Recipe)].index("mixers")
