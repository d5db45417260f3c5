"""A Swin-like classifier: stages of blocks with windows that shift, and patches merged two by two between stages.

Liu et al., *Swin Transformer*, arXiv 2103.14030, sections 3.1 and 3.2. From stage to stage the grid halves along both
axes while width, heads and hidden double. Windows do not wrap around (`windows.py`), there is no relative position
bias (positions are learned, at the first stage), and merging has a bias, so that its BatchNorm can be folded. Along an
axis where a stage's grid is no longer than the window, one window covers it and does not shift.

Merging is a linear on four neighbours behind a norm: one level under encryption, like the head. Shapes: x_BTD on a
grid of R x C tokens in raster order; stage s has R/2^s x C/2^s of them and width D 2^s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from polyformer.layers import beside
from polyformer.mixers import unread
from polyformer.model import ModelConfig, lone_norm, reset_linears, stack, stack_levels
from polyformer.vision import VisionConfig, layers, patches


@dataclass(frozen=True, kw_only=True)
class SwinConfig(VisionConfig):
    """`stages` are the blocks of each stage; `body` gives width, heads, hidden and length of the first one, and norms,
    mixers and `blocks` of all of them in order. A norm before merging is of the last norm's kind.
    """

    stages: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages or min(self.stages) < 1 or sum(self.stages) != self.body.blocks:
            raise ValueError(f"stages {self.stages} have {sum(self.stages)} blocks, the body has {self.body.blocks}")
        if self.pool != "mean":
            raise ValueError(f"pool is {self.pool!r}; merging has no place for a class token, use 'mean'")
        if self.body.parallel or self.body.order == "post":
            raise ValueError("stages split norms two a block, before its parts; set parallel=False and order='pre'")
        times = 2 ** (len(self.stages) - 1)
        if self.grid[0] % times or self.grid[1] % times:
            raise ValueError(
                f"grid {self.grid} cannot be halved {len(self.stages) - 1} times; "
                f"use sides that are multiples of {times}, or fewer stages"
            )

    def stage(self, s: int) -> VisionConfig:
        """Return what stage s is, as the config of a plain vision model whose pixels are its patches."""
        first, blocks, times = sum(self.stages[:s]), self.stages[s], 2**s
        grid = (self.grid[0] // times, self.grid[1] // times)
        names = self.body.layer_mixers[first : first + blocks]
        common = self.body.at_defaults(unread(names))  # another stage may read more
        body = replace(
            common,
            length=grid[0] * grid[1],
            width=self.body.width * times,
            heads=self.body.heads * times,
            kv_heads=common.kv_heads * times,
            hidden=self.body.hidden * times,
            blocks=blocks,
            norms=(*self.body.norms[2 * first : 2 * (first + blocks)], self.body.norms[-1]),
            mixers=self.body.mixers[first : first + blocks],
            grid=grid if self.body.grid else (),
        )
        return VisionConfig(body=body, classes=self.classes, image=grid, patch=1, window=min(self.window, max(grid)))


class PatchMerging(nn.Module):
    """x_BTD on a grid -> [B, T/4, 2D]: the four tokens of each 2 x 2 square side by side, a norm, a linear."""

    def __init__(self, config: ModelConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = lone_norm(replace(config, width=4 * config.width, heads=1, kv_heads=0, rotary=0))
        self.reduce = nn.Linear(4 * config.width, 2 * config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, _, d = x_BTD.shape
        rows, columns = (side // 2 for side in self.grid)
        squares = x_BTD.view(b, rows, 2, columns, 2, d).transpose(2, 3).reshape(b, rows * columns, 4 * d)
        return self.reduce(self.norm(squares))

    def reference(self, x_BTD: Tensor) -> Tensor:
        """Square by square."""
        rows, columns = self.grid
        merged = []
        for y in range(0, rows, 2):
            for x in range(0, columns, 2):
                corners = [(y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)]
                merged.append(torch.cat([x_BTD[:, i * columns + j] for i, j in corners], -1))
        return self.reduce(self.norm(torch.stack(merged, 1)))


class Swin(nn.Module):
    """images_BCHW -> logits_BC."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.patch_size, self.channels = config.image, config.patch, config.channels
        found = [config.stage(s) for s in range(len(config.stages))]
        self.patch = nn.Linear(config.channels * config.patch**2, config.body.width)
        self.position = nn.Parameter(torch.zeros(config.body.length, config.body.width))
        self.stages = nn.ModuleList(stack(stage.body, layers(stage)) for stage in found)
        self.merges = nn.ModuleList(PatchMerging(stage.body, stage.grid) for stage in found[:-1])
        self.norm = lone_norm(found[-1].body)
        self.head = nn.Linear(found[-1].body.width, config.classes)
        nn.init.normal_(self.position, std=0.2)
        reset_linears(self, config.body.blocks)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return x0_BTD: embedded patches plus positions."""
        return (
            self.patch(patches(beside(images_BCHW, self.position), self.channels, self.size, self.patch_size))
            + self.position
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = self.embed(images_BCHW)
        for s, blocks in enumerate(self.stages):
            if s:
                x_BTD = self.merges[s - 1](x_BTD)
            for block in blocks:  # type: ignore[attr-defined]
                x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD).mean(1))

    @property
    def levels(self) -> int:
        """Multiplicative levels from x0 to the logits; raises ValueError if a part is not polynomial."""
        total = 0
        for blocks, end in zip(self.stages, [*self.merges, self], strict=True):  # a norm and a linear end each stage
            total += stack_levels(blocks, end.norm)  # type: ignore[arg-type]
        return total

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
