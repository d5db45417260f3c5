"""The interface of a sequence mixer and the projections that attention mixers share.

Shapes: B batch, T positions, D width, H heads, G key heads (H a multiple of G), K = D/H head size, R rotary channels.
x_BTD in, y_BTD out; A_BHTT[b, h, i, j] is the weight that output position i of head h gives to value j.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
    """Projections q, k, v, o of multi-head attention; the parameters are the same for every score non-linearity.

    Grouped queries (GQA, arXiv 2305.13245): k and v have G heads, head h reads key head h // (H/G). Rotary positions
    (RoFormer, arXiv 2104.09864) turn the leading R channels of q and k, channel c with c + R/2, by the angle
    t base^(-2c/R). Without `causal` every position sees every key. `visible_BT` (bool), where a method takes it, hides
    keys of padding on top of that.
    """

    mask_TT: Tensor
    cos_TR: Tensor
    sin_TR: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.head_size, self.length = config.heads, d // config.heads, config.length
        self.kv_heads, self.causal, self.rotary = config.kv_heads or config.heads, config.causal, config.rotary
        outs = (d, self.kv_heads * self.head_size, self.kv_heads * self.head_size, d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, out, bias=config.biases) for out in outs)
        ones = torch.ones(config.length, config.length)
        self.register_buffer("mask_TT", ones.tril() if config.causal else ones, persistent=False)
        if config.rotary:
            c = torch.arange(0, config.rotary, 2, dtype=torch.float64)
            angle_TR = torch.arange(config.length)[:, None] * config.rotary_base ** (-c / config.rotary).repeat(2)
            self.register_buffer("cos_TR", angle_TR.cos().float(), persistent=False)
            self.register_buffer("sin_TR", angle_TR.sin().float(), persistent=False)

    def split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, K], H as many heads as the width holds."""
        b, t, _ = x_BTD.shape
        return x_BTD.view(b, t, -1, self.head_size).transpose(1, 2)

    def merge(self, y_BHTK: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, T, D]"""
        b, _, t, _ = y_BHTK.shape
        return y_BHTK.transpose(1, 2).reshape(b, t, -1)

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each [B, H, T, K]: rotated, key heads repeated for their group."""
        q, k, v = self.rotate(self.split(self.q(x_BTD))), self.rotate(self.split(self.k(x_BTD))), self.values(x_BTD)
        return q, self._grouped(k), v

    def values(self, x_BTD: Tensor) -> Tensor:
        """Return v [B, H, T, K], what `matrix` multiplies."""
        return self._grouped(self.split(self.v(x_BTD)))

    def rotate(self, x_BHTK: Tensor) -> Tensor:
        """Turn the leading R channels by the angles of their positions."""
        if not self.rotary:
            return x_BHTK
        t = x_BHTK.shape[2]
        x_BHTR, rest = x_BHTK[..., : self.rotary], x_BHTK[..., self.rotary :]
        low, high = x_BHTR.chunk(2, -1)
        turned_BHTR = torch.cat((-high, low), -1)
        return torch.cat((x_BHTR * self.cos_TR[:t] + turned_BHTR * self.sin_TR[:t], rest), -1)

    def mask(self, t: int, visible_BT: Tensor | None = None) -> Tensor:
        """Return the mask of ones and zeros: [T, T], or [B, 1, T, T] where keys are hidden."""
        mask_TT = self.mask_TT[:t, :t]
        return mask_TT if visible_BT is None else mask_TT * visible_BT[:, None, None, :].to(mask_TT.dtype)

    def row_scores(self, q_BHTK: Tensor, k_BHTK: Tensor, i: int) -> Tensor:
        """Return s [B, H, J] of row i against the keys that the mask leaves, one by one: a part of each `reference`."""
        keys = range(i + 1 if self.causal else q_BHTK.shape[2])
        return torch.stack([(q_BHTK[:, :, i] * k_BHTK[:, :, j]).sum(-1) for j in keys], -1) / math.sqrt(self.head_size)

    @property
    def rotary_depth(self) -> int:
        """Levels of the rotary positions: products of q and k with plaintext cosines and sines."""
        return int(self.rotary > 0)

    def _grouped(self, x_BGTK: Tensor) -> Tensor:
        return x_BGTK if self.kv_heads == self.heads else x_BGTK.repeat_interleave(self.heads // self.kv_heads, 1)
