"""Normalisations: exact LayerNorm and RMSNorm, the same with a polynomial inverse square root, BatchNorm, and a foldable
affine map.

Every `Norm` is y = gamma * (x - [mean]) * q(S) (+ beta), S = mean((x - [mean])^2) the value that the `Tap` sees:

    affine      q = 1, no mean: folds into the next linear, costs no level
    rms         q = (S + eps)^(-1/2)
    layer       the same after subtracting the mean (exact also under encryption: a plaintext average)
    rms_poly    q a polynomial in S; `newton` steps refine it (2 levels each)
    layer_poly  likewise, with the mean
    batch       a `BatchNorm`: in evaluation mode an affine map with the statistics seen in training

Levels before the product with x: 1 for the square, then those of q. Since q(S) is a scalar per position it commutes
with the linear that follows, so W (x q) = (W x) q costs max(square + q, linear) + 1. Spec: methods.md 1.3 and 1.6;
polynomial inverse square root after Panda 2022 (seed in relative error, then Newton).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.approx import depth_of_degree, newton_inverse_sqrt
from polyformer.layers import PolynomialLayer, Tap

NORMS = ("affine", "rms", "layer", "rms_poly", "layer_poly")
BATCH = "batch"


class Norm(nn.Module):
    """A normalisation over the last axis, of one of the kinds above.

    Args: `width` D; `kind`; `degree` of the polynomial seed and `newton` steps, for the polynomial kinds; `eps` is
    added to S by the exact kinds alone (a polynomial needs no guard: its interval is the guard).
    """

    def __init__(self, width: int, kind: str, *, degree: int = 2, newton: int = 0, eps: float = 1e-5) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"unknown norm {kind!r}; known: {', '.join(NORMS)}, and {BATCH} as `make_norm` builds it")
        self.kind, self.eps, self.newton = kind, eps, newton
        self.centre = kind.startswith("layer")
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width)) if kind == "affine" or self.centre else None
        self.tap = None if kind == "affine" else Tap("variance")
        self.inverse_sqrt = PolynomialLayer(degree) if kind.endswith("_poly") else None

    @property
    def depth(self) -> int:
        """Levels of the norm and the product with x, when the linear after it is taken first; 0 for affine."""
        if self.tap is None:
            return 0
        if self.inverse_sqrt is None:
            raise ValueError(f"norm {self.kind!r} is not polynomial; use 'affine', 'rms_poly' or 'layer_poly'")
        return 1 + depth_of_degree(self.inverse_sqrt.degree) + 2 * self.newton + 1

    def _fused(self, x_BTD: Tensor) -> bool:
        """Whether torch's one kernel may stand for the formula: exact LayerNorm, and nobody listens at the tap."""
        assert self.tap is not None
        exact = self.kind == "layer" and x_BTD.dtype == self.gamma.dtype
        return exact and not self.tap._forward_hooks

    def inverse_root(self, s_BT1: Tensor) -> Tensor:
        """Return q(S), exact or polynomial."""
        if self.inverse_sqrt is None:
            return torch.rsqrt(s_BT1 + self.eps)
        return newton_inverse_sqrt(s_BT1, self.inverse_sqrt(s_BT1), self.newton)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.tap is not None and self._fused(x_BTD):
            return F.layer_norm(x_BTD, x_BTD.shape[-1:], self.gamma, self.beta, self.eps)
        if self.tap is not None:
            if self.centre:
                x_BTD = x_BTD - x_BTD.mean(-1, keepdim=True)
            s_BT1 = self.tap((x_BTD * x_BTD).mean(-1, keepdim=True))
            x_BTD = x_BTD * self.inverse_root(s_BT1)
        y_BTD = x_BTD * self.gamma
        return y_BTD if self.beta is None else y_BTD + self.beta


class BatchNorm(nn.Module):
    """Normalise each channel by statistics over everything else: the batch's in training, the running ones after it.

    In evaluation mode it is an affine map with constants, which folds into a neighbouring linear and costs nothing.
    For vision (methods.md 2.2); in causal language models it fails, and statistics over positions look ahead.
    Args: `width` of the channel axis, `axis` its place (-1: features of x_BTD; 1: heads of s_BHTT), `momentum` of the
    running statistics, `eps` added to the variance.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, *, axis: int = -1, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.axis, self.momentum, self.eps = axis, momentum, eps
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    @property
    def depth(self) -> int:
        """0, as for an affine norm: it folds."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        x_BC = x.transpose(1, self.axis)
        # Weights may be bfloat16 where the statistics are not; torch's CPU kernel wants both alike, whatever x is.
        gamma, beta = self.gamma.to(self.mean.dtype), self.beta.to(self.mean.dtype)
        y_BC = F.batch_norm(x_BC, self.mean, self.variance, gamma, beta, self.training, self.momentum, self.eps)
        return y_BC.transpose(1, self.axis)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return (scale, shift) of evaluation mode, each [width]: y = x scale + shift."""
        scale = self.gamma * torch.rsqrt(self.variance + self.eps)
        return scale, self.beta - self.mean * scale

    @torch.no_grad()
    def to_norm(self) -> Norm:
        """Return the affine `Norm` that equals this one in evaluation mode."""
        norm = Norm(len(self.gamma), "affine").to(self.gamma)
        scale, shift = self.affine()
        norm.gamma.copy_(scale)
        assert norm.beta is not None
        norm.beta.copy_(shift)
        return norm


def make_norm(width: int, kind: str, *, degree: int = 2, newton: int = 0, eps: float = 1e-5) -> Norm | BatchNorm:
    """Return the norm of a name, `batch` included."""
    return BatchNorm(width, eps=eps) if kind == BATCH else Norm(width, kind, degree=degree, newton=newton, eps=eps)


@torch.no_grad()
def fold(norm: BatchNorm, linear: nn.Linear) -> nn.Linear:
    """Return the linear that equals linear(norm(x)) in evaluation mode: W' = W diag(scale), b' = b + W shift."""
    scale, shift = norm.affine()
    return _linear(linear.weight * scale, linear.weight @ shift + (0.0 if linear.bias is None else linear.bias))


@torch.no_grad()
def fold_before(linear: nn.Linear, norm: BatchNorm) -> nn.Linear:
    """Return the linear that equals norm(linear(x)) in evaluation mode: W' = diag(scale) W, b' = scale b + shift."""
    scale, shift = norm.affine()
    return _linear(linear.weight * scale[:, None], shift if linear.bias is None else linear.bias * scale + shift)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear
