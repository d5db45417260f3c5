"""LaS, local and smooth attention: an option of every attention mixer that costs no ciphertext product.

Zimerman and Wolf, *Viewing Transformers Through the Lens of Long Convolutions Layers*, ICML 2024, arXiv 2311.16620
(methods.md 8):

    local     scores of head c are multiplied by exp(-alpha_c |i - j|) before the non-linearity; alpha_0 = 0
    smooth    average pooling of width P along each row of weights, after the non-linearity

Under x^p a decayed score has weight exp(-p alpha |i - j|), under softmax it becomes neutral: choose the strength
smaller by p. Pooling rows is a Toeplitz matrix on the values, AP(A) V = A (T V), so nothing but V is touched; decay
is a constant that merges with mask and scale.

Centred pooling of a causal row gives weight to future keys. So the causal form is one-sided: T[j + u, j] = 1/P for
u = 0 .. P-1, a trailing average of the values; the first P - 1 keys lose a little weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LocalSmooth:
    """Decay and smoothing for `heads` heads; plain constants, no parameters and no state.

    Args: `decay` B >= 0, the largest alpha (ours: alpha_c = B 2^(c - H + 1) for c > 0, spread exponentially in (0, B]);
    `width` P >= 1, positions averaged, odd unless `causal`.
    """

    def __init__(self, heads: int, *, decay: float, width: int, causal: bool) -> None:
        if decay < 0:
            raise ValueError(f"las_decay is {decay}; it must be at least 0, which is none")
        if decay and heads < 2:
            raise ValueError(f"las_decay is {decay} with {heads} head, whose alpha is 0; use 2 heads or more")
        if width < 1 or not (causal or width % 2):
            raise ValueError(f"las_width is {width}; it must be at least 1, and odd where attention is not causal")
        self.width, self.causal = width, causal
        self.alphas = tuple(decay * 2.0 ** (c - heads + 1) if c else 0.0 for c in range(heads))

    def decay(self, t: int, like: Tensor) -> Tensor:
        """Return exp(-alpha_c |i - j|), [H, T, T], in the type and on the device of `like`."""
        i_T = torch.arange(t, dtype=like.dtype, device=like.device)
        alpha_H = torch.tensor(self.alphas, dtype=like.dtype, device=like.device)
        return torch.exp(-alpha_H[:, None, None] * (i_T[:, None] - i_T).abs())

    def toeplitz(self, t: int, like: Tensor) -> Tensor:
        """Return T, [T, T], such that A T pools the rows of A and T V smooths the values."""
        i_T = torch.arange(t, device=like.device)
        offset_TT = i_T[:, None] - i_T
        back = self.width - 1 if self.causal else self.width // 2
        ahead = self.width - 1 - back
        return ((offset_TT <= back) & (offset_TT >= -ahead)).to(like.dtype) / self.width

    def smooth(self, v_BHTK: Tensor) -> Tensor:
        """Return T V: each value becomes the average of its neighbours (of those before it, if causal)."""
        return v_BHTK if self.width == 1 else self.toeplitz(v_BHTK.shape[2], v_BHTK) @ v_BHTK

    def pool(self, a_BHTT: Tensor) -> Tensor:
        """Return A T, the matrix of the smoothed mixer."""
        return a_BHTT if self.width == 1 else a_BHTT @ self.toeplitz(a_BHTT.shape[2], a_BHTT)
