"""Linear recurrences h_t = a_t h_{t-1} + b_t: one step after another, by a tree, and as a product of matrices in chunks.

`scan` is the selective scan of S6 (Mamba, arXiv 2312.00752, section 3.3) for any state. `decayed_attention` is the same
map for a state k v^T, written with matrix products: the state-space duality of Mamba-2 (arXiv 2405.21060, section 6)
for one decay a head, the chunked form of gated linear attention (arXiv 2312.06635, section 4) for one decay a key entry.

Shapes: B batch, T positions, H heads, N key entries or states, P value entries, C positions of a chunk, n chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32  # positions of a chunk: scores inside cost T C, the states between chunks T N P / C
ENTRY_CHUNK = 8  # the same where each key entry has its own decay: what is held inside is then T C N


def sequential_scan(a: Tensor, b: Tensor) -> Tensor:
    """Return h with h_t = a_t h_{t-1} + b_t, h_{-1} = 0, along dimension 1, one position after another: the oracle of
    `scan`.
    """
    h, states = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def scan(a: Tensor, b: Tensor) -> Tensor:
    """Return the same h for a and b of one shape [B, T, ...], in ceil(log2 T) rounds and 2 T products in all; h is
    `wide`.
    """
    return _Scan.apply(wide(a), wide(b))


def wide(x: Tensor) -> Tensor:
    """Return x in float32 at least. Decays and states need it: the last number of bfloat16 below 1 is 0.996, which
    forgets half in 177 positions.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Scan(torch.autograd.Function):
    """Autograd through the tree would keep every round; the gradient is itself a scan, from the end, and needs a and h
    alone: g_t = dL/dh_t + a_{t+1} g_{t+1}, dL/db_t = g_t, dL/da_t = g_t h_{t-1}.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        h = _tree(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors  # type: ignore[attr-defined]
        g = _tree(shift(a.flip(1)), grad.flip(1)).flip(1)
        return g * shift(h), g


def _tree(a: Tensor, b: Tensor) -> Tensor:
    """Pairs of neighbours are one step of a recurrence of half the length (Blelloch 1990): its states are the odd ones,
    and one step from them gives the even ones.
    """
    t = b.shape[1]
    if t == 1:
        return b
    even = t - t % 2
    a0, b0, a1, b1 = a[:, 0:even:2], b[:, 0:even:2], a[:, 1::2], b[:, 1::2]
    h1 = _tree(a1 * a0, a1 * b0 + b1)
    h = torch.stack((a0 * shift(h1) + b0, h1), 2).flatten(1, 2)
    return h if t == even else torch.cat((h, a[:, -1:] * h[:, -1:] + b[:, -1:]), 1)


def shift(x: Tensor) -> Tensor:
    """Return x one position later along dimension 1, with a zero in front."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def decays(log_a_BHTN: Tensor) -> Tensor:
    """Return exp(sum_{k=j+1..i} log a_k) as [B, H, T(i), T(j), N], 0 for j > i.

    One exponential of a difference of sums: the product of two exponentials would leave the range of floats. The
    result is `wide`.
    """
    sums = wide(log_a_BHTN).cumsum(-2)
    t = sums.shape[-2]
    hidden_TT1 = torch.ones(t, t, dtype=torch.bool, device=sums.device).triu(1)[..., None]
    return (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(hidden_TT1, -math.inf).exp()


def decayed_scores(q_BHTN: Tensor, k_BHTN: Tensor, log_a: Tensor) -> Tensor:
    """Return A_BHTT = sum_n q_in k_jn exp(sum_{k=j+1..i} log a_kn); log_a is [B, H, T, N] or [B, H, T, 1]."""
    decay = decays(log_a).to(q_BHTN.dtype)
    if log_a.shape[-1] == 1:
        return (q_BHTN @ k_BHTN.transpose(-1, -2)) * decay[..., 0]
    return torch.einsum("...in,...jn,...ijn->...ij", q_BHTN, k_BHTN, decay)


def decayed_attention(q_BHTN: Tensor, k_BHTN: Tensor, v_BHTP: Tensor, log_a: Tensor) -> Tensor:
    """Return y_BHTP = A v for the A of `decayed_scores`, in time linear in T: scores inside a chunk, states between.

    The last axis of log_a is N or 1 and its other axes broadcast to [B, H, T].
    """
    b, h, t = v_BHTP.shape[:3]
    log_a = log_a.expand(b, h, t, log_a.shape[-1])
    chunk = CHUNK if log_a.shape[-1] == 1 else ENTRY_CHUNK
    if t <= chunk:
        return decayed_scores(q_BHTN, k_BHTN, log_a) @ v_BHTP
    q, k, v, g = (_chunks(x, chunk) for x in (q_BHTN, k_BHTN, v_BHTP, log_a))  # [B, H, n, C, ...]
    inside = decayed_scores(q.flatten(1, 2), k.flatten(1, 2), g.flatten(1, 2)) @ v.flatten(1, 2)
    sums = wide(g).cumsum(-2)
    total = sums[..., -1:, :]
    states = (k * (total - sums).exp().to(k.dtype)).transpose(-1, -2) @ v  # what a chunk adds, [B, H, n, N, P]
    carried = total.transpose(-1, -2).exp().expand_as(states)
    before = shift(scan(carried.transpose(1, 2), states.transpose(1, 2))).transpose(1, 2)
    y = inside.view(v.shape) + (q * sums.exp().to(q.dtype)) @ before.to(q.dtype)
    return y.flatten(2, 3)[:, :, :t]


def decayed_flops(t: int, n: int, p: int, *, entries: bool) -> int:
    """Operations of `decayed_attention` for one position and head, N = n and P = p, a multiply-add being 2; `entries`: each
    key entry has its own decay.
    """
    c = min(t, ENTRY_CHUNK if entries else CHUNK)
    inside = 2 * c * (n + p)
    # states and what is read from them; carrying a state on is one multiply-add an entry and chunk
    return inside if t <= c else inside + 4 * n * p + 2 * n * p // c


def _chunks(x_BHTN: Tensor, size: int) -> Tensor:
    """[B, H, T, N] -> [B, H, n, C, N]; zeros at the end add no key and do not decay."""
    x = F.pad(x_BHTN, (0, 0, 0, -x_BHTN.shape[2] % size))
    return x.unflatten(2, (-1, size))
