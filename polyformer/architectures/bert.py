"""BERT, RoBERTa and MiniLM: post-norm encoder, learned positions, token types, GELU; the output is the last states.

Poolers and heads of pre-training are left out: an encoder is used through its states (mean pooling, a new classifier).
RoBERTa numbers its positions from pad_token_id + 1; those rows become our row 0, which holds for sequences padded on
the right, the only padding that gives a token its own position here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyformer.architectures.source import Source, activation, demand
from polyformer.model import ModelConfig

USELESS = (r"position_ids$", r"token_type_ids$", r"(^|\.)pooler\.", r"^cls\.", r"^lm_head\.", r"^classifier\.")


def longest(values: Mapping[str, Any]) -> int:
    return values["max_position_embeddings"] - _first_position(values)


def config(values: Mapping[str, Any], length: int) -> ModelConfig:
    demand(values, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    blocks = values["num_hidden_layers"]
    return ModelConfig(
        vocab=values["vocab_size"],
        length=length,
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        hidden=values["intermediate_size"],
        blocks=blocks,
        mixer="softmax",
        norms=("layer",) * (2 * blocks + 1),
        activation=activation(values, "hidden_act"),
        norm_eps=values.get("layer_norm_eps", 1e-12),
        order="post",
        causal=False,
        token_types=values["type_vocab_size"],
        head="none",
    )


def weights(source: Source, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    d, hidden = config.width, config.hidden
    body = source.under("bert.", "roberta.", "", marker="embeddings.word_embeddings.weight")
    first = _first_position(values)
    positions = body.take("embeddings.position_embeddings.weight", values["max_position_embeddings"], d)
    found = {
        "token.weight": body.take("embeddings.word_embeddings.weight", config.vocab, d),
        "position": positions[first : first + config.length],
        "segment.weight": body.take("embeddings.token_type_embeddings.weight", config.token_types, d),
    }
    found |= body.layer_norm("embeddings.LayerNorm", "norm", d)
    for i in range(config.blocks):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for name, target, inputs, outputs in (
            ("attention.self.query", "mixer.q", d, d),
            ("attention.self.key", "mixer.k", d, d),
            ("attention.self.value", "mixer.v", d, d),
            ("attention.output.dense", "mixer.o", d, d),
            ("intermediate.dense", "mlp.up", d, hidden),
            ("output.dense", "mlp.down", hidden, d),
        ):
            found |= body.linear(f"{theirs}.{name}", f"{ours}.{target}", inputs, outputs)
        found |= body.layer_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm1", d)
        found |= body.layer_norm(f"{theirs}.output.LayerNorm", f"{ours}.norm2", d)
    source.finish(*USELESS)
    return found


def _first_position(values: Mapping[str, Any]) -> int:
    """Return the row of the position table that belongs to the first token."""
    return 0 if values["model_type"] == "bert" else values["pad_token_id"] + 1
