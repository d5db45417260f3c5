"""The fused form of PowerSoftmax: rows of powers in tiles, no T x T value kept for the backward pass.

    d_i = eps f_i^p + sum_j (f_i s_ij)^p,   y_i = sum_j (f_i s_ij)^p v_j  [/ d_i],   s_ij = q_i . k_j / sqrt(K)

`power_sums` returns y and d with gradients for any use of both, so that the `Tap` and the range losses stay outside;
so does the reciprocal where it is not exact. A tile holds the scores of some queries of some heads against every key
that one of these queries sees: causal tiles end at their last query. Kept for the backward pass are q, k, v, f, d and
y; scores and powers are made again (as Dao et al. do for softmax, FlashAttention, arXiv 2205.14135, section 3.1; a
power needs no running maximum across tiles, since a row of scores is whole in its tile).

What bounds it: 2 products of matrices forward and 5 backward, each of 2 K flops a score, beside 6 and 7 passes over a
tile that stays in the second-level cache (p = 4). p is even: one u^(p-2) by repeated squaring gives u^p and u^(p-1).
Factors known before the scores are folded into q, the gradient's p f / sqrt(K) into q and dq: K numbers a row, not T.
Fresh memory costs more than arithmetic here, so results lie as [B, T, H, K], in which neither the split into heads nor
their merging copies, forward or backward, and the tiles of one call share their memory.

Shapes: N heads of a tile, of one or several sequences, Q queries and J keys of a tile. Products of matrices are made
in the type of q; powers and sums are `wide`, since a p-th power multiplies a relative error by p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from polyformer.recurrence import wide

QUERIES = 64  # rows of a tile: of a diagonal block of causal scores half is wasted
SCORES = 1 << 18  # entries of a tile: 1 MB in float32
DEVICE_QUERIES, DEVICE_SCORES = 512, 1 << 25  # an accelerator hides latency instead: few and large tiles
Slices = tuple[slice, slice]  # of sequences and heads


def power_sums(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    f_T1: Tensor | None,
    *,
    power: int,
    eps: float,
    causal: bool,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [B, H, T, K] in the type of v (with `divide` over d, else not) and d [B, H, T, 1], `wide`.

    Args: `f_T1` public row factors; None takes those of the stable form, 1/max(||s_i||_inf, eps^(1/p)), detached.
    `power` even, `eps` positive. A hidden key is a zero vector k_j: its score and its power are exactly 0.
    """
    return _PowerSums.apply(q_BHTK, k_BHTK, v_BHTK, f_T1, power, eps, causal, divide)


class _PowerSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f_T1: Tensor | None,
        power: int,
        eps: float,
        causal: bool,
        divide: bool,
    ) -> tuple[Tensor, Tensor]:
        y, tiles = _like(v), _Tiles(q, causal)
        d = torch.empty(*q.shape[:3], 1, dtype=tiles.kind, device=q.device)
        f = torch.empty_like(d) if f_T1 is None else f_T1.to(d).expand(d.shape)
        scale, floor = 1 / math.sqrt(q.shape[-1]), eps ** (1 / power)
        for heads in tiles.heads():
            k_NTK, v_NTK = tiles.gathered("k", k[heads]), tiles.gathered("v", v[heads])
            q_NTK = tiles.gathered("q", q[heads], scale if f_T1 is None else f[heads] * scale)
            f_NT1, d_NT1, y_NTK = tiles.memory("f", f[heads]), tiles.memory("d", d[heads]), tiles.memory("y", v[heads])
            for rows, keys in tiles.rows():
                u_NQJ = tiles.scores(q_NTK[:, rows], k_NTK[:, keys], rows)
                if f_T1 is None:
                    largest = torch.maximum(u_NQJ.amax(-1, keepdim=True), u_NQJ.amin(-1, keepdim=True).neg_())
                    f_NT1[:, rows] = largest.clamp_min_(floor).reciprocal_()
                    u_NQJ.mul_(f_NT1[:, rows])
                w_NQJ = _power(u_NQJ.mul_(u_NQJ), power // 2, tiles.tile(1, u_NQJ.shape))
                d_NT1[:, rows] = w_NQJ.sum(-1, keepdim=True)
                y_NTK[:, rows] = torch.bmm(w_NQJ.to(v.dtype), v_NTK[:, keys])
            if f_T1 is None:
                f[heads] = f_NT1.view(f[heads].shape)
            d_group = d[heads].copy_(d_NT1.view(d[heads].shape)).add_(f[heads] ** power, alpha=eps)
            y_group = y_NTK.view(y[heads].shape)
            y[heads] = y_group / d_group if divide else y_group
        ctx.save_for_backward(q, k, v, f, d, y)
        ctx.settings = power, causal, divide  # type: ignore[attr-defined]
        return y, d

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gy: Tensor, gd: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, f, d, y = ctx.saved_tensors  # type: ignore[attr-defined]
        power, causal, divide = ctx.settings  # type: ignore[attr-defined]
        dq, dk, dv = _like(q), _like(k), _like(v)
        scale, half = 1 / math.sqrt(q.shape[-1]), power // 2
        tiles = _Tiles(q, causal)
        for heads in tiles.heads():
            k_NTK, v_NTK = tiles.gathered("k", k[heads]), tiles.gathered("v", v[heads])
            factor = f[heads] * scale
            q_NTK = tiles.gathered("q", q[heads], factor)
            gn_NTK, gd_group = tiles.gathered("gn", gy[heads]), gd[heads]
            if divide:  # n = y d: the gradient of n is that of y over d, and d has a second way into the loss
                gn_NTK = tiles.gathered("gn", gy[heads], 1.0 / d[heads])
                gd_group = gd_group - (gn_NTK.view(gy[heads].shape) * y[heads]).sum(-1, keepdim=True)
            gd_NT1 = tiles.gathered("gd", gd_group)
            dq_NTK = tiles.memory("dq", q[heads])
            dk_NTK, dv_NTK = (tiles.memory(name, x[heads], tiles.kind).zero_() for name, x in (("dk", k), ("dv", v)))
            for rows, keys in tiles.rows():
                u_NQJ = tiles.scores(q_NTK[:, rows], k_NTK[:, keys], rows)
                w_NQJ = torch.mul(u_NQJ, u_NQJ, out=tiles.tile(1, u_NQJ.shape))
                if half > 1:  # u becomes u^(p-1) and its square u^p
                    below_NQJ = _power(w_NQJ, half - 1, tiles.tile(2, u_NQJ.shape))
                    u_NQJ.mul_(below_NQJ)
                    w_NQJ.mul_(below_NQJ)
                dv_NTK[:, keys] += torch.bmm(w_NQJ.to(v.dtype).transpose(1, 2), gn_NTK[:, rows])
                dw_NQJ = tiles.product(2, gn_NTK[:, rows], v_NTK[:, keys].transpose(1, 2)).add_(gd_NT1[:, rows])
                ds_NQJ = u_NQJ.mul_(dw_NQJ).to(q.dtype)  # without p f / sqrt(K)
                dq_NTK[:, rows] = torch.bmm(ds_NQJ, k_NTK[:, keys])
                dk_NTK[:, keys] += torch.bmm(ds_NQJ.transpose(1, 2), q_NTK[:, rows])
            torch.mul(dq_NTK.view(q[heads].shape), (factor * power).to(q.dtype), out=dq[heads])
            dk[heads] = dk_NTK.mul_(power).view(k[heads].shape)
            dv[heads] = dv_NTK.view(v[heads].shape)
        return dq, dk, dv, None, None, None, None, None


def _like(x_BHTK: Tensor) -> Tensor:
    """Return fresh memory that lies as [B, T, H, K], seen as [B, H, T, K]."""
    return torch.empty_like(x_BHTK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class _Tiles:
    """Which heads, rows and keys are computed together, and the memory that all tiles of a call are computed in."""

    def __init__(self, q_BHTK: Tensor, causal: bool) -> None:
        self.b, self.h, self.t, _ = q_BHTK.shape
        self.causal, self.device, self.kind = causal, q_BHTK.device, wide(q_BHTK[:0]).dtype
        queries, scores = (QUERIES, SCORES) if q_BHTK.device.type == "cpu" else (DEVICE_QUERIES, DEVICE_SCORES)
        self.queries = min(self.t, queries, max(8, scores // self.t))
        count = max(1, scores // (self.t * self.queries))
        self.sequences, self.count = max(1, count // self.h), min(count, self.h)
        self.lower_QQ = torch.ones(self.queries, self.queries, dtype=self.kind, device=self.device).tril()
        self.held: dict[str, Tensor] = {}

    def heads(self) -> Iterator[Slices]:
        """Whole sequences, or heads of one."""
        for b in range(0, self.b, self.sequences):
            for h in range(0, self.h, self.count):
                yield slice(b, b + self.sequences), slice(h, h + self.count)

    def rows(self) -> Iterator[tuple[slice, slice]]:
        """Queries of a tile and the keys that one of them sees."""
        for start in range(0, self.t, self.queries):
            stop = min(start + self.queries, self.t)
            yield slice(start, stop), slice(0, stop if self.causal else self.t)

    def memory(self, name: str, like_bhTK: Tensor, kind: torch.dtype | None = None) -> Tensor:
        """Return memory of a name for a group of heads, [N, T, K]; the first group is the largest."""
        n, shape = like_bhTK.shape[0] * like_bhTK.shape[1], like_bhTK.shape[2:]
        if name not in self.held:
            self.held[name] = torch.empty(n, *shape, dtype=kind or like_bhTK.dtype, device=self.device)
        return self.held[name][:n]

    def gathered(self, name: str, x_bhTK: Tensor, factor: Tensor | float | None = None) -> Tensor:
        """Return a copy [N, T, K] of the values of a group of heads, times a factor."""
        out = self.memory(name, x_bhTK)
        out.view(x_bhTK.shape).copy_(x_bhTK if factor is None else x_bhTK * factor)
        return out

    def tile(self, number: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Return memory number `number` in the shape of a tile."""
        name, size = str(number), math.prod(shape)
        if name not in self.held:
            most = self.sequences * self.count * self.queries * self.t
            self.held[name] = torch.empty(most, dtype=self.kind, device=self.device)
        return self.held[name][:size].view(shape)

    def product(self, number: int, a_NQK: Tensor, b_NKJ: Tensor) -> Tensor:
        """Return a b, `wide`, in memory number `number`."""
        out = self.tile(number, (*a_NQK.shape[:2], b_NKJ.shape[2]))
        return torch.bmm(a_NQK, b_NKJ, out=out) if a_NQK.dtype == self.kind else out.copy_(torch.bmm(a_NQK, b_NKJ))

    def scores(self, q_NQK: Tensor, k_NJK: Tensor, rows: slice) -> Tensor:
        """Return q k^T in memory 0, future keys 0."""
        s_NQJ = self.product(0, q_NQK, k_NJK.transpose(1, 2))
        if self.causal:
            size = rows.stop - rows.start
            s_NQJ[..., rows.start :].mul_(self.lower_QQ[:size, :size])
        return s_NQJ


def _power(x: Tensor, m: int, spare: Tensor) -> Tensor:
    """Return x^m, m >= 1, by squaring from the leading bit of m on: x itself for m = 1, else `spare`."""
    y = x
    for bit in bin(m)[3:]:
        y = torch.mul(y, y, out=spare)
        if bit == "1":
            y.mul_(x)
    return y
