"""What a recipe costs before anything is allocated: parameters, bytes and floating-point operations.

The model is built on the meta device, where tensors have shapes and no data. Parameters are counted on it; what
autograd would keep for the backward pass is measured by running its blocks and adding up the storages that are saved.
FLOPs are closed form (a multiply-add is 2), each mixer's its own, and a test holds them against torch's own counter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyformer.model import Block, ModelConfig, Transformer
from training import optimiser, parallel
from training.loop import token_loss
from training.recipes import ScaleRecipe


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """Bytes are those of one process of `world`, FLOPs those of one token. Peak memory adds the four parts: it leaves
    out the allocator's slack and the gathered weights of the block at work.
    """

    recipe: str
    world: int
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimiser_bytes: int
    activation_bytes: int
    forward_flops: int
    step_flops: int  # of a training step, a token: forward, backward, and the forward again when checkpointing

    @property
    def peak_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimiser_bytes + self.activation_bytes


def account(recipe: ScaleRecipe, *, world: int = 1) -> Accounts:
    """Return the accounts of a recipe for one process of `world`, weights sharded evenly over all of them."""
    model = on_meta(recipe.model)
    forward = _forward_flops(model, recipe.model.length)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Accounts(
        recipe=recipe.name,
        world=world,
        parameters=model.parameter_count(),
        parameter_bytes=weights // world,
        gradient_bytes=weights // world,
        optimiser_bytes=optimiser.state_bytes(recipe.optimiser, model) // world,
        activation_bytes=activation_bytes(recipe),
        forward_flops=forward,
        step_flops=forward * (4 if recipe.checkpointing else 3),
    )


def on_meta(config: ModelConfig) -> Transformer:
    """Return a model without data."""
    with torch.device("meta"):
        return Transformer(config)


def forward_flops(config: ModelConfig, tokens: int | None = None) -> int:
    """FLOPs of a forward pass, a token, in windows of `tokens` (the full window if None): 2 a weight of every linear, the
    head included (Kaplan et al. 2020, arXiv 2001.08361, table 1, with the head counted), and what each block's mixer
    counts for itself.
    """
    return _forward_flops(on_meta(config), config.length if tokens is None else tokens)


def _forward_flops(model: Transformer, t: int) -> int:
    linears = (m for m in model.modules() if isinstance(m, nn.Linear))
    layers = [block.mixer for block in model.blocks if isinstance(block, Block)]
    inside = {id(m) for mixer in layers for m in mixer.modules()}
    outside = sum(2 * linear.weight.numel() for linear in linears if id(linear) not in inside)
    return outside + sum(mixer.flops(t) for mixer in layers)


def model_flops(config: ModelConfig, tokens: int | None = None) -> int:
    """FLOPs of forward and backward, a token: what the model needs, and MFU counts; recomputation is not in it."""
    return 3 * forward_flops(config, tokens)


def activation_bytes(recipe: ScaleRecipe) -> int:
    """Bytes that autograd keeps for one micro-batch: all blocks and the head, or with checkpointing the inputs of all
    blocks and the largest of one block and the head.
    """
    config = recipe.model
    model = on_meta(config)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if recipe.precision == "bf16":
        parallel.to_bfloat16(model)
        parallel.keep_powers_in_fp32(model)
    x_BTD = torch.empty(recipe.micro_batch, config.length, config.width, device="meta", dtype=dtype, requires_grad=True)
    targets_BT = torch.empty(recipe.micro_batch, config.length, device="meta", dtype=torch.int64)
    kept: dict[tuple[str, ...], int] = {}  # of one block of each kind
    kinds = [(name, *_norms(block)) for name, block in zip(config.layer_mixers, model.blocks, strict=True)]
    for kind, block in zip(kinds, model.blocks, strict=True):
        if kind not in kept:
            kept[kind] = saved_bytes(block, functools.partial(block, x_BTD))
    blocks = [kept[kind] for kind in kinds]
    head = saved_bytes(model, lambda: token_loss(model.head(model.norm(x_BTD)).float(), targets_BT))
    inputs = config.blocks * x_BTD.numel() * x_BTD.element_size()
    return inputs + max(*blocks, head) if recipe.checkpointing else sum(blocks) + head


def _norms(block: nn.Module) -> list[str]:
    return [getattr(norm, "kind", type(norm).__name__) for norm in (block.norm1, block.norm2)]


def saved_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves while `run` runs, the weights and buffers of `module` left
    out.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage is freed and its address given again

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
