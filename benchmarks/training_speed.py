"""Speed of training: PowerSoftmax in tiles against fused softmax, and our loop against a plain one, on one thread.

Every comparison is A B A B in one run: each round times the same steps of A, then of B, and gives one ratio, so that a
machine that slows down slows both. Reported are the median ratio and the extremes over rounds. Tokens a second are of
whole steps: batch, forward, backward, clipping and update. Seconds are of the process's CPU time, which on one thread
and an idle machine is the time on the wall and does not count what neighbours use; the ratio on the wall stands
beside it.

The plain loop and model are written here from what nanoGPT (Karpathy, MIT licence) does: AdamW with decay on matrices,
a cosine rate, clipped gradients, one product for q, k and v, torch's LayerNorm, GELU and fused attention.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import records
from benchmarks.blocks import Block, Table
from benchmarks.registry import Record, Settings
from benchmarks.train_runs import one_by_one
from polyformer.model import ModelConfig, Transformer
from training.data import Mix, Sampler
from training.loop import Schedule, run_stage

POWERS = (2, 4, 8)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a step of `batch` windows of `length` tokens."""

    length: int
    batch: int
    width: int = 256
    blocks: int = 4
    heads: int = 4
    vocab: int = 1024
    steps: int = 3  # timed together, in each round

    def config(self, mixer: str, power: int = 4) -> ModelConfig:
        return ModelConfig(
            vocab=self.vocab,
            length=self.length,
            width=self.width,
            heads=self.heads,
            hidden=4 * self.width,
            blocks=self.blocks,
            mixer=mixer,
            power=power,
            norms=("layer",) * (2 * self.blocks + 1),
        )

    def sampler(self, seed: int) -> Sampler:
        """Random tokens: speed does not depend on what they say."""
        g = torch.Generator().manual_seed(seed)
        docs = [torch.randint(1, self.vocab, (4 * self.length,), generator=g) for _ in range(16)]
        return Sampler(docs, length=self.length, vocab=self.vocab, mix=Mix(batch=self.batch), seed=seed)

    def schedule(self) -> Schedule:
        return Schedule(
            steps=self.steps, lr=1e-3, warmup=1, weight_decay=0.1, clip=1.0, checkpoint_every=self.steps + 1
        )


SHAPES = tuple(Shape(length=t, batch=4096 // t) for t in (128, 512, 1024))
QUICK = (Shape(length=24, batch=2, width=16, blocks=1, heads=2, vocab=32, steps=2),)


def measure(settings: Settings) -> Record:
    """Return a record with one row a comparison and shape. `settings.repeats` is the number of rounds."""
    shapes, rounds = QUICK if settings.quick else SHAPES, max(2, settings.repeats)
    seed = settings.seeds[0]

    def one(shape: Shape, name: str) -> list[Row]:
        torch.manual_seed(seed)
        return [compare(name, shape, rounds, seed)]

    def record(rows: Sequence[Row]) -> dict[str, Any]:
        return records.record(
            "training-speed",
            metrics={"rows": list(rows), "least_ratio": least(rows)},
            params={"shapes": [asdict(s) for s in shapes], "rounds": rounds, "powers": list(POWERS)},
            threads=1,
            seed=seed,
            repeats=rounds,
        )

    todo = [(f"{name}, {shape.length} tokens", partial(one, shape, name)) for shape in shapes for name in COMPARISONS]
    return one_by_one(todo, record, keep=settings.keep, progress=settings.progress)


def compare(name: str, shape: Shape, rounds: int, seed: int) -> Row:
    """Time `rounds` rounds of both sides of a comparison, after one of each that is not counted."""
    ours, theirs = COMPARISONS[name](shape, seed)
    for side in (theirs, ours):
        side()
    seen: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for whose, run in (("theirs", theirs), ("ours", ours)):
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            seen[whose].append((time.process_time() - cpu, time.perf_counter() - wall))
    tokens = shape.steps * shape.batch * shape.length
    ratios = [t[0] / o[0] for o, t in zip(seen["ours"], seen["theirs"], strict=True)]
    walls = [t[1] / o[1] for o, t in zip(seen["ours"], seen["theirs"], strict=True)]
    return {
        "comparison": name,
        "length": shape.length,
        "batch": shape.batch,
        "width": shape.width,
        "blocks": shape.blocks,
        "tokens_per_second": tokens / statistics.median(c for c, _ in seen["ours"]),
        "baseline_tokens_per_second": tokens / statistics.median(c for c, _ in seen["theirs"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ratio_wall": statistics.median(walls),
    }


Sides = tuple[Callable[[], None], Callable[[], None]]  # ours, theirs: each does the steps of one round


def mixers(power: int) -> Callable[[Shape, int], Sides]:
    """PowerSoftmax against softmax in torch's fused kernel: same loop, same model but for the mixer."""

    def make(shape: Shape, seed: int) -> Sides:
        ours, theirs = (Transformer(shape.config(m, power)) for m in ("power_softmax", "softmax"))
        return _our_loop(ours, shape, seed), _our_loop(theirs, shape, seed)

    return make


def loops(shape: Shape, seed: int) -> Sides:
    """Our loop against the plain one: same softmax model, same batches."""
    ours, theirs = (Transformer(shape.config("softmax")) for _ in range(2))
    return _our_loop(ours, shape, seed), _plain_loop(theirs, shape, seed)


def whole(shape: Shape, seed: int) -> Sides:
    """Our loop and softmax model against plain loop and plain model."""
    return _our_loop(Transformer(shape.config("softmax")), shape, seed), _plain_loop(PlainModel(shape), shape, seed)


COMPARISONS: Mapping[str, Callable[[Shape, int], Sides]] = {
    **{f"PowerSoftmax p={p} / softmax": mixers(p) for p in POWERS},
    "our loop / plain loop": loops,
    "our loop and model / plain loop and model": whole,
}


def _our_loop(model: nn.Module, shape: Shape, seed: int) -> Callable[[], None]:
    sampler = shape.sampler(seed)

    def run() -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            run_stage(model, sampler, stage="run", schedule=shape.schedule(), folder=folder, log=folder / "train.jsonl")

    return run


def _plain_loop(model: nn.Module, shape: Shape, seed: int) -> Callable[[], None]:
    data, rate = shape.sampler(seed).stream, shape.schedule().rate
    g = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - shape.length - 1, (shape.batch,), generator=g).tolist()
        x = torch.stack([data[i : i + shape.length] for i in starts])
        return x, torch.stack([data[i + 1 : i + 1 + shape.length] for i in starts])

    def run() -> None:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        model.train()
        x_BT, y_BT = batch()
        for step in range(shape.steps):
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
            loss = F.cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten())
            x_BT, y_BT = batch()  # nanoGPT fetches the next batch while a device computes
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return run


class PlainModel(nn.Module):
    """A decoder of a shape out of torch's own layers, tokens_BT -> logits_BTV."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(shape.vocab, shape.width), nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(PlainBlock(shape) for _ in range(shape.blocks)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocab)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.token(tokens_BT) + self.position(torch.arange(tokens_BT.shape[1]))
        return self.head(self.norm(self.blocks(x_BTD)))


class PlainBlock(nn.Module):
    """Attention and MLP, each behind its norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.heads, self.norm1, self.norm2 = shape.heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.o(y_BHTK.transpose(1, 2).reshape(b, t, d))
        return x_BTD + self.mlp(self.norm2(x_BTD))


def least(rows: Sequence[Row]) -> dict[str, float]:
    """Return the smallest median ratio of each comparison over the shapes."""
    found: dict[str, float] = {}
    for row in rows:
        name = row["comparison"]
        found[name] = min(found.get(name, math.inf), row["ratio"])
    return found


def show(record: Record) -> list[Block]:
    """One table: ratios above 1 are ours faster."""
    columns = {
        "comparison": "ours / baseline",
        "length": "tokens",
        "tokens_per_second": "tokens/s",
        "baseline_tokens_per_second": "baseline",
        "ratio": "ratio",
        "ratio_low": "lowest",
        "ratio_high": "highest",
        "ratio_wall": "ratio on the wall",
    }
    rows = [[row.get(name) for name in columns] for row in record["metrics"]["rows"]]
    caption = (
        f"Training speed on one thread, {record['params']['rounds']} rounds of A B; ratios above 1: ours is faster."
    )
    return [Table(caption=caption, columns=list(columns.values()), rows=rows)]
