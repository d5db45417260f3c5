"""Sums of equal weights over equal windows without a single product: average pooling costs two rotations and no level.

Where every output is the same multiple of a sum over inputs that lie at the same distances from its first one, and those distances are
all sums of some steps (a 2 x 2 window: {0, 1, row, row + 1}), the map is a `rotate_sum` over the steps; its weight goes into the
factor of the result, which costs nothing. Other slots are left with sums that mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from .placed import Placed

if TYPE_CHECKING:
    from .ir import Node
    from .lower import Lowering


LARGEST = 16  # inputs of a window: the stored sum may be as many times larger than what is summed


@dataclass(frozen=True, kw_only=True)
class Pool:
    """y = weight * (x summed over `steps`), in `layout` [slots]."""

    weight: float
    steps: tuple[int, ...]
    layout: np.ndarray


def find_pool(matrix: sp.csr_matrix, source: np.ndarray) -> Pool | None:
    """The map as sums over steps, or None if it is no such thing.

    Args:
        matrix: [outputs, inputs]; source: [slots] index of an input or -1.
    """
    matrix = sp.csr_matrix(matrix)
    outputs = matrix.shape[0]
    window = matrix.nnz // max(outputs, 1)
    data = matrix.data
    if (
        not 2 <= window <= LARGEST
        or np.any(np.diff(matrix.indptr) != window)
        or np.any(data != data[0])
        or data[0] <= 0.0
    ):
        return None
    first = np.full(matrix.shape[1], -1)
    at = np.flatnonzero(source >= 0)[::-1]
    first[source[at]] = at  # the lowest slot of each input
    members = matrix.indices.reshape(outputs, window)
    where = first[members]  # [outputs, window]
    if (where < 0).any():
        return None
    order = np.argsort(where, axis=1)
    where, members = np.take_along_axis(where, order, 1), np.take_along_axis(members, order, 1)
    distances = where - where[:, :1]
    if np.any(distances != distances[0]) or (steps := _steps(distances[0].tolist())) is None:
        return None
    owner = np.full(matrix.shape[1], -1)
    owner[members[:, 0]] = np.arange(outputs)
    layout = np.where(source >= 0, owner[np.maximum(source, 0)], -1)
    for t, distance in enumerate(distances[0]):  # copies count where their whole window is there
        held = np.roll(source, -int(distance))
        layout = np.where((layout >= 0) & (held == members[np.maximum(layout, 0), t]), layout, -1)
    if np.unique(layout[layout >= 0]).size != outputs:
        return None
    return Pool(weight=float(data[0]), steps=tuple(int(s) for s in steps), layout=layout)


def _steps(distances: list[int]) -> list[int] | None:
    """Steps whose subset sums are just the distances, each once; None if there are none."""
    left, steps = sorted(distances), []
    while len(left) > 1:
        step = left[1] - left[0]
        lower: list[int] = []
        rest = list(left)
        while rest:
            low = rest.pop(0)
            if step == 0 or low + step not in rest:
                return None
            rest.remove(low + step)
            lower.append(low)
        steps.append(step)
        left = lower
    return steps


def emit_pool(low: Lowering, node: Node, x: Placed, pool: Pool, bias: np.ndarray | None) -> Placed:
    """The ops of a pool: a sum over slots and, with a bias, a plaintext sum."""
    factor = x.factor * pool.weight
    op = low.emit("rotate_sum", (x.ops[0],), node.source, factor=factor, steps=list(pool.steps))
    if bias is not None:
        values = np.where(pool.layout >= 0, bias[np.maximum(pool.layout, 0)] / factor, 0.0)
        op = low.emit("add_plain", (op,), node.source, factor=factor, array=low.array(f"{node.name}.pool.bias", values))
    return Placed(ops=(op,), layout=pool.layout[None], factor=factor, clean=False)
