"""Gated linear attention: S_i = diag(a_i) S_{i-1} + k_i v_i^T, y_i = q_i^T S_i / sqrt(K), then an output gate.

    decay 'fixed'   a = 1 - 2^(-5-h) of head h: RetNet, arXiv 2307.08621, section 2.2 (without its rotations)
    decay 'data'    a_i = sigmoid(W x_i + b)^(1/16), one an entry of the key: GLA, arXiv 2312.06635, section 4

    output_gate 'silu'     diag(silu(W_g x)) after each head's row is divided by its root mean square, as both papers do
    output_gate 'linear'   diag(W_g x) alone
    output_gate 'none'     nothing

A fixed decay with a linear gate or none is a polynomial: the decays are public constants. Without the division a row
is scaled by sqrt(1 - a^2) where a is fixed, which keeps it at the size of one value, and by 1/sqrt(L) otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.mixers.base import Attention
from polyformer.recurrence import decayed_attention, decayed_flops, decayed_scores, wide

if TYPE_CHECKING:
    from polyformer.model import ModelConfig

DECAYS = ("data", "fixed")
GATES = ("silu", "linear", "none")
TEMPERATURE = 16.0  # of the data-dependent decay: sigmoid^(1/16) forgets slowly
EPS = 1e-5  # below the mean square of a row


class GatedLinear(Attention):
    """Causal linear attention with the decay `config.decay` and the gate `config.output_gate`."""

    options = ("kv_heads", "rotary")  # there is no matrix of scores: no LaS, no norm over them, no other side

    log_fixed_H: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.decay not in DECAYS:
            raise ValueError(f"unknown decay {config.decay!r}; known: {', '.join(DECAYS)}")
        if config.output_gate not in GATES:
            raise ValueError(f"unknown output_gate {config.output_gate!r}; known: {', '.join(GATES)}")
        self.gate_kind = config.output_gate
        self.g = nn.Linear(config.width, config.width) if config.output_gate != "none" else None
        self.a = nn.Linear(config.width, config.width) if config.decay == "data" else None
        fixed_H = 1 - 2.0 ** (-5 - torch.arange(config.heads, dtype=torch.float64))
        self.register_buffer("log_fixed_H", fixed_H.log().float(), persistent=False)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """Return log a, [B, H, T, K] or [1, H, T, 1], `wide`."""
        if self.a is not None:
            return F.logsigmoid(wide(self.split(self.a(x_BTD)))) / TEMPERATURE
        return self.log_fixed_H[None, :, None, None].expand(1, self.heads, x_BTD.shape[1], 1)

    def queries(self, q_BHTK: Tensor) -> Tensor:
        """Return q with the scale of the scores."""
        q_BHTK = q_BHTK * self.head_size**-0.5
        if self.gate_kind == "silu":
            return q_BHTK
        if self.a is not None:
            return q_BHTK * self.length**-0.5
        return q_BHTK * (-torch.expm1(2 * wide(self.log_fixed_H))).sqrt()[:, None, None].to(q_BHTK.dtype)

    def row_factor(self, y_BHTK: Tensor) -> Tensor:
        """Return what each row is multiplied with before the gate, [B, H, T, 1] or 1."""
        if self.gate_kind != "silu":
            return torch.ones_like(y_BHTK[..., :1])
        return torch.rsqrt((y_BHTK * y_BHTK).mean(-1, keepdim=True) + EPS)

    def gate(self, x_BTD: Tensor) -> Tensor:
        """Return the gate of each channel, [B, H, T, K] (ones without one)."""
        if self.g is None:
            return torch.ones_like(self.split(x_BTD))
        g_BHTK = self.split(self.g(x_BTD))
        return F.silu(g_BHTK) if self.gate_kind == "silu" else g_BHTK

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        y_BHTK = decayed_attention(self.queries(q), k, v, self.log_decay(x_BTD))
        return self.o(self.merge(y_BHTK * self.row_factor(y_BHTK) * self.gate(x_BTD)))

    def matrix(self, x_BTD: Tensor) -> Tensor:
        """Return the matrix of every channel, [B, D, T, T]: a gate differs from channel to channel."""
        q, k, v = self.qkv(x_BTD)
        log_a = self.log_decay(x_BTD)
        a_BHTT = decayed_scores(self.queries(q), k, log_a)
        a_BHTT = a_BHTT * self.row_factor(a_BHTT @ v)
        gates_BHKT1 = self.gate(x_BTD).transpose(-1, -2)[..., None]
        return (a_BHTT[:, :, None] * gates_BHKT1).flatten(1, 2)

    def value(self, x_BTD: Tensor) -> Tensor:
        return super().value(x_BTD).transpose(2, 3).flatten(1, 2)[..., None]

    def project(self, y_BHTK: Tensor) -> Tensor:
        """Here every channel is a head: [B, D, T, 1] in."""
        return self.o(y_BHTK[..., 0].transpose(1, 2))

    def reference(self, x_BTD: Tensor) -> Tensor:
        """The recurrence, one key and value after another."""
        q, k, v = self.qkv(x_BTD)
        a_BHTK, q = self.log_decay(x_BTD).exp(), self.queries(q)
        state_BHKK, rows = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :]), []
        for i in range(x_BTD.shape[1]):
            state_BHKK = a_BHTK[:, :, i, :, None] * state_BHKK + k[:, :, i, :, None] * v[:, :, i, None, :]
            y_BHK = (q[:, :, i, :, None] * state_BHKK).sum(2)
            rows.append(y_BHK * self.row_factor(y_BHK))
        return self.o(self.merge(torch.stack(rows, 2) * self.gate(x_BTD)))

    def mixing(self, t: int) -> int:
        return self.heads * decayed_flops(t, self.head_size, self.head_size, entries=self.a is not None)

    @property
    def degree(self) -> int:
        """Scores 2, values 1, and 1 for a linear gate."""
        self._check_polynomial()
        return 3 + (self.g is not None)

    @property
    def depth(self) -> int:
        """q/k/v/gate 1, shifting and masking keys (the decays are part of the mask) 1, scores 1, values 1, gate 1 if
        there is one, output 1.
        """
        self._check_polynomial()
        return 5 + (self.g is not None)

    def _check_polynomial(self) -> None:
        if self.a is not None or self.gate_kind == "silu":
            raise ValueError(
                f"gated linear attention with decay {'data' if self.a is not None else 'fixed'!r} and output_gate "
                f"{self.gate_kind!r} is not polynomial; use decay 'fixed' with output_gate 'linear' or 'none'"
            )
