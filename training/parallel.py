"""Parallelism, precision, recomputation and compilation, applied to a model from outside: the model knows of none.

Order matters and is fixed in `apply`: float32 where powers need it, then checkpointing of activations, then
compilation, each inside the other and inside the sharding, so that a recomputed block finds its gathered weights. All
four leave the names of parameters alone: a checkpoint of a sharded run loads into a plain model.

Sharding is torch's FSDP2 (`fully_shard`): each process holds 1/n of every weight, gradient and moment; weights of one
block at a time are gathered for the work. Gradients are averaged in float32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from polyformer.filters import ImplicitFilter
from polyformer.layers import PolynomialLayer
from polyformer.mixers.base import Attention, ChannelMixer
from polyformer.mixers.softmax import Softmax
from polyformer.model import Transformer
from polyformer.norms import BatchNorm, Norm


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to apply. `compile` is a backend of torch.compile, or None."""

    precision: str = "fp32"
    checkpointing: bool = False
    compile: str | None = None


@contextmanager
def processes() -> Iterator[DeviceMesh]:
    """Join the processes that torchrun started (a single one without it) and yield the mesh of all; leave at the end.

    NCCL on GPUs, one a process; gloo on CPUs.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda" if gpu else "cpu", (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def apply(model: Transformer, plan: Plan, mesh: DeviceMesh | None) -> Transformer:
    """Change a model in place as the plan says and shard it over the mesh (None: leave it whole); returns it.

    The model may lie on the meta device; `materialise` fills it afterwards.

    Raises:
        ValueError: a BatchNorm is to be trained by several processes, each of which would keep statistics of its own.
    """
    if mesh is not None and mesh.size() > 1 and batch_norms(model):
        raise ValueError(
            f"the model has {len(batch_norms(model))} BatchNorms, whose running statistics are not reduced over the "
            f"{mesh.size()} processes; use one process, or another norm"
        )
    if plan.precision == "bf16":
        keep_powers_in_fp32(model)
    for block in model.blocks:
        if plan.checkpointing:
            contexts = {"context_fn": functools.partial(_contexts, block)} if batch_norms(block) else {}
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **contexts)
        if plan.compile is not None:
            block.forward = torch.compile(block.forward, backend=plan.compile)
    if mesh is not None:
        half = torch.bfloat16 if plan.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        for block in model.blocks:
            if half is not None:
                shard_exact_parts(block, mesh, policy)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the forward pass of a checkpointed block, and its recomputation."""
    return nullcontext(), frozen_statistics(block)


@contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics of all BatchNorms as they are: a recomputed forward pass must not count twice."""
    norms = batch_norms(block)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def shard_exact_parts(block: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard by themselves, and gather in float32, the weights of `exact_parts`. The linears and convolutions of a mixer
    that holds such weights beside them stay under `policy`, one gathering each.
    """
    exact = MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype)
    for module in list(block.modules()):
        if isinstance(module, ChannelMixer):
            for child in module.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh, mp_policy=policy)
        if exact_parts(module):
            fully_shard(module, mesh=mesh, mp_policy=exact)


def exact_parts(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that stay float32 in a bfloat16 model: coefficients of polynomials, implicit
    filters, and what a recurrence holds beside its linears, rates of decay above all. Widening them later is too late:
    0.998 is 1 in bfloat16, and a decay of 1 forgets nothing.
    """
    if isinstance(module, ChannelMixer | PolynomialLayer):
        return list(module.parameters(recurse=False))
    return list(module.parameters()) if isinstance(module, ImplicitFilter) else []


def to_bfloat16(model: nn.Module) -> None:
    """Turn weights into bfloat16 one by one, so that never two copies of all exist; buffers and `exact_parts` stay
    float32.
    """
    exact = {id(p) for module in model.modules() for p in exact_parts(module)}
    for p in model.parameters():
        if id(p) not in exact:
            p.data = p.data.to(torch.bfloat16)


def keep_powers_in_fp32(model: nn.Module) -> None:
    """Let norms, polynomials and attention with powers compute in float32 inside a model whose weights are bfloat16.

    A sum of p-th powers spans p times the exponents of its terms, and bfloat16 has 8 bits: a relative error of 2^-9 in
    a score is p 2^-9 in its power, and small powers vanish beside a large one in the sum that everything is divided by.
    So scores, powers and their sums are float32; projections and MLP, where the time goes, stay bfloat16. So do those of a
    recurrence, whose float32 weights make float32 of what is between.
    """
    for module in model.modules():
        if isinstance(module, Norm | PolynomialLayer):
            module.forward = functools.partial(_in_fp32, module.forward)  # type: ignore[method-assign]
        elif isinstance(module, Attention) and not isinstance(module, Softmax):
            for projection in (module.q, module.k, module.v):
                projection.register_forward_hook(_widen_output)
            module.o.register_forward_pre_hook(_as_weight)
        elif isinstance(module, ChannelMixer):
            for child in module.children():
                if any(True for _ in child.parameters()):
                    child.register_forward_pre_hook(_as_weight)


def _in_fp32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # A caller that is float32 already (a norm around a polynomial) gets float32 back.
    return forward(x.float()).to(x.dtype)


def _widen_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _as_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) for a in args)


def materialise(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Allocate a sharded meta model and fill it with the values of a whole one, which rank 0 alone holds (the others
    give None).
    """
    model.to_empty(device=device)
    if isinstance(model, Transformer) and model.config.head == "tied":  # new memory has parted them
        model.head.weight = model.token.weight
    values: Mapping[str, Any] = {} if source is None else source.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(values), options=options)
    # Buffers that no state dict holds (masks) are empty memory by now.
    theirs = {} if source is None else dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        if name in theirs:
            buffer.copy_(theirs[name])
        dist.broadcast(buffer, 0)


def total_norm(model: nn.Module, clip: float) -> float:
    """Clip the gradients of all processes together and return the norm that they had."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def mean(value: Tensor) -> float:
    """Return the mean of a scalar over all processes."""
    value = value.detach().clone().double()
    if value.is_cuda:
        value = value.float()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()
