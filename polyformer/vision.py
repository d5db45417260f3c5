"""A vision transformer: images to the logits of their class, with any mixer, or with windows that shift (Swin-like).

Shapes: images_BCHW, patches of P x P pixels in raster order, tokens x_BTD. ViT: Dosovitskiy et al., arXiv 2010.11929;
windows: Liu et al., arXiv 2103.14030, here at one resolution (`swin.py` has stages that merge patches). For a model
without any square root take norms "batch" with `mlp_norm` and `score_norm` (methods.md 2.2) and `fold.folded` after
training. A hybrid such as `mixers=("hyena_nd", "hyena_nd", "power_softmax", "power_softmax")` has Hyena first
(methods.md 9.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyformer import mixers
from polyformer.encoder import Classifier, ClassifierConfig
from polyformer.layers import beside
from polyformer.mixers.base import Attention, Mixer
from polyformer.windows import Windowed


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ClassifierConfig):
    """Images and patches around a body, whose `vocab` is not used and whose `length` is the number of tokens.

    `pool="first"` puts a learned class token before the patches. `window` > 0 keeps attention inside windows of
    window x window patches, shifted by half a window in every second block; along an axis that is no longer than the
    window, one window covers it and does not shift. Mixers that are no attention still see the whole image.
    """

    image: tuple[int, int]  # height and width in pixels
    patch: int
    channels: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image[0] % self.patch or self.image[1] % self.patch:
            raise ValueError(f"image {self.image} is not a multiple of the patch, {self.patch} pixels")
        if self.body.length != self.tokens:
            raise ValueError(f"length is {self.body.length}, an image has {self.tokens} tokens (grid {self.grid})")
        if self.body.grid not in ((), self.grid, (self.tokens,)):
            raise ValueError(
                f"grid of the body is {self.body.grid}, that of the patches {self.grid}; give that one, or "
                f"{(self.tokens,)} to see them as one row"
            )
        if not 0 <= self.window <= max(self.grid):
            raise ValueError(
                f"window is {self.window} patches; it must be from 1 to the longer side of the grid {self.grid}, or 0 for none"
            )
        if self.window and self.pool == "first":
            raise ValueError("a class token lies in no window; use pool='mean' with windows")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + (self.pool == "first")


class ViT(Classifier):
    """images_BCHW -> logits_BC. The patch embedding is a linear: the client may compute it in clear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config, layers(config))
        self.size, self.patch_size, self.channels = config.image, config.patch, config.channels
        self.patch = nn.Linear(config.channels * config.patch**2, config.body.width)
        self.token = nn.Parameter(torch.zeros(config.body.width)) if config.pool == "first" else None
        self.reset()

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return x0_BTD: embedded patches, after the class token if there is one, plus positions."""
        x_BTD = self.patch(patches(beside(images_BCHW, self.position), self.channels, self.size, self.patch_size))
        if self.token is not None:
            x_BTD = torch.cat([self.token.expand(len(x_BTD), 1, -1), x_BTD], 1)
        return x_BTD + self.position

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.classify(self.embed(images_BCHW))


def patches(images_BCHW: Tensor, channels: int, size: tuple[int, int], p: int) -> Tensor:
    """Cut images into patches [B, T, C P P], in raster order.

    Raises:
        ValueError: the images have other channels or another size.
    """
    if tuple(images_BCHW.shape[1:]) != (channels, *size):
        raise ValueError(
            f"images are {tuple(images_BCHW.shape[1:])} (channels, height, width), the model reads "
            f"{(channels, *size)}; resize them or change the config"
        )
    return images_BCHW.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def layers(config: VisionConfig) -> list[Mixer]:
    """Return the mixer of each block: attention in windows if there are any, every second one shifted along the axes that
    one window does not cover.
    """
    found: list[Mixer] = []
    rows, columns = (min(config.window, side) for side in config.grid)
    half = (rows // 2 * (rows < config.grid[0]), columns // 2 * (columns < config.grid[1]))
    for i, name in enumerate(config.body.layer_mixers):
        kind = mixers.load(name)
        if config.window and issubclass(kind, Attention):
            shift = half if i % 2 else 0
            found.append(Windowed(config.body, name, grid=config.grid, window=(rows, columns), shift=shift))
        else:
            found.append(kind(config.body))
    return found
