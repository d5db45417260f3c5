"""Hyena as ONNX nodes: gates are products, convolutions are depthwise `Conv` with constant kernels.

The filters, all flips, their mix and the skip of a long convolution are one kernel c, y_i = sum_j c[i - j] v_j, with
offsets i - j from -(L - 1) to L - 1 along each axis (from 0 on where it is causal).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyformer.export_graph import Graph
from polyformer.export_layers import linear
from polyformer.mixers.hyena import SHORT, Hyena
from polyformer.mixers.hyena_nd import HyenaNd


def hyena(g: Graph, layer: Hyena, name: str, x: str) -> str:
    """Input projection and short convolution, then gate and long convolution in turn, last gate, output projection."""
    d, order, grid = layer.width, layer.order, layer.grid
    n, t = len(grid), int(np.prod(grid))
    causal = not isinstance(layer, HyenaNd)
    z = g.node("Transpose", [linear(g, layer.inputs, f"{name}.inputs", x)], f"{name}.channels", perm=[0, 2, 1])
    if n > 1:
        shape = g.constant(f"{name}.grid", np.array([1, (order + 1) * d, *grid], dtype=np.int64))
        z = g.node("Reshape", [z, shape], f"{name}.on_grid")
    around = [SHORT - 1, 0] if causal else [SHORT // 2] * (2 * n)
    z = _depthwise(g, f"{name}.short", z, layer.short.detach(), around)
    gates = [_part(g, z, f"{name}.gate.{i}", i, d) for i in range(order)]
    v = _part(g, z, f"{name}.value", order, d)
    for i in range(order - 1, 0, -1):
        v = g.node("Mul", [v, gates[i]], f"{name}.gated.{i}")
        around = [grid[0] - 1, 0] if causal else [side - 1 for side in grid] * 2
        v = _depthwise(g, f"{name}.long.{i}", v, kernel(layer, i)[:, None], around)
    v = g.node("Mul", [v, gates[0]], f"{name}.gated.0")
    if n > 1:
        flat = g.constant(f"{name}.tokens", np.array([1, d, t], dtype=np.int64))
        v = g.node("Reshape", [v, flat], f"{name}.flat")
    return linear(g, layer.o, f"{name}.o", g.node("Transpose", [v], f"{name}.out", perm=[0, 2, 1]))


@torch.no_grad()
def kernel(layer: Hyena, step: int) -> Tensor:
    """Return the kernel of long convolution `step` as `Conv` slides it, [D, *offsets], from the largest i - j down."""
    grid, h = layer.grid, layer.taps()[step - 1]
    c = torch.zeros(layer.width, *(2 * side - 1 for side in grid))
    orientations = layer.orientations(step) if isinstance(layer, HyenaNd) else [(slice(None), [], 0, None)]
    for channels, flip, k, mix_D in orientations:
        part = h[k, channels].flip(flip)
        turned = {axis % len(grid) for axis in flip}
        where: tuple[slice, ...] = (channels,)
        for a, side in enumerate(grid):
            where += (slice(0, side) if a in turned else slice(side - 1, 2 * side - 1),)
        c[where] += part if mix_D is None else part * mix_D.view(-1, *([1] * len(grid)))
    at_zero: tuple[int | slice, ...] = (slice(None), *(side - 1 for side in grid))
    c[at_zero] += layer.skip_SD[step - 1]
    if not isinstance(layer, HyenaNd):
        c = c[:, grid[0] - 1 :]
    return c.flip(list(range(1, c.ndim)))


def _depthwise(g: Graph, name: str, x: str, weight: Tensor, pads: list[int]) -> str:
    return g.node("Conv", [x, g.constant(f"{name}.weight", weight)], name, group=len(weight), pads=pads)


def _part(g: Graph, z: str, name: str, i: int, d: int) -> str:
    """Channels i D to (i + 1) D."""
    ends = [g.constant(f"{name}.{end}", np.array([at], dtype=np.int64)) for end, at in _ends(i, d)]
    return g.node("Slice", [z, *ends], name)


def _ends(i: int, d: int) -> list[tuple[str, int]]:
    return [("first", i * d), ("last", (i + 1) * d), ("axis", 1)]
