"""Hyena: gates and long convolutions in turn, an exact polynomial of degree o + 1 without any division.

Poli et al., *Hyena Hierarchy*, arXiv 2302.10866, sections 3.2 and 3.3; as specified in methods.md 9.1 with one axis.

    x_0, ..., x_{o-1}, v    a linear to (o + 1) D channels, then a short depthwise convolution
    for i = o-1 .. 1        v <- v . x_i,  v <- h_i * v + b_i . v
    y                       out(v . x_0)

o products of ciphertexts; filters and short convolution are plaintext. Implicit matrix, one a channel (H = D):
A = diag(x_0) prod_i (T_{h_i} + diag(b_i)) diag(x_i) S, on the projected values; S is their short convolution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.filters import ImplicitFilter
from polyformer.mixers.base import Mixer

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

SHORT = 3  # taps of the short convolution along each axis


class Hyena(Mixer):
    """Causal Hyena of order `config.hyena_order` over one axis; a sequence shorter than the window uses the first taps
    of each filter.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.hyena_order < 2:
            raise ValueError(f"hyena_order is {config.hyena_order}; it must be at least 2, for one long convolution")
        d, self.order = config.width, config.hyena_order
        self.width = d
        self.grid = self.sides(config)
        self.inputs = nn.Linear(d, (self.order + 1) * d)
        taps = SHORT ** len(self.grid)
        self.short = nn.Parameter(torch.randn((self.order + 1) * d, 1, *([SHORT] * len(self.grid))) * taps**-0.5)
        steps = self.order - 1
        self.filter = ImplicitFilter(
            self.grid,
            steps * self.filters * d,
            kind=config.hyena_filter,
            window=config.hyena_window,
            repeats=steps * self.filters,
        )
        self.skip_SD = nn.Parameter(torch.randn(steps, d))
        self.o = nn.Linear(d, d)

    filters = 1  # of each long convolution and channel
    directions = 1  # in which each long convolution runs over a channel

    def sides(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the sides of the grid on which the tokens lie."""
        return (config.length,)

    def parts(self, x_BTD: Tensor) -> list[Tensor]:
        """Return x_0, ..., x_{o-1}, v, each [B, D, T], after projection and short convolution."""
        return list(self.convolve_short(self.inputs(x_BTD).transpose(1, 2)).split(self.width, 1))

    def convolve_short(self, z_BCT: Tensor) -> Tensor:
        """Depthwise and causal: position i sees i-2, i-1, i."""
        return F.conv1d(F.pad(z_BCT, (SHORT - 1, 0)), self.short, groups=z_BCT.shape[1])

    def taps(self) -> Tensor:
        """Return the filters h [o - 1, filters, D, *grid]; step i of the loop uses h[i - 1]."""
        return self.filter().unflatten(0, (self.order - 1, self.filters, self.width))

    def convolve(self, v_BDT: Tensor, h_KDT: Tensor, step: int) -> Tensor:
        """Return the causal convolution h * v by FFT, padded so that nothing wraps around."""
        t = v_BDT.shape[-1]
        return fft_convolve(v_BDT, h_KDT[0, :, :t], 1)

    def convolve_slowly(self, v_BDT: Tensor, h_KDT: Tensor, step: int) -> Tensor:
        """Return the same as `convolve` by the sum that defines it."""
        t = v_BDT.shape[-1]
        return torch.stack(
            [torch.stack([h_KDT[0, :, i - j] * v_BDT[..., j] for j in range(i + 1)]).sum(0) for i in range(t)], -1
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        *gates, v = self.parts(x_BTD)
        h = self.taps()
        for i in range(self.order - 1, 0, -1):
            v = v * gates[i]
            v = self.convolve(v, h[i - 1], i) + self.skip_SD[i - 1, :, None] * v
        return self.o((v * gates[0]).transpose(1, 2))

    def reference(self, x_BTD: Tensor) -> Tensor:
        z_BCT = self.inputs(x_BTD).transpose(1, 2)
        *gates, v = self.convolve_short_slowly(z_BCT).split(self.width, 1)
        h = self.taps()
        for i in range(self.order - 1, 0, -1):
            v = v * gates[i]
            v = self.convolve_slowly(v, h[i - 1], i) + self.skip_SD[i - 1, :, None] * v
        return self.o((v * gates[0]).transpose(1, 2))

    def convolve_short_slowly(self, z_BCT: Tensor) -> Tensor:
        columns = []
        for i in range(z_BCT.shape[-1]):
            reach = range(max(0, i - SHORT + 1), i + 1)
            columns.append(torch.stack([self.short[:, 0, SHORT - 1 - (i - j)] * z_BCT[..., j] for j in reach]).sum(0))
        return torch.stack(columns, -1)

    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return A_BDTT, one matrix a channel; it acts on `value`."""
        *gates, _ = self.parts(x_BTD)
        t, h = x_BTD.shape[1], self.taps()
        eye_TT = torch.eye(t, dtype=x_BTD.dtype, device=x_BTD.device)
        impulses = eye_TT[:, None].expand(t, self.width, t)
        a_BDTT = torch.diag_embed(gates[0])
        for i in range(1, self.order):
            response_DTT = self.convolve(impulses, h[i - 1], i).permute(1, 2, 0) + torch.diag_embed(
                self.skip_SD[i - 1, :, None].expand(self.width, t)
            )
            a_BDTT = a_BDTT @ response_DTT * gates[i][:, :, None, :]
        everything = eye_TT[:, None].expand(t, (self.order + 1) * self.width, t)
        short_DTT = self.convolve_short(everything)[:, -self.width :].permute(1, 2, 0)
        return a_BDTT @ short_DTT

    def value(self, x_BTD: Tensor) -> Tensor:
        """Return v [B, D, T, 1], an affine map of x: what the matrix acts on."""
        return self.inputs(x_BTD)[..., -self.width :].transpose(1, 2)[..., None]

    def project(self, y_BDT1: Tensor) -> Tensor:
        """Return the output projection of the channels, y_BTD."""
        return self.o(y_BDT1[..., 0].transpose(1, 2))

    def mixing(self, t: int) -> int:
        """The short convolution, and by FFT the long ones: there and back, and a product of spectra, a channel and step."""
        sides = (t,) if len(self.grid) == 1 else self.grid
        return 2 * self.short.numel() + (self.order - 1) * self.width * self.directions * fft_flops(sides)

    @property
    def degree(self) -> int:
        return self.order + 1

    @property
    def depth(self) -> int:
        """Projection 1, short convolution 1, gate and long convolution 2 each of o - 1 times, last gate 1, output 1."""
        return 2 + 2 * (self.order - 1) + 2


def fft_flops(sides: tuple[int, ...]) -> int:
    """Operations of `fft_convolve` for each point of a grid, the transform of h left out: 2.5 n log2 n for a real transform
    of n points (Cooley and Tukey 1965), padded to twice each side, and 6 a product of complex numbers.
    """
    n = math.prod(2 * side for side in sides)
    return round((5 * n * math.log2(n) + 6 * (n // 2 + 1)) / math.prod(sides))


def fft_convolve(v: Tensor, h: Tensor, axes: int) -> Tensor:
    """Return sum_j h[i - j] v[j], j <= i along each of the last `axes` axes, with the shape of v.

    Padded to twice each side; narrow types are computed in float32, because FFTs lack them.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    dims = tuple(range(-axes, 0))
    sides = [2 * v.shape[d] for d in dims]
    spectrum = torch.fft.rfftn(v.to(wide), s=sides, dim=dims) * torch.fft.rfftn(h.to(wide), s=sides, dim=dims)
    y = torch.fft.irfftn(spectrum, s=sides, dim=dims)
    for d in dims:
        y = y.narrow(d, 0, v.shape[d])
    return y.to(v.dtype)
