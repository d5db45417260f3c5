"""Optimisers by name: AdamW, and a factored one whose state is two vectors a matrix.

AdamW keeps two numbers a weight: 8 bytes beside a weight of 4. `Factored` keeps a mean square a row and one a column
and no momentum, so the state of a 1.4 B model is a few megabytes. Both are told by `build`, and both run on plain
tensors and on the sharded ones of `fully_shard`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

OPTIMISERS = ("adamw", "factored")
Group = dict[str, Any]


def build(name: str, model: nn.Module, *, lr: float, weight_decay: float, seed: int = 0) -> torch.optim.Optimizer:
    """Return the optimiser of a name over the groups of a model; an unknown name lists the known ones."""
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    if name == "factored":
        return Factored(groups, lr=lr, seed=seed)
    raise ValueError(f"unknown optimiser {name!r}; known: {', '.join(OPTIMISERS)}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Return two groups: weights of `nn.Linear` with weight decay; all else without.

    All else are biases, gains, positions, coefficients, convolutions, skips, rates of decay whatever their shape, and
    tables of embeddings: of tokens, as ever, and so a head that is tied to one; of segments too.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - tables
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        (decayed if id(p) in linears else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def state_bytes(name: str, model: nn.Module) -> int:
    """Bytes of state that the optimiser holds for a model (which may lie on the meta device)."""
    if name == "adamw":
        return sum(2 * p.numel() * p.element_size() + 4 for p in model.parameters())
    if name == "factored":
        return sum(4 * (sum(p.shape) if p.ndim == 2 else p.numel()) + 4 for p in model.parameters())
    raise ValueError(f"unknown optimiser {name!r}; known: {', '.join(OPTIMISERS)}")


class Factored(torch.optim.Optimizer):
    """RMS-scaled steps with a second moment factored into rows and columns, without momentum.

    Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5): for a matrix the mean square of entry ij
    is r_i c_j / mean(r), its decay is 1 - t^-0.8, and an update whose root mean square exceeds 1 is scaled down to it.
    Vectors keep their whole second moment. Unlike the paper the learning rate is the caller's and weight decay is
    decoupled. Arithmetic is float32, one parameter at a time; a weight of bfloat16 is rounded stochastically, since
    rounding to nearest would drop every update below 1/256 of the weight. The rounding is a function of seed, step,
    parameter and rank, so a resumed run repeats it.

    Args: `params` as for any torch optimiser; `lr`; `seed` of the rounding.
    """

    def __init__(self, params: Any, *, lr: float, weight_decay: float = 0.0, seed: int = 0) -> None:
        if lr <= 0:
            raise ValueError(f"lr is {lr}; it must be positive")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                index += 1
                if p.grad is not None:
                    self._update(p, group["lr"], group["weight_decay"], index)
        return loss

    def _update(self, p: Tensor, lr: float, decay: float, index: int) -> None:
        state = self.state[p]
        grad = p.grad
        assert grad is not None
        g = grad.float()
        square = g * g + 1e-30
        if "step" not in state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        kept = 1.0 - float(state["step"]) ** -0.8
        if p.ndim == 2:
            row = _moved(state, "row", square.sum(1) / p.shape[1], kept)
            column = _moved(state, "column", _replicated(square.sum(0)) / p.shape[0], kept)
            del square
            share = row / (_replicated(row.sum()) / p.shape[0])
            g = g * share.rsqrt().unsqueeze(1) * column.rsqrt().unsqueeze(0)
        else:
            g = g * _moved(state, "square", square, kept).rsqrt()
        size = math.sqrt(float(_replicated((g * g).sum())) / p.numel())
        new = p.float().mul_(1 - lr * decay).sub_(g * (lr / max(1.0, size)))
        target, value = _local(p), _local(new)
        target.copy_(self._rounded(value, int(state["step"]), index) if p.dtype == torch.bfloat16 else value)

    def _rounded(self, x: Tensor, step: int, index: int) -> Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        g = torch.Generator(x.device)
        g.manual_seed((((self.seed * 1_000_003 + step) * 65_537 + index) * 8_191 + rank) % (1 << 63))
        return round_stochastically(x, g)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 x in bfloat16, up or down with the odds that make the mean exact."""
    # bfloat16 is the upper half of float32: add a random lower half, then cut the lower half off.
    # One draw of 64 bits serves four weights.
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    noise = draws.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    bits = noise.int().bitwise_and_(0xFFFF).add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def _moved(state: dict[str, Any], name: str, now: Tensor, kept: float) -> Tensor:
    """Return the moving mean of a name after it took in `now`."""
    if name not in state:
        state[name] = torch.zeros_like(now)
    state[name].mul_(kept).add_(now, alpha=1 - kept)
    return state[name]


def _replicated(x: Tensor) -> Tensor:
    """Sum a value that each process holds a part of; a plain tensor is returned as it is."""
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim) if isinstance(x, DTensor) else x


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
