"""Run a recipe on one process or many.

    python -m training.distributed --recipe tiny_cpu --out runs/tiny
    torchrun --nproc-per-node 2 -m training.distributed --recipe tiny_cpu --out runs/tiny
    torchrun --nproc-per-node 8 -m training.distributed --recipe 1.4b --data shards/ --out runs/big
    torchrun --nproc-per-node 8 -m training.distributed --recipe 1.4b --from pythia-1.4b/ --data shards/ --out runs/powers \
        --heldout heldout/ --ranges activation=-8,8 variance=0.1,100 --no-compile

The same command again goes on where the last complete checkpoint stands; with more `--steps` it extends the run, on the
learning rates of the longer schedule from there on. torchrun's own `--max-restarts` is not proven: start the command anew.
`--out` gets log.jsonl, outcome.json and checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from training import parallel, recipes, scale, trackers
from training.recipes import RangeTargets
from training.shards import BYTE_VOCAB, write_byte_shards


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run. What the user can mend ends in a sentence and exit status 1."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def _run(options: argparse.Namespace) -> None:
    recipe = recipes.load(options.recipe)
    changes = {
        name: value
        for name in (
            "steps",
            "batch",
            "micro_batch",
            "checkpoint_every",
            "evaluate_every",
            "heldout_windows",
            "start",
            "optimiser",
            "precision",
            "checkpointing",
            "compile",
            "seed",
        )
        if (value := getattr(options, name)) is not None
    }
    if options.ranges is not None:
        changes["ranges"] = RangeTargets.changed(options.ranges)
    recipe = recipe.with_(**changes)
    if recipe.start is not None and options.data is None:
        raise ValueError(
            "a run that starts from a checkpoint needs text in its tokenizer; give --data, a folder of shards"
        )
    if options.peak_tflops is not None and options.peak_tflops <= 0:
        raise ValueError(f"peak-tflops is {options.peak_tflops}; it must be positive")
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    # Linear returns a view and FSDP2 warns of writing into it; nobody writes into logits.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    with parallel.processes() as mesh:
        data = _data(options.data, options.out, recipe.model.vocab)
        peak = None if options.peak_tflops is None else options.peak_tflops * 1e12 * dist.get_world_size()
        outcome = scale.run(
            recipe, options.out, data, mesh, tracking=options.track, peak_flops=peak, heldout=options.heldout
        )
        if dist.get_rank() == 0:
            if outcome.extended_from is not None:
                sys.stderr.write(
                    f"extended from {outcome.extended_from} to {outcome.steps} steps: behind step {outcome.resumed_from} "
                    f"the learning rate was that of {outcome.steps} steps, not of {outcome.extended_from}\n"
                )
            _write_outcome(options.out / "outcome.json", recipe.name, outcome)


def _write_outcome(path: Path, recipe: str, outcome: scale.Outcome) -> None:
    """Write how the run ended. A run that was finished before has that on file: it stays."""
    if outcome.resumed_from == outcome.steps and path.exists():
        return
    text = json.dumps({"recipe": recipe, "processes": dist.get_world_size(), **asdict(outcome)}, indent=1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _data(given: Path | None, out: Path, vocab: int) -> Path:
    """Return the folder of shards; without one, rank 0 writes this package's text as bytes for a byte model."""
    if given is not None:
        return given
    if vocab != BYTE_VOCAB:
        raise ValueError(f"the recipe has a vocabulary of {vocab}; give --data, a folder of shards")
    folder = out / "shards"
    if dist.get_rank() == 0 and not (folder / "shards.json").exists():
        write_byte_shards(folder)
    dist.barrier()
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.distributed", description="Train a recipe on any number of processes."
    )
    parser.add_argument("--recipe", required=True, choices=recipes.names())
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--data", type=Path, help="folder of token shards; tiny_cpu makes its own")
    parser.add_argument(
        "--from",  # torchrun reads --start as its own --start-method
        dest="start",
        help="checkpoint of the first weights: a Hugging Face folder, .gguf, or RUN/MODEL.safetensors",
    )
    parser.add_argument("--heldout", type=Path, help="folder of token shards to measure the loss on")
    parser.add_argument("--evaluate-every", type=int, help="steps between measurements")
    parser.add_argument("--heldout-windows", type=int, help="windows measured")
    parser.add_argument(
        "--ranges", nargs="*", metavar="NAME=VALUE", help="range losses; activation=-4,4 variance_weight=0.3 ..."
    )
    parser.add_argument("--steps", type=int, help="of the whole run; more than before extend it")
    parser.add_argument("--batch", type=int, help="windows a step, over all processes")
    parser.add_argument("--micro-batch", type=int, help="windows a pass of one process")
    parser.add_argument("--checkpoint-every", type=int)
    parser.add_argument("--optimiser", choices=("adamw", "factored"))
    parser.add_argument("--precision", choices=recipes.PRECISIONS)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile each block")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--track", nargs="+", default=["jsonl"], choices=list(trackers.TRACKERS))
    parser.add_argument("--peak-tflops", type=float, help="of one device, for MFU: 989 for an H100 in bf16")
    return parser


if __name__ == "__main__":
    main()
