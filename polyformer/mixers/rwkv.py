"""RWKV-4: attention without queries, the weights of the past decaying at a rate of the channel, with a sigmoid gate.

*RWKV: Reinventing RNNs for the Transformer Era*, arXiv 2305.13048, section 3 (time mixing; the mixer of channels is the
block's MLP). With x~ = mu x_t + (1 - mu) x_{t-1}, one mu for each of r, k, v (linear in their x~):

    y_i = sigmoid(r_i) . wkv_i,   wkv_i = sum_j alpha_ij v_j,   rows of alpha sum to 1 (methods.md 5.1)
    alpha_ij proportional to exp(-(i - j - 1) w + k_j) for j < i, to exp(u + k_i) for j = i,   w = exp(rate) > 0

Every sum is scaled by exp(-m_t), m_t the largest exponent so far: a public or detached m is exact, because numerator
and denominator have it in common.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyformer.mixers.base import ChannelMixer
from polyformer.recurrence import scan, shift, wide

if TYPE_CHECKING:
    from polyformer.model import ModelConfig


class Rwkv(ChannelMixer):
    """The time mixing of RWKV-4; every channel is a head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.r, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        share_D = torch.arange(d) / d
        self.mu_3D = nn.Parameter(torch.stack((share_D**0.5, share_D, share_D)))  # of r, k, v
        self.rate_D = nn.Parameter(-5 + 8 * (torch.arange(d) / max(d - 1, 1)) ** 0.7)  # w from 0.007 to 20
        self.bonus_D = nn.Parameter(torch.full((d,), math.log(0.3)))  # u

    def rkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return r, k (`wide`) and v, each [B, T, D], from the mix of a position and the one before."""
        before_BTD = shift(x_BTD)
        r, k, v = (mu_D * x_BTD + (1 - mu_D) * before_BTD for mu_D in self.mu_3D)
        return self.r(r), wide(self.k(k)), self.v(v)

    def forward(self, x_BTD: Tensor) -> Tensor:
        r, k, v = self.rkv(x_BTD)
        w_D, t = wide(self.rate_D).exp(), x_BTD.shape[1]
        with torch.no_grad():
            drift_TD = torch.arange(t, dtype=k.dtype, device=k.device)[:, None] * w_D
            m = (k + drift_TD).cummax(1).values - drift_TD  # m_t = max(m_{t-1} - w, k_t)
            m_before = torch.cat((m[:, :1], m[:, :-1]), 1)
            top = torch.maximum(m_before, self.bonus_D + k)
        a, fresh = (m_before - w_D - m).exp(), (k - m).exp()
        # Both sums are one scan: numerator and denominator side by side, seen from the position after.
        sums = shift(scan(torch.cat((a, a), -1), torch.cat((fresh * v, fresh), -1)))
        past, now = (m_before - top).exp(), (self.bonus_D + k - top).exp()
        numerator, denominator = sums.chunk(2, -1)
        wkv_BTD = (past * numerator + now * v) / (past * denominator + now)
        return self.o(r.sigmoid() * wkv_BTD.to(r.dtype))

    def reference(self, x_BTD: Tensor) -> Tensor:
        """Row by row, from the definition, as a softmax of the exponents."""
        r, k, v = self.rkv(x_BTD)
        w_D, rows = self.rate_D.exp(), []
        for i in range(x_BTD.shape[1]):
            exponents = [k[:, j] - (i - j - 1) * w_D for j in range(i)] + [self.bonus_D + k[:, i]]
            weights = torch.stack(exponents, 1).softmax(1)
            rows.append(r[:, i].sigmoid() * sum(weights[:, j] * v[:, j] for j in range(i + 1)))
        return self.o(torch.stack(rows, 1))

    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return diag(sigmoid(r)) alpha, [B, D, T, T]."""
        r, k, _ = self.rkv(x_BTD)
        t = x_BTD.shape[1]
        steps_T = torch.arange(t, dtype=k.dtype, device=k.device)
        k_BD1T = k.transpose(1, 2)[:, :, None]
        past_DTT = -(steps_T[:, None] - steps_T - 1) * self.rate_D.exp()[:, None, None]
        own_TT = torch.eye(t, dtype=torch.bool, device=k.device)
        exponents = k_BD1T + torch.where(own_TT, self.bonus_D[:, None, None], past_DTT)
        hidden_TT = torch.ones_like(own_TT).triu(1)
        alpha_BDTT = exponents.masked_fill(hidden_TT, -math.inf).softmax(-1)
        return r.sigmoid().transpose(1, 2)[..., None] * alpha_BDTT

    def value(self, x_BTD: Tensor) -> Tensor:
        """v of the mix of two positions: the mix is part of the value, as in methods.md 5.1."""
        return self.split(self.rkv(x_BTD)[2])

    def mixing(self, t: int) -> int:
        """Two sums a channel, numerator and denominator, each a recurrence of 2."""
        return 4 * len(self.rate_D)

    @property
    def degree(self) -> int:
        raise ValueError("rwkv divides by a sum of exponentials and is not polynomial; use 'power_softmax' or 'linear'")

    @property
    def depth(self) -> int:
        raise ValueError("rwkv divides by a sum of exponentials and is not polynomial; use 'power_softmax' or 'linear'")
