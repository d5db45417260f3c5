"""The interface of a sequence mixer and the projections that attention mixers share.

Shapes: B batch, T positions, D width, H heads, K = D/H head size. x_BTD in, y_BTD out; A_BHTT[b, h, i, j] is the
weight that output position i of head h gives to value j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyformer.las import LocalSmooth
from polyformer.norms import BatchNorm

if TYPE_CHECKING:
    from polyformer.model import ModelConfig


class Mixer(nn.Module, ABC):
    """y = A(x) x, one input-dependent matrix a head."""

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return y_BTD, fast."""

    @abstractmethod
    def reference(self, x_BTD: Tensor) -> Tensor:
        """Return y_BTD by loops over rows, written from the definition: the oracle of `forward`."""

    @abstractmethod
    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return A_BHTT, the implicit attention matrix."""

    @property
    @abstractmethod
    def degree(self) -> int:
        """Polynomial degree of y in x; raises ValueError where the mixer is not polynomial."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Multiplicative levels from x to y, plaintext products included; raises ValueError where it is not
        polynomial.
        """


class Attention(Mixer):
    """Projections q, k, v, o of multi-head attention, causal or not; the parameters are the same for every score
    non-linearity. A non-linearity takes its scores from `normed_scores`, multiplies them by `visible`, and its weights
    by `las.smooth(v)`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.head_size, self.length = config.heads, d // config.heads, config.length
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.causal = config.causal
        ones_TT = torch.ones(config.length, config.length)
        self.register_buffer("mask_TT", ones_TT.tril() if config.causal else ones_TT, persistent=False)
        if config.score_norm and config.causal:
            raise ValueError("score_norm takes statistics over hidden keys too; set causal=False, or score_norm=False")
        self.score_norm = BatchNorm(config.heads, axis=1) if config.score_norm else None
        self.las = LocalSmooth(config.heads, decay=config.las_decay, width=config.las_width, causal=config.causal)

    mask_TT: Tensor

    def normed_scores(self, s_BHTT: Tensor) -> Tensor:
        """Return scores through the BatchNorm over heads, if there is one; masks and decay come after it."""
        return s_BHTT if self.score_norm is None else self.score_norm(s_BHTT)

    def visible(self, t: int) -> Tensor:
        """Return the factor of the scores, [T, T] or [H, T, T]: 0 for hidden keys, else 1 or the decay of LaS."""
        mask_TT = self.mask_TT[:t, :t]
        return mask_TT * self.las.decay(t, mask_TT) if any(self.las.alphas) else mask_TT

    def keys(self, i: int, t: int) -> range:
        """Return the keys that row i of t sees."""
        return range(i + 1 if self.causal else t)

    def split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, K]"""
        b, t, _ = x_BTD.shape
        return x_BTD.view(b, t, self.heads, self.head_size).transpose(1, 2)

    def merge(self, y_BHTK: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, T, D]"""
        b, _, t, _ = y_BHTK.shape
        return y_BHTK.transpose(1, 2).reshape(b, t, -1)

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each [B, H, T, K]."""
        return self.split(self.q(x_BTD)), self.split(self.k(x_BTD)), self.split(self.v(x_BTD))
