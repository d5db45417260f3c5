"""Write the token shards of a text for `training.distributed`.

python -m training.prepare --text corpus/ --tokenizer tokenizer.json --out shards/

Without a tokenizer the tokens are bytes (vocabulary 257). The tokenizer's <|eot|> or <|endoftext|> must have id 0, which
is what ends a document in a shard; that is so in Pythia's tokenizer and in our own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.data import EOT, EOT_ID, read_documents
from training.shards import write_byte_shards, write_shards

END_MARKS = (EOT, "<|endoftext|>")


def prepare(out: Path, *, text: Path | None, tokenizer: Path | None, shard_tokens: int = 100_000_000) -> list[int]:
    """Write the shards of a text (a file, or a folder of .txt files; None: this package's) and return the tokens of
    each.
    """
    if tokenizer is None:
        return write_byte_shards(out, text, shard_tokens=shard_tokens)
    loaded = Tokenizer.from_file(str(tokenizer))
    marks = {mark: loaded.token_to_id(mark) for mark in END_MARKS}
    if EOT_ID not in marks.values():
        raise ValueError(f"{tokenizer} gives {marks}; one of them must have id {EOT_ID}, it ends documents in a shard")

    def encoded() -> Iterator[np.ndarray]:
        for document in read_documents(text):
            yield np.array(loaded.encode(document, add_special_tokens=False).ids, dtype=np.int64)

    return write_shards(out, encoded(), vocab=loaded.get_vocab_size(), shard_tokens=shard_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="training.prepare", description="Write token shards.")
    parser.add_argument("--text", type=Path, help="a file or a folder of .txt files; default: this package's text")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: bytes")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    options = parser.parse_args(arguments)
    prepare(options.out, text=options.text, tokenizer=options.tokenizer, shard_tokens=options.shard_tokens)


if __name__ == "__main__":
    main()
