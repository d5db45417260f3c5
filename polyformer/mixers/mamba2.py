"""Mamba-2: one decay a head, so that the scan is attention with a decaying mask, computed by matrix products in chunks.

*Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality*, arXiv
2405.21060, sections 6 and 7. E = expand * width channels in expand * heads heads of P = width/heads channels; B and C
(the keys and queries, N entries) are shared by the heads. With (v, z, w, dt) linear in x:

    (u, B, C) = silu(conv(v, w)),  Delta = softplus(dt + b),  a_t = exp(-Delta_t exp(A_log))
    S_t = a_t S_{t-1} + Delta_t B_t u_t^T,   y = norm(silu(z) . (C_t S_t + D u_t)),  norm = RMS over all E channels

    matrix   R G (alpha + D) Z M   R = diag of the norm's row factors with its gains, the rest as in Mamba
    offset   R G (alpha + D) Z b   b the convolution's bias on the values
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.mixers.base import CausalConv, ConvolvedMixer
from polyformer.mixers.mamba import delta_bias
from polyformer.recurrence import decayed_attention, decayed_flops, decayed_scores, wide

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

EPS = 1e-5  # below the mean square of the norm


class Mamba2(ConvolvedMixer):
    """Mamba-2 with N = `config.state` and a convolution over `config.conv_width` positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, n = config.expand * config.width, config.state
        self.channels, self.state, self.heads = e, n, config.expand * config.heads
        self.inner = nn.Linear(config.width, 2 * e + 2 * n + self.heads, bias=False)
        self.conv = CausalConv(e, config.conv_width)
        self.conv_select = CausalConv(2 * n, config.conv_width)
        self.delta_bias_H = nn.Parameter(delta_bias(self.heads))
        self.A_log_H = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D_H = nn.Parameter(torch.ones(self.heads))
        self.gain_E = nn.Parameter(torch.ones(e))
        self.o = nn.Linear(e, config.width, bias=False)

    def parts(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return v and z [B, T, E], what B and C are made of [B, T, 2N], and Delta [B, T, H], `wide`."""
        v, z, w, dt = self.inner(x_BTD).split([self.channels, self.channels, 2 * self.state, self.heads], -1)
        return v, z, w, F.softplus(wide(dt) + self.delta_bias_H)

    def heads_of(self, u_BTE: Tensor) -> Tensor:
        """[B, T, E] -> [B, H, T, P]"""
        return u_BTE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def scores(self, w_BTM: Tensor, delta_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return C and Delta B, each [B, H, T, N], and log a [B, H, T, 1]."""
        b_BTN, c_BTN = F.silu(self.conv_select(w_BTM)).chunk(2, -1)
        delta_BHT1 = delta_BTH.transpose(1, 2)[..., None]
        log_a_BHT1 = -delta_BHT1 * wide(self.A_log_H).exp()[:, None, None]
        return c_BTN[:, None].expand(-1, self.heads, -1, -1), delta_BHT1.to(b_BTN.dtype) * b_BTN[:, None], log_a_BHT1

    def normed(self, y_BTE: Tensor) -> Tensor:
        """Return the root-mean-square norm over the channels."""
        return y_BTE * self.row_factor(y_BTE) * self.gain_E

    def row_factor(self, y_BTE: Tensor) -> Tensor:
        return torch.rsqrt((y_BTE * y_BTE).mean(-1, keepdim=True) + EPS)

    def forward(self, x_BTD: Tensor) -> Tensor:
        v, z, w, delta = self.parts(x_BTD)
        u_BHTP = self.heads_of(F.silu(self.conv(v)))
        c, b, log_a = self.scores(w, delta)
        y_BHTP = decayed_attention(c, b, u_BHTP, log_a) + self.D_H[:, None, None] * u_BHTP
        return self.o(self.normed(y_BHTP.transpose(1, 2).flatten(2) * F.silu(z)))

    def reference(self, x_BTD: Tensor) -> Tensor:
        """Position by position: the convolutions and the recurrence of the states [B, H, N, P]."""
        v, z, w, delta = self.parts(x_BTD)
        u_BHTP = self.heads_of(F.silu(self.conv.reference(v)))
        b_BTN, c_BTN = F.silu(self.conv_select.reference(w)).chunk(2, -1)
        state_BHNP, rows = torch.zeros_like(b_BTN[:, 0, None, :, None] * u_BHTP[:, :, 0, None, :]), []
        for t in range(x_BTD.shape[1]):
            step_BH11 = delta[:, t, :, None, None]
            a_BH11 = torch.exp(-step_BH11 * self.A_log_H.exp()[:, None, None])
            state_BHNP = a_BH11 * state_BHNP + step_BH11 * b_BTN[:, t, None, :, None] * u_BHTP[:, :, t, None, :]
            y_BHP = (c_BTN[:, t, None, :, None] * state_BHNP).sum(2) + self.D_H[:, None] * u_BHTP[:, :, t]
            rows.append(self.normed(y_BHP.flatten(1) * F.silu(z[:, t])))
        return self.o(torch.stack(rows, 1))

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """Return alpha + diag(D), [B, H, T, T]: one matrix for all channels of a head."""
        _, _, w, delta = self.parts(x_BTD)
        skip_HTT = torch.diag_embed(self.D_H[:, None].expand(-1, x_BTD.shape[1]))
        return decayed_scores(*self.scores(w, delta)) + skip_HTT

    def gated(self, x_BTD: Tensor) -> Tensor:
        """Return R G (alpha + diag(D)) Z, [B, E, T, T]: all but the convolution."""
        v, z, _, _ = self.parts(x_BTD)
        m_BTE, alpha_BHTT = self.conv(v), self.hidden(x_BTD)
        y_BTE = (alpha_BHTT @ self.heads_of(F.silu(m_BTE))).transpose(1, 2).flatten(2) * F.silu(z)
        rows_BTE = self.row_factor(y_BTE) * self.gain_E * F.silu(z)
        alpha_BETT = alpha_BHTT.repeat_interleave(self.channels // self.heads, 1)
        return rows_BTE.transpose(1, 2)[..., None] * alpha_BETT * m_BTE.sigmoid().transpose(1, 2)[:, :, None, :]

    def mixing(self, t: int) -> int:
        attention = self.heads * decayed_flops(t, self.state, self.channels // self.heads, entries=False)
        return attention + self.conv.flops + self.conv_select.flops

    @property
    def degree(self) -> int:
        raise ValueError("mamba2 holds exponentials, sigmoids and a norm and is not polynomial; use 'polynomial_s6'")

    @property
    def depth(self) -> int:
        raise ValueError("mamba2 holds exponentials, sigmoids and a norm and is not polynomial; use 'polynomial_s6'")
