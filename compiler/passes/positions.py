"""Fold what depends on the position into the projection before it: rotary embeddings cost neither a level nor a rotation.

x W, then a map S of the features of each token, another at each position   -> token t times W S_t

That is what rotary positions are (RoFormer, arXiv 2104.09864), however a file writes them: halves swapped by slices, a split
or a gather, products with cosines and sines, sums, before or after the split into heads. A key head repeated for the queries
that share it is a map of this kind as well. Looked at is what is multiplied by another encrypted tensor, because the scores
want queries and keys in a layout of their own; the weights of a token then lie in its slots, so that the product with a
matrix of each token's own takes as many rotations as that with one for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
from scipy import sparse

from he_backend.base import UnsupportedOpError

from ..ir import Graph, Node
from ..ops import maps
from .linear_chains import VIEWS, as_map, shape_of
from .rewrite import View, rewrite

BETWEEN = ("add", "add_const", "mul_const", "sparse", *VIEWS)  # of what a tensor may have gone through
MAX_WEIGHTS = 1 << 26  # numbers of a projection, 0.5 GB


def _paths(view: View, name: str) -> Iterator[Node]:
    """The nodes between a tensor and the linear maps that it comes from."""
    node = view.nodes.get(name)
    if node is not None and node.op in BETWEEN:
        yield node
        for before in node.inputs:
            yield from _paths(view, before)


def _affine(graph: Graph, view: View, name: str) -> tuple[Node, sparse.csr_matrix, np.ndarray | None] | None:
    """A tensor as (x, M, b): M x + b of the flattened result of one linear node; None if it is no such thing."""
    node = view.nodes.get(name)
    if node is not None and node.op == "linear":
        return node, maps.identity(math.prod(node.shape)), None
    if node is None or node.op not in BETWEEN:
        return None
    first, *others = (_affine(graph, view, before) for before in node.inputs)
    if first is None:
        return None
    x, a, b = first
    if node.op == "add":
        (second,) = others
        if second is None or second[0].name != x.name or second[1].shape != a.shape:
            return None
        biases = [bias for bias in (b, second[2]) if bias is not None]
        return x, (a + second[1]).tocsr(), np.sum(biases, axis=0) if biases else None
    known = as_map(node, shape_of(graph, view, node.inputs[0]))
    if known is None:
        return None
    m, shift = known
    return x, (m @ a).tocsr(), shift if b is None else m @ b + (0.0 if shift is None else shift)


def _axis(shape: tuple[int, ...], rows: np.ndarray, token: np.ndarray, tokens: int) -> int | None:
    """The axis of a tensor along which elements `rows` count the tokens that they come from."""
    places = np.unravel_index(rows, shape)
    return next((a for a in range(1, len(shape)) if shape[a] == tokens and np.array_equal(places[a], token)), None)


def _into_projection(graph: Graph, refused: set[str], node: Node, view: View) -> list[Node] | None:
    if node.op == "linear" or not any(user.op == "matmul" for user in view.users[node.name]) or node.name in refused:
        return None
    if all(between.op in VIEWS for between in _paths(view, node.name)):
        return None
    made = _folded(graph, node, view)
    if made is None:
        refused.add(node.name)
    return made


def _folded(graph: Graph, node: Node, view: View) -> list[Node] | None:
    """Projection with weights by token, split into heads, transposed; None where tokens mix or all are alike.

    Raises:
        UnsupportedOpError: the weights would be too many.
    """
    found = _affine(graph, view, node.name)
    if found is None or len(found[0].shape) != 3 or found[0].shape[0] != 1 or node.shape[0] != 1:
        return None
    maker, matrix, shift = found
    assert maker.const is not None
    _, tokens, features = maker.shape
    entries = matrix.tocoo()
    token, feature = np.divmod(entries.col, features)
    axis = _axis(node.shape, entries.row, token, tokens)
    if tokens == 1 or axis is None or maker.const.ndim != 2:
        return None
    rest = tuple(n for a, n in enumerate(node.shape) if a not in (0, axis))
    outputs = math.prod(rest)
    if (size := tokens * maker.const.shape[0] * outputs) > MAX_WEIGHTS:
        raise UnsupportedOpError(
            f"{node}: its positions give each of {tokens} tokens a projection of {maker.const.shape[0]} x {outputs}, "
            f"{size:,} weights, {MAX_WEIGHTS:,} are allowed: take a shorter window"
        )
    flat = np.moveaxis(np.arange(math.prod(node.shape)).reshape(node.shape), axis, 1).reshape(-1)
    where = np.empty_like(flat)  # of an element of the node: token * outputs + output
    where[flat] = np.arange(flat.size)
    output = where[entries.row] % outputs
    turns = [
        sparse.csr_matrix((entries.data[token == t], (feature[token == t], output[token == t])), (features, outputs))
        for t in range(tokens)
    ]
    if all((turn != turns[0]).nnz == 0 for turn in turns):
        return None  # the same for all tokens: `linear_chains` takes columns of the projection
    weights = np.stack([(turn.T @ maker.const.T).T for turn in turns])
    bias = shift
    if maker.bias is not None:
        own = matrix @ np.tile(np.broadcast_to(maker.bias, (features,)), tokens)
        bias = own if shift is None else own + shift
    perm = [0, *range(2, len(rest) + 2)]
    perm.insert(axis, 1)
    steps = [
        replace(
            maker,
            name=f"{node.name}.projection",
            shape=(1, tokens, outputs),
            const=weights,
            bias=None if bias is None else bias[flat].reshape(tokens, outputs),
        ),
        replace(
            node, name=f"{node.name}.split", op="reshape", shape=(1, tokens, *rest), const=None, bias=None, attrs={}
        ),
        replace(node, op="transpose", const=None, bias=None, attrs={"perm": perm}),
    ]
    return [steps[0], *(replace(s, inputs=(before.name,)) for before, s in pairwise(steps))]


def positions(graph: Graph) -> Graph:
    """Fold to a fixed point; a graph without such maps comes back as it is."""
    if not any(node.op == "sparse" for node in graph.nodes):
        return graph
    return rewrite(graph, [partial(_into_projection, graph, set())])
