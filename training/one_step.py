"""One full training step of a polynomial model on this machine's CPU, measured: time, peak memory, losses.

    python -m training.one_step --recipe 1.4b --tokens 256 --json out.json

Every exact function of the recipe's model is replaced by a polynomial; weights and gradients are bfloat16, powers and
their sums float32, activations are recomputed a block at a time, and the optimiser keeps two vectors a matrix. The
weights are random: the loss says that the arithmetic holds, not that the model is good.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from polyformer.activations import Activation, fit_activation
from polyformer.approx import inverse_sqrt, reciprocal
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import Transformer
from polyformer.norms import Norm
from training import optimiser, parallel, recipes
from training.data import read_documents
from training.loop import token_loss
from training.recipes import ScaleRecipe

# Where random weights put the values: residual variance starts near 1 and grows by about 1 over all blocks, scores are
# standard normal and their mean 4th power 3. Training mode clamps what lies outside.
ACTIVATION_INTERVAL = (-4.0, 4.0)
VARIANCE_INTERVAL = (0.25, 4.0)
DENOMINATOR_INTERVAL = (0.5, 16.0)


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """What a step took. Losses are nats a token before and after the update on the same window; bytes are the largest
    resident size of the whole process, its libraries included.
    """

    recipe: str
    parameters: int
    levels: int  # multiplicative depth of the polynomial model, without a refresh
    batch: int
    tokens: int
    optimiser: str
    lr: float
    build_seconds: float
    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    after_seconds: float
    loss_before: float
    loss_after: float
    gradient_norm: float
    peak_bytes: int
    seed: int
    threads: int
    load_average: float  # over the last minute, when the step began: other work on the machine
    machine: str
    torch_version: str


def one_step(
    recipe: ScaleRecipe, *, tokens: int, batch: int = 1, name: str = "factored", lr: float | None = None
) -> OneStep:
    """Build the recipe's polynomial model, do forward, backward, clipping and one update, and one forward after it.

    Args: `tokens` a window, at most the recipe's length; `name` of the optimiser; `lr` (a tenth of the recipe's if None).
    """
    if not 2 <= tokens <= recipe.model.length:
        raise ValueError(f"tokens is {tokens}; give 2 to {recipe.model.length}, the length of {recipe.name}")
    load = os.getloadavg()[0]
    begin = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model = Transformer(recipe.polynomial_config())
    fit_polynomials(model, recipe.model.activation)
    parallel.to_bfloat16(model)
    parallel.apply(model, parallel.Plan(precision="bf16", checkpointing=True), None).train()
    # The first step of a run comes with a rate warmed up from nothing; the full rate on unseasoned weights leaves the
    # intervals of the polynomials at once.
    rate = recipe.lr / 10 if lr is None else lr
    opt = optimiser.build(name, model, lr=rate, weight_decay=recipe.weight_decay, seed=recipe.seed)
    windows = text_windows(batch, tokens + 1)
    x_BT, y_BT = windows[:, :-1], windows[:, 1:]
    marks = [time.perf_counter()]
    loss = token_loss(model(x_BT).float(), y_BT)
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    norm = parallel.total_norm(model, recipe.clip)
    opt.step()
    opt.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    with torch.no_grad():
        after = token_loss(model(x_BT).float(), y_BT)
    marks.append(time.perf_counter())
    seconds = np.diff([begin, *marks]).tolist()
    return OneStep(
        recipe=recipe.name,
        parameters=model.parameter_count(),
        levels=model.levels,
        batch=batch,
        tokens=tokens,
        optimiser=name,
        lr=rate,
        build_seconds=seconds[0],
        forward_seconds=seconds[1],
        backward_seconds=seconds[2],
        update_seconds=seconds[3],
        after_seconds=seconds[4],
        loss_before=float(loss.detach()),
        loss_after=float(after),
        gradient_norm=norm,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        seed=recipe.seed,
        threads=torch.get_num_threads(),
        load_average=load,
        machine=_processor(),
        torch_version=torch.__version__,
    )


def fit_polynomials(model: Transformer, activation: str) -> None:
    """Fill every polynomial of a model with random weights: reciprocals, activations and inverse square roots."""
    for module in model.modules():
        if isinstance(module, PowerSoftmax) and module.reciprocal is not None:
            module.reciprocal.set(reciprocal(module.reciprocal.degree, DENOMINATOR_INTERVAL))
        elif isinstance(module, Activation) and module.polynomial is not None:
            module.polynomial.set(fit_activation(activation, module.polynomial.degree, ACTIVATION_INTERVAL))
        elif isinstance(module, Norm) and module.inverse_sqrt is not None:
            module.inverse_sqrt.set(inverse_sqrt(module.inverse_sqrt.degree, VARIANCE_INTERVAL))


def text_windows(count: int, size: int) -> torch.Tensor:
    """Return int64 [count, size]: bytes of this package's text, one document a window, as ids 1..256."""
    documents = read_documents()
    if count > len(documents):
        raise ValueError(f"batch is {count}; the text has {len(documents)} documents, give at most so many")
    rows = [np.frombuffer(d.encode()[:size], dtype=np.uint8).astype(np.int64) + 1 for d in documents[:count]]
    return torch.from_numpy(np.stack(rows))


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, do the step and write the JSON."""
    parser = argparse.ArgumentParser(prog="training.one_step", description="Measure one training step on the CPU.")
    parser.add_argument("--recipe", required=True, choices=recipes.names())
    parser.add_argument("--tokens", type=int, default=256, help="tokens a window")
    parser.add_argument("--batch", type=int, default=1, help="windows")
    parser.add_argument("--optimiser", choices=optimiser.OPTIMISERS, default="factored")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--json", required=True, type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    recipe = recipes.load(options.recipe)
    result = one_step(recipe, tokens=options.tokens, batch=options.batch, name=options.optimiser, lr=options.lr)
    options.json.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    if not math.isfinite(result.loss_before + result.loss_after):
        raise SystemExit(f"the loss is {result.loss_before} before and {result.loss_after} after the step")


if __name__ == "__main__":
    main()
