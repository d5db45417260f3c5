"""Griffin's recurrent block: a real-gated linear recurrence (RG-LRU) behind a short convolution, with a GELU gate.

*Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models*, arXiv 2402.19427,
section 2.4; its matrix after arXiv 2405.16504 (methods.md 5.1). With (v, g) the halves of a linear map of x:

    u = conv(v),  r, i = sigmoids of linear maps of u,  a_t = exp(-8 r_t softplus(lambda))
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t . u_t),   y = gelu(g) . h

    matrix   G alpha M   M the convolution, G = diag(gelu(g)), alpha_ij = (prod_{k=j+1..i} a_k) sqrt(1 - a_j^2) i_j
    offset   G alpha b   b the bias of the convolution
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.mixers.base import CausalConv, ConvolvedMixer
from polyformer.recurrence import decays, scan, wide

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

SHARPNESS = 8.0  # c of the paper
TINY = 1e-12  # below 1 - a^2: the slope of the root is infinite at 0


class Griffin(ConvolvedMixer):
    """RG-LRU over D channels with a convolution over `config.conv_width` positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.inner = nn.Linear(d, 2 * d)
        self.conv = CausalConv(d, config.conv_width)
        self.gates = nn.Linear(d, 2 * d)
        # a = exp(-8 softplus(lambda)) at r = 1 begins between 0.9 and 0.999.
        rates_D = -torch.log(torch.empty(d).uniform_(0.9, 0.999)) / SHARPNESS
        self.lambda_D = nn.Parameter(torch.log(torch.expm1(rates_D)))
        self.o = nn.Linear(d, d)

    def parts(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return v, the input of the convolution, and the gate gelu(g), each [B, T, D]."""
        v_BTD, g_BTD = self.inner(x_BTD).chunk(2, -1)
        return v_BTD, F.gelu(g_BTD)

    def recurrence(self, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return log a and the factor sqrt(1 - a^2) i of the input, each [B, T, D] and `wide`."""
        r_BTD, i_BTD = wide(self.gates(u_BTD)).sigmoid().chunk(2, -1)
        log_a_BTD = -SHARPNESS * r_BTD * F.softplus(self.lambda_D)
        return log_a_BTD, (-torch.expm1(2 * log_a_BTD)).clamp_min(TINY).sqrt() * i_BTD

    def forward(self, x_BTD: Tensor) -> Tensor:
        v_BTD, g_BTD = self.parts(x_BTD)
        u_BTD = self.conv(v_BTD)
        log_a_BTD, into_BTD = self.recurrence(u_BTD)
        return self.o(scan(log_a_BTD.exp(), into_BTD * u_BTD).to(g_BTD.dtype) * g_BTD)

    def reference(self, x_BTD: Tensor) -> Tensor:
        """Position by position: the convolution and the recurrence."""
        v_BTD, g_BTD = self.parts(x_BTD)
        u_BTD = self.conv.reference(v_BTD)
        h_BD, rows = torch.zeros_like(u_BTD[:, 0]), []
        for t in range(x_BTD.shape[1]):
            r_BD, i_BD = self.gates(u_BTD[:, t]).sigmoid().chunk(2, -1)
            a_BD = torch.exp(-SHARPNESS * r_BD * F.softplus(self.lambda_D))
            h_BD = a_BD * h_BD + torch.sqrt(1 - a_BD**2) * (i_BD * u_BTD[:, t])
            rows.append(g_BTD[:, t] * h_BD)
        return self.o(torch.stack(rows, 1))

    def gated(self, x_BTD: Tensor) -> Tensor:
        """Return G alpha, [B, D, T, T]: all but the convolution."""
        v_BTD, g_BTD = self.parts(x_BTD)
        log_a, into, g = (s.transpose(1, 2) for s in (*self.recurrence(self.conv(v_BTD)), g_BTD))
        return g[..., None] * decays(log_a[..., None])[..., 0] * into[:, :, None, :]

    def mixing(self, t: int) -> int:
        """The convolution, and the recurrence, 2 a channel."""
        return self.conv.flops + 2 * len(self.lambda_D)

    @property
    def degree(self) -> int:
        raise ValueError("griffin holds sigmoids and exponentials and is not polynomial; use 'polynomial_s6'")

    @property
    def depth(self) -> int:
        raise ValueError("griffin holds sigmoids and exponentials and is not polynomial; use 'polynomial_s6'")
