"""The interface of a sequence mixer, and what several mixers share: the projections of attention, a short convolution.

Shapes: B batch, T positions, D width, H heads, K = D/H head size, E inner channels. x_BTD in, y_BTD out; A_BHTT[b, h,
i, j] is the weight that output position i of head h gives to value j. Where a gate or a convolution differs from
channel to channel, every channel is a head: H = E, K = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from polyformer.model import ModelConfig


class Mixer(nn.Module, ABC):
    """y = A(x) x, one input-dependent matrix a head: `forward` is project(matrix(x) value(x) + offset(x)).

    What the matrix acts on is an affine map of x; all that depends on x in another way (scores, decays, gates) and the
    short convolution is in the matrix (methods.md 5.1).
    """

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return y_BTD, fast."""

    @abstractmethod
    def reference(self, x_BTD: Tensor) -> Tensor:
        """Return y_BTD by loops over rows, written from the definition: the oracle of `forward`."""

    @abstractmethod
    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return A_BHTT, the implicit attention matrix."""

    def value(self, x_BTD: Tensor) -> Tensor:
        """Return v_BHTK, an affine map of x: what the matrix acts on."""
        raise NotImplementedError(f"{type(self).__name__} does not give its values; write its method `value`")

    def offset(self, x_BTD: Tensor) -> Tensor | float:
        """Return what forward adds to A v before the projection, [B, H, T, K]: the way of a convolution's bias."""
        return 0.0

    def project(self, y_BHTK: Tensor) -> Tensor:
        """Return the output projection of the merged heads, y_BTD."""
        raise NotImplementedError(f"{type(self).__name__} does not give its output; write its method `project`")

    @property
    @abstractmethod
    def degree(self) -> int:
        """Polynomial degree of y in x; raises ValueError where the mixer is not polynomial."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Multiplicative levels from x to y, plaintext products included; raises ValueError where it is not
        polynomial.
        """

    @property
    def receptive_field(self) -> int | None:
        """The largest distance i - j at which value j can still reach output i; None where nothing bounds it but the
        length. How far it does reach on given data is a matter of the matrix (methods.md 6.1).
        """
        return None


class Attention(Mixer):
    """Projections q, k, v, o of causal multi-head attention; the parameters are the same for every score
    non-linearity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.head_size, self.length = config.heads, d // config.heads, config.length
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.register_buffer("mask_TT", torch.ones(config.length, config.length).tril(), persistent=False)

    mask_TT: Tensor

    def split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, K]"""
        b, t, _ = x_BTD.shape
        return x_BTD.view(b, t, self.heads, self.head_size).transpose(1, 2)

    def merge(self, y_BHTK: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, T, D]"""
        b, _, t, _ = y_BHTK.shape
        return y_BHTK.transpose(1, 2).reshape(b, t, -1)

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each [B, H, T, K]."""
        return self.split(self.q(x_BTD)), self.split(self.k(x_BTD)), self.split(self.v(x_BTD))

    def value(self, x_BTD: Tensor) -> Tensor:
        return self.split(self.v(x_BTD))

    def project(self, y_BHTK: Tensor) -> Tensor:
        return self.o(self.merge(y_BHTK))


class ChannelMixer(Mixer):
    """A mixer whose heads are its E channels; a subclass makes the output projection `o`, E -> D."""

    o: nn.Linear

    def split(self, x_BTE: Tensor) -> Tensor:
        """[B, T, E] -> [B, E, T, 1]"""
        return x_BTE.transpose(1, 2)[..., None]

    def merge(self, y_BET1: Tensor) -> Tensor:
        """[B, E, T, 1] -> [B, T, E]"""
        return y_BET1[..., 0].transpose(1, 2)

    def project(self, y_BHTK: Tensor) -> Tensor:
        return self.o(self.merge(y_BHTK))


class CausalConv(nn.Module):
    """Depthwise convolution over the last W positions: u_i = sum_s w_s x_{i-s} + b, one filter a channel."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"conv_width is {width}; it must be at least 1, the position itself")
        self.weight_EW = nn.Parameter((torch.rand(channels, width) * 2 - 1) * width**-0.5)
        self.bias_E = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BTE: Tensor) -> Tensor:
        e, w = self.weight_EW.shape
        padded_BET = F.pad(x_BTE.transpose(1, 2), (w - 1, 0))
        return F.conv1d(padded_BET, self.weight_EW.flip(1)[:, None], self.bias_E, groups=e).transpose(1, 2)

    def reference(self, x_BTE: Tensor) -> Tensor:
        """Position by position, from the definition."""
        rows = []
        for i in range(x_BTE.shape[1]):
            taps = range(min(i + 1, self.weight_EW.shape[1]))
            rows.append(sum((self.weight_EW[:, s] * x_BTE[:, i - s] for s in taps), self.bias_E))
        return torch.stack(rows, 1)

    def matrix(self, t: int) -> Tensor:
        """Return the Toeplitz matrices M_ETT with M[e, i, j] = w[e, i - j]."""
        padded_ET = F.pad(self.weight_EW, (0, max(0, t - self.weight_EW.shape[1])))
        steps = torch.arange(t, device=padded_ET.device)
        return padded_ET[:, (steps[:, None] - steps).clamp_min(0)].tril()
