"""The training loop at scale: any number of processes, gradients that accumulate, a run that goes on after a kill.

Same step, schedule and clipping as `training.loop`; what differs is that weights are sharded, data come from shards on
disk and checkpoints are sharded. The curve depends on the recipe alone: not on the number of processes (to rounding),
nor on where the run was interrupted (exactly).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from polyformer.model import Transformer
from polyformer.ranges import Collector, range_loss
from training import accounts, checkpoints, optimiser, parallel, start, trackers
from training.data import IGNORE
from training.loop import token_loss
from training.recipes import RangeTargets, ScaleRecipe
from training.shards import ShardReader


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: the last step and its loss (nats a token), tokens a second over the steps of this process's
    life (None if it had none left to do), and the share of `peak_flops` of all processes that the model's own operations
    made (None if no peak is known). `heldout`: the last held-out loss measured. `extended_from`: the steps that the run was
    planned for before.
    """

    steps: int
    resumed_from: int
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    heldout: float | None = None
    extended_from: int | None = None


@dataclass
class Throughput:
    """Counts tokens and time; MFU is model FLOPs (no recomputation) over what the devices could do (Chowdhery et al.
    2022, arXiv 2204.02311, appendix B).
    """

    flops_per_token: int
    peak_flops: float | None  # of all processes, a second
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> dict[str, float]:
        """Take in a step; return its own figures."""
        self.tokens += tokens
        self.seconds += seconds
        return self._figures(tokens, seconds)

    def total(self) -> dict[str, float]:
        return self._figures(self.tokens, self.seconds) if self.tokens else {}

    def _figures(self, tokens: int, seconds: float) -> dict[str, float]:
        rate = tokens / seconds
        figures = {"tokens_per_second": rate}
        if self.peak_flops is not None:
            figures["mfu"] = rate * self.flops_per_token / self.peak_flops
        return figures


def run(
    recipe: ScaleRecipe,
    folder: Path,
    data: Path,
    mesh: DeviceMesh,
    *,
    tracking: Sequence[str] = ("jsonl",),
    peak_flops: float | None = None,
    heldout: Path | None = None,
) -> Outcome:
    """Train a recipe into `folder` from the shards in `data`; goes on from the last complete checkpoint there.

    A recipe of more steps extends the run that is there: from the next step on the learning rate is that of the longer
    cosine, which is higher than where the shorter one stood, so the curve is not that of a run planned so from the start.

    Args: `mesh` of all processes, from `parallel.processes`; `peak_flops` of all devices together, a second; `heldout`, a
        folder of shards to measure the loss on every `recipe.evaluate_every` steps and at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    passes, device = recipe.accumulation(world), torch.device(mesh.device_type)
    recipe, source = start.begin(recipe)
    reader = _reader(data, recipe, seed=recipe.seed)
    judge = None if heldout is None else _reader(heldout, recipe, seed=0)
    model = sharded_model(recipe, source, mesh)
    del source
    schedule = recipe.schedule()
    opt = optimiser.build(recipe.optimiser, model, lr=recipe.lr, weight_decay=recipe.weight_decay, seed=recipe.seed)
    first, loss, extended = _resume(recipe, folder / "checkpoints", model, opt, reader)
    measured = None
    tracking_here = trackers.open_all(tracking, folder, run=recipe.name, first=first) if rank == 0 else []
    speed = Throughput(flops_per_token=accounts.model_flops(recipe.model), peak_flops=peak_flops)
    model.train()
    for step in range(first, recipe.steps):
        begin = time.perf_counter()
        for group in opt.param_groups:
            group["lr"] = schedule.rate(step)
        tokens_BT, targets_BT = (t.to(device) for t in reader.batch(recipe.batch, rank=rank, world=world))
        opt.zero_grad(set_to_none=True)
        total, outside = torch.zeros(2, device=device)
        # Gradients are reduced after each pass, not once at the end: whole gradients would not fit beside the shards.
        for x_BT, y_BT in zip(tokens_BT.chunk(passes), targets_BT.chunk(passes), strict=True):
            part, ranges = backward(model, x_BT, y_BT, recipe.ranges, share=1 / passes)
            total, outside = total + part, outside + ranges
        norm = parallel.total_norm(model, schedule.clip)
        if norm < float("inf"):  # false for nan too; every process sees the same norm
            opt.step()
        loss, done = parallel.mean(total), step + 1
        figures = speed.add(recipe.batch * recipe.model.length, time.perf_counter() - begin)
        if recipe.ranges is not None:
            figures["ranges"] = parallel.mean(outside)
        if judge is not None and (done % recipe.evaluate_every == 0 or done == recipe.steps):
            measured = heldout_loss(model, judge, recipe, device)
            figures["heldout"] = measured
        for tracker in tracking_here:
            tracker.write(done, {"loss": loss, "gradient": norm, "lr": schedule.rate(step), **figures})
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            state = checkpoints.RunState(step=done, position=reader.position, recipe=recipe.to_json(), loss=loss)
            checkpoints.save(folder / "checkpoints", model, opt, state)
    for tracker in tracking_here:
        tracker.close()
    average = speed.total()
    return Outcome(
        steps=recipe.steps,
        resumed_from=first,
        loss=loss,
        tokens_per_second=average.get("tokens_per_second"),
        mfu=average.get("mfu"),
        heldout=measured,
        extended_from=extended,
    )


def backward(
    model: Transformer, x_BT: Tensor, y_BT: Tensor, ranges: RangeTargets | None, *, share: float
) -> tuple[Tensor, Tensor]:
    """Add the gradients of one pass, times its share of the step; return token loss and range losses, times that."""
    if ranges is None:
        task = token_loss(model(x_BT).float(), y_BT) * share
        task.backward()
        return task.detach(), torch.zeros_like(task)
    with Collector(model) as seen:  # until backward is through: a block that is recomputed must do what it did
        task = token_loss(model(x_BT).float(), y_BT) * share
        # the norm that opens a post-norm stack is the client's, and exact
        kinds = {name: tap.kind for name, tap in seen.taps.items() if name != "norm" or model.config.order == "pre"}
        outside = share * range_loss(
            seen,
            {name: getattr(ranges, kind) for name, kind in kinds.items()},
            activation=ranges.activation_weight,
            variance=ranges.variance_weight,
            denominator=ranges.denominator_weight,
        )
        (task + outside).backward()
    return task.detach(), outside.detach()


@torch.no_grad()
def heldout_loss(model: Transformer, reader: ShardReader, recipe: ScaleRecipe, device: torch.device) -> float:
    """Return the mean loss, nats a token, over the first `recipe.heldout_windows` windows of held-out shards. All processes
    call this together, and each makes as many passes as the others: the last may hold rows that count nothing.
    """
    rank, world, size = dist.get_rank(), dist.get_world_size(), recipe.micro_batch
    count = min(reader.count, recipe.heldout_windows)
    total = torch.zeros((), device=device)
    model.eval()
    for first in range(rank * size, rank * size + count, world * size):
        rows = [torch.from_numpy(reader.window(min(i, count - 1))) for i in range(first, first + size)]
        windows = torch.stack(rows).to(device)
        targets_BT = windows[:, 1:].clone()
        targets_BT[max(0, count - first) :] = IGNORE
        logits = model(windows[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
    model.train()
    return parallel.mean(total) * world / (count * reader.length)


def _reader(folder: Path, recipe: ScaleRecipe, *, seed: int) -> ShardReader:
    reader = ShardReader(folder, length=recipe.model.length, seed=seed)
    if reader.vocab > recipe.model.vocab:
        raise ValueError(f"{folder} has a vocabulary of {reader.vocab}, the model one of {recipe.model.vocab}")
    return reader


def sharded_model(recipe: ScaleRecipe, source: Transformer | None, mesh: DeviceMesh) -> Transformer:
    """Return the recipe's model, sharded, with the weights of `source`: no process but rank 0 ever holds it whole."""
    model = parallel.apply(accounts.on_meta(recipe.model), plan_of(recipe), mesh)
    parallel.materialise(model, source, torch.device(mesh.device_type))
    return model


def plan_of(recipe: ScaleRecipe) -> parallel.Plan:
    return parallel.Plan(
        precision=recipe.precision,
        checkpointing=recipe.checkpointing,
        compile="inductor" if recipe.compile else None,
    )


def _resume(
    recipe: ScaleRecipe, folder: Path, model: Transformer, opt: torch.optim.Optimizer, reader: ShardReader
) -> tuple[int, float | None, int | None]:
    """Load the last complete checkpoint, if there is one, and return the steps done, the loss of the last one, and the
    steps that were planned if they are now more.
    """
    found = checkpoints.complete(folder)
    if not found:
        return 0, None, None
    theirs = checkpoints.read_state(found[-1]).recipe
    planned = int(json.loads(theirs)["steps"])
    differing = recipe.with_(steps=planned if planned < recipe.steps else recipe.steps).differences(theirs)
    if differing:
        raise ValueError(
            f"{found[-1]} is of another recipe: {'; '.join(differing)}; resume with the same values or choose an empty "
            "folder"
        )
    state = checkpoints.load(found[-1], model, opt)
    reader.seek(state.position)
    return state.step, state.loss, planned if planned < recipe.steps else None
