"""Polynomial S6: a selective scan without exp and softplus, every part a polynomial of x.

The simplified S6 of *On the Expressivity of Selective State-Space Layers: A Multivariate Polynomial Approach*, arXiv
2502.02209, with a decay that is a polynomial of degree g <= 2 (methods.md 3.2 and 3.6). E channels, N states each; u, s,
B and C linear in x:

    a_t[e, n] = c0[e, n] + c1[e, n] s_t[e] + c2[e, n] s_t[e]^2
    h_t = a_t h_{t-1} + B_t u_t,   y_t = C_t h_t / sqrt(N) + D u_t

The last output has degree g (L - 1) + 3, L + 2 for g = 1. Nothing bounds a_t by itself: the `Tap` on it lets the range
loss keep it inside [-1, 1]. In training mode it is clamped there, like the input of a polynomial layer; in evaluation
mode, as under encryption, it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyformer.approx import depth_of_degree
from polyformer.layers import Tap
from polyformer.mixers.base import ChannelMixer
from polyformer.recurrence import scan, wide

if TYPE_CHECKING:
    from polyformer.model import ModelConfig


class PolynomialS6(ChannelMixer):
    """Polynomial S6 with E = expand * width, N = `config.state` and a decay of degree `config.gate_degree`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.gate_degree not in (1, 2):
            raise ValueError(f"gate_degree is {config.gate_degree}; the decay is a polynomial of degree 1 or 2")
        e, n = config.expand * config.width, config.state
        self.state, self.length, self.gate_degree = n, config.length, config.gate_degree
        self.u, self.s = nn.Linear(config.width, e), nn.Linear(config.width, e)
        self.select = nn.Linear(config.width, 2 * n)
        self.tap = Tap("activation")
        # Time constants of 1 to L positions, and a selection small enough to begin inside [-1, 1].
        spans_N = torch.logspace(0, 1, n, base=float(max(config.length, 2)))
        self.c0_EN = nn.Parameter(torch.exp(-1 / spans_N).repeat(e, 1) * 0.95)
        self.higher_GEN = nn.Parameter(torch.randn(config.gate_degree, e, n) * 0.01)
        self.D_E = nn.Parameter(torch.ones(e))
        self.o = nn.Linear(e, config.width)

    def decay(self, x_BTD: Tensor) -> Tensor:
        """Return a, [B, T, E, N], `wide`."""
        s_BTE1 = wide(self.s(x_BTD))[..., None]
        a = self.c0_EN + self.higher_GEN[0] * s_BTE1
        if self.gate_degree == 2:
            a = a + self.higher_GEN[1] * (s_BTE1 * s_BTE1)
        a = self.tap(a)
        return a.clamp(-1, 1) if self.training else a

    def forward(self, x_BTD: Tensor) -> Tensor:
        u_BTE = self.u(x_BTD)
        b_BTN, c_BTN = self.select(x_BTD).chunk(2, -1)
        h_BTEN = scan(self.decay(x_BTD), u_BTE[..., None] * b_BTN[:, :, None])
        y_BTE = (h_BTEN @ wide(c_BTN)[..., None])[..., 0].to(u_BTE.dtype)
        return self.o(y_BTE * self.state**-0.5 + self.D_E * u_BTE)

    def reference(self, x_BTD: Tensor) -> Tensor:
        """The recurrence, one position after another."""
        u_BTE, a_BTEN = self.u(x_BTD), self.decay(x_BTD)
        b_BTN, c_BTN = self.select(x_BTD).chunk(2, -1)
        h_BEN, rows = torch.zeros_like(a_BTEN[:, 0]), []
        for t in range(x_BTD.shape[1]):
            h_BEN = a_BTEN[:, t] * h_BEN + u_BTE[:, t, :, None] * b_BTN[:, t, None, :]
            rows.append((h_BEN * c_BTN[:, t, None, :]).sum(-1) / self.state**0.5 + self.D_E * u_BTE[:, t])
        return self.o(torch.stack(rows, 1))

    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return alpha + diag(D), [B, E, T, T]; the decays have signs, so their products are taken one by one."""
        a_BTEN = self.decay(x_BTD)
        b_BTN, c_BTN = self.select(x_BTD).chunk(2, -1)
        t = x_BTD.shape[1]
        row_BETN, rows = torch.zeros_like(a_BTEN.transpose(1, 2)), []  # prod_{k=j+1..i} a_k of row i, for every j
        eye_TT = torch.eye(t, dtype=x_BTD.dtype, device=x_BTD.device)
        for i in range(t):
            row_BETN = row_BETN * a_BTEN[:, i, :, None] + eye_TT[i][:, None]
            rows.append((row_BETN * (c_BTN[:, i, None, :] * b_BTN)[:, None]).sum(-1))
        return torch.stack(rows, 2) * self.state**-0.5 + eye_TT * self.D_E[:, None, None]

    def value(self, x_BTD: Tensor) -> Tensor:
        return self.split(self.u(x_BTD))

    def mixing(self, t: int) -> int:
        """h = a h + b and C h, 2 each an entry of the state."""
        return 4 * self.c0_EN.numel()

    @property
    def degree(self) -> int:
        """C 1, u 1, B 1 and L - 1 decays, at the last of the L positions of the window."""
        return self.gate_degree * (self.length - 1) + 3

    @property
    def depth(self) -> int:
        """u/s/B/C 1, B u beside the decay's square 1, the tree over L positions ceil(log2 L), C 1, output 1; a decay of
        degree 2 has one more level for its coefficients.
        """
        return 1 + self.gate_degree + depth_of_degree(self.length) + 1 + 1
