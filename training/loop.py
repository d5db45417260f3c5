"""One training loop: AdamW, cosine schedule with warm-up, clipped gradients, checkpoints that resume bit for bit, a
JSON-lines log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.layers import beside
from training import optimiser as optimisers
from training.data import IGNORE
from training.interrupt import held_interrupt
from training.recipe import Progress
from training.trackers import keep_lines


class Batches(Protocol):
    """What the loop draws from: inputs [B, ...] and targets [B, T] or [B] (-100 is not scored), the whole state in one
    generator.
    """

    generator: torch.Generator

    def batch(self) -> tuple[Tensor, Tensor]: ...


ExtraLoss = Callable[[], Tensor]  # called after the forward pass, e.g. the range losses on what a Collector holds


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate lr after `warmup` linear steps, then a cosine down to a tenth of it at `steps`."""

    steps: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    checkpoint_every: int

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats over targets that are not -100: logits [B, T, V] of tokens and targets
    [B, T], or logits [B, C] of classes and targets [B].
    """
    return F.cross_entropy(logits.flatten(0, -2), beside(targets.flatten(), logits), ignore_index=IGNORE)


def run_stage(
    model: nn.Module,
    sampler: Batches,
    *,
    stage: str,
    schedule: Schedule,
    folder: Path,
    log: Path,
    extra: ExtraLoss | None = None,
    until: Callable[[int], bool] | None = None,
    progress: Progress | None = None,
) -> int:
    """Train `model` in place for one stage and return the steps done. If the stage's checkpoint exists, go on from
    there. `until`, asked after every step with the number of steps done, may end the stage early.

    On Ctrl-C the step in progress is finished and its checkpoint written before KeyboardInterrupt comes out, with a
    sentence that says how far the stage is.

    The checkpoint holds parameters, buffers, Adam moments, the step and the states of both generators. It stays: once
    the trained model is kept somewhere, the caller removes it by `discard_checkpoint`.
    """
    optimiser = optimisers.build("adamw", model, lr=schedule.lr, weight_decay=schedule.weight_decay)
    checkpoint = _checkpoint(folder, stage)
    first = load_checkpoint(checkpoint, model, optimiser, sampler) if checkpoint.exists() else 0
    _trim_log(log, stage, first)
    model.train()
    done = first
    ended = first > 0 and until is not None and until(first)  # interrupted in its last step
    with log.open("a", encoding="utf-8") as lines, held_interrupt() as interrupted:
        for step in range(first, first if ended else schedule.steps):
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step)
            inputs, targets = sampler.batch()
            task = token_loss(model(inputs), targets)
            ranges = extra() if extra is not None else torch.zeros(())
            optimiser.zero_grad(set_to_none=True)
            (task + ranges).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            if torch.isfinite(norm):
                optimiser.step()
            done = step + 1
            last = done == schedule.steps or (until is not None and until(done))
            if done % 10 == 0 or last:
                figures = {"loss": float(task.detach()), "ranges": float(ranges.detach()), "gradient": float(norm)}
                lines.write(json.dumps({"stage": stage, "step": done, **figures}) + "\n")
                lines.flush()
                if progress is not None:
                    progress(stage, done, schedule.steps, figures)
            stop = interrupted()
            if stop or (not last and done % schedule.checkpoint_every == 0):
                save_checkpoint(checkpoint, model, optimiser, sampler, done)
            if stop:
                raise KeyboardInterrupt(f"{stage} stopped after {done} of {schedule.steps} steps, all of them kept")
            if last:
                break
    model.eval()
    return done


def discard_checkpoint(folder: Path, stage: str) -> None:
    """Remove the checkpoint of a stage, if there is one: what it was trained to is kept, or never wanted again."""
    _checkpoint(folder, stage).unlink(missing_ok=True)


def _checkpoint(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.safetensors"


def save_checkpoint(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, sampler: Batches, step: int
) -> None:
    """Write everything that the next step depends on, atomically; a run goes on from it on any device."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{i}.{k}": v for k, v in state.items()})
    tensors.update(step=torch.tensor(step), sampler=sampler.generator.get_state(), torch=torch.get_rng_state())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, sampler: Batches) -> int:
    """Restore a checkpoint into its four owners and return the number of steps done."""
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    sampler.generator.set_state(tensors["sampler"])
    torch.set_rng_state(tensors["torch"])
    return int(tensors["step"])


def _trim_log(log: Path, stage: str, first: int) -> None:
    """Drop lines of this stage beyond the checkpoint, so that a resumed log reads like an uninterrupted one."""
    keep_lines(log, lambda line: line["stage"] != stage or line["step"] <= first)
