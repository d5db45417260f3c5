"""Token shards on disk, mapped into memory, read in a shuffled order whose whole state is one number.

shards.json       {"format": 1, "vocab": V, "dtype": "uint16" | "uint32", "end": id, "tokens": [n0, n1, ...],
                  "digest": hex}
shard-00000.bin   n0 tokens, little-endian, documents one after the other with the id `end` behind each

A window has T + 1 tokens, inputs and targets in one; windows tile each shard without overlap of their inputs. The order
of an epoch is a keyed permutation computed window by window (a Feistel network walked until it lands inside), so a
corpus of any size needs no table in memory, and position k of epoch e is the same window in every process, whatever the
number of processes. Resuming is setting the position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data import EOT_ID, read_documents

FORMAT = 1
BYTE_VOCAB = 257  # <|eot|> is 0, byte b is b + 1
ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a reader stands: `windows` drawn since the start of epoch 0, the `seed` of the order, the `digest` of the
    data.
    """

    windows: int
    seed: int
    digest: str


def write_shards(
    folder: Path, documents: Iterable[np.ndarray], *, vocab: int, shard_tokens: int = 100_000_000, end: int = EOT_ID
) -> list[int]:
    """Write documents (int vectors of ids), each with the id `end` behind it, as shards of at most `shard_tokens` tokens;
    return the tokens of each.

    The index is written last and by a rename: a folder without it holds no shards.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    digest, held = hashlib.blake2b(digest_size=16), 0
    counts: list[int] = []
    parts: list[np.ndarray] = []

    def flush() -> None:
        nonlocal held, parts
        data = np.concatenate(parts)
        (folder / f"shard-{len(counts):05d}.bin").write_bytes(data.tobytes())
        digest.update(data.tobytes())
        counts.append(len(data))
        held, parts = 0, []

    for document in documents:
        ids = np.append(np.asarray(document), end)
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"a document holds ids {ids.min()}..{ids.max()}; the vocabulary has {vocab}")
        for start in range(0, len(ids), shard_tokens):
            piece = ids[start : start + shard_tokens].astype(dtype)
            if held and held + len(piece) > shard_tokens:
                flush()
            parts.append(piece)
            held += len(piece)
    if held:
        flush()
    if not counts:
        raise ValueError(f"no documents for {folder}; give at least one")
    index = {
        "format": FORMAT,
        "vocab": vocab,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "end": end,
        "tokens": counts,
        "digest": digest.hexdigest(),
    }
    temporary = folder / "shards.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / "shards.json")
    return counts


def write_byte_shards(folder: Path, text: Path | None = None, *, shard_tokens: int = 1 << 20) -> list[int]:
    """Write a text, byte by byte, as shards of vocabulary 257; None is the text of this package."""
    documents = (
        np.frombuffer(d.encode(), dtype=np.uint8).astype(np.int64) + 1 for d in read_documents(text) if d.strip()
    )
    return write_shards(folder, documents, vocab=BYTE_VOCAB, shard_tokens=shard_tokens)


class ShardReader:
    """Batches of windows from a folder of shards. `position` is the whole state; give it to `seek` to resume exactly.

    Args: `length` T; `seed` of the order.
    """

    def __init__(self, folder: Path, *, length: int, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0, it keys the order of the windows")
        index_path = folder / "shards.json"
        if not index_path.exists():
            raise FileNotFoundError(f"{index_path} is missing: write the shards with training.shards.write_shards")
        index = json.loads(index_path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"{index_path} has format {index['format']}, this version reads {FORMAT}; write it anew")
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[index["dtype"]])
        self.vocab, self.digest, self.length, self.seed = int(index["vocab"]), str(index["digest"]), length, seed
        self.shards: list[np.memmap] = []
        for i, tokens in enumerate(index["tokens"]):
            path = folder / f"shard-{i:05d}.bin"
            size = path.stat().st_size if path.exists() else 0
            if size != tokens * dtype.itemsize:
                raise ValueError(
                    f"{path} has {size} bytes, {index_path.name} says {tokens * dtype.itemsize}; write it anew"
                )
            self.shards.append(np.memmap(path, dtype=dtype, mode="r"))
        # The last token of a window is the first input of the next, so only targets overlap.
        self.ends = np.cumsum([max(0, (len(s) - 1) // length) for s in self.shards])
        self.count = int(self.ends[-1])
        if not self.count:
            longest = max(len(s) for s in self.shards)
            raise ValueError(
                f"the longest shard of {folder} has {longest} tokens, a window {length + 1}; shorten `length`"
            )
        self._drawn = 0

    @property
    def position(self) -> Position:
        return Position(windows=self._drawn, seed=self.seed, digest=self.digest)

    def seek(self, position: Position) -> None:
        """Go on from a position; one of other data or of another order is refused."""
        for name, ours in (("digest", self.digest), ("seed", self.seed)):
            theirs = getattr(position, name)
            if theirs != ours:
                raise ValueError(
                    f"the checkpoint read data with {name} {theirs}, this run has {ours}; resume with the same {name}"
                )
        self._drawn = position.windows

    def window(self, index: int) -> np.ndarray:
        """Return int64 [T + 1], the window of an index in file order, 0 <= index < count."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (int(self.ends[shard - 1]) if shard else 0)) * self.length
        return self.shards[shard][start : start + self.length + 1].astype(np.int64)

    def batch(self, size: int, *, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Draw `size` windows over all processes and return those of this one: inputs and targets, int64
        [size/world, T].

        Every process advances by `size`, so positions agree without a message.
        """
        if size % world:
            raise ValueError(f"a batch of {size} windows does not divide over {world} processes; change one of them")
        share = size // world
        first = self._drawn + rank * share
        rows = np.stack([self.window(self._order(k)) for k in range(first, first + share)])
        self._drawn += size
        windows = torch.from_numpy(rows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _order(self, k: int) -> int:
        epoch, place = divmod(k, self.count)
        return permuted(place, self.count, key=(self.seed << 32) ^ epoch)


def permuted(i: int, n: int, *, key: int) -> int:
    """Return the image of i under a permutation of 0..n-1 picked by `key`.

    A balanced Feistel network on the next even number of bits, applied until the image is below n (cycle walking: it
    stays a permutation, and takes fewer than 4 rounds on average).
    """
    if not 0 <= i < n:
        raise ValueError(f"{i} is outside 0..{n - 1}")
    if key < 0:
        raise ValueError(f"key is {key}; it must be at least 0")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (_mixed(right + (r << 40) + (key << 43)) & mask)
        i = left << half | right
        if i < n:
            return i


def _mixed(x: int) -> int:
    """SplitMix64's finaliser over the 64-bit words of x: a hash good enough to shuffle with, the same everywhere."""
    h = 0
    while True:
        h = (h ^ x) & 0xFFFFFFFFFFFFFFFF
        h = (h + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        h = ((h ^ h >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        h = ((h ^ h >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
        x >>= 64
        if not x:
            return h
