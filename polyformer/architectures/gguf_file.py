"""Read Llama-like models from GGUF files (llama.cpp) of types F32, F16, Q8_0, Q4_0 and Q4_1, without a further package.

Blocks of 32 weights along a row: Q8_0 is one float16 scale d and 32 int8, w = d q; Q4_0 has d and 16 bytes, w = d (q -
8); Q4_1 has d and a minimum m, w = d q + m. The low halves of the bytes are weights 0 to 15, the high halves 16 to 31.
Dimensions are written fastest first. llama.cpp keeps the rows of q and k in the order of *interleaved* rotary pairs;
`rotate_half_rows` undoes that. Format: ggml documentation, "GGUF"; our dequantisation is compared with the `gguf`
package in a test.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# type number: (weights a block, bytes a block)
TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34)}
TYPE_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile(Mapping[str, Tensor]):
    """A GGUF file: `fields` are its metadata; as a mapping, its tensors by their original names, dequantised to float32
    when asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise ValueError(f"{path} does not begin with GGUF: not a GGUF file")
            version, tensors, fields = struct.unpack("<IQQ", _read(f, 20))
            if version not in (2, 3):
                raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3 are known")
            self.fields: dict[str, Any] = {}
            for _ in range(fields):
                name = _string(f)
                self.fields[name] = _value(f, *struct.unpack("<I", _read(f, 4)))
            self.entries: dict[str, tuple[int, int, tuple[int, ...]]] = {}
            for _ in range(tensors):
                name = _string(f)
                (dimensions,) = struct.unpack("<I", _read(f, 4))
                shape = struct.unpack(f"<{dimensions}Q", _read(f, 8 * dimensions))[::-1]
                kind, offset = struct.unpack("<IQ", _read(f, 12))
                self.entries[name] = (kind, offset, shape)
            align = self.fields.get("general.alignment", ALIGNMENT)
            data = -(-f.tell() // align) * align
        for name, (kind, offset, shape) in self.entries.items():
            if kind not in TYPES:
                raise ValueError(
                    f"{path}: {name} has GGML type {kind}; known: {TYPE_NAMES}. Convert it to one of these"
                )
            self.entries[name] = (kind, data + offset, shape)
            if shape[-1] % TYPES[kind][0] or data + offset + _bytes(kind, shape) > size:
                raise ValueError(
                    f"{path}: {name} of shape {shape} does not fit the {size} bytes of the file; fetch it again"
                )

    def __getitem__(self, name: str) -> Tensor:
        kind, start, shape = self.entries[name]
        raw = np.fromfile(self.path, np.uint8, _bytes(kind, shape), offset=start)
        return torch.from_numpy(dequantise(raw, kind).reshape(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def dequantise(raw: np.ndarray, kind: int) -> np.ndarray:
    """Return float32 weights [n] from the bytes of whole blocks."""
    if kind == 0:
        return raw.view(np.float32)
    if kind == 1:
        return raw.view(np.float16).astype(np.float32)
    blocks = raw.reshape(-1, TYPES[kind][1])
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:
        return (d * blocks[:, 2:].view(np.int8)).reshape(-1)
    halves = blocks[:, -16:]
    q = np.concatenate([halves & 15, halves >> 4], 1).astype(np.float32)
    if kind == 2:
        return (d * (q - 8)).reshape(-1)
    return (d * q + blocks[:, 2:4].copy().view(np.float16).astype(np.float32)).reshape(-1)


def rotate_half_rows(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of q or k from interleaved rotary pairs (c, c + 1) to the halves (c, c + K/2) of each head."""
    return weight.view(-1, head_size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class LlamaNames(Mapping[str, Tensor]):
    """The tensors of a GGUF file of architecture llama under the names of Hugging Face, q and k for rotate-half."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.head_size = file.fields["llama.embedding_length"] // file.fields["llama.attention.head_count"]
        self.names = {_llama_name(name): name for name in file}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.file[self.names[name]]
        rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        return rotate_half_rows(tensor, self.head_size) if rotated else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def llama_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that the metadata of a GGUF file stand for."""
    kind = file.fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"{file.path} is of architecture {kind!r}; only llama is read from GGUF. Use its safetensors")
    f = {name.removeprefix("llama."): value for name, value in file.fields.items()}
    width, heads = f["embedding_length"], f["attention.head_count"]
    if f.get("rope.dimension_count", width // heads) != width // heads:
        raise ValueError(
            f"{file.path} rotates {f['rope.dimension_count']} of {width // heads} channels; all were expected"
        )
    return {
        "model_type": "llama",
        "vocab_size": file.entries["token_embd.weight"][2][0],
        "hidden_size": width,
        "intermediate_size": f["feed_forward_length"],
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": f.get("attention.head_count_kv", heads),
        "max_position_embeddings": f["context_length"],
        "rms_norm_eps": f["attention.layer_norm_rms_epsilon"],
        "rope_theta": f.get("rope.freq_base", 10000.0),
        "rope_scaling": {"type": f.get("rope.scaling.type", "default").replace("none", "default")},
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file,
        "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
    }


def _llama_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, block, part, kind = (*name.split("."), "", "", "")[:4]
    return f"model.layers.{block}.{BLOCK_NAMES[part]}.{kind}" if part in BLOCK_NAMES else name


def _bytes(kind: int, shape: tuple[int, ...]) -> int:
    weights, size = TYPES[kind]
    return math.prod(shape) // weights * size


def _read(f: BinaryIO, count: int) -> bytes:
    data = f.read(count)
    if len(data) != count:
        raise ValueError(f"{f.name} ends after {len(data)} of {count} bytes of a field; fetch it again")
    return data


def _string(f: BinaryIO) -> str:
    return _read(f, struct.unpack("<Q", _read(f, 8))[0]).decode("utf-8")


def _value(f: BinaryIO, kind: int) -> Any:
    if kind in SCALARS:
        return struct.unpack(f"<{SCALARS[kind]}", _read(f, struct.calcsize(SCALARS[kind])))[0]
    if kind == STRING:
        return _string(f)
    if kind != ARRAY:
        raise ValueError(f"{f.name} has a metadata value of unknown type {kind}; is it damaged?")
    inner, count = struct.unpack("<IQ", _read(f, 12))
    return [_value(f, inner) for _ in range(count)]
