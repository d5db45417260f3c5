"""Start powers where softmax stopped: an offset in the scores makes (1 + (s - c)/p)^p stand for e^(s - c).

PowerSoftmax knows scores in |s| only, so that a model that was just swapped forgets which keys repelled a query. But
e^s is the limit of (1 + s/p)^p, and softmax does not see an offset that is the same for a whole row. So if q and k
carry one more channel, 1 in every key and 1 - c(x)/p in the query, where c(x) is the score at which the row attends,
the powers follow the exponential near c and reach zero p below it. The head need not grow for it: the channel takes
the place of that direction of the head which moves scores least. Training does the rest. (We; no paper does this.)

Shapes: N windows, T positions, D width, H heads, G key heads, K head size, M channels that rotary positions leave
still.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor, nn

from polyformer.mixers.base import Attention
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.mixers.softmax import Softmax

STILL = 0.05  # radians: a channel that turns less over the window counts as one that does not turn
SINK = 0.01  # eps as a share of a row that attends to one key
SLOPES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)  # tried for each head, in units of 1/p
SHIFTS = (-1.5, 0.0, 1.5)  # of c, tried for each head


@torch.no_grad()
def match_powers(original: Softmax, swapped: PowerSoftmax, x_NTD: Tensor, visible_NT: Tensor | None = None) -> Tensor:
    """Rewrite q and k of `swapped` so that its powers follow the exponentials of `original` on the inputs x.

    Slope and offset of a head are those of a small grid that leave the least error in the head's outputs.

    Args:
        original: attention of the released model.
        swapped: PowerSoftmax with the same parameters and with biases.
        x_NTD: what the layer reads in the released model, some thousand positions.
        visible_NT: False where a position is padding.

    Returns:
        What is left [H]: mean square error of each head's outputs, as a share of their mean square.

    Raises:
        ValueError: `swapped` has no biases to hold the offset, or all channels of its heads turn.
    """
    if swapped.q.bias is None or swapped.k.bias is None:
        raise ValueError("the offset of the scores lives in the biases of q and k; swap with biases=True")
    p, size, root = swapped.power, original.head_size, math.sqrt(original.head_size)
    q, k, v = original.qkv(x_NTD)
    weights = original.weights(q, k, visible_NT)
    target = weights @ v
    attended_NHT = (weights * (q @ k.transpose(-1, -2) / root)).sum(-1)
    del weights
    centre_HD, centre_H = _regress(x_NTD, attended_NHT, visible_NT)

    free = free_channel(swapped, x_NTD, visible_NT)
    base_HKD, base_HK = (r.clone() for r in _rows(swapped.q, size))
    best_HKD, best_HK = base_HKD.clone(), base_HK.clone()
    best_H = torch.full((original.heads,), math.inf, device=x_NTD.device)
    energy_H = _mean_square(target, visible_NT)
    scale = (swapped.eps / SINK) ** (1 / p)
    for slope, shift in product(SLOPES, SHIFTS):
        b = slope / p
        q_HKD, q_HK = base_HKD * (b * scale), base_HK * (b * scale)
        q_HKD[:, free] = -b * scale * root * centre_HD
        q_HK[:, free] = scale * root * (1 - b * (centre_H + shift))
        _set_rows(swapped.q, q_HKD, q_HK)
        u_NHTT, d_NHT1 = swapped.powers(*swapped.qkv(x_NTD)[:2], visible_NT)
        error_H = _mean_square(u_NHTT @ v / d_NHT1 - target, visible_NT) / energy_H
        better = error_H < best_H
        best_H[better] = error_H[better]
        best_HKD[better], best_HK[better] = q_HKD[better], q_HK[better]
    _set_rows(swapped.q, best_HKD, best_HK)
    return best_H


@torch.no_grad()
def free_channel(mixer: Attention, x_NTD: Tensor, visible_NT: Tensor | None = None) -> int:
    """Free one channel of every head, make it 1 in the keys and 0 in the queries, and return its number.

    Among the channels that do not turn, q and k are rewritten in the basis in which they are balanced: the score is
    sum_m S_m a_m b_m with a, b of unit second moments and S falling. The last direction, least in its mean square, is
    given up; what is lost is S_M^2 / K, a mean square of scores. Exact where that direction is empty and nothing turns.

    Raises:
        ValueError: fewer than two channels of a head stay still over the window.
    """
    t, size = x_NTD.shape[1], mixer.head_size
    still = _still_channels(mixer, t)
    if len(still) < 2:
        raise ValueError(
            f"{len(still)} of {size} channels of a head turn by less than {STILL} over {t} tokens, 2 are needed; "
            "take a shorter window"
        )
    x_ND = x_NTD.flatten(0, 1) if visible_NT is None else x_NTD[visible_NT]
    q_HKD, q_HK = _rows(mixer.q, size)
    k_GKD, k_GK = _rows(mixer.k, size)
    shared = mixer.heads // mixer.kv_heads
    for g in range(mixer.kv_heads):
        heads = slice(g * shared, (g + 1) * shared)
        wq = torch.cat((q_HKD[heads][:, still], q_HK[heads][:, still, None]), -1).double()  # [shared, M, D + 1]
        wk = torch.cat((k_GKD[g][still], k_GK[g][still, None]), -1).double()
        moment = _second_moment(x_ND)
        root_q = _root((wq @ moment @ wq.transpose(1, 2)).mean(0))
        root_k = _root(wk @ moment @ wk.T)
        left, s_M, right = torch.linalg.svd(root_q @ root_k)
        balance = s_M.sqrt()[:, None]
        to_q, to_k = balance * (left.T @ torch.linalg.inv(root_q)), balance * (right @ torch.linalg.inv(root_k))
        new_q, new_k = (to_q @ wq).float(), (to_k @ wk).float()
        new_q[:, -1], new_k[-1] = 0.0, 0.0
        new_k[-1, -1] = 1.0
        q_HKD[heads, still], q_HK[heads, still] = new_q[..., :-1], new_q[..., -1]
        k_GKD[g, still], k_GK[g, still] = new_k[:, :-1], new_k[:, -1]
    _set_rows(mixer.q, q_HKD, q_HK)
    _set_rows(mixer.k, k_GKD, k_GK)
    return still[-1]


def _still_channels(mixer: Attention, t: int) -> list[int]:
    """Return the channels that turn by less than STILL over t positions, the stillest last."""
    if not mixer.rotary:
        return list(range(mixer.head_size))
    cosine_R = mixer.cos_TR[:t].amin(0)
    turning = [c for c in range(mixer.rotary) if cosine_R[c] > math.cos(STILL)]
    return sorted(turning, key=lambda c: float(cosine_R[c])) + list(range(mixer.rotary, mixer.head_size))


def _rows(linear: nn.Linear, size: int) -> tuple[Tensor, Tensor]:
    """Return copies of weight and bias by head: [H, K, D], [H, K]."""
    assert linear.bias is not None
    return linear.weight.view(-1, size, linear.in_features).clone(), linear.bias.view(-1, size).clone()


def _set_rows(linear: nn.Linear, weight_HKD: Tensor, bias_HK: Tensor) -> None:
    linear.weight.copy_(weight_HKD.reshape(linear.weight.shape))
    linear.bias.copy_(bias_HK.reshape(-1))


def _second_moment(x_ND: Tensor) -> Tensor:
    """Return E[(x, 1)(x, 1)^T], float64 [D + 1, D + 1]."""
    n = len(x_ND)
    square, mean = x_ND.T @ x_ND / n, x_ND.mean(0)
    top = torch.cat((square, mean[:, None]), 1)
    return torch.cat((top, torch.cat((mean, mean.new_ones(1)))[None]), 0).double()


def _root(moment: Tensor) -> Tensor:
    """Return the symmetric root of a second moment, its smallest directions lifted to stay invertible."""
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(1e-9 * values[-1]).sqrt()) @ vectors.T


def _regress(x_NTD: Tensor, y_NHT: Tensor, visible_NT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return w [H, D] and b [H] of the ridge regression y = w x + b."""
    x_ND, y_NH = x_NTD.flatten(0, 1), y_NHT.transpose(1, 2).flatten(0, 1)
    if visible_NT is not None:
        x_ND, y_NH = x_ND[visible_NT.flatten()], y_NH[visible_NT.flatten()]
    x_mean, y_mean = x_ND.mean(0), y_NH.mean(0)
    a, b = (x_ND - x_mean).double(), (y_NH - y_mean).double()
    square = a.T @ a
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64, device=square.device)
    w_DH = torch.linalg.solve(square + ridge, a.T @ b).float()
    return w_DH.T, y_mean - x_mean @ w_DH


def _mean_square(y_NHTK: Tensor, visible_NT: Tensor | None) -> Tensor:
    """Return the mean square over what belongs to a head [H], padding left out."""
    square_NHT = (y_NHTK * y_NHTK).mean(-1)
    if visible_NT is None:
        return square_NHT.mean((0, 2))
    seen = visible_NT[:, None].to(square_NHT)
    return (square_NHT * seen).sum((0, 2)) / seen.sum()
