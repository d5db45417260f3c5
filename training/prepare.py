"""Write the token shards of a text for `training.distributed`.

    python -m training.prepare --text corpus/ --tokenizer tokenizer.json --out shards/
    python -m training.prepare --text corpus/ --tokenizer checkpoints/gpt2 --out shards/

Without a tokenizer the tokens are bytes (vocabulary 257). A document ends with the tokenizer's own mark, <|endoftext|> or
</s> for example, or the token that `--end` names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from training.data import read_documents
from training.shards import write_byte_shards, write_shards
from training.vocabulary import checkpoint_tokenizer, document_end


def prepare(
    out: Path, *, text: Path | None, tokenizer: Path | None, end: str | None = None, shard_tokens: int = 100_000_000
) -> list[int]:
    """Write the shards of a text (a file, or a folder of .txt files; None: this package's) and return the tokens of
    each.

    Args: `tokenizer` a tokenizer.json, a folder that has one, or a .gguf file; None: bytes. `end` the token, or its id, that
        ends a document; None is what the tokenizer has for that, or config.json beside it says.

    Raises:
        FileNotFoundError: text or tokenizer is missing.
        ValueError: the tokenizer cannot be read, or nothing says what ends a document.
    """
    if tokenizer is None:
        if end is not None:
            raise ValueError(f"--end is {end!r}, but bytes end a document with id 0; leave it out, or give --tokenizer")
        return write_byte_shards(out, text, shard_tokens=shard_tokens)
    loaded = checkpoint_tokenizer(tokenizer)
    config = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    mark = document_end(loaded, values, end)
    vocab = max(loaded.get_vocab(with_added_tokens=True).values()) + 1

    def encoded() -> Iterator[np.ndarray]:
        for document in read_documents(text):
            yield np.array(loaded.encode(document, add_special_tokens=False).ids, dtype=np.int64)

    return write_shards(out, encoded(), vocab=vocab, shard_tokens=shard_tokens, end=mark)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write. What the user can mend ends in a sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="training.prepare", description="Write token shards.")
    parser.add_argument("--text", type=Path, help="a file or a folder of .txt files; default: this package's text")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, its folder, or a .gguf file; default: bytes")
    parser.add_argument("--end", help="token, or its id, that ends a document; default: the tokenizer's own")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    given = parser.parse_args(arguments)
    try:
        prepare(given.out, text=given.text, tokenizer=given.tokenizer, end=given.end, shard_tokens=given.shard_tokens)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
