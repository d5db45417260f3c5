"""Text to token windows: documents, a split that holds out whole documents, a byte-level BPE, and samplers that can
resume.

A window has T + 1 tokens: T inputs and the same shifted by one as targets. Prompts shorter than T are padded on the
*left* with the id that ends documents (`Reading.window`), so training mixes in windows that start a document behind such
padding. That id is 0 in our own tokenizers and another one in released ones, where 0 may be text. Windows of arbitrary
tokens (`noise`) carry no targets (-100): they exist so that range losses see what a user may type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from polyformer.reading import Reading

EOT = "<|eot|>"
EOT_ID = 0  # of the tokenizers that are trained here
IGNORE = -100
OWN_TEXT = Path(__file__).parent / "text" / "sotu"


def read_documents(path: Path | None = None) -> list[str]:
    """Return documents: the files *.txt of a folder, or the parts of one file between form feeds; None is the text in
    this package.

    A single file without form feeds is cut into 20 parts of equal length, so that some can be held out. Bytes that are
    not UTF-8 become U+FFFD.
    """
    path = OWN_TEXT if path is None else path
    if path.is_dir():
        docs = [p.read_text(encoding="utf-8", errors="replace") for p in sorted(path.glob("*.txt"))]
    elif path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        docs = [d for d in text.split("\f") if d.strip()]
        if len(docs) == 1:
            size = -(-len(text) // 20)
            docs = [text[i : i + size] for i in range(0, len(text), size)]
    else:
        raise FileNotFoundError(f"no text at {path}: give a file, or a folder of .txt files")
    if len(docs) < 2:
        raise ValueError(f"{path} holds {len(docs)} documents; at least 2 are needed, one of them to hold out")
    return docs


def split_docs(docs: Sequence[str], k: int = 10) -> tuple[list[str], list[str]]:
    """Return train and held-out documents; every k-th one, from the first on, is held out."""
    return [d for i, d in enumerate(docs) if i % k], list(docs[::k])


def train_bpe(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab` tokens; <|eot|> has id 0. Any UTF-8 text round-trips."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[EOT],
        ),
    )
    return t


def encode_documents(tokenizer: Tokenizer, docs: Sequence[str]) -> list[Tensor]:
    """Return one int64 vector of ids a document, without end marks and without a tokenizer's own marks."""
    encoded = tokenizer.encode_batch(list(docs), add_special_tokens=False)
    return [torch.tensor(e.ids, dtype=torch.int64) for e in encoded]


def cut_windows(docs: Sequence[Tensor], size: int) -> Tensor:
    """Return all whole windows [n, size] that tile each document without overlap."""
    parts = [d[: len(d) // size * size].view(-1, size) for d in docs if len(d) >= size]
    if not parts:
        raise ValueError(f"no document has {size} tokens; give more text or a shorter window")
    return torch.cat(parts)


def noise_windows(count: int, size: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Return windows [count, size] of arbitrary tokens: even rows uniform, odd rows of one to four distinct tokens."""
    rows = torch.randint(0, vocab, (count, size), generator=generator)
    for i in range(1, count, 2):
        few = int(torch.randint(1, 5, (1,), generator=generator))
        rows[i] = rows[i, torch.randint(0, few, (size,), generator=generator)]
    return rows


def padded_windows(docs: Sequence[Tensor], size: int, *, end: int = EOT_ID) -> Tensor:
    """Return windows [n, size] that hold the first 1 .. size - 1 tokens of each document, padded on the left with `end`."""
    window = Reading(pad=end).window
    return torch.tensor([window(d[:n].tolist(), size) for d in docs for n in range(1, min(size, len(d)))])


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a batch is made of: windows in all, of them `padded` starts of documents and `noise` windows of arbitrary
    tokens.
    """

    batch: int
    padded: int = 0
    noise: int = 0


class Sampler:
    """Draws batches of windows from token documents; the whole state is one generator, so a run can resume exactly.

    Args: `end` is the id that ends a document and pads a short one.
    """

    def __init__(
        self, docs: Sequence[Tensor], *, length: int, vocab: int, mix: Mix, seed: int, end: int = EOT_ID
    ) -> None:
        self.docs = [d for d in docs if len(d) > length]
        if not self.docs:
            raise ValueError(f"no document has more than {length} tokens")
        mark = torch.tensor([end])
        self.stream = torch.cat([t for d in docs for t in (d, mark)])
        self.reading = Reading(pad=end)
        self.size, self.vocab, self.mix = length + 1, vocab, mix
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both int64 [B, T]; targets of padding and of noise are -100."""
        g, size = self.generator, self.size
        start_B = torch.randint(0, len(self.stream) - size, (self.mix.batch,), generator=g)
        rows = self.stream[start_B[:, None] + torch.arange(size)]
        targets = rows[:, 1:].clone()
        noise, padded = self.mix.noise, self.mix.padded
        if noise:
            rows[:noise] = noise_windows(noise, size, self.vocab, g)
            targets[:noise] = IGNORE
        for i in range(noise, noise + padded):
            doc = self.docs[int(torch.randint(0, len(self.docs), (1,), generator=g))]
            pad = int(torch.randint(1, size - 1, (1,), generator=g))
            rows[i] = torch.tensor(self.reading.window(doc[: size - pad].tolist(), size))
            targets[i] = rows[i, 1:]
            targets[i, : pad - 1] = IGNORE
        return rows[:, :-1].contiguous(), targets
