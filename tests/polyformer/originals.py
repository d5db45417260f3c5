"""Tiny random checkpoints in the naming of each released family, and what the original computes, in plain NumPy.

Written from the models' papers and published configs, apart from `polyformer`: one sequence, float64, no batching, heads
in a loop, rotary positions as complex numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Weights = dict[str, np.ndarray]

VOCAB, D, HEADS, BLOCKS, WINDOW = 23, 24, 4, 2, 16
K = D // HEADS

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_positions": WINDOW,
    "n_embd": D,
    "n_head": HEADS,
    "n_layer": BLOCKS,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": WINDOW,
    "rotary_pct": 0.4,  # 2 of 6 channels
    "rotary_emb_base": 10000,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": WINDOW,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": WINDOW,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
ROBERTA = BERT | {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def write(folder: Path, config: dict, weights: Weights) -> Path:
    """Write a checkpoint as Hugging Face does: config.json and model.safetensors, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def random_weights(config: dict, seed: int = 0) -> Weights:
    """Weights of a family, rounded to float32, of a size at which every part matters."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 2:
            value = rng.normal(0, 1.5 / math.sqrt(D), shape)
        else:
            value = rng.normal("orm" in name or "ln_" in name, 0.3, shape) * (1 if "bias" not in name else 0.7)
        return value.astype(np.float32).astype(np.float64)

    shapes = {"gpt2": _gpt2_shapes, "gpt_neox": _neox_shapes, "llama": _llama_shapes}.get(
        config["model_type"], _bert_shapes
    )(config)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def compute(config: dict, weights: Weights, ids: list[int], types: list[int] | None = None) -> np.ndarray:
    """What the original gives for one sequence: logits [T, V], or states [T, D] of an encoder."""
    kind = config["model_type"]
    if kind == "gpt2":
        return _gpt2(config, weights, ids)
    if kind == "gpt_neox":
        return _neox(config, weights, ids)
    if kind == "llama":
        return _llama(config, weights, ids)
    return _bert(config, weights, ids, types or [0] * len(ids))


# --- names and shapes -------------------------------------------------------------------------------------------------


def _gpt2_shapes(config):
    shapes = {"wte.weight": (VOCAB, D), "wpe.weight": (config["n_positions"], D)}
    for i in range(BLOCKS):
        sizes = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
        for name, shape in sizes.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        shapes |= {f"h.{i}.{n}.{p}": (D,) for n in ("ln_1", "ln_2") for p in ("weight", "bias")}
    return {f"transformer.{n}": s for n, s in (shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)}).items()}


def _neox_shapes(config):
    f = config["intermediate_size"]
    shapes = {"gpt_neox.embed_in.weight": (VOCAB, D), "embed_out.weight": (VOCAB, D)}
    for i in range(BLOCKS):
        sizes = {"attention.query_key_value": (3 * D, D), "attention.dense": (D, D)}
        sizes |= {"mlp.dense_h_to_4h": (f, D), "mlp.dense_4h_to_h": (D, f)}
        for name, shape in sizes.items():
            path = f"gpt_neox.layers.{i}.{name}"
            shapes |= {f"{path}.weight": shape, f"{path}.bias": shape[:1]}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"gpt_neox.layers.{i}.{norm}.{p}": (D,) for p in ("weight", "bias")}
    return shapes | {f"gpt_neox.final_layer_norm.{p}": (D,) for p in ("weight", "bias")}


def _llama_shapes(config):
    f, kv = config["intermediate_size"], config["num_key_value_heads"] * K
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(BLOCKS):
        sizes = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
        sizes |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (f, D), "mlp.up_proj": (f, D), "mlp.down_proj": (D, f)}
        sizes |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in sizes.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (VOCAB, D)}


def _bert_shapes(config):
    f, prefix = config["intermediate_size"], "" if config["model_type"] == "bert" else "roberta."
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, D),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], D),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], D),
        "embeddings.LayerNorm.weight": (D,),
        "embeddings.LayerNorm.bias": (D,),
    }
    for i in range(BLOCKS):
        path = f"encoder.layer.{i}"
        sizes = {f"attention.self.{part}": (D, D) for part in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (D, D), "intermediate.dense": (f, D), "output.dense": (D, f)}
        for name, shape in sizes.items():
            shapes |= {f"{path}.{name}.weight": shape, f"{path}.{name}.bias": shape[:1]}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{path}.{norm}.{p}": (D,) for p in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


# --- what the originals compute ---------------------------------------------------------------------------------------


def _gpt2(config, w, ids):
    w = {n.removeprefix("transformer."): v for n, v in w.items()}
    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(BLOCKS):
        p = f"h.{i}"
        z = _layer_norm(x, w, f"{p}.ln_1", 1e-5) @ w[f"{p}.attn.c_attn.weight"] + w[f"{p}.attn.c_attn.bias"]
        y = _attention(z[:, :D], z[:, D : 2 * D], z[:, 2 * D :], HEADS, causal=True)
        x = x + y @ w[f"{p}.attn.c_proj.weight"] + w[f"{p}.attn.c_proj.bias"]
        u = _layer_norm(x, w, f"{p}.ln_2", 1e-5) @ w[f"{p}.mlp.c_fc.weight"] + w[f"{p}.mlp.c_fc.bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ w[f"{p}.mlp.c_proj.weight"] + w[f"{p}.mlp.c_proj.bias"]
    return _layer_norm(x, w, "ln_f", 1e-5) @ w["wte.weight"].T


def _neox(config, w, ids):
    x = w["gpt_neox.embed_in.weight"][ids]
    turned = int(K * config["rotary_pct"])
    for i in range(BLOCKS):
        p = f"gpt_neox.layers.{i}"
        z = _linear(_layer_norm(x, w, f"{p}.input_layernorm", 1e-5), w, f"{p}.attention.query_key_value")
        q, k, v = (np.concatenate([z[:, 3 * K * h + part * K :][:, :K] for h in range(HEADS)], 1) for part in range(3))
        y = _attention(q, k, v, HEADS, causal=True, turned=turned, base=config["rotary_emb_base"])
        y = _linear(y, w, f"{p}.attention.dense")
        read = x if config["use_parallel_residual"] else x + y
        u = _linear(_layer_norm(read, w, f"{p}.post_attention_layernorm", 1e-5), w, f"{p}.mlp.dense_h_to_4h")
        x = x + y + _linear(_gelu(u), w, f"{p}.mlp.dense_4h_to_h")
    return _layer_norm(x, w, "gpt_neox.final_layer_norm", 1e-5) @ w["embed_out.weight"].T


def _llama(config, w, ids):
    x = w["model.embed_tokens.weight"][ids]
    for i in range(BLOCKS):
        p = f"model.layers.{i}"
        z = _rms(x, w[f"{p}.input_layernorm.weight"])
        q, k, v = (z @ w[f"{p}.self_attn.{n}_proj.weight"].T for n in "qkv")
        groups = config["num_key_value_heads"]
        y = _attention(q, k, v, groups, causal=True, turned=K, base=config["rope_theta"])
        x = x + y @ w[f"{p}.self_attn.o_proj.weight"].T
        z = _rms(x, w[f"{p}.post_attention_layernorm.weight"])
        gate = z @ w[f"{p}.mlp.gate_proj.weight"].T
        u = gate / (1 + np.exp(-gate)) * (z @ w[f"{p}.mlp.up_proj.weight"].T)
        x = x + u @ w[f"{p}.mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return _rms(x, w["model.norm.weight"]) @ w[head].T


def _bert(config, w, ids, types):
    w = {n.removeprefix("roberta."): v for n, v in w.items()}
    first, eps = 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1, config["layer_norm_eps"]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][types]
    x = x + np.stack([w["embeddings.position_embeddings.weight"][first + t] for t in range(len(ids))])
    x = _layer_norm(x, w, "embeddings.LayerNorm", eps)
    for i in range(BLOCKS):
        p = f"encoder.layer.{i}"
        q, k, v = (_linear(x, w, f"{p}.attention.self.{n}") for n in ("query", "key", "value"))
        y = _linear(_attention(q, k, v, HEADS, causal=False), w, f"{p}.attention.output.dense")
        x = _layer_norm(x + y, w, f"{p}.attention.output.LayerNorm", eps)
        u = _linear(_gelu(_linear(x, w, f"{p}.intermediate.dense")), w, f"{p}.output.dense")
        x = _layer_norm(x + u, w, f"{p}.output.LayerNorm", eps)
    return x


def _linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _rms(x, gamma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma


def _layer_norm(x, w, name, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(q, k, v, groups, *, causal, turned=0, base=1.0):
    """Softmax attention of [T, D] against `groups` key heads; query head h reads key head h // (heads/groups)."""
    t, outputs = len(q), []
    for h in range(HEADS):
        g = h // (HEADS // groups)
        qh = _turn(q[:, h * K : (h + 1) * K], turned, base)
        kh = _turn(k[:, g * K : (g + 1) * K], turned, base)
        s = qh @ kh.T / math.sqrt(K)
        if causal:
            s[np.triu_indices(t, 1)] = -np.inf
        e = np.exp(s - s.max(-1, keepdims=True))
        outputs.append(e / e.sum(-1, keepdims=True) @ v[:, g * K : (g + 1) * K])
    return np.concatenate(outputs, 1)


def _turn(x, turned, base):
    """Rotary positions: channels c and c + turned/2 are the parts of a complex number that turns with the position."""
    half = turned // 2
    z = x[:, :half] + 1j * x[:, half:turned]
    z = z * np.exp(1j * np.arange(len(x))[:, None] * float(base) ** (-2 * np.arange(half) / max(turned, 1)))
    return np.concatenate([z.real, z.imag, x[:, turned:]], 1)
