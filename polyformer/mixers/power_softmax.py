"""PowerSoftmax attention: w_ij = s_ij^p / (eps + sum_l s_il^p), even p, one public eps on the sum.

*PowerSoftmax: Towards Secure LLM Inference over Encrypted Data*, arXiv 2410.09457, sections on the score function, the
stable form and the length-agnostic form; the consistent eps and the row factors are ours (methods.md 1.2). Four forms
of one map, f_i a factor of row i:

    exact    w_ij = M_ij s_ij^p / (eps + sum_l M_il s_il^p)           f_i = 1
    stable   u = f_i s,  w_ij = u_ij^p / (eps f_i^p + sum_l u_il^p)   f_i = 1/max(||s_i||_inf, eps^(1/p)), detached: training
    mean     the same with f_i = n_i^(-1/p), n_i visible keys         denominators are eps/n_i + the mean of powers
    rows     the same with public trained f_i (buffer `row_T`)        all rows share ONE narrow interval of denominators

Dividing a row by a positive number changes nothing as long as eps is rescaled with it; eps left unscaled changes
weights by up to 0.29. The division is a `Tap` and then one of: exact, `goldschmidt` steps on an interval, or a
polynomial (the `reciprocal`); the stable form, whose factors are no polynomial, has the exact one alone. `forward` runs in
tiles (`power_sums.py`) but with LaS decay or a norm over scores. Row sums are S/(S + eps) < 1: eps is an attention sink with
value 0. Masking multiplies: a masked score is 0 and 0^p = 0, never -inf.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.approx import depth_of_degree, goldschmidt_reciprocal
from polyformer.layers import PolynomialLayer, Tap
from polyformer.mixers.base import Attention
from polyformer.power_sums import power_sums

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

FORMS = ("exact", "stable", "mean", "rows")


class PowerSoftmax(Attention):
    """PowerSoftmax attention in one of the forms above; `config.reciprocal` says how 1/x is computed. Without `causal`
    all T keys are visible, n_i = T. Hidden keys of padding leave n_i as it is: a factor changes no weight.
    """

    hides_keys = True

    row_T: Tensor
    goldschmidt_start_T: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.power % 2 or not 2 <= config.power <= 12:
            raise ValueError(f"power is {config.power}; it must be even, from 2 to 12")
        if config.form not in FORMS:
            raise ValueError(f"unknown form {config.form!r}; known: {', '.join(FORMS)}")
        if config.eps <= 0:
            raise ValueError(f"eps is {config.eps}; it must be positive, it bounds the division")
        self.power, self.eps, self.form, self.reciprocal_kind = config.power, config.eps, config.form, config.reciprocal
        self.tap = Tap("denominator")
        self.steps = config.reciprocal_degree if config.reciprocal == "goldschmidt" else 0
        self.reciprocal = PolynomialLayer(config.reciprocal_degree) if config.reciprocal == "polynomial" else None
        if self.form == "rows":
            self.register_buffer("row_T", (self.visible_keys(config.length).double() ** (-1 / self.power)).float())
        if self.steps:
            self.register_buffer("goldschmidt_start_T", torch.ones(config.length))
        elif config.reciprocal not in ("exact", "polynomial"):
            raise ValueError(
                f"unknown reciprocal {config.reciprocal!r}; known: exact, polynomial, "
                "goldschmidt (whose reciprocal_degree is the number of steps, at least 1)"
            )
        if self.form == "stable" and config.reciprocal != "exact":
            raise ValueError(
                f"form is 'stable' and reciprocal {config.reciprocal!r}: the largest score of a row scales what it is evaluated "
                "on, which is no polynomial; use form 'rows' (a Rows stage before the substitution) or 'mean'"
            )

    def visible_keys(self, t: int) -> Tensor:
        """Return n [T], the number of keys that each of t rows sees."""
        return torch.arange(1, t + 1) if self.causal else torch.full((t,), t)

    def scores(self, q_BHTK: Tensor, k_BHTK: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        """Return the masked scores [B, H, T, T]; a hidden key has score exactly 0."""
        f = self.factor(q_BHTK.shape[2], visible_BT)
        if self.score_norm is None:  # one product with T x T constants instead of two
            return (q_BHTK @ k_BHTK.transpose(-1, -2)) * (f / math.sqrt(self.head_size))
        return self.normed_scores(q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(self.head_size)) * f

    def row_factor(self, t: int, s_BHTT: Tensor | None = None) -> Tensor:
        """Return f, broadcastable to [B, H, T, 1]; only the stable form looks at the scores."""
        if self.form == "stable":
            assert s_BHTT is not None
            return 1.0 / s_BHTT.detach().abs().amax(-1, keepdim=True).clamp_min(self.eps ** (1 / self.power))
        if self.form == "rows":
            return self.row_T[:t, None].to(self.mask_TT.dtype)
        if self.form == "mean":
            return self.visible_keys(t).to(self.mask_TT)[:, None] ** (-1 / self.power)
        return torch.ones(1, 1, dtype=self.mask_TT.dtype, device=self.mask_TT.device)

    def public_factor(self) -> Tensor:
        """Return f [T, 1], float64, of what is written elsewhere: the stable form, which divides exactly, as the exact one."""
        f_T1 = torch.ones(1, 1) if self.form == "stable" else self.row_factor(self.length)
        return f_T1.detach().double().expand(self.length, 1)

    def powers(self, q_BHTK: Tensor, k_BHTK: Tensor, visible_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return u^p [B, H, T, T] and the denominators eps f^p + sum u^p [B, H, T, 1]."""
        s_BHTT = self.scores(q_BHTK, k_BHTK, visible_BT)
        f = self.row_factor(s_BHTT.shape[2], s_BHTT)
        u_BHTT = integer_power(s_BHTT * f, self.power)
        return u_BHTT, self.tap(u_BHTT.sum(-1, keepdim=True) + self.eps * integer_power(f, self.power))

    def invert(self, d_BHT1: Tensor) -> Tensor:
        """Return 1/d: exact, by Goldschmidt from the public start of each row, or by the polynomial."""
        if self.reciprocal is not None:
            return self.reciprocal(d_BHT1)
        if self.steps:
            return goldschmidt_reciprocal(
                d_BHT1, self.goldschmidt_start_T[: d_BHT1.shape[2], None].to(d_BHT1.dtype), self.steps
            )
        return 1.0 / d_BHT1

    def forward(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        v = self.las.smooth(v)
        if any(self.las.alphas) or self.score_norm is not None:  # the fused form cannot touch the scores themselves
            u_BHTT, d_BHT1 = self.powers(q, k, visible_BT)
            return self.o(self.merge((u_BHTT @ v) * self.invert(d_BHT1)))
        if visible_BT is not None:  # a zero key has score 0, which is what hides it
            k = k * visible_BT[:, None, :, None].to(k.dtype)
        exact = self.reciprocal is None and not self.steps
        f_T1 = None if self.form == "stable" else self.row_factor(x_BTD.shape[1])
        y_BHTK, d_BHT1 = power_sums(q, k, v, f_T1, power=self.power, eps=self.eps, causal=self.causal, divide=exact)
        d_BHT1 = self.tap(d_BHT1)
        return self.o(self.merge(y_BHTK if exact else (y_BHTK * self.invert(d_BHT1)).to(v.dtype)))

    def matrix(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q, k, _ = self.qkv(x_BTD)
        u_BHTT, d_BHT1 = self.powers(q, k, visible_BT)
        return self.las.pool(u_BHTT * self.invert(d_BHT1))

    def reference(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        """Row by row, from the definition in the exact form; the polynomial reciprocal is applied to the scaled
        denominator.
        """
        q, k, v = self.qkv(x_BTD)
        rows = []
        v = self.las.smooth(v)
        for i in range(x_BTD.shape[1]):
            s_BHj = self.row_scores(q, k, i)
            keys = s_BHj.shape[-1]
            if visible_BT is not None:
                s_BHj = s_BHj * visible_BT[:, None, :keys]
            sums_BH = (s_BHj**self.power).sum(-1) + self.eps
            if self.reciprocal_kind == "exact":
                inverse_BH = 1.0 / sums_BH
            else:
                f = float(self.row_factor(x_BTD.shape[1]).expand(x_BTD.shape[1], 1)[i]) ** self.power
                scaled = (sums_BH * f)[:, :, None, None]
                start = self.goldschmidt_start_T[i].to(scaled.dtype) if self.steps else None
                inverse_BH = (
                    f
                    * (
                        self.reciprocal(scaled)
                        if self.reciprocal is not None
                        else goldschmidt_reciprocal(scaled, start, self.steps)
                    )[:, :, 0, 0]
                )
            w_BHj = s_BHj**self.power * inverse_BH[..., None]
            rows.append(torch.stack([w_BHj[:, :, j, None] * v[:, :, j] for j in range(keys)]).sum(0))
        return self.o(self.merge(torch.stack(rows, 2)))

    @property
    def reciprocal_degree(self) -> int:
        """Degree of the polynomial that stands for 1/x."""
        if self.reciprocal is not None:
            return self.reciprocal.degree
        if self.steps:
            return 2**self.steps - 1
        raise ValueError("the division is exact, not polynomial; set reciprocal to 'polynomial' or 'goldschmidt'")

    @property
    def degree(self) -> int:
        """Scores have degree 2, powers 2p, times values 2p + 1, times R of degree n in a denominator of degree 2p."""
        return 2 * self.power * (1 + self.reciprocal_degree) + 1

    @property
    def depth(self) -> int:
        """q/k/v 1 (rotary positions are in their weights), shifting and masking keys 1, scores 1, power log2 p, reciprocal log2 n
        (values run beside it), product 1, output 1.
        """
        reciprocal = self.steps + 1 if self.steps else depth_of_degree(self.reciprocal_degree)
        return 1 + 1 + 1 + depth_of_degree(self.power) + max(reciprocal, 1) + 1 + 1


def integer_power(x: Tensor, p: int) -> Tensor:
    """x^p for even p by products alone, p/2 = 2^a or a small product: exact zeros stay zero and gradients stay
    finite.
    """
    square = x * x
    result, base, k = None, square, p // 2
    while k:
        if k & 1:
            result = base if result is None else result * base
        k >>= 1
        if k:
            base = base * base
    assert result is not None
    return result
