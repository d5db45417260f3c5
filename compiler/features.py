"""Lowering of linear maps and sums over features, token by token: tensors [1, T, F] in one ciphertext or in tiles of features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .attention import lower_denominators
from .general import lower_map, matrix_of
from .ir import Node
from .layout import feature_tiles, from_features, held, local, power_of_two, to_features
from .matvec import plan_matvec
from .placed import Placed

if TYPE_CHECKING:
    from .lower import Lowering


def lower_linear(low: Lowering, node: Node) -> Placed:
    assert node.const is not None
    x = low.placed[node.inputs[0]]
    features_in, features_out = node.const.shape[-2:]
    shape = low.graph.shape(node.inputs[0])
    sources = [to_features(part, low.tokens, features_in) for part in x.layout]
    if low.tokens == 1 or shape != (1, low.tokens, features_in) or any(f is None for f in sources):
        rows = int(np.prod(shape[:-1]))
        bias = None if node.bias is None else np.broadcast_to(node.bias, (rows, features_out)).reshape(-1)
        return lower_map(low, node, x, matrix_of(node, shape), bias)
    heads = low.goes_to_heads(node.name)
    targets = heads.features if heads is not None else feature_tiles(features_out, low.positions)
    factor = low.wanted(node.name)
    ops = []
    for part, target in enumerate(targets):
        constant = None
        if node.bias is not None:
            spread = np.broadcast_to(node.bias, (low.tokens, features_out))[:, np.maximum(target, 0)]
            values = np.where(target >= 0, spread, 0.0).T.reshape(-1)
            constant = low.array(f"{node.name}.{part}.bias", values / factor)
        ops.append(_tile(low, node, x, [f for f in sources if f is not None], part, target, constant, factor))
    layout = np.stack([from_features(target, low.tokens, features_out) for target in targets])
    return Placed(ops=tuple(ops), layout=layout, factor=factor, heads=heads)


def _tile(
    low: Lowering,
    node: Node,
    x: Placed,
    sources: list[np.ndarray],
    part: int,
    target: np.ndarray,
    bias: str | None,
    factor: float,
) -> int:
    """One ciphertext of a linear map's result: a matrix-vector product of every source ciphertext, those with equal folds summed first."""
    assert node.const is not None
    t = low.tokens
    columns = held(target)
    partial: dict[tuple[int, ...], int] = {}
    for i, source in enumerate(sources):
        rows = held(source)
        matrix = node.const[..., rows, :][..., columns] * (x.factor / factor)
        plan = plan_matvec(local(source, rows), local(target, columns), matrix, low.cost)
        weights = plan.weights
        if weights.ndim == 3:  # a token's own weights lie in its slots: [T, R, P] -> [R, P T]
            weights = weights.transpose(1, 2, 0).reshape(len(plan.rotations), -1)
        alone = len(sources) == 1 and not plan.folds
        op = low.emit(
            "linear",
            (x.ops[i],),
            node.source,
            factor=factor,
            weights=low.array(f"{node.name}.{part}.{i}.weights", weights),
            plan=[[g * t, [[b * t, row] for b, row in terms]] for g, terms in plan.plan],
            bias=bias if alone else None,
        )
        if alone:
            return op
        known = partial.get(plan.folds)
        partial[plan.folds] = op if known is None else low.emit("add", (known, op), node.source, factor=factor)
    total = -1
    for folds, op in partial.items():
        if folds:
            op = low.emit("rotate_sum", (op,), node.source, factor=factor, steps=[f * t for f in folds])
        total = op if total < 0 else low.emit("add", (total, op), node.source, factor=factor)
    return total if bias is None else low.emit("add_plain", (total,), node.source, factor=factor, array=bias)


def lower_sparse(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    return lower_map(low, node, x, node.attrs["matrix"], node.bias)


def lower_reduce_sum(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    shape = low.graph.shape(node.inputs[0])
    if x.heads is not None and x.scores:
        return lower_denominators(low, node, x, x.heads)
    t, tiles = low.tokens, feature_tiles(shape[-1], low.positions)
    known = shape in ((1, t, shape[-1]), (1, shape[-1])) and len(tiles) == len(x.layout)
    known = known and np.array_equal(np.stack([from_features(tile, t, shape[-1]) for tile in tiles]), x.layout)
    if not known or (not x.clean and any((tile < 0).any() for tile in tiles)):
        return lower_map(low, node, x, matrix_of(node, shape), None)
    total = x.ops[0]
    for op in x.ops[1:]:
        total = low.emit("add", (total, op), node.source, factor=x.factor)
    period = min(power_of_two(shape[-1]), low.positions)
    if period > 1:
        steps = [t << k for k in range(period.bit_length() - 1)]
        total = low.emit("rotate_sum", (total,), node.source, factor=x.factor, steps=steps)
    # The sum is complete in every slot of its row; unused slots of a periodic layout hold it too.
    return Placed(ops=(total,), layout=np.tile(np.arange(t), low.positions)[None], factor=x.factor, clean=False)
