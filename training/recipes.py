"""Recipes of runs at scale, by name: the shape of the model and all numbers of the optimisation.

Released weights load into these shapes (`polyformer.pretrained`); what is ours is PowerSoftmax in the place of softmax.

    pythia-70m, 160m, 410m, 1.4b   Pythia (Biderman et al. 2023, arXiv 2304.01373, table 1, with their learning rates):
                                   parallel blocks, rotary positions on a quarter of each head, LayerNorm, GELU, biases, an
                                   untied head, 2048 tokens, a table of 50,304 rows (padded: the tokenizer has fewer)
    llama-7b-shape                 LLaMA 7B (Touvron et al. 2023, arXiv 2302.13971, table 2): rotary positions, RMSNorm,
                                   SwiGLU, no biases, an untied head, 2048 tokens, 32,000 rows

Parameters are those published, but for one thing: a parallel block of Pythia has two LayerNorms on the same x, ours one
(the gains fold into the linears, see `architectures/gpt_neox.py`), so it holds 2 D a block fewer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from polyformer.model import ModelConfig
from training.loop import Schedule
from training.shards import BYTE_VOCAB

PRECISIONS = ("fp32", "bf16")
# How a run is called and carried out: a run may go on with others.
NOT_MATHEMATICS = ("name", "checkpointing", "compile", "checkpoint_every", "evaluate_every", "heldout_windows")


@dataclass(frozen=True, kw_only=True)
class RangeTargets:
    """Range losses (methods.md 1.3) of a run: the interval in which the values of each kind are wanted, and the weight of
    what leaves it (0 leaves the kind alone).
    """

    activation: tuple[float, float] = (-4.0, 4.0)
    variance: tuple[float, float] = (0.25, 4.0)
    denominator: tuple[float, float] = (0.5, 16.0)
    activation_weight: float = 0.3
    variance_weight: float = 0.3
    denominator_weight: float = 0.3

    def __post_init__(self) -> None:
        for kind in ("activation", "variance", "denominator"):
            lo, hi = getattr(self, kind)
            if not lo < hi or (lo >= 0) == (kind == "activation") or lo == 0:
                wanted = "below 0 to above it" if kind == "activation" else "above 0 upwards"
                raise ValueError(f"the target of {kind} is {lo} to {hi}; give an interval from {wanted}")

    @classmethod
    def changed(cls, changes: Sequence[str]) -> RangeTargets:
        """Return the defaults with some changed, each "kind=low,high" or "kind_weight=number"."""
        values: dict[str, Any] = {}
        for change in changes:
            name, _, text = change.partition("=")
            if name not in (known := [f.name for f in fields(cls)]):
                raise ValueError(f"unknown range {change!r}; known: {', '.join(f'{n}=' for n in known)}")
            try:
                numbers = tuple(float(part) for part in text.split(","))
            except ValueError:
                numbers = ()
            if len(numbers) != (wanted := 1 if name.endswith("_weight") else 2):
                raise ValueError(f"{change!r} must hold {wanted} numbers after {name}=, parted by a comma")
            values[name] = numbers[0] if wanted == 1 else numbers
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ScaleRecipe:
    """One run. `batch` counts windows an optimiser step over all processes, `micro_batch` those of one process in one
    pass; their ratio fixes how often gradients accumulate, so the mathematics does not depend on the processes.
    """

    name: str
    model: ModelConfig
    batch: int
    micro_batch: int
    steps: int
    lr: float
    warmup: int
    weight_decay: float = 0.1
    clip: float = 1.0
    optimiser: str = "adamw"
    precision: str = "bf16"  # of the computation; weights and reductions are fp32
    checkpointing: bool = True  # of activations
    compile: bool = False
    checkpoint_every: int = 1000
    seed: int = 0
    start: str | None = None  # checkpoint of the first weights, see `training.start`; None: random ones
    ranges: RangeTargets | None = None  # None: no range losses
    evaluate_every: int = 1000  # steps, where there are held-out shards
    heldout_windows: int = 1024  # of them, the first

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        for name in ("batch", "micro_batch", "steps", "checkpoint_every", "evaluate_every", "heldout_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.ranges is not None and self.compile:
            raise ValueError(
                "range losses listen inside the blocks, where compiled code hears nobody; set compile=False"
            )
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; change one of them"
            )

    def with_(self, **changes: object) -> ScaleRecipe:
        """Return a copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def accumulation(self, world: int) -> int:
        """Passes of one process a step."""
        passes, rest = divmod(self.batch, self.micro_batch * world)
        if rest:
            raise ValueError(
                f"batch {self.batch} does not divide over {world} processes of micro_batch {self.micro_batch}; "
                "change one of them"
            )
        return passes

    def schedule(self) -> Schedule:
        return Schedule(
            steps=self.steps,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            checkpoint_every=self.checkpoint_every,
        )

    def polynomial_config(self) -> ModelConfig:
        """The model with every exact function replaced: reciprocal, activation and norms are polynomials."""
        return replace(
            self.model,
            form="rows",
            reciprocal="polynomial",
            reciprocal_degree=4,
            activation="polynomial",
            activation_degree=4,
            norms=tuple(f"{kind}_poly" if kind in ("rms", "layer") else kind for kind in self.model.norms),
            norm_degree=4,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def differences(self, other: str) -> list[str]:
        """Return what decides the curve and is another value in the JSON of another recipe: one phrase a field, with
        both values. Fields that the JSON lacks, because they are younger, have their defaults there.
        """
        ours, theirs = json.loads(self.to_json()), json.loads(other)
        return [
            *_differences(ScaleRecipe, ours, theirs, skipped=("model", *NOT_MATHEMATICS)),
            *_differences(ModelConfig, ours["model"], theirs["model"], prefix="model."),
        ]


def _differences(
    kind: type, ours: dict[str, Any], theirs: dict[str, Any], *, prefix: str = "", skipped: Sequence[str] = ()
) -> list[str]:
    """Return the differing fields of two values of one dataclass, as JSON has them."""
    defaults = json.loads(json.dumps({f.name: f.default for f in fields(kind) if f.default is not MISSING}))
    ours, theirs = defaults | ours, defaults | theirs
    return [
        f"{prefix}{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in dict.fromkeys((*ours, *theirs))
        if name not in skipped and ours.get(name) != theirs.get(name)
    ]


def names() -> list[str]:
    """Return the names of all recipes, smallest first."""
    return ["tiny_cpu", *PYTHIA, "llama-7b-shape"]


def load(name: str) -> ScaleRecipe:
    """Return the recipe of a name; an unknown name lists the known ones."""
    if name == "tiny_cpu":
        return _tiny_cpu()
    if name in PYTHIA:
        return _pythia(name)
    if name == "llama-7b-shape":
        return _llama_7b_shape()
    raise ValueError(f"unknown recipe {name!r}; known: {', '.join(names())}")


def _tiny_cpu() -> ScaleRecipe:
    """Bytes of this package's text, two blocks of width 32: a run of seconds that goes through everything."""
    return ScaleRecipe(
        name="tiny_cpu",
        model=ModelConfig(
            vocab=BYTE_VOCAB,
            length=32,
            width=32,
            heads=2,
            hidden=64,
            blocks=2,
            norms=("rms",) * 5,
            power=4,
        ),
        batch=8,
        micro_batch=4,
        steps=40,
        lr=3e-3,
        warmup=5,
        precision="fp32",
        checkpoint_every=10,
    )


# width, blocks, heads, learning rate, micro batch
PYTHIA: dict[str, tuple[int, int, int, float, int]] = {
    "pythia-70m": (512, 6, 8, 1e-3, 16),
    "160m": (768, 12, 12, 6e-4, 16),
    "410m": (1024, 24, 16, 3e-4, 8),
    "1.4b": (2048, 24, 16, 2e-4, 4),
}


def _pythia(name: str) -> ScaleRecipe:
    width, blocks, heads, lr, micro_batch = PYTHIA[name]
    return ScaleRecipe(
        name=name,
        model=ModelConfig(
            vocab=50_304,
            length=2048,
            width=width,
            heads=heads,
            hidden=4 * width,
            blocks=blocks,
            parallel=True,
            norms=("layer",) * (blocks + 1),
            power=4,
            rotary=width // heads // 4,
            positions="none",
            head_bias=False,
        ),
        batch=1024,  # 2 million tokens a step
        micro_batch=micro_batch,
        steps=143_000,
        lr=lr,
        warmup=1430,
        compile=True,
    )


def _llama_7b_shape() -> ScaleRecipe:
    return ScaleRecipe(
        name="llama-7b-shape",
        model=ModelConfig(
            vocab=32_000,
            length=2048,
            width=4096,
            heads=32,
            hidden=11_008,
            blocks=32,
            norms=("rms",) * 65,
            activation="silu",
            power=4,
            norm_eps=1e-6,
            rotary=128,
            positions="none",
            biases=False,
            gated=True,
            head_bias=False,
        ),
        batch=2048,  # 4 million tokens a step, as LLaMA
        micro_batch=1,
        steps=250_000,  # 1 T tokens
        lr=3e-4,
        warmup=2000,
        compile=True,
    )
