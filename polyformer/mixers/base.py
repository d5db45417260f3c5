"""The interface of a sequence mixer, and what several mixers share: the projections of attention, a short convolution.

Shapes: B batch, T positions, D width, H heads, G key heads (H a multiple of G), K = D/H head size, R rotary channels,
E inner channels. x_BTD in, y_BTD out; A_BHTT[b, h, i, j] is the weight that output position i of head h gives to value
j. Where a gate or a convolution differs from channel to channel, every channel is a head: H = E, K = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.las import LocalSmooth
from polyformer.norms import BatchNorm

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

# Fields of a config that change what a layer computes and that not every mixer knows (`mixers.unread`).
OPTIONS: tuple[str, ...] = ("causal", "kv_heads", "rotary", "score_norm", "las_decay", "las_width")


class Mixer(nn.Module, ABC):
    """y = A(x) x, one input-dependent matrix a head: `forward` is project(matrix(x) value(x) + offset(x)).

    What the matrix acts on is an affine map of x; all that depends on x in another way (scores, decays, gates) and the
    short convolution is in the matrix (methods.md 5.1).
    """

    options: tuple[str, ...] = ()  # those of OPTIONS that it reads
    hides_keys = False  # whether `forward` takes `visible_BT`

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

    def flops(self, t: int) -> int:
        """Floating-point operations of `forward` for each position of a window of t: linears, 2 a weight, and `mixing`."""
        linears = (child for child in self.children() if isinstance(child, nn.Linear))
        return sum(2 * linear.weight.numel() for linear in linears) + self.mixing(t)

    @abstractmethod
    def mixing(self, t: int) -> int:
        """Those beside the linears: matrix products, convolutions and recurrences, where a multiply-add is 2. Functions
        of single entries (softmax, gates, what makes a decay) count nothing, nor does what is made once for all windows.
        """

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
    """Projections q, k, v, o of multi-head attention; the parameters are the same for every score non-linearity.

    Grouped queries (GQA, arXiv 2305.13245): k and v have G heads, head h reads key head h // (H/G). Rotary positions
    (RoFormer, arXiv 2104.09864) turn the leading R channels of q and k, channel c with c + R/2, by the angle t
    base^(-2c/R), which costs no level: for each position it is a linear map that joins the projection. Without `causal`
    every position sees every key. `visible_BT` (bool), where a method takes it, hides keys of padding on top of that. A
    non-linearity takes its scores from `normed_scores`, multiplies them by `factor` and its weights by `las.smooth(v)`.
    What a non-linearity does not read of OPTIONS stays at its default, whatever the other layers of a hybrid stack do.
    """

    options: tuple[str, ...] = OPTIONS

    mask_TT: Tensor
    cos_TR: Tensor
    sin_TR: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config = config.at_defaults(option for option in OPTIONS if option not in self.options)
        d = config.width
        self.heads, self.head_size, self.length = config.heads, d // config.heads, config.length
        if config.score_norm and config.causal:
            raise ValueError("score_norm takes statistics over hidden keys too; set causal=False, or score_norm=False")
        self.kv_heads, self.causal, self.rotary = config.kv_heads or config.heads, config.causal, config.rotary
        outs = (d, self.kv_heads * self.head_size, self.kv_heads * self.head_size, d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, out, bias=config.biases) for out in outs)
        ones = torch.ones(config.length, config.length)
        self.register_buffer("mask_TT", ones.tril() if config.causal else ones, persistent=False)
        self.score_norm = BatchNorm(config.heads, axis=1) if config.score_norm else None
        self.las = LocalSmooth(config.heads, decay=config.las_decay, width=config.las_width, causal=config.causal)
        if config.rotary:
            c = torch.arange(0, config.rotary, 2, dtype=torch.float64)
            angle_TR = torch.arange(config.length)[:, None] * config.rotary_base ** (-c / config.rotary).repeat(2)
            self.register_buffer("cos_TR", angle_TR.cos().float(), persistent=False)
            self.register_buffer("sin_TR", angle_TR.sin().float(), persistent=False)

    def normed_scores(self, s_BHTT: Tensor) -> Tensor:
        """Return scores through the BatchNorm over heads, if there is one; masks and decay come after it."""
        return s_BHTT if self.score_norm is None else self.score_norm(s_BHTT)

    def factor(self, t: int, visible_BT: Tensor | None = None) -> Tensor:
        """Return the factor of the scores, [T, T] or more axes before: 0 for hidden keys, else 1 or the decay of LaS."""
        mask = self.mask(t, visible_BT)
        return mask * self.las.decay(t, mask) if any(self.las.alphas) else mask

    def split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, K], H as many heads as the width holds."""
        b, t, _ = x_BTD.shape
        return x_BTD.view(b, t, -1, self.head_size).transpose(1, 2)

    def merge(self, y_BHTK: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, T, D]"""
        b, _, t, _ = y_BHTK.shape
        return y_BHTK.transpose(1, 2).reshape(b, t, -1)

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each [B, H, T, K]: rotated, key heads repeated for their group."""
        q, k, v = self.rotate(self.split(self.q(x_BTD))), self.rotate(self.split(self.k(x_BTD))), self.v(x_BTD)
        return q, self._grouped(k), self._grouped(self.split(v))

    def value(self, x_BTD: Tensor) -> Tensor:
        """Return v [B, H, T, K], what `matrix` multiplies."""
        return self._grouped(self.split(self.v(x_BTD)))

    def rotate(self, x_BHTK: Tensor) -> Tensor:
        """Turn the leading R channels by the angles of their positions."""
        if not self.rotary:
            return x_BHTK
        t = x_BHTK.shape[2]
        x_BHTR, rest = x_BHTK[..., : self.rotary], x_BHTK[..., self.rotary :]
        low, high = x_BHTR.chunk(2, -1)
        turned_BHTR = torch.cat((-high, low), -1)
        turned = torch.cat((x_BHTR * self.cos_TR[:t] + turned_BHTR * self.sin_TR[:t], rest), -1)
        return turned.to(x_BHTK.dtype)  # sharding leaves buffers in float32 where q, k and v are bfloat16

    def mask(self, t: int, visible_BT: Tensor | None = None) -> Tensor:
        """Return the mask of ones and zeros: [T, T], or [B, 1, T, T] where keys are hidden."""
        if visible_BT is not None and (self.las.width > 1 or self.score_norm is not None):
            raise ValueError(
                "visible_BT hides padding, but LaS averages over it and score_norm counts it; leave one out"
            )
        mask_TT = self.mask_TT[:t, :t]
        return mask_TT if visible_BT is None else mask_TT * visible_BT[:, None, None, :].to(mask_TT.dtype)

    def row_scores(self, q_BHTK: Tensor, k_BHTK: Tensor, i: int) -> Tensor:
        """Return s [B, H, J] of row i against the keys that the mask leaves, one by one: a part of each `reference`. The
        norm over scores is that of evaluation mode.
        """
        t = q_BHTK.shape[2]
        keys = range(i + 1 if self.causal else t)
        s_BHJ = torch.stack([(q_BHTK[:, :, i] * k_BHTK[:, :, j]).sum(-1) for j in keys], -1) / math.sqrt(self.head_size)
        if self.score_norm is not None:
            scale_H, shift_H = self.score_norm.affine()
            s_BHJ = s_BHJ * scale_H[:, None] + shift_H[:, None]
        return s_BHJ * self.las.decay(t, s_BHJ)[:, i, : len(keys)]

    def _grouped(self, x_BGTK: Tensor) -> Tensor:
        return x_BGTK if self.kv_heads == self.heads else x_BGTK.repeat_interleave(self.heads // self.kv_heads, 1)

    def project(self, y_BHTK: Tensor) -> Tensor:
        return self.o(self.merge(y_BHTK))

    def mixing(self, t: int) -> int:
        """Scores and values, 2 T D each, over the whole square, as MFU is defined (Chowdhery et al. 2022, arXiv 2204.02311,
        appendix B): the tiles of `power_sums` leave out most of what a causal mask hides, so a long window makes as little
        as half of that.
        """
        return 4 * t * self.heads * self.head_size


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

    @property
    def flops(self) -> int:
        """Operations of one position."""
        return 2 * self.weight_EW.numel()

    def matrix(self, t: int) -> Tensor:
        """Return the Toeplitz matrices M_ETT with M[e, i, j] = w[e, i - j]."""
        padded_ET = F.pad(self.weight_EW, (0, max(0, t - self.weight_EW.shape[1])))
        steps = torch.arange(t, device=padded_ET.device)
        return padded_ET[:, (steps[:, None] - steps).clamp_min(0)].tril()


class ConvolvedMixer(ChannelMixer):
    """A channel mixer that reads its values through a short causal convolution: matrix = gated @ convolution.

    A subclass makes `conv`, and gives `parts`, whose first tensor holds the values, [B, T, E], and `gated`.
    """

    conv: CausalConv

    @abstractmethod
    def parts(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Return the input projection cut into its parts; the first is v_BTE."""

    @abstractmethod
    def gated(self, x_BTD: Tensor) -> Tensor:
        """Return all but the convolution, [B, E, T, T]."""

    def matrix(self, x_BTD: Tensor) -> Tensor:
        return self.gated(x_BTD) @ self.conv.matrix(x_BTD.shape[1])

    def value(self, x_BTD: Tensor) -> Tensor:
        return self.split(self.parts(x_BTD)[0])

    def offset(self, x_BTD: Tensor) -> Tensor:
        return self.gated(x_BTD).sum(-1, keepdim=True) * self.conv.bias_E[:, None, None]
