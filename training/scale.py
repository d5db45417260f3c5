"""The training loop at scale: any number of processes, gradients that accumulate, a run that goes on after a kill.

Same step, schedule and clipping as `training.loop`; what differs is that weights are sharded, data come from shards on
disk and checkpoints are sharded. The curve depends on the recipe alone: not on the number of processes (to rounding),
nor on where the run was interrupted (exactly).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from polyformer.model import Transformer
from training import accounts, checkpoints, optimiser, parallel, trackers
from training.loop import token_loss
from training.recipes import ScaleRecipe
from training.shards import ShardReader


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: the last step and its loss (nats a token), tokens a second over the steps of this process's
    life (None if it had none left to do), and the share of `peak_flops` of all processes that the model's own operations
    made (None if no peak is known).
    """

    steps: int
    resumed_from: int
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None


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
) -> Outcome:
    """Train a recipe into `folder` from the shards in `data`; goes on from the last complete checkpoint there.

    Args: `mesh` of all processes, from `parallel.processes`; `peak_flops` of all devices together, a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    passes, device = recipe.accumulation(world), torch.device(mesh.device_type)
    reader = ShardReader(data, length=recipe.model.length, seed=recipe.seed)
    if reader.vocab > recipe.model.vocab:
        raise ValueError(f"{data} has a vocabulary of {reader.vocab}, the model one of {recipe.model.vocab}")
    model = sharded_model(recipe, mesh)
    schedule = recipe.schedule()
    opt = optimiser.build(recipe.optimiser, model, lr=recipe.lr, weight_decay=recipe.weight_decay, seed=recipe.seed)
    first, loss = _resume(recipe, folder / "checkpoints", model, opt, reader)
    tracking_here = trackers.open_all(tracking, folder, run=recipe.name, first=first) if rank == 0 else []
    speed = Throughput(flops_per_token=accounts.model_flops(recipe.model), peak_flops=peak_flops)
    model.train()
    for step in range(first, recipe.steps):
        begin = time.perf_counter()
        for group in opt.param_groups:
            group["lr"] = schedule.rate(step)
        tokens_BT, targets_BT = (t.to(device) for t in reader.batch(recipe.batch, rank=rank, world=world))
        opt.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        # Gradients are reduced after each pass, not once at the end: whole gradients would not fit beside the shards.
        for x_BT, y_BT in zip(tokens_BT.chunk(passes), targets_BT.chunk(passes), strict=True):
            part = token_loss(model(x_BT).float(), y_BT) / passes
            part.backward()
            total += part.detach()
        norm = parallel.total_norm(model, schedule.clip)
        if norm < float("inf"):  # false for nan too; every process sees the same norm
            opt.step()
        loss, done = parallel.mean(total), step + 1
        figures = speed.add(recipe.batch * recipe.model.length, time.perf_counter() - begin)
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
    )


def sharded_model(recipe: ScaleRecipe, mesh: DeviceMesh) -> Transformer:
    """Return the recipe's model with its first weights, sharded; no process but rank 0 ever holds it whole."""
    model = parallel.apply(accounts.on_meta(recipe.model), plan_of(recipe), mesh)
    source = None
    if dist.get_rank() == 0:
        torch.manual_seed(recipe.seed)
        source = Transformer(recipe.model)
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
) -> tuple[int, float | None]:
    """Load the last complete checkpoint, if there is one, and return the steps done and the loss of the last one."""
    found = checkpoints.complete(folder)
    if not found:
        return 0, None
    differing = recipe.differences(checkpoints.read_state(found[-1]).recipe)
    if differing:
        raise ValueError(
            f"{found[-1]} is of another recipe: {'; '.join(differing)}; resume with the same values or choose an empty "
            "folder"
        )
    state = checkpoints.load(found[-1], model, opt)
    reader.seek(state.position)
    return state.step, state.loss
