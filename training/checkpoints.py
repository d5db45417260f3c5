"""Sharded checkpoints of a run: each process writes its own part, and a checkpoint is there whole or not at all.

checkpoints/
  step-00000040/          complete: torch.distributed.checkpoint's files, and run.json
  step-00000060.partial/  a write that was killed; the next save removes it

A write goes into the `.partial` folder; when all processes are done, rank 0 puts it on disk and renames it, which is
atomic. A kill at any moment leaves the checkpoint before. Parts are stored by parameter name and place in the whole
tensor, so a run resumes on another number of processes too. The index that torch writes is a pickle: load only
checkpoints that you wrote yourself.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from training.shards import Position

KEPT = 2  # complete checkpoints
PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that the next step depends on, beside weights and moments: steps done, and where the data stand. Nothing
    random is left: the order of data and stochastic rounding are functions of seed and step.
    """

    step: int
    position: Position
    recipe: str  # JSON of the recipe, compared when the run goes on
    loss: float | None = None  # of this step, nats a token: what a run has to show that has no step left to do


def save(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, state: RunState) -> Path:
    """Write a checkpoint, remove those before the last two, and return its folder. All processes call this together."""
    first = dist.get_rank() == 0
    final = folder / f"step-{state.step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left)
    dist.barrier()
    weights, moments = get_state_dict(model, optimiser)
    state_dict_saver.save({"model": weights, "optimiser": moments}, checkpoint_id=partial)
    if first:
        (partial / "run.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            _to_disk(path)
        _to_disk(partial)
        if final.exists():  # of a run that was rewound by hand
            shutil.rmtree(final)
        partial.rename(final)
        _to_disk(folder)
        for old in complete(folder)[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if not p.name.endswith(PARTIAL) and (p / "run.json").exists())


def read_state(checkpoint: Path) -> RunState:
    """Return the state of a complete checkpoint, without its tensors."""
    values = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    return RunState(**values | {"position": Position(**values["position"])})


def load(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> RunState:
    """Restore weights and moments of a complete checkpoint in place and return the rest. All processes call this
    together.
    """
    state = read_state(checkpoint)
    weights, moments = get_state_dict(model, optimiser)
    holder: dict[str, Any] = {"model": weights, "optimiser": moments}
    state_dict_loader.load(holder, checkpoint_id=checkpoint)
    set_state_dict(model, optimiser, model_state_dict=holder["model"], optim_state_dict=holder["optimiser"])
    return state


def _to_disk(path: Path) -> None:
    """Have the system write a file or the entries of a folder now, so that the rename cannot come first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
