"""Rotary positions and shared key heads as ONNX nodes: what a released model does between a projection and its heads.

Both are linear in the features at each position, so that a compiler can merge them with the projection. The turn of
RoFormer (arXiv 2104.09864) is x cos + x[partner] sin, where partner c + R/2 of channel c has the sign in the sine and a
channel that does not turn has cosine 1 and sine 0. A key head that several queries read (arXiv 2305.13245) is written
as often as it is read, in the weights of its projection.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polyformer.export_graph import Graph
from polyformer.mixers.base import Attention


def projection(layer: Attention, part: str) -> nn.Linear:
    """Return the linear of q, k or v with as many heads as there are queries."""
    given: nn.Linear = getattr(layer, part)
    times = layer.heads * layer.head_size // given.out_features
    if times == 1:
        return given
    repeated = nn.Linear(given.in_features, times * given.out_features, bias=given.bias is not None)
    for mine, theirs in zip(repeated.parameters(), given.parameters(), strict=True):
        heads = theirs.detach().unflatten(0, (-1, layer.head_size)).repeat_interleave(times, 0)
        mine.data = heads.flatten(0, 1)
    return repeated


def turn(layer: Attention) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return cosines and signed sines [T, K] of the turn, and the partner of each channel of a head [K]."""
    half, channels = layer.rotary // 2, np.arange(layer.head_size)
    partner = np.concatenate([(channels[: layer.rotary] + half) % layer.rotary, channels[layer.rotary :]])
    still = torch.zeros(layer.length, layer.head_size - layer.rotary)
    cos_TK = torch.cat((layer.cos_TR, still + 1), -1)
    sin_TK = torch.cat((-layer.sin_TR[:, :half], layer.sin_TR[:, half:], still), -1)
    return cos_TK, sin_TK, partner


def partnered(layer: Attention, given: nn.Linear) -> nn.Linear:
    """Return a linear whose outputs are those of `given`, each channel's partner in its place."""
    rows = torch.arange(given.out_features).view(-1, layer.head_size)[:, torch.from_numpy(turn(layer)[2])].flatten()
    moved = nn.Linear(given.in_features, given.out_features, bias=given.bias is not None)
    for mine, theirs in zip(moved.parameters(), given.parameters(), strict=True):
        mine.data = theirs.detach()[rows]
    return moved


def turned(g: Graph, layer: Attention, name: str, part: str, x: str) -> str:
    """Append the turn of x [1, T, H, K], the queries or keys of the mixer `name`."""
    if not layer.rotary:
        return x
    own, (cos_TK, sin_TK, partner) = f"{name}.{part}", turn(layer)
    straight = g.node("Mul", [x, g.constant(f"{own}.cos", cos_TK[None, :, None])], f"{own}.straight")
    swapped = g.node("Gather", [x, g.constant(f"{own}.partner", partner)], f"{own}.swapped", axis=3)
    across = g.node("Mul", [swapped, g.constant(f"{own}.sin", sin_TK[None, :, None])], f"{own}.across")
    return g.node("Add", [straight, across], f"{own}.turned")
