"""Quality of a model on data that it has not seen: perplexity, bits per byte, accuracy of recall.

Every figure is of the model as it stands, in evaluation mode and without gradients. A figure that is not finite is
returned as it is: a diverged model has a loss of nan or inf, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from polyformer.model import Transformer
from training.data import IGNORE
from training.loop import token_loss

LARGEST_EXPONENT = 700.0  # exp of more than this is inf in a double


@torch.no_grad()
def heldout_loss(model: nn.Module, windows_NS: Tensor, *, batch: int = 256) -> float:
    """Return the mean cross entropy in nats a token over windows [n, T + 1]."""
    total = sum(float(token_loss(model(w[:, :-1]), w[:, 1:])) * len(w) for w in windows_NS.split(batch))
    return total / len(windows_NS)


@dataclass(frozen=True, kw_only=True)
class Language:
    """Held-out loss in nats a token, its exponential, and bits a byte of text: only the last compares tokenizers."""

    loss: float
    perplexity: float
    bits_per_byte: float


def language(model: Transformer, windows_NS: Tensor, *, bytes_per_token: float, batch: int = 64) -> Language:
    """Measure next-token prediction on windows [n, T + 1].

    Args: `bytes_per_token` of the same text, see `bytes_per_token`.
    """
    was_training = model.training
    model.eval()
    loss = heldout_loss(model, windows_NS, batch=batch)
    model.train(was_training)
    return Language(
        loss=loss,
        perplexity=math.exp(loss) if loss < LARGEST_EXPONENT else math.inf if loss == loss else loss,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
    )


def bytes_per_token(tokenizer: Tokenizer, docs: Sequence[str]) -> float:
    """Return the mean UTF-8 bytes of a token over documents."""
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(list(docs), add_special_tokens=False))
    if not tokens:
        raise ValueError(f"{len(docs)} documents hold no token; give the held-out text")
    return sum(len(d.encode()) for d in docs) / tokens


def unigram_loss(train_docs: Sequence[Tensor], windows_NS: Tensor, *, vocab: int) -> float:
    """Return nats a token of the frequencies of the training text (add-one) on held-out targets: what a model reaches
    that knows nothing but the tokens themselves. A loss above it means that a model has not learnt to read.
    """
    counts_V = torch.bincount(torch.cat(list(train_docs)), minlength=vocab).double() + 1
    return float(-(counts_V / counts_V.sum()).log()[windows_NS[:, 1:]].mean())


@torch.no_grad()
def answers(model: nn.Module, tokens_NT: Tensor, targets_NT: Tensor, *, batch: int = 256) -> Tensor:
    """Return [n, q] bool, whether the likeliest token is the target at each of the q places that are asked, in
    order: their mean over rows is accuracy against shots for `few_shot` (training/recall.py).

    Raises:
        ValueError: the rows ask at different places, so there is no curve over them.
    """
    asked_NT = targets_NT != IGNORE
    if not bool((asked_NT == asked_NT[:1]).all()) or not bool(asked_NT[0].any()):
        raise ValueError("rows ask at different places, or at none; give targets whose -100 stand in the same columns")
    was_training = model.training
    model.eval()
    columns = asked_NT[0].nonzero()[:, 0]
    parts = [model(rows)[:, columns].argmax(-1) for rows in tokens_NT.split(batch)]
    model.train(was_training)
    return torch.cat(parts).cpu() == targets_NT[:, columns].cpu()


def accuracy(model: nn.Module, tokens_NT: Tensor, targets_NT: Tensor, *, batch: int = 256) -> float:
    """Return the share of right answers over all places that are asked."""
    return float(answers(model, tokens_NT, targets_NT, batch=batch).double().mean())
