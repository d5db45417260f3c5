"""GPT-NeoX and Pythia: parallel residual, partial rotary positions, LayerNorm, GELU, one fused q/k/v matrix.

A parallel block of these has two LayerNorms that read the same x, x + attention(n1(x)) + mlp(n2(x)). They differ only
in gamma and beta, so both are folded into the linears that follow, W (g * z + b) = (W g) z + W b, and one plain norm
is left: the same function, one inverse square root less. Names after the published checkpoints (EleutherAI/pythia).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyformer.architectures.source import Source, activation, demand, rope_base
from polyformer.model import ModelConfig

USELESS = (r"\.attention\.(bias|masked_bias)$", r"rotary_emb\.inv_freq$")


def longest(values: Mapping[str, Any]) -> int:
    return values["max_position_embeddings"]


def config(values: Mapping[str, Any], length: int) -> ModelConfig:
    heads, blocks = values["num_attention_heads"], values["num_hidden_layers"]
    head_size = values["hidden_size"] // heads
    parallel = values.get("use_parallel_residual", True)
    demand(values, tie_word_embeddings=False)
    share = (values.get("rope_parameters") or {}).get("partial_rotary_factor", values.get("rotary_pct", 0.25))
    return ModelConfig(
        vocab=values["vocab_size"],
        length=length,
        width=values["hidden_size"],
        heads=heads,
        hidden=values["intermediate_size"],
        blocks=blocks,
        parallel=parallel,
        mixer="softmax",
        norms=("layer",) * (blocks * (1 if parallel else 2) + 1),
        activation=activation(values, "hidden_act"),
        norm_eps=values.get("layer_norm_eps", 1e-5),
        rotary=int(head_size * share),
        rotary_base=rope_base(values, "rotary_emb_base", "rope_theta"),
        positions="none",
        head_bias=False,
    )


def weights(source: Source, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    d, hidden = config.width, config.hidden
    body = source.under("gpt_neox.", "", marker="embed_in.weight")
    found = {"token.weight": body.take("embed_in.weight", config.vocab, d)}
    for i in range(config.blocks):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        block = _qkv(body, f"{theirs}.attention.query_key_value", ours, config)
        block |= body.linear(f"{theirs}.attention.dense", f"{ours}.mixer.o", d, d, fill=True)
        block |= body.linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.up", d, hidden)
        block |= body.linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.down", hidden, d)
        block |= body.layer_norm(f"{theirs}.input_layernorm", f"{ours}.norm1", d)
        block |= body.layer_norm(f"{theirs}.post_attention_layernorm", f"{ours}.norm2", d)
        found |= _with_one_norm(block, ours) if config.parallel else block
    found |= body.layer_norm("final_layer_norm", "norm", d)
    found["head.weight"] = source.take("embed_out.weight", config.vocab, d)
    source.finish(*USELESS)
    return found


def _qkv(source: Source, name: str, ours: str, config: ModelConfig) -> dict[str, Tensor]:
    """Cut the fused rows, which are ordered [head, q/k/v, channel]."""
    d, h = config.width, config.heads
    fused = source.linear(name, "", d, 3 * d, fill=True)
    found: dict[str, Tensor] = {}
    for kind, rows in fused.items():
        parts = rows.view(h, 3, d // h, *rows.shape[1:]).unbind(1)
        found |= {
            f"{ours}.mixer.{p}{kind}": part.reshape(d, *rows.shape[1:]) for p, part in zip("qkv", parts, strict=True)
        }
    return found


def _with_one_norm(block: dict[str, Tensor], ours: str) -> dict[str, Tensor]:
    """Fold both norms into what follows them and leave one with gamma 1 and beta 0."""
    followers = {"norm1": ("mixer.q", "mixer.k", "mixer.v"), "norm2": ("mlp.up",)}
    for norm, linears in followers.items():
        gamma, beta = block.pop(f"{ours}.{norm}.gamma"), block.pop(f"{ours}.{norm}.beta")
        for linear in linears:
            weight = block[f"{ours}.{linear}.weight"]
            block[f"{ours}.{linear}.bias"] = block[f"{ours}.{linear}.bias"] + weight @ beta
            block[f"{ours}.{linear}.weight"] = weight * gamma
    return block | {f"{ours}.norm1.gamma": torch.ones_like(gamma), f"{ours}.norm1.beta": torch.zeros_like(beta)}
