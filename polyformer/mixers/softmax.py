"""Softmax attention: the twin that a polynomial model is compared with (and may start from). Not polynomial,
never compiled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.mixers.base import Attention


class Softmax(Attention):
    """A = softmax(q k^T / sqrt(K)) over the keys j <= i, or over all of them; with LaS, of decayed scores, then pooled."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        v = self.las.smooth(v)
        if any(self.las.alphas) or self.score_norm is not None:  # the fused kernel cannot touch the scores themselves
            return self.o(self.merge(self.weights(q, k) @ v))
        return self.o(self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))

    def weights(self, q_BHTK: Tensor, k_BHTK: Tensor) -> Tensor:
        """Return the rows of softmax [B, H, T, T], before pooling."""
        t = q_BHTK.shape[2]
        s_BHTT = self.normed_scores(q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(self.head_size)) * self.visible(t)
        return torch.softmax(s_BHTT.masked_fill(self.mask_TT[:t, :t] == 0, -math.inf), -1)

    def reference(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        rows = []
        t = x_BTD.shape[1]
        v = self.las.smooth(v)
        for i in range(t):
            s_BHj = torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in self.keys(i, t)], -1) / math.sqrt(
                self.head_size
            )
            if self.score_norm is not None:
                scale_H, shift_H = self.score_norm.affine()
                s_BHj = s_BHj * scale_H[:, None] + shift_H[:, None]
            s_BHj = s_BHj * self.visible(t)[..., i, : s_BHj.shape[-1]]
            e_BHj = torch.exp(s_BHj)
            w_BHj = e_BHj / e_BHj.sum(-1, keepdim=True)
            rows.append(torch.stack([w_BHj[:, :, j, None] * v[:, :, j] for j in self.keys(i, t)]).sum(0))
        return self.o(self.merge(torch.stack(rows, 2)))

    def matrix(self, x_BTD: Tensor) -> Tensor:
        q, k, _ = self.qkv(x_BTD)
        return self.las.pool(self.weights(q, k))

    @property
    def degree(self) -> int:
        raise ValueError("softmax is not polynomial; use the mixer 'power_softmax'")

    @property
    def depth(self) -> int:
        raise ValueError("softmax is not polynomial; use the mixer 'power_softmax'")
