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
    """A = softmax(q k^T / sqrt(K)) over the keys that the mask leaves, j <= i if causal; with LaS, of decayed scores,
    then pooled.
    """

    hides_keys = True

    def forward(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        v = self.las.smooth(v)
        if any(self.las.alphas) or self.score_norm is not None:  # the fused kernel cannot touch the scores themselves
            y_BHTK = self.weights(q, k, visible_BT).to(v.dtype) @ v  # masks and decays may be wider than bfloat16
        elif visible_BT is None:
            y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            mask = self.mask(x_BTD.shape[1], visible_BT) > 0
            y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(self.merge(y_BHTK))

    def weights(self, q_BHTK: Tensor, k_BHTK: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        """Return the rows of softmax [B, H, T, T], before pooling."""
        t = q_BHTK.shape[2]
        s_BHTT = self.normed_scores(q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(self.head_size))
        s_BHTT = s_BHTT * self.factor(t, visible_BT)
        return torch.softmax(s_BHTT.masked_fill(self.mask(t, visible_BT) == 0, -math.inf), -1)

    def reference(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        rows = []
        v = self.las.smooth(v)
        for i in range(x_BTD.shape[1]):
            e_BHj = torch.exp(self.row_scores(q, k, i))
            j = e_BHj.shape[-1]
            if visible_BT is not None:
                e_BHj = e_BHj * visible_BT[:, None, :j]
            w_BHj = e_BHj / e_BHj.sum(-1, keepdim=True)
            rows.append(torch.stack([w_BHj[:, :, n, None] * v[:, :, n] for n in range(j)]).sum(0))
        return self.o(self.merge(torch.stack(rows, 2)))

    def matrix(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, _ = self.qkv(x_BTD)
        return self.las.pool(self.weights(q, k, visible_BT))

    @property
    def degree(self) -> int:
        raise ValueError("softmax is not polynomial; use the mixer 'power_softmax'")

    @property
    def depth(self) -> int:
        raise ValueError("softmax is not polynomial; use the mixer 'power_softmax'")
