"""Causal softmax attention: the twin that a polynomial model is compared with (and may start from). Not polynomial,
never compiled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.mixers.base import Attention


class Softmax(Attention):
    """A = softmax(q k^T / sqrt(K)) over the keys j <= i."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.o(self.merge(F.scaled_dot_product_attention(*self.qkv(x_BTD), is_causal=True)))

    def reference(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        rows = []
        for i in range(x_BTD.shape[1]):
            s_BHj = torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in range(i + 1)], -1) / math.sqrt(
                self.head_size
            )
            e_BHj = torch.exp(s_BHj)
            w_BHj = e_BHj / e_BHj.sum(-1, keepdim=True)
            rows.append(torch.stack([w_BHj[:, :, j, None] * v[:, :, j] for j in range(i + 1)]).sum(0))
        return self.o(self.merge(torch.stack(rows, 2)))

    def matrix(self, x_BTD: Tensor) -> Tensor:
        q, k, _ = self.qkv(x_BTD)
        t = x_BTD.shape[1]
        s_BHTT = q @ k.transpose(-1, -2) / math.sqrt(self.head_size)
        return torch.softmax(s_BHTT.masked_fill(self.mask_TT[:t, :t] == 0, -math.inf), -1)

    @property
    def degree(self) -> int:
        raise ValueError("softmax is not polynomial; use the mixer 'power_softmax'")

    @property
    def depth(self) -> int:
        raise ValueError("softmax is not polynomial; use the mixer 'power_softmax'")
