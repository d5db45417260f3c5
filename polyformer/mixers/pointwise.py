"""Pointwise attention: y = (1/S(L)) (M . sigma(q k^T / sqrt(K))) v, no normaliser and no division.

*Converting Transformers to Polynomial Form for Secure Inference Over Homomorphic Encryption*, arXiv 2311.08610
(methods.md 2.2). sigma is the model's activation (GELU or ReLU there; 'polynomial' or 'square' for an encrypted one).
The mask M multiplies after sigma: GELU(0) = 0, but a fitted polynomial at 0 need not be 0. S is a public constant of
the window, so that a row never depends on the positions behind it:

    none         S = 1 everywhere: weights explode in the first epochs
    after_sqrt   S = sqrt(L) after sigma: the best
    after        S = L after sigma
    both         1/L on the scores and again after sigma: collapses
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.activations import Activation
from polyformer.mixers.base import Attention

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

SCALINGS = ("none", "after_sqrt", "after", "both")


class Pointwise(Attention):
    """Pointwise attention with sigma = `config.activation` and the scaling `config.length_scaling`. Hidden keys of padding
    leave S as it is.
    """

    hides_keys = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.length_scaling not in SCALINGS:
            raise ValueError(f"unknown length_scaling {config.length_scaling!r}; known: {', '.join(SCALINGS)}")
        n = config.length
        self.before = 1 / n if config.length_scaling == "both" else 1.0
        self.after = {"none": 1.0, "after_sqrt": n**-0.5, "after": 1 / n, "both": 1 / n}[config.length_scaling]
        self.act = Activation(config.activation, degree=config.activation_degree)

    def weights(self, q_BHTK: Tensor, k_BHTK: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        """Return A_BHTT, before pooling."""
        t = q_BHTK.shape[2]
        s_BHTT = self.normed_scores(q_BHTK @ k_BHTK.transpose(-1, -2) * (self.before / math.sqrt(self.head_size)))
        if any(self.las.alphas):
            s_BHTT = s_BHTT * self.las.decay(t, s_BHTT)
        return self.act(s_BHTT) * (self.mask(t, visible_BT) * self.after)

    def forward(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        return self.project(self.weights(q, k, visible_BT) @ self.las.smooth(v))

    def matrix(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, _ = self.qkv(x_BTD)
        return self.las.pool(self.weights(q, k, visible_BT))

    def reference(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        v, t, rows = self.las.smooth(v), x_BTD.shape[1], []
        for i in range(t):
            row_BHK = torch.zeros_like(v[:, :, i])
            for j in range(i + 1 if self.causal else t):
                s_BH1 = (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True) * self.before / math.sqrt(self.head_size)
                if self.score_norm is not None:
                    scale_H, shift_H = self.score_norm.affine()
                    s_BH1 = s_BH1 * scale_H[:, None] + shift_H[:, None]
                s_BH1 = s_BH1 * self.las.decay(t, s_BH1)[:, i, j, None]
                term_BHK = self.after * self.act(s_BH1) * v[:, :, j]
                row_BHK = row_BHK + (term_BHK if visible_BT is None else term_BHK * visible_BT[:, j, None, None])
            rows.append(row_BHK)
        return self.project(torch.stack(rows, 2))

    @property
    def degree(self) -> int:
        """Scores have degree 2, sigma of degree d makes 2d, the values add 1; raises ValueError where sigma is not
        polynomial.
        """
        return 2 * self.act.degree + 1

    @property
    def depth(self) -> int:
        """q/k/v 1, shifting keys and values (the mask and 1/S go onto the values) 1, scores 1, sigma, product 1,
        output 1; raises ValueError where sigma is not polynomial.
        """
        return 1 + 1 + 1 + self.act.depth + 1 + 1
