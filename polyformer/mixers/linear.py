"""Linear attention: y_i = q_i^T S_i with the state S_i = sum_{j<=i} k_j v_j^T.

*Transformers are RNNs*, arXiv 2006.16236. Two feature maps:

    identity   y_i = sum_j (q_i . k_j) v_j / sqrt(K L): a polynomial of degree 3 without division (methods.md 3.2)
    elu        phi(x) = elu(x) + 1 on q and k, rows divided by their sum, as in the paper: not polynomial

L is the window, a public constant: 1/sqrt(K L) keeps the last row at the size of one value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.mixers.base import Attention
from polyformer.recurrence import decayed_attention, decayed_flops

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

FEATURES = ("identity", "elu")


class Linear(Attention):
    """Causal linear attention with the feature map `config.feature_map`."""

    options = ("kv_heads", "rotary")  # there is no matrix of scores: no LaS, no norm over them, no other side

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.feature_map not in FEATURES:
            raise ValueError(f"unknown feature_map {config.feature_map!r}; known: {', '.join(FEATURES)}")
        self.feature_map = config.feature_map
        self.scale = (self.head_size * config.length) ** -0.5

    def features(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return phi(q), phi(k) and v, each [B, H, T, K]; the scale of the identity is on q."""
        q, k, v = self.qkv(x_BTD)
        if self.feature_map == "identity":
            return q * self.scale, k, v
        return F.elu(q) + 1, F.elu(k) + 1, v

    def sums(self, q_BHTK: Tensor, k_BHTK: Tensor) -> Tensor:
        """Return the divisor of each row, [B, H, T, 1]: sum_j phi(q_i) . phi(k_j), or 1."""
        if self.feature_map == "identity":
            return torch.ones_like(q_BHTK[..., :1])
        return (q_BHTK * k_BHTK.cumsum(2)).sum(-1, keepdim=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.features(x_BTD)
        y_BHTK = decayed_attention(q, k, v, torch.zeros_like(q[:1, :1, :, :1]))
        return self.project(y_BHTK / self.sums(q, k))

    def matrix(self, x_BTD: Tensor) -> Tensor:
        q, k, _ = self.features(x_BTD)
        return (q @ k.transpose(-1, -2)).tril() / self.sums(q, k)

    def reference(self, x_BTD: Tensor) -> Tensor:
        """The recurrence, one key and value after another."""
        q, k, v = self.features(x_BTD)
        state_BHKK = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :])
        keys_BHK, rows = torch.zeros_like(k[:, :, 0]), []
        for i in range(x_BTD.shape[1]):
            state_BHKK = state_BHKK + k[:, :, i, :, None] * v[:, :, i, None, :]
            keys_BHK = keys_BHK + k[:, :, i]
            y_BHK = (q[:, :, i, :, None] * state_BHKK).sum(2)
            if self.feature_map == "elu":
                y_BHK = y_BHK / (q[:, :, i] * keys_BHK).sum(-1, keepdim=True)
            rows.append(y_BHK)
        return self.project(torch.stack(rows, 2))

    def mixing(self, t: int) -> int:
        return self.heads * decayed_flops(t, self.head_size, self.head_size, entries=False)

    @property
    def degree(self) -> int:
        self._check_polynomial()
        return 3

    @property
    def depth(self) -> int:
        """q/k/v 1, shifting and masking keys 1, scores 1, values 1, output 1."""
        self._check_polynomial()
        return 5

    def _check_polynomial(self) -> None:
        if self.feature_map != "identity":
            raise ValueError("linear attention with feature_map 'elu' divides and is not polynomial; use 'identity'")
