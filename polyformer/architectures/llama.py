"""Llama-like models (Llama, SmolLM2): RMSNorm, rotary positions on whole heads, grouped queries, SwiGLU, head tied or
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyformer.architectures.source import Source, activation, demand, rope_base
from polyformer.model import ModelConfig

USELESS = (r"rotary_emb\.inv_freq$",)


def longest(values: Mapping[str, Any]) -> int:
    return values["max_position_embeddings"]


def config(values: Mapping[str, Any], length: int) -> ModelConfig:
    d, heads, blocks = values["hidden_size"], values["num_attention_heads"], values["num_hidden_layers"]
    demand(values, head_dim=d // heads, pretraining_tp=1)
    kv_heads = values.get("num_key_value_heads") or heads
    return ModelConfig(
        vocab=values["vocab_size"],
        length=length,
        width=d,
        heads=heads,
        hidden=values["intermediate_size"],
        blocks=blocks,
        mixer="softmax",
        norms=("rms",) * (2 * blocks + 1),
        activation=activation(values, "hidden_act"),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        kv_heads=0 if kv_heads == heads else kv_heads,
        rotary=d // heads,
        rotary_base=rope_base(values, "rope_theta"),
        positions="none",
        biases=bool(values.get("attention_bias") or values.get("mlp_bias")),
        gated=True,
        head="tied" if values.get("tie_word_embeddings", False) else "linear",
        head_bias=False,
    )


def weights(source: Source, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    d, hidden, biased = config.width, config.hidden, config.biases
    kv = d // config.heads * (config.kv_heads or config.heads)
    body = source.under("model.", "", marker="embed_tokens.weight")
    token = body.take("embed_tokens.weight", config.vocab, d)
    found = {"token.weight": token}
    for i in range(config.blocks):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        for name, target, inputs, outputs in (
            ("self_attn.q_proj", "mixer.q", d, d),
            ("self_attn.k_proj", "mixer.k", d, kv),
            ("self_attn.v_proj", "mixer.v", d, kv),
            ("self_attn.o_proj", "mixer.o", d, d),
            ("mlp.gate_proj", "mlp.gate", d, hidden),
            ("mlp.up_proj", "mlp.up", d, hidden),
            ("mlp.down_proj", "mlp.down", hidden, d),
        ):
            found |= body.linear(f"{theirs}.{name}", f"{ours}.{target}", inputs, outputs, biased=biased, fill=True)
        found[f"{ours}.norm1.gamma"] = body.take(f"{theirs}.input_layernorm.weight", d)
        found[f"{ours}.norm2.gamma"] = body.take(f"{theirs}.post_attention_layernorm.weight", d)
    found["norm.gamma"] = body.take("norm.weight", d)
    tied = config.head == "tied"
    found["head.weight"] = token if tied else source.take("lm_head.weight", config.vocab, d)
    source.finish(*USELESS, *((r"^lm_head\.weight$",) if tied else ()))
    return found
