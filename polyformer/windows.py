"""Attention inside windows of a token grid, shifted in every second layer: the mixer of a Swin-like model.

Liu et al., *Swin Transformer*, arXiv 2103.14030, section 3.2. Shifted windows do not wrap around: those at the border
are smaller instead, which is what the masks of the paper come to, without any mask. Windows of equal size are one
batch for the inner mixer.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer import mixers
from polyformer.mixers.base import Attention, Mixer

if TYPE_CHECKING:
    from polyformer.model import ModelConfig


class Windowed(Mixer):
    """Any attention mixer, applied to each window of a grid in raster order.

    Args: `config` and `name` of the inner mixer; `grid` (rows, columns), whose product is the number of positions; `window`,
    the tokens of a window along both axes, or (rows, columns); `shift` by which the windows start later, 0 to window - 1, one
    for both axes or (rows, columns).
    """

    order: Tensor

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        *,
        grid: tuple[int, int],
        window: int | tuple[int, int],
        shift: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        sides, shifts = _pair(window), _pair(shift)
        if not all(1 <= w <= side for w, side in zip(sides, grid, strict=True)):
            raise ValueError(f"window is {window}; along each axis it must be from 1 to the side of the grid {grid}")
        if not all(0 <= s < w for s, w in zip(shifts, sides, strict=True)):
            raise ValueError(
                f"shift is {shift}; along each axis it must be from 0 to window - 1, the window is {window}"
            )
        if not issubclass(mixers.load(name), Attention):
            raise ValueError(f"mixer {name!r} is not an attention; only attention works on windows of several sizes")
        self.inner = mixers.load(name)(replace(config, length=sides[0] * sides[1], grid=sides))
        self.windows = [
            torch.tensor([y * grid[1] + x for y in range(*rows) for x in range(*columns)])
            for rows, columns in itertools.product(*map(spans, grid, sides, shifts))
        ]
        sizes = sorted({len(w) for w in self.windows})
        self.groups = len(sizes)
        for k, size in enumerate(sizes):
            index_NT = torch.stack([w for w in self.windows if len(w) == size])
            self.register_buffer(f"index_{k}", index_NT, persistent=False)
        flat = torch.cat([self.get_buffer(f"index_{k}").flatten() for k in range(self.groups)])
        self.register_buffer("order", flat.argsort(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = []
        for k in range(self.groups):
            x_BNTD = x_BTD[:, self.get_buffer(f"index_{k}")]
            parts.append(self.inner(x_BNTD.flatten(0, 1)).view_as(x_BNTD).flatten(1, 2))
        return torch.cat(parts, 1)[:, self.order]

    def reference(self, x_BTD: Tensor) -> Tensor:
        y_BTD = torch.zeros_like(x_BTD)
        for index_T in (window.to(x_BTD.device) for window in self.windows):
            y_BTD = y_BTD.index_copy(1, index_T, self.inner.reference(x_BTD[:, index_T]))
        return y_BTD

    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return A_BHTT over the whole grid: 0 between windows."""
        blocks = [(index_T, self.inner.matrix(x_BTD[:, index_T])) for index_T in self.windows]
        b, h = blocks[0][1].shape[:2]
        a_BHTT = x_BTD.new_zeros(b, h, x_BTD.shape[1], x_BTD.shape[1])
        for index_T, a in blocks:
            a_BHTT[:, :, index_T[:, None], index_T] = a
        return a_BHTT

    def value(self, x_BTD: Tensor) -> Tensor:
        return self.inner.value(x_BTD)

    def project(self, y_BHTK: Tensor) -> Tensor:
        return self.inner.project(y_BHTK)

    def mixing(self, t: int) -> int:
        """Those of the inner mixer, its linears too, on windows of full size: shifted ones at an edge are smaller."""
        return self.inner.flops(int(self.inner.length))  # type: ignore[arg-type]

    @property
    def receptive_field(self) -> int | None:
        """From the first to the last token of the longest window, in raster order; None if one window holds them all."""
        return max(int(w[-1] - w[0]) for w in self.windows) if len(self.windows) > 1 else None

    @property
    def degree(self) -> int:
        return self.inner.degree

    @property
    def depth(self) -> int:
        return self.inner.depth


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return one value an axis."""
    return (value, value) if isinstance(value, int) else value


def spans(side: int, window: int, shift: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of the windows along one axis: a short one before the shift, perhaps one at the end."""
    starts = [0, *range(shift, side, window)] if shift else list(range(0, side, window))
    return list(zip(starts, [*starts[1:], side], strict=True))
