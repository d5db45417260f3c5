"""GPT-2: learned positions, pre-norm, GELU in its tanh form, tied head; weights stored [in, out] (its `Conv1D`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyformer.architectures.source import Source, activation, demand
from polyformer.model import ModelConfig

USELESS = (r"\.attn\.(bias|masked_bias)$", r"^lm_head\.weight$")  # causal masks, and the head that is tied


def longest(values: Mapping[str, Any]) -> int:
    return values["n_positions"]


def config(values: Mapping[str, Any], length: int) -> ModelConfig:
    demand(
        values,
        tie_word_embeddings=True,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    blocks = values["n_layer"]
    return ModelConfig(
        vocab=values["vocab_size"],
        length=length,
        width=values["n_embd"],
        heads=values["n_head"],
        hidden=values.get("n_inner") or 4 * values["n_embd"],
        blocks=blocks,
        mixer="softmax",
        norms=("layer",) * (2 * blocks + 1),
        activation=activation({"activation_function": "gelu_new", **values}, "activation_function"),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        head="tied",
        head_bias=False,
    )


def weights(source: Source, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    d, hidden = config.width, config.hidden
    body = source.under("transformer.", "", marker="wte.weight")
    token = body.take("wte.weight", config.vocab, d)
    positions = body.take("wpe.weight", values["n_positions"], d)
    found = {"token.weight": token, "head.weight": token, "position": positions[: config.length]}
    for i in range(config.blocks):
        theirs, ours = f"h.{i}", f"blocks.{i}"
        found |= body.layer_norm(f"{theirs}.ln_1", f"{ours}.norm1", d)
        found |= body.layer_norm(f"{theirs}.ln_2", f"{ours}.norm2", d)
        for p, weight, bias in zip(
            "qkv",
            body.take(f"{theirs}.attn.c_attn.weight", d, 3 * d).T.split(d),
            body.take(f"{theirs}.attn.c_attn.bias", 3 * d).split(d),
            strict=True,
        ):
            found |= {f"{ours}.mixer.{p}.weight": weight, f"{ours}.mixer.{p}.bias": bias}
        for name, target, inputs, outputs in (
            ("attn.c_proj", "mixer.o", d, d),
            ("mlp.c_fc", "mlp.up", d, hidden),
            ("mlp.c_proj", "mlp.down", hidden, d),
        ):
            found[f"{ours}.{target}.weight"] = body.take(f"{theirs}.{name}.weight", inputs, outputs).T
            found[f"{ours}.{target}.bias"] = body.take(f"{theirs}.{name}.bias", outputs)
    found |= body.layer_norm("ln_f", "norm", d)
    source.finish(*USELESS)
    return found
