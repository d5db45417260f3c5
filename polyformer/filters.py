"""Implicit filters of long convolutions: an MLP of the position, times a decaying window.

Shapes: C channels, a grid of sides (L_1, ..., L_n), h_C... = h[channel, i_1, ..., i_n]. At inference a filter is a
constant, computed once and multiplied as plaintext: what it costs to compute does not matter under encryption.

    product   h(i, j) = h_1(i) h_2(j), one MLP an axis: falls apart into one convolution an axis
    joint     one MLP of all coordinates
    direct    a free parameter at every point: the ablation

The window is exp(-sum_a delta_ca i_a) with delta = ln(100)/(f L_a): it falls to 1e-2 at the share f of the side, f
spread over [0.3, 1.5] by channel. We scale it to unit energy, so that a convolution keeps the size of its input.
Source: Zimerman and Wolf, arXiv 2309.13600 (methods.md 9.1); Poli et al., *Hyena Hierarchy*, arXiv 2302.10866.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FILTERS = ("product", "joint", "direct")
WINDOWS = ("decay", "learned", "none")
HIDDEN = 64  # width of the MLP
FREQUENCIES = 4  # cos and sin of 2 pi k t, k = 1 .. FREQUENCIES
SPREAD = (0.3, 1.5)  # shares of the side at which the window has fallen to 1e-2


class SineMLP(nn.Module):
    """coordinates [N, n] in [0, 1) -> values [C, N]: two inner layers with sine activations."""

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(axes * (1 + 2 * FREQUENCIES), HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, channels)

    def forward(self, t_Nn: Tensor) -> Tensor:
        k = torch.arange(1, FREQUENCIES + 1, dtype=t_Nn.dtype, device=t_Nn.device)
        angle = (2 * math.pi * t_Nn[..., None] * k).flatten(1)
        z = torch.cat([t_Nn, angle.cos(), angle.sin()], 1)
        return self.last(torch.sin(self.second(torch.sin(self.first(z))))).T


class ImplicitFilter(nn.Module):
    """The filters of all channels on a grid; `forward()` returns h [C, L_1, ..., L_n].

    Args: `grid` sides; `channels` C; `kind` and `window` as above; `repeats` how often the spread of decays starts
    again along the channels (once for each convolution of a mixer).
    """

    def __init__(self, grid: tuple[int, ...], channels: int, *, kind: str, window: str, repeats: int = 1) -> None:
        super().__init__()
        if kind not in FILTERS:
            raise ValueError(f"unknown filter {kind!r}; known: {', '.join(FILTERS)}")
        if window not in WINDOWS:
            raise ValueError(f"unknown window {window!r}; known: {', '.join(WINDOWS)}")
        if channels % repeats:
            raise ValueError(f"{channels} channels are not a multiple of {repeats} repeats")
        self.grid, self.kind, self.window = grid, kind, window
        axes = {"product": len(grid), "joint": 1, "direct": 0}[kind]
        self.mlps = nn.ModuleList(SineMLP(1 if kind == "product" else len(grid), channels) for _ in range(axes))
        self.values = nn.Parameter(torch.randn(channels, *grid)) if kind == "direct" else None
        share_C = torch.linspace(*SPREAD, channels // repeats).repeat(repeats)
        log_rate_CA = torch.stack([torch.log(math.log(100) / (share_C * side)) for side in grid], 1)
        if window == "learned":
            self.log_rate_CA = nn.Parameter(log_rate_CA)
        else:
            self.register_buffer("log_rate_CA", log_rate_CA, persistent=False)

    log_rate_CA: Tensor

    def forward(self) -> Tensor:
        h = self.shape() if self.values is None else self.values
        return h * self.envelope()

    def shape(self) -> Tensor:
        """Return the MLPs on the grid, without the window."""
        like = self.log_rate_CA
        axes = [torch.arange(side, dtype=like.dtype, device=like.device) / side for side in self.grid]
        if self.kind == "joint":
            t_Nn = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
            return self.mlps[0](t_Nn).unflatten(1, self.grid)
        h = torch.ones(())
        for a, (mlp, t_L) in enumerate(zip(self.mlps, axes, strict=True)):
            h = h * _along(mlp(t_L[:, None]), a, len(self.grid))
        return h

    def envelope(self) -> Tensor:
        """Return the window [C, L_1, ..., L_n], of unit energy in each channel."""
        like = self.log_rate_CA
        w = torch.ones(())
        for a, side in enumerate(self.grid):
            i_L = torch.arange(side, dtype=like.dtype, device=like.device)
            rate_C1 = like[:, a : a + 1].exp() if self.window != "none" else torch.zeros_like(like[:, :1])
            w_CL = torch.exp(-rate_C1 * i_L)
            w = w * _along(w_CL / w_CL.square().sum(1, keepdim=True).sqrt(), a, len(self.grid))
        return w


def _along(h_CL: Tensor, axis: int, axes: int) -> Tensor:
    """Return h shaped to broadcast along one axis of the grid: [C, 1, ..., L, ..., 1]."""
    shape = [1] * axes
    shape[axis] = h_CL.shape[1]
    return h_CL.view(-1, *shape)
