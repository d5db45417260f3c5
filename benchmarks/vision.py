"""Small vision models at equal budgets: what each step from softmax to a polynomial costs, and what Hyena's grid gives.

`vision`        a ViT from softmax and LayerNorm to polynomials, by mixer, norm and activation (methods.md 2), test
                accuracy over seeds. BatchNorm alone, and with the two that stabilise it: one inside each MLP, one over
                the scores of each head.
`vision-few`    attention, Hyena over the grid or over the raster, and hybrids on few images (methods.md 9.4), each also
                on images whose pixels are shuffled by one fixed permutation: what a mixer gains from neighbourhood must
                go away there.

Data: 5,000 MNIST digits, all of them training images of MNIST, split here 4,000 / 1,000 by a fixed permutation: never
call that MNIST's test set. Fashion-MNIST with its own split. 28 x 28 pixels in patches of 4 x 4, 49 tokens. Folder:
the variable POLYFORMER_DATA, else `data`. `quick` draws its own pictures and needs none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import records
from benchmarks.blocks import Block, Table, legend, logarithmic, look, panels, picture
from benchmarks.registry import Record, Settings
from benchmarks.train_runs import data_folder, one_by_one
from polyformer.model import ModelConfig
from polyformer.vision import VisionConfig, ViT
from training import datasets, optimiser
from training.loop import Schedule

Row = dict[str, Any]
CLASSES = 10
SPLIT_SEED, SHUFFLE_SEED = 0, 1
STABLE = {"mlp_norm": True, "score_norm": True}
BATCH = {"norm": "batch"}

# What each case changes in a ViT of softmax attention, LayerNorm and GELU. "norm" is the kind at every site.
VISION: Mapping[str, Mapping[str, Any]] = {
    "softmax, LayerNorm": {},
    "softmax, BatchNorm": BATCH,
    "softmax, BatchNorm, stabilised": BATCH | STABLE,
    "PowerSoftmax, LayerNorm": {"mixer": "power_softmax"},
    "PowerSoftmax, BatchNorm": BATCH | {"mixer": "power_softmax"},
    "PowerSoftmax, BatchNorm, stabilised": BATCH | STABLE | {"mixer": "power_softmax"},
    "PowerSoftmax, stabilised, quartic": BATCH | STABLE | {"mixer": "power_softmax", "activation": "quartic"},
    "pointwise, stabilised, square": BATCH | STABLE | {"mixer": "pointwise", "activation": "square"},
    "Hyena 2-D, BatchNorm in MLP, square": BATCH | {"mixer": "hyena_nd", "mlp_norm": True, "activation": "square"},
}
# The last two have no division and no root: polynomials as they are. The one before has one division a row left.

FEW: Mapping[str, Mapping[str, Any]] = {
    "softmax attention": {},
    "PowerSoftmax attention": {"mixer": "power_softmax"},
    "Hyena 2-D": {"mixer": "hyena_nd"},
    "Hyena on the raster": {"mixer": "hyena_nd", "raster": True, "hyena_direction": "standard"},
    "hybrid, Hyena 2-D first": {"order": ("hyena_nd", "softmax")},
    "hybrid, attention first": {"order": ("softmax", "hyena_nd")},
}
DIRECTION = "parallel"  # of Hyena 2-D: all four quadrants at a quarter of the cost of 4dirp


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every case may spend: equal steps of equal batches, one rate for all."""

    steps: int
    batch: int = 64
    width: int = 48
    blocks: int = 2
    heads: int = 4
    hidden: int = 96
    patch: int = 4
    lr: float = 4e-3
    test: int = 1000  # images of the test split that accuracy is taken on

    def schedule(self) -> Schedule:
        return Schedule(
            steps=self.steps,
            lr=self.lr,
            warmup=max(1, self.steps // 10),
            weight_decay=0.05,
            clip=1.0,
            checkpoint_every=self.steps + 1,
        )


VISION_BUDGET, FEW_BUDGET = Budget(steps=300), Budget(steps=150)
QUICK = Budget(steps=6, batch=8, width=16, blocks=2, hidden=16, heads=2, patch=4, test=32)
FEW_SIZES, QUICK_SIZES = (100, 300, 1000), (16,)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Pictures NCHW, mean 0 and deviation 1 over the training side, and labels, of both sides of a split."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def first(self, n: int, seed: int) -> Images:
        """Return a draw of n training images, as equal in number by class as n allows."""
        g = torch.Generator().manual_seed(1_000 + seed)
        x, y = self.train
        order = torch.randperm(len(y), generator=g)
        each = [order[y[order] == c] for c in range(CLASSES)]
        chosen = [each[c][i] for i in range(-(-n // CLASSES)) for c in range(CLASSES) if i < len(each[c])][:n]
        at = torch.stack(chosen)
        return Images(train=(x[at], y[at]), test=self.test)

    def shuffled(self) -> Images:
        """Return the same with the pixels of every image in one fixed other order."""
        n = self.train[0][0].numel()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(SHUFFLE_SEED))

        def moved(x: Tensor) -> Tensor:
            return x.flatten(1)[:, order].view_as(x)

        return Images(train=(moved(self.train[0]), self.train[1]), test=(moved(self.test[0]), self.test[1]))


def digits() -> Images:
    """5,000 digits of MNIST's training side, 4,000 / 1,000."""
    x, y = datasets.mnist5k(data_folder())
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    pictures, labels = torch.from_numpy(x)[order], torch.from_numpy(y)[order]
    return scaled((pictures[:4000], labels[:4000]), (pictures[4000:], labels[4000:]))


def fashion() -> Images:
    """Fashion-MNIST with its own split."""
    train, test = datasets.fashion_mnist(data_folder())
    return scaled(*((torch.from_numpy(x.copy()), torch.from_numpy(y.copy()).long()) for x, y in (train, test)))


def spots() -> Images:
    """Drawn here, 12 x 12: one bright spot in noise, the class is where it is. Needs no data; proves nothing."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % CLASSES
    x = torch.rand(160, 12, 12, generator=g) * 80
    for i, c in enumerate(labels.tolist()):
        x[i, 2 * (c // 5) * 2 + 1 : 2 * (c // 5) * 2 + 4, 2 * (c % 5) : 2 * (c % 5) + 3] += 150
    return scaled((x[:128], labels[:128]), (x[128:], labels[128:]))


def scaled(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Images:
    """Turn uint8 pictures NHW into floats NCHW by the mean and deviation of the training side."""
    mean, deviation = train[0].float().mean(), train[0].float().std()

    def one(x: Tensor) -> Tensor:
        return ((x.float() - mean) / deviation)[:, None]

    return Images(train=(one(train[0]), train[1].long()), test=(one(test[0]), test[1].long()))


DATA: Mapping[str, Callable[[], Images]] = {"digits": digits, "fashion-mnist": fashion, "spots": spots}


def config(changes: Mapping[str, Any], budget: Budget, size: int) -> VisionConfig:
    """Return the ViT of a case for images of size x size."""
    rest = dict(changes)
    side, norm = size // budget.patch, rest.pop("norm", "layer")
    order, raster = rest.pop("order", ()), rest.pop("raster", False)
    names = tuple(order[2 * i // budget.blocks] for i in range(budget.blocks)) if order else ()
    hyena = "hyena_nd" in (rest.get("mixer"), *names)
    body = ModelConfig(
        vocab=0,
        length=side * side,
        width=budget.width,
        heads=budget.heads,
        hidden=budget.hidden,
        blocks=budget.blocks,
        norms=(norm,) * (2 * budget.blocks + 1),
        causal=False,
        mixers=names,
        grid=() if not hyena else (side * side,) if raster else (side, side),
        **{"mixer": "softmax", "hyena_direction": DIRECTION, **rest},
    )
    return VisionConfig(body=body, classes=CLASSES, image=(size, size), patch=budget.patch)


def fit(model: ViT, images: Images, budget: Budget, seed: int) -> Row:
    """Train in place and return accuracy and loss on the test side, and seconds of training."""
    schedule, (x, y) = budget.schedule(), images.train
    adam = optimiser.build("adamw", model, lr=schedule.lr, weight_decay=schedule.weight_decay)
    g = torch.Generator().manual_seed(seed)
    model.train()
    began = time.perf_counter()
    for step in range(schedule.steps):
        for group in adam.param_groups:
            group["lr"] = schedule.rate(step)
        at = torch.randint(0, len(y), (budget.batch,), generator=g)
        loss = F.cross_entropy(model(x[at]), y[at])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        adam.step()
    seconds = time.perf_counter() - began
    model.eval()
    test_x, test_y = images.test[0][: budget.test], images.test[1][: budget.test]
    with torch.no_grad():
        logits = torch.cat([model(part) for part in test_x.split(250)])
    right = (logits.argmax(1) == test_y).float().mean()
    return {
        "accuracy": float(right),
        "loss": finite(F.cross_entropy(logits, test_y)),
        "train_loss": finite(loss),
        "seconds": seconds,
    }


def finite(x: Tensor) -> float | None:
    """A number, or None where training diverged: JSON has no nan."""
    return float(x.detach()) if bool(torch.isfinite(x)) else None


def vision(settings: Settings) -> Record:
    """Return the record of `vision`: every case on every data set that is there."""
    budget, names = (QUICK, ("spots",)) if settings.quick else (VISION_BUDGET, ("digits", "fashion-mnist"))
    plans = [(name, case, 0, False) for name in names for case in VISION]
    return sweep("vision", VISION, plans, budget, settings)


def vision_few(settings: Settings) -> Record:
    """Return the record of `vision-few`: every case on few digits, as they are and shuffled."""
    budget, sizes = (QUICK, QUICK_SIZES) if settings.quick else (FEW_BUDGET, FEW_SIZES)
    name = "spots" if settings.quick else "digits"
    plans = [(name, case, n, shuffled) for n in sizes for shuffled in (False, True) for case in FEW]
    return sweep("vision-few", FEW, plans, budget, settings)


Plan = tuple[str, str, int, bool]  # data, case, training images (0: all), shuffled


def sweep(
    name: str, cases: Mapping[str, Mapping[str, Any]], plans: Sequence[Plan], budget: Budget, settings: Settings
) -> Record:
    """Train every plan with every seed, seeds outermost, so that a run cut short has compared all cases once.

    Raises:
        FileNotFoundError: none of the data sets is there; says how to fetch them.
    """
    held, missing = load(plan[0] for plan in plans)
    if not held:
        raise FileNotFoundError("; ".join(missing.values()))

    def one(seed: int, plan: Plan) -> list[Row]:
        data, case, n, shuffled = plan
        images = held[data] if not n else held[data].first(n, seed)
        images = images.shuffled() if shuffled else images
        torch.manual_seed(seed)
        model = ViT(config(cases[case], budget, images.train[0].shape[-1]))
        labels = {"data": data, "case": case, "images": len(images.train[1]), "shuffled": shuffled, "seed": seed}
        return [labels | {"parameters": model.parameter_count()} | fit(model, images, budget, seed)]

    def record(rows: Sequence[Row]) -> dict[str, Any]:
        return records.record(
            name,
            metrics={"summary": summary(rows), "rows": list(rows), "missing": missing},
            params={"budget": asdict(budget), "cases": {k: dict(v) for k, v in cases.items()}},
            threads=1,
            seed=settings.seeds[0],
            repeats=len(settings.seeds),
        )

    todo = [
        (f"{plan[1]}, {plan[0]}, seed {seed}", partial(one, seed, plan))
        for seed in settings.seeds
        for plan in plans
        if plan[0] in held
    ]
    return one_by_one(todo, record, keep=settings.keep, progress=settings.progress)


def load(names: Any) -> tuple[dict[str, Images], dict[str, str]]:
    """Return the data sets that are there, and for each that is not the sentence that says how to fetch it."""
    held: dict[str, Images] = {}
    missing: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            held[name] = DATA[name]()
        except FileNotFoundError as error:
            missing[name] = f"{name}: {error}"
    return held, missing


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return mean and sample deviation of accuracy over seeds, one entry a data set, case, size and order of pixels."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("data", "case", "images", "shuffled")), []).append(row)
    entries = []
    for (data, case, images, shuffled), members in groups.items():
        values = [r["accuracy"] for r in members]
        entries.append(
            {
                "data": data,
                "case": case,
                "images": images,
                "shuffled": shuffled,
                "accuracy": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": len(values),
                "parameters": members[0]["parameters"],
                "diverged": sum(r["loss"] is None for r in members),
            }
        )
    return entries


COLUMNS = {
    "data": "data",
    "case": "model",
    "images": "images",
    "shuffled": "pixels shuffled",
    "accuracy": "test accuracy",
    "deviation": "±",
    "seeds": "seeds",
    "parameters": "parameters",
    "diverged": "diverged",
}


def table(record: Record, caption: str) -> Table:
    """One row an entry of the summary."""
    rows = [[entry[name] for name in COLUMNS] for entry in record["metrics"]["summary"]]
    return Table(caption=caption, columns=list(COLUMNS.values()), rows=rows)


def show_vision(record: Record) -> list[Block]:
    """A table, and accuracy by case with its deviation, one marker a data set."""
    entries = record["metrics"]["summary"]
    steps = record["params"]["budget"]["steps"]
    blocks: list[Block] = [table(record, f"Small ViTs after {steps} steps; missing data: {_missing(record)}")]
    if entries:
        cases = list(dict.fromkeys(e["case"] for e in entries))
        drawing, (ax,) = panels(height=0.6 + 0.34 * len(cases))
        for i, data in enumerate(dict.fromkeys(e["data"] for e in entries)):
            own = [e for e in entries if e["data"] == data]
            ax.errorbar(
                [e["accuracy"] for e in own],
                [cases.index(e["case"]) + 0.12 * i for e in own],
                xerr=[e["deviation"] or 0.0 for e in own],
                linestyle="none",
                **look(i),
                label=data,
                capsize=2,
            )
        ax.set_yticks(range(len(cases)), cases)
        ax.invert_yaxis()
        ax.set_xlabel("test accuracy")
        legend(ax)
        blocks.append(picture(drawing, "Test accuracy from softmax to polynomials, mean and deviation over seeds"))
    return blocks


def show_few(record: Record) -> list[Block]:
    """A table, and accuracy against the number of images, solid as they are and dotted with pixels shuffled."""
    entries = record["metrics"]["summary"]
    blocks: list[Block] = [table(record, "Few training images, and the same with one fixed shuffling of the pixels")]
    if entries:
        drawing, (ax,) = panels()
        for i, case in enumerate(dict.fromkeys(e["case"] for e in entries)):
            for shuffled, style in ((False, "-"), (True, ":")):
                own = [e for e in entries if e["case"] == case and e["shuffled"] == shuffled]
                ax.errorbar(
                    [e["images"] for e in own],
                    [e["accuracy"] for e in own],
                    yerr=[e["deviation"] or 0.0 for e in own],
                    linestyle=style,
                    label=None if shuffled else case,
                    capsize=2,
                    **look(i),
                )
        logarithmic(ax, "x", [e["images"] for e in entries])
        ax.set_xlabel("training images")
        ax.set_ylabel("test accuracy")
        legend(ax)
        blocks.append(picture(drawing, "Accuracy against training images; dotted: pixels shuffled"))
    return blocks


def _missing(record: Record) -> str:
    return "; ".join(record["metrics"]["missing"].values()) or "none"
