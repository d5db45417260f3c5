"""Lowering by layouts alone: every plaintext-linear op as one sparse map, and what that makes possible for the other ops.

The handlers of `features` and `attention` know tokens, features and heads. Where a tensor does not lie as they want it, the
functions here take over: they know only that a layout is a map from slots to elements, so that they work for any shape and any number of
ciphertexts.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from he_backend.base import UnsupportedOpError

from .ir import Node
from .layout import power_of_two
from .placed import Placed
from .pooling import emit_pool, find_pool
from .sparse import Place, SparseMap, kron_linear, picking, places, plan_sparse

if TYPE_CHECKING:
    from .lower import Lowering

MOST_CIPHERTEXTS = 64  # of the products of one general matrix product


def matrix_of(node: Node, shape: tuple[int, ...]) -> sp.csr_matrix:
    """A plaintext-linear node as a matrix [size of result, size of argument] on flattened tensors.

    Args:
        shape: of the argument.
    """
    size = int(np.prod(shape))
    match node.op:
        case "sparse":
            return node.attrs["matrix"]
        case "linear":
            assert node.const is not None
            return kron_linear(node.const, size // shape[-1])
        case "reduce_sum":
            rows = size // shape[-1]
            return sp.kron(sp.identity(rows), np.ones((1, shape[-1])), format="csr")
    raise UnsupportedOpError(f"{node}: is no linear map with known weights")


def lower_map(low: Lowering, node: Node, x: Placed, matrix: sp.csr_matrix, bias: np.ndarray | None) -> Placed:
    """y = M x + bias, in the layout that costs least."""
    outputs, repeated = matrix.shape[0], low.repeats(node.name)
    if not repeated and len(x.ops) == 1 and (pool := find_pool(matrix, x.layout[0])) is not None:
        return emit_pool(low, node, x, pool, bias)
    candidates = places(outputs, x.layout, matrix, repeated=repeated)
    if not repeated and outputs <= low.tokens:
        candidates = chain([_one_token(outputs, low.tokens, low.positions)], candidates)
    found = plan_sparse(matrix, x.layout, candidates, low.cost)
    return emit_map(low, node, node.name, x, found, bias, low.wanted(node.name))


def _one_token(outputs: int, tokens: int, positions: int) -> Place:
    """Output o in the slot of token o at every position: what a head on one token wants, as sums over features are sums over positions."""
    row = np.where(np.arange(tokens) < outputs, np.arange(tokens), -1)
    folds = tuple(tokens << k for k in range(positions.bit_length() - 1))
    return Place(slots=np.tile(row, positions)[None], folds=folds, period=tokens)


def move(low: Lowering, node: Node, x: Placed, index: np.ndarray, layout: np.ndarray, size: int) -> Placed:
    """Copy elements into a given layout: element o of the result is element index[o] of x, one level.

    Args:
        index: [outputs]; layout: [D, slots] of the result; size: elements of x.
    """
    name = f"{node.name}.moved.{len(low.ops)}"
    found = plan_sparse(picking(index, size), x.layout, [Place(slots=layout)], low.cost)
    return emit_map(low, node, name, x, found, None, x.factor)


def emit_map(
    low: Lowering, node: Node, name: str, x: Placed, found: SparseMap, bias: np.ndarray | None, factor: float
) -> Placed:
    """The ops of a planned map."""
    ops = []
    for part, terms in enumerate(found.targets):
        total = -1
        layout = found.layout[part]
        constant = None
        if bias is not None:
            values = np.where(layout >= 0, bias[np.maximum(layout, 0)] / factor, 0.0)
            constant = low.array(f"{name}.{part}.bias", values)
        inside = constant if not found.folds and len(terms) == 1 else None
        for term in terms:
            op = low.emit(
                "linear",
                (x.ops[term.source],),
                node.source,
                factor=factor,
                weights=low.array(f"{name}.{part}.{term.source}", term.weights * (x.factor / factor)),
                plan=[[g, [[b, row] for b, row in rows]] for g, rows in term.plan],
                bias=inside,
            )
            total = op if total < 0 else low.emit("add", (total, op), node.source, factor=factor)
        if total < 0:  # nothing of x lies in this ciphertext, as where padding fills it: 0 x holds its bias
            weights, only = low.array(f"{name}.{part}.nothing", np.zeros((1, low.slots))), [[0, [[0, 0]]]]
            total = low.emit(
                "linear", (x.ops[0],), node.source, factor=factor, weights=weights, plan=only, bias=constant
            )
            inside = constant
        if found.folds:
            total = low.emit("rotate_sum", (total,), node.source, factor=factor, steps=list(found.folds))
        if constant is not None and inside is None:
            total = low.emit("add_plain", (total,), node.source, factor=factor, array=constant)
        ops.append(total)
    return Placed(ops=tuple(ops), layout=found.layout, factor=factor, clean=found.clean)


def lower_matmul(low: Lowering, node: Node, a: Placed, b: Placed) -> Placed:
    """Product of two encrypted matrices of any shape: both spread to [.., m, n, k], multiplied, summed over k.

    Raises:
        UnsupportedOpError: it would take more than MOST_CIPHERTEXTS ciphertexts.
    """
    left, right = (low.graph.shape(name) for name in node.inputs)
    batch, m, n, k = node.shape[:-2], node.shape[-2], node.shape[-1], left[-1]
    depth = power_of_two(k)  # k is padded, so that its sum is a fold over neighbours
    total = int(np.prod(node.shape)) * depth
    parts = -(-total // low.slots)
    if depth > low.slots or parts > MOST_CIPHERTEXTS:
        raise UnsupportedOpError(
            f"{node}: spread to [{m}, {n}, {k}] it takes {parts} ciphertexts of {low.slots} slots, {MOST_CIPHERTEXTS} are allowed; "
            "attention heads of power-of-two sizes have a layout of their own"
        )
    ia = np.broadcast_to(np.arange(int(np.prod(left))).reshape(*left[:-2], m, 1, k), (*batch, m, n, k))
    ib = np.arange(int(np.prod(right))).reshape(*right[:-2], 1, k, n).swapaxes(-1, -2)
    ib = np.broadcast_to(ib, (*batch, m, n, k))
    at = np.arange(parts * low.slots)
    row, channel = at // depth, at % depth
    valid = (row < int(np.prod(node.shape))) & (channel < k)
    layout = np.where(valid, row * k + channel, -1).reshape(parts, low.slots)
    x = move(low, node, a, ia.reshape(-1), layout, int(np.prod(left)))
    y = move(low, node, b, ib.reshape(-1), layout, int(np.prod(right)))
    factor = x.factor * y.factor
    steps = [1 << i for i in range(depth.bit_length() - 1)]
    ops = []
    for pair in zip(x.ops, y.ops, strict=True):
        op = low.emit("mul", pair, node.source, factor=factor)
        ops.append(low.emit("rotate_sum", (op,), node.source, factor=factor, steps=steps) if steps else op)
    final = np.where((channel == 0) & (row < int(np.prod(node.shape))), row, -1).reshape(parts, low.slots)
    placed = Placed(ops=tuple(ops), layout=final, factor=factor, clean=False)
    if (mask := node.attrs.get("mask")) is not None:
        flat = np.broadcast_to(mask, node.shape).reshape(-1)
        diagonal = sp.diags(flat).tocsr()
        found = plan_sparse(diagonal, final, [Place(slots=final)], low.cost)
        return emit_map(low, node, f"{node.name}.masked", placed, found, None, factor)
    return placed
