"""What a recipe costs before anything is allocated: parameters, bytes and floating-point operations.

The model is built on the meta device, where tensors have shapes and no data. Parameters are counted on it; what
autograd would keep for the backward pass is measured by running one block on it and adding up the storages that are
saved. FLOPs are closed form (a multiply-add is 2), and a test holds them against torch's own counter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyformer.model import ModelConfig, Transformer
from training import optimiser
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
    forward = forward_flops(recipe.model)
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


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model with exact functions, in closed form; refuses a config that has trained coefficients."""
    if config.activation == "polynomial":
        raise ValueError("a polynomial activation has coefficients of its own; count them on the model from on_meta")
    d, v = config.width, config.vocab
    norms = sum(d * (1 if kind.startswith("rms") else 2) for kind in config.norms)
    block = sum((into + config.biases) * out for into, out in block_linears(config))
    return v * d + config.length * d + config.blocks * block + norms + d * v + v


def block_linears(config: ModelConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear of a block with attention: q, k, v, o, then up, down and perhaps the gate."""
    d, h = config.width, config.hidden
    keys = d * config.kv_heads // config.heads if config.kv_heads else d
    return [(d, d), (d, keys), (d, keys), (d, d), (d, h), (h, d), *([(d, h)] if config.gated else [])]


def forward_flops(config: ModelConfig, tokens: int | None = None) -> int:
    """FLOPs of a forward pass, a token, in windows of `tokens` (the full window if None): matrix products alone.

    Linears 2 a weight (with as many key heads as heads and no gate 8 D^2 of attention, 4 D hidden of the MLP), head
    2 D V; scores and values 2 T D each, over the whole square, as MFU is defined (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B): the tiles of `power_sums` leave out most of what a causal mask hides, so a long window makes
    as little as half of that. Kaplan et al. 2020 (arXiv 2001.08361, table 1), with the head counted.
    """
    d, t = config.width, config.length if tokens is None else tokens
    linears = sum(2 * into * out for into, out in block_linears(config))
    return config.blocks * (linears + 4 * t * d) + 2 * d * config.vocab


def model_flops(config: ModelConfig, tokens: int | None = None) -> int:
    """FLOPs of forward and backward, a token: what the model needs, and MFU counts; recomputation is not in it."""
    return 3 * forward_flops(config, tokens)


def activation_bytes(recipe: ScaleRecipe) -> int:
    """Bytes that autograd keeps for one micro-batch: all blocks and the head, or with checkpointing the inputs of all
    blocks and the larger of one block and the head.
    """
    config = recipe.model
    model = on_meta(config)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if recipe.precision == "bf16":
        from training.parallel import keep_powers_in_fp32

        model.to(dtype)
        keep_powers_in_fp32(model)
    x_BTD = torch.empty(recipe.micro_batch, config.length, config.width, device="meta", dtype=dtype, requires_grad=True)
    targets_BT = torch.empty(recipe.micro_batch, config.length, device="meta", dtype=torch.int64)
    block = saved_bytes(model.blocks[0], lambda: model.blocks[0](x_BTD))
    head = saved_bytes(model, lambda: token_loss(model.head(model.norm(x_BTD)).float(), targets_BT))
    inputs = config.blocks * x_BTD.numel() * x_BTD.element_size()
    return inputs + max(block, head) if recipe.checkpointing else config.blocks * block + head


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
