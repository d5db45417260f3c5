"""Hyena N-D: the gates of Hyena with long convolutions over a grid of tokens, for images and volumes.

Zimerman and Wolf, *Multi-Dimensional Hyena for Spatial Inductive Bias*, arXiv 2309.13600 (methods.md 9.1). Tokens are
in raster order on `config.grid`. A filter sees one quadrant (orthant): positions not after i on any axis. Flipping the
input, convolving and flipping the output back shows it another one:

    standard    one orthant
    seq         all axes flipped in every second long convolution (so the order must be at least 3)
    parallel    one group of channels for each of the 2^n flips
    4dir        all 2^n flips, one filter for all, and a learned mix
    4dirp       all 2^n flips with a filter each, and a learned mix

Which of the last two shares its filters is our reading. Flips and mix are plaintext: they fold into the convolution
and cost no level; degree and depth are those of `Hyena`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.mixers.hyena import SHORT, Hyena, fft_convolve

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

DIRECTIONS = ("standard", "seq", "parallel", "4dir", "4dirp")
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class HyenaNd(Hyena):
    """Hyena over a grid of 1, 2 or 3 axes, not causal. The short convolution is centred, 3 taps an axis."""

    options = ("causal",)

    def __init__(self, config: ModelConfig) -> None:
        self.direction = config.hyena_direction
        n = len(config.grid)
        if self.direction not in DIRECTIONS:
            raise ValueError(f"unknown hyena_direction {self.direction!r}; known: {', '.join(DIRECTIONS)}")
        if config.causal:
            raise ValueError("hyena_nd sees both sides of a token; set causal=False, or use the mixer 'hyena'")
        if n not in CONVOLUTIONS or math.prod(config.grid) != config.length:
            raise ValueError(
                f"grid {config.grid} holds {math.prod(config.grid)} tokens on {n} axes, length is {config.length}; "
                "give 1 to 3 sides whose product is the length (no class token)"
            )
        if self.direction == "seq" and config.hyena_order < 3:
            raise ValueError(
                f"direction 'seq' flips every second long convolution, order {config.hyena_order} has one; "
                "use order 3 or more, or direction '4dirp'"
            )
        if self.direction == "parallel" and config.width % 2**n:
            raise ValueError(f"width {config.width} is not a multiple of {2**n}, the groups of direction 'parallel'")
        self.filters = 2**n if self.direction == "4dirp" else 1
        super().__init__(config)
        # flips[k]: the axes (of a tensor that ends in the grid) that orientation k turns round
        self.flips = [
            [axis - n for axis, flip in enumerate(flips) if flip]
            for flips in itertools.product((False, True), repeat=n)
        ]
        self.directions = len(self.flips) if self.direction.startswith("4dir") else 1
        self.mix_SKD = (
            nn.Parameter(torch.full((self.order - 1, 2**n, self.width), 2 ** (-n / 2)))
            if self.direction.startswith("4dir")
            else None
        )

    def sides(self, config: ModelConfig) -> tuple[int, ...]:
        return config.grid

    def convolve_short(self, z_BCT: Tensor) -> Tensor:
        convolution = CONVOLUTIONS[len(self.grid)]
        z = convolution(z_BCT.unflatten(2, self.grid), self.short, padding=SHORT // 2, groups=z_BCT.shape[1])
        return z.flatten(2)

    def orientations(self, step: int) -> list[tuple[slice, list[int], int, Tensor | None]]:
        """Return what a long convolution is the sum of: channels, flipped axes, filter index and mix [D]."""
        everything = slice(None)
        if self.direction == "standard":
            return [(everything, [], 0, None)]
        if self.direction == "seq":
            return [(everything, self.flips[-1] if step % 2 == 0 else [], 0, None)]
        if self.direction == "parallel":
            group = self.width // len(self.flips)
            return [(slice(k * group, (k + 1) * group), flip, 0, None) for k, flip in enumerate(self.flips)]
        assert self.mix_SKD is not None
        mix_KD = self.mix_SKD[step - 1]
        return [(everything, flip, k % self.filters, mix_KD[k]) for k, flip in enumerate(self.flips)]

    def convolve(self, v_BDT: Tensor, h_KDT: Tensor, step: int) -> Tensor:
        v = v_BDT.unflatten(2, self.grid)
        return self._sum(v, h_KDT, step, lambda part, h: fft_convolve(part, h, len(self.grid))).flatten(2)

    def _sum(self, v: Tensor, h_K: Tensor, step: int, convolve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        terms = []
        for channels, flip, k, mix_D in self.orientations(step):
            y = convolve(v[:, channels].flip(flip), h_K[k, channels]).flip(flip)
            terms.append(y if mix_D is None else y * mix_D.view(-1, *([1] * len(self.grid))))
        return torch.cat(terms, 1) if self.direction == "parallel" else torch.stack(terms).sum(0)

    def convolve_slowly(self, v_BDT: Tensor, h_KDT: Tensor, step: int) -> Tensor:
        """Sum over pairs of points i, j: orientation k counts if j is not after i in its direction."""
        points = list(itertools.product(*(range(side) for side in self.grid)))
        rows = []
        for i in points:
            row = torch.zeros_like(v_BDT[..., 0])
            for channels, flip, k, mix_D in self.orientations(step):
                for position, j in enumerate(points):
                    offset = [a - b for a, b in zip(i, j, strict=True)]
                    for axis in flip:
                        offset[axis] = -offset[axis]
                    if min(offset) < 0:
                        continue
                    where: tuple[int | slice, ...] = (k, channels, *offset)
                    term = h_KDT[where] * v_BDT[:, channels, position]
                    term = term if mix_D is None else term * mix_D
                    row = row + F.pad(term, self._margins(channels))
            rows.append(row)
        return torch.stack(rows, -1)

    def _margins(self, channels: slice) -> tuple[int, int]:
        start, stop, _ = channels.indices(self.width)
        return start, self.width - stop

    def convolve_short_slowly(self, z_BCT: Tensor) -> Tensor:
        points = {p: n for n, p in enumerate(itertools.product(*(range(side) for side in self.grid)))}
        columns = []
        for i in points:
            column = torch.zeros_like(z_BCT[..., 0])
            for tap in itertools.product(range(SHORT), repeat=len(self.grid)):
                j = points.get(tuple(a + u - SHORT // 2 for a, u in zip(i, tap, strict=True)))
                if j is not None:
                    where: tuple[int | slice, ...] = (slice(None), 0, *tap)
                    column = column + self.short[where] * z_BCT[..., j]
            columns.append(column)
        return torch.stack(columns, -1)
