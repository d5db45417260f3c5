"""Tokenizers of released checkpoints: what a folder holds, and the byte-level BPE of a GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from training.data import train_bpe
from training.vocabulary import checkpoint_tokenizer

TEXT = "It was 1984, and the clocks were striking thirteen. " * 10


def write_gguf(path: Path, fields: dict) -> None:
    """A GGUF file without tensors."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(v) -> bytes:
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        if isinstance(v[0], str):
            return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
        return struct.pack("<IIQ", 9, 5, len(v)) + struct.pack(f"<{len(v)}i", *v)

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields))
    path.write_bytes(head + b"".join(string(k) + value(v) for k, v in fields.items()))


def gguf_fields(tokenizer, pre: str) -> dict:
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if i == 0 else 1 for _, i in vocab],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
    }


def test_gguf_gives_the_tokens_of_the_original(tmp_path):
    original = train_bpe([TEXT], 300)
    write_gguf(tmp_path / "model.gguf", gguf_fields(original, "gpt-2"))
    found = checkpoint_tokenizer(tmp_path / "model.gguf")
    for text in ("the clocks were striking", "ünïcode 1984\n", "a<|eot|>b"):
        assert found.encode(text).ids == original.encode(text).ids
        assert found.decode(found.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_split_where_the_file_says_so(tmp_path):
    original = train_bpe([TEXT], 300)
    assert any("19" in t for t in original.encode("1984").tokens)
    write_gguf(tmp_path / "model.gguf", gguf_fields(original, "smollm"))
    assert checkpoint_tokenizer(tmp_path / "model.gguf").encode("1984").tokens == ["1", "9", "8", "4"]


def test_a_folder_gives_its_own_without_truncation_and_padding(tmp_path):
    original = train_bpe([TEXT], 300)
    original.enable_truncation(4)
    original.enable_padding(length=8)
    original.save(str(tmp_path / "tokenizer.json"))
    found = checkpoint_tokenizer(tmp_path)
    original.no_truncation()
    original.no_padding()
    assert found.encode(TEXT).ids == original.encode(TEXT).ids


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        checkpoint_tokenizer(tmp_path)
    fields = gguf_fields(train_bpe([TEXT], 300), "llama-bpe")
    write_gguf(tmp_path / "model.gguf", fields)
    with pytest.raises(ValueError, match=r"'llama-bpe'"):
        checkpoint_tokenizer(tmp_path / "model.gguf")
