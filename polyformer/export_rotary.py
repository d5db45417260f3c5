"""Rotary positions and shared key heads as ONNX nodes: what a released model does between a projection and its heads.

Both are linear in the features at each position, so that a compiler can merge them with the projection. The turn of
RoFormer (arXiv 2104.09864) is x cos + x[partner] sin, where partner c + R/2 of channel c has the sign in the sine and a
channel that does not turn has cosine 1 and sine 0. A key head that several queries read (arXiv 2305.13245) is written
as often as it is read, in the weights of its projection.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

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


def turned(g: Graph, layer: Attention, name: str, part: str, x: str) -> str:
    """Append the turn of x [1, T, H, K], the queries or keys of the mixer `name`."""
    if not layer.rotary:
        return x
    own, half, t = f"{name}.{part}", layer.rotary // 2, layer.length
    channels = np.arange(layer.head_size)
    partner = np.concatenate([(channels[: layer.rotary] + half) % layer.rotary, channels[layer.rotary :]])
    still = torch.zeros(t, layer.head_size - layer.rotary)
    cos_TK = torch.cat((layer.cos_TR, still + 1), -1)
    sin_TK = torch.cat((-layer.sin_TR[:, :half], layer.sin_TR[:, half:], still), -1)
    straight = g.node("Mul", [x, g.constant(f"{own}.cos", cos_TK[None, :, None])], f"{own}.straight")
    swapped = g.node("Gather", [x, g.constant(f"{own}.partner", partner)], f"{own}.swapped", axis=3)
    across = g.node("Mul", [swapped, g.constant(f"{own}.sin", sin_TK[None, :, None])], f"{own}.across")
    return g.node("Add", [straight, across], f"{own}.turned")
