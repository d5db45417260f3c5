"""Mamba: the selective state-space layer S6 behind a short convolution, with a gate.

*Mamba: Linear-Time Sequence Modeling with Selective State Spaces*, arXiv 2312.00752, section 3; its matrix after
*The Hidden Attention of Mamba Models*, arXiv 2403.01590, and arXiv 2405.16504 (methods.md 4.1 and 5.1). With (v, z) the
two halves of a linear map of x, E channels and N states a channel:

    u = silu(conv(v)),  (dt, B, C) linear in u,  Delta = softplus(W dt + b),  A = -exp(A_log)
    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t,   y = silu(z) . (C_t h_t + D u_t)

    matrix   G (alpha + diag(D)) Z M   M the convolution, Z = diag(sigmoid(conv(v))), G = diag(silu(z)),
             alpha_ij = sum_n C_i[n] exp(A[n] sum_{k=j+1..i} Delta_k) Delta_j B_j[n]
    offset   G (alpha + diag(D)) Z b   b the bias of the convolution

On CUDA the scan is the kernel of the package `mamba_ssm` where that is installed, else a tree of torch operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.mixers.base import CausalConv, ConvolvedMixer
from polyformer.recurrence import scan, wide

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

DELTA_RANGE = (1e-3, 1e-1)  # of softplus(bias) at the start, spread evenly in the logarithm


class Mamba(ConvolvedMixer):
    """Mamba with E = expand * width channels, N = `config.state` states and a convolution over `config.conv_width`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, n = config.expand * config.width, config.state
        self.channels, self.state, self.rank = e, n, math.ceil(config.width / 16)
        self.inner = nn.Linear(config.width, 2 * e, bias=False)
        self.conv = CausalConv(e, config.conv_width)
        self.select = nn.Linear(e, self.rank + 2 * n, bias=False)
        self.delta = nn.Linear(self.rank, e, bias=False)
        self.delta_bias_E = nn.Parameter(delta_bias(e))
        self.A_log_EN = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1))
        self.D_E = nn.Parameter(torch.ones(e))
        self.o = nn.Linear(e, config.width, bias=False)

    def parameters_of(self, u_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Delta [B, T, E], B and C [B, T, N], and A [E, N] < 0; Delta and A are `wide`."""
        dt, b_BTN, c_BTN = self.select(u_BTE).split([self.rank, self.state, self.state], -1)
        return F.softplus(wide(self.delta(dt)) + self.delta_bias_E), b_BTN, c_BTN, -wide(self.A_log_EN).exp()

    def forward(self, x_BTD: Tensor) -> Tensor:
        v_BTE, z_BTE = self.inner(x_BTD).chunk(2, -1)
        u_BTE = F.silu(self.conv(v_BTE))
        kernel = official_kernel() if u_BTE.is_cuda else None
        if kernel is not None:
            return self.o(self.by_kernel(kernel, u_BTE, z_BTE))
        delta, b, c, a = self.parameters_of(u_BTE)
        h_BTEN = scan((delta[..., None] * a).exp(), (delta * u_BTE)[..., None] * b[:, :, None])
        y_BTE = (h_BTEN @ wide(c)[..., None])[..., 0].to(u_BTE.dtype) + self.D_E * u_BTE
        return self.o(y_BTE * F.silu(z_BTE))

    def by_kernel(self, kernel: Callable[..., Tensor], u_BTE: Tensor, z_BTE: Tensor) -> Tensor:
        """Return the gated y_BTE by `mamba_ssm`'s selective_scan_fn, whose tensors are [B, channels, T]."""
        dt, b, c = self.select(u_BTE).split([self.rank, self.state, self.state], -1)
        u, dt, b, c, z = (s.transpose(1, 2).contiguous() for s in (u_BTE, self.delta(dt), b, c, z_BTE))
        bias = self.delta_bias_E.float()
        y = kernel(
            u, dt, -self.A_log_EN.float().exp(), b, c, self.D_E.float(), z=z, delta_bias=bias, delta_softplus=True
        )
        return y.transpose(1, 2)

    def reference(self, x_BTD: Tensor) -> Tensor:
        """Position by position: the convolution and the recurrence."""
        v_BTE, z_BTE = self.inner(x_BTD).chunk(2, -1)
        u_BTE = F.silu(self.conv.reference(v_BTE))
        delta, b, c, a = self.parameters_of(u_BTE)
        h_BEN, rows = torch.zeros_like(delta[:, 0, :, None] * a), []
        for t in range(x_BTD.shape[1]):
            step_BE1 = delta[:, t, :, None]
            h_BEN = (step_BE1 * a).exp() * h_BEN + step_BE1 * b[:, t, None, :] * u_BTE[:, t, :, None]
            rows.append(((h_BEN * c[:, t, None, :]).sum(-1) + self.D_E * u_BTE[:, t]) * F.silu(z_BTE[:, t]))
        return self.o(torch.stack(rows, 1))

    def hidden(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha + diag(D) [B, E, T, T], the scan's matrix with the skip (methods.md 4.1), and conv(v) [B, T, E],
        at which the gates are taken. One state at a time: N matrices a channel would be held otherwise.
        """
        m_BTE = self.conv(self.inner(x_BTD).chunk(2, -1)[0])
        delta, b, c, a = self.parameters_of(F.silu(m_BTE))
        sums_BET = delta.cumsum(1).transpose(1, 2)
        spans_BETT = (sums_BET[..., :, None] - sums_BET[..., None, :]).tril()  # of Delta over k = j + 1..i
        alpha_BETT = torch.zeros_like(spans_BETT)
        for n in range(self.state):
            alpha_BETT = alpha_BETT + (spans_BETT * a[:, n, None, None]).exp() * (
                c[:, None, :, None, n] * b[:, None, None, :, n]
            )
        alpha_BETT = (alpha_BETT * delta.transpose(1, 2)[:, :, None, :]).tril()
        return alpha_BETT + torch.diag_embed(self.D_E[:, None].expand(-1, x_BTD.shape[1])), m_BTE

    def gated(self, x_BTD: Tensor) -> Tensor:
        """Return G (alpha + diag(D)) Z, [B, E, T, T]: all but the convolution."""
        alpha_BETT, m_BTE = self.hidden(x_BTD)
        g_BTE = F.silu(self.parts(x_BTD)[1])
        return g_BTE.transpose(1, 2)[..., None] * alpha_BETT * m_BTE.sigmoid().transpose(1, 2)[:, :, None, :]

    def parts(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return self.inner(x_BTD).chunk(2, -1)

    def mixing(self, t: int) -> int:
        """The convolution, then h = a h + b and C h, 2 each an entry of the state."""
        return self.conv.flops + 4 * self.channels * self.state

    @property
    def degree(self) -> int:
        raise ValueError("mamba holds exponentials and sigmoids and is not polynomial; use 'polynomial_s6'")

    @property
    def depth(self) -> int:
        raise ValueError("mamba holds exponentials and sigmoids and is not polynomial; use 'polynomial_s6'")


def delta_bias(channels: int) -> Tensor:
    """Draw b with softplus(b) spread evenly in the logarithm over `DELTA_RANGE`."""
    lo, hi = (math.log(d) for d in DELTA_RANGE)
    delta = torch.exp(torch.rand(channels) * (hi - lo) + lo)
    return delta + torch.log(-torch.expm1(-delta))


@cache
def official_kernel() -> Callable[..., Tensor] | None:
    """Return `selective_scan_fn` of the package mamba_ssm, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn
