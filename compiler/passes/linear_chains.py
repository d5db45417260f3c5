"""Merge chains of plaintext-linear ops around a `sparse` node into one `sparse` node.

A (B x + b) + a            -> (A B) x + (A b + a)       where nobody else reads the inner one
A x + B x                  -> (A + B) x                 halves of a rotary embedding, a concat of slices
a selection of x W         -> x (columns of W)          and a reshape and transpose to heads: a fused query, key and value map

Chains without a sparse node, views that attention is recognised by (those between a linear map and a product of two encrypted
tensors) and linear maps of many tokens keep their structure, because the lowering has better plans for it. The product of two
matrices may have at most half as many entries again as both together: beyond that two steps are less work than one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
from scipy import sparse

from ..ir import Graph, Node
from ..ops import maps
from .rewrite import View, rewrite

MAX_FILL = 1.5  # entries of a product over those of its factors
VIEWS = ("reshape", "transpose")
Shape = tuple[int, ...]


def shape_of(graph: Graph, view: View, name: str) -> Shape:
    return view.nodes[name].shape if name in view.nodes else graph.input_shape


def as_map(node: Node, shape: Shape) -> tuple[sparse.csr_matrix, np.ndarray | None] | None:
    """A node that reads a tensor of this shape as matrix and bias; None if it is not linear or has a plan of its own."""
    size = math.prod(shape)
    match node.op:
        case "sparse":
            return node.attrs["matrix"], node.bias
        case "mul_const" if math.prod(node.shape) == size:
            assert node.const is not None
            return sparse.diags(np.broadcast_to(node.const, node.shape).reshape(-1), format="csr"), None
        case "add_const" if math.prod(node.shape) == size:
            assert node.const is not None
            return maps.identity(size), np.broadcast_to(node.const, node.shape).reshape(-1)
        case "reshape":
            return maps.identity(size), None
        case "transpose":
            index = np.arange(size).reshape(shape).transpose(node.attrs["perm"])
            return maps.selection(index, size), None
        case "reduce_sum":
            return maps.sums(shape, (len(shape) - 1,)), None
        case "linear" if size == shape[-1]:
            assert node.const is not None and node.const.ndim == 2
            return sparse.csr_matrix(node.const.T), node.bias
    return None


def _serves_attention(node: Node, view: View) -> bool:
    """Whether a view lies between a product of two encrypted tensors and what feeds or follows it."""
    if node.op not in VIEWS:
        return False
    through = (*VIEWS, "mul_const", "add_const", "mul")
    ahead, behind = [node], [node]
    while ahead:
        for user in view.users[ahead.pop().name]:
            if user.op == "matmul":
                return True
            if user.op in through:
                ahead.append(user)
    while behind:
        for name in behind.pop().inputs:
            maker = view.nodes.get(name)
            if maker is not None and maker.op == "matmul":
                return True
            if maker is not None and maker.op in through:
                behind.append(maker)
    return False


def _chain(graph: Graph, refused: set[object], node: Node, view: View) -> list[Node] | None:
    """A (B x + b) + a."""
    if len(node.inputs) != 1 or (maker := view.nodes.get(node.inputs[0])) is None or len(maker.inputs) != 1:
        return None
    if "sparse" not in (node.op, maker.op) or not view.only_user(maker.name, node):
        return None
    if _serves_attention(node, view) or _serves_attention(maker, view):
        return None
    outer, inner = as_map(node, maker.shape), as_map(maker, shape_of(graph, view, maker.inputs[0]))
    if outer is None or inner is None:
        return None
    (a, shift), (b, bias) = outer, inner
    pair = (node.name, maker.name, a.nnz, b.nnz)
    if pair in refused or int(np.diff(b.indptr)[a.indices].sum()) > maps.MAX_ENTRIES:
        return None
    product = (a @ b).tocsr()
    if product.nnz > MAX_FILL * (a.nnz + b.nnz):
        refused.add(pair)  # the product need not be formed again each time that the graph changes elsewhere
        return None
    moved = shift if bias is None else a @ bias + (0.0 if shift is None else shift)
    return [replace(node, op="sparse", inputs=maker.inputs, const=None, bias=moved, attrs={"matrix": product})]


def _parallel(graph: Graph, node: Node, view: View) -> list[Node] | None:
    """A x + B x."""
    if node.op != "add" or len(set(node.inputs)) < 2:
        return None
    makers = [view.nodes.get(name) for name in node.inputs]
    u, v = makers
    if u is None or v is None or u.inputs != v.inputs or "sparse" not in (u.op, v.op):
        return None
    if not (view.only_user(u.name, node) and view.only_user(v.name, node) and u.shape == v.shape == node.shape):
        return None
    shape = shape_of(graph, view, u.inputs[0])
    first, second = as_map(u, shape), as_map(v, shape)
    if first is None or second is None:
        return None
    biases = [b for _, b in (first, second) if b is not None]
    matrix = (first[0] + second[0]).tocsr()
    bias = np.sum(biases, axis=0) if biases else None
    return [replace(node, op="sparse", inputs=u.inputs, bias=bias, attrs={"matrix": matrix})]


def _squeeze(node: Node, view: View) -> list[Node] | None:
    """A sparse map whose result only loses or gains axes of length 1, as after cutting out one of three parts."""
    maker = view.maker(node.inputs[0], "sparse") if node.op == "reshape" else None
    if maker is None or not view.only_user(maker.name, node):
        return None
    if [n for n in maker.shape if n > 1] != [n for n in node.shape if n > 1]:
        return None
    return [replace(maker, name=node.name, shape=node.shape)]


def _columns(graph: Graph, node: Node, view: View) -> list[Node] | None:
    """Scaled and shifted elements of x W, seen through views, of which every token takes the same."""
    if node.op != "sparse":
        return None
    matrix = node.attrs["matrix"]
    if matrix.nnz != matrix.shape[0] or np.any(np.diff(matrix.indptr) != 1):
        return None
    index, maker = matrix.indices, view.nodes.get(node.inputs[0])
    while maker is not None and maker.op in VIEWS:
        if maker.op == "transpose":
            before = shape_of(graph, view, maker.inputs[0])
            index = np.arange(math.prod(before)).reshape(before).transpose(maker.attrs["perm"]).reshape(-1)[index]
        maker = view.nodes.get(maker.inputs[0])
    if maker is None or maker.op != "linear" or maker.const is None or maker.const.ndim != 2:
        return None
    tokens, features = math.prod(maker.shape[:-1]), maker.shape[-1]
    token, feature = (part.reshape(node.shape) for part in np.divmod(index, features))
    axis = next((a for a, n in enumerate(node.shape) if n == tokens and _counts(token, a)), None)
    if tokens == 1 or axis is None or node.shape[0] != 1 or axis == 0:
        return None
    shift = np.zeros(node.shape) if node.bias is None else node.bias.reshape(node.shape)
    chosen, factor, more = (part.take(0, axis) for part in (feature, matrix.data.reshape(node.shape), shift))
    for whole, part in ((feature, chosen), (matrix.data.reshape(node.shape), factor), (shift, more)):
        if np.any(whole != np.expand_dims(part, axis)):
            return None
    flat, factor, more = chosen.reshape(-1), factor.reshape(-1), more.reshape(-1)
    bias = None if maker.bias is None and node.bias is None else more
    if maker.bias is not None:
        bias = maker.bias[flat] * factor + more
    heads = (1, tokens, *chosen.shape[1:])
    perm = [0, *(i for i in range(2, len(heads)))]
    perm.insert(axis, 1)
    made = [replace(maker, shape=(*maker.shape[:-1], flat.size), const=maker.const[:, flat] * factor, bias=bias)]
    if made[-1].shape != heads:
        made.append(replace(node, op="reshape", inputs=(), shape=heads, attrs={}))
    if axis != 1:
        made.append(replace(node, op="transpose", inputs=(), attrs={"perm": perm}))
    names = [f"{node.name}.{step.op}" for step in made[:-1]] + [node.name]
    sources = [maker.inputs, *((name,) for name in names)]
    return [replace(step, name=name, inputs=i) for step, name, i in zip(made, names, sources, strict=False)]


def _counts(token: np.ndarray, axis: int) -> bool:
    """Whether an array is 0, 1, 2, ... along an axis and constant along all others."""
    steps = np.arange(token.shape[axis]).reshape([-1 if a == axis else 1 for a in range(token.ndim)])
    return bool(np.all(token == steps))


def _nothing(node: Node, view: View) -> list[Node] | None:
    """A sparse identity, such as the concat of all parts of a split."""
    if node.op != "sparse" or node.bias is not None:
        return None
    m = node.attrs["matrix"]
    if m.shape[0] != m.shape[1] or m.nnz != m.shape[0] or (m != maps.identity(m.shape[0])).nnz:
        return None
    return [replace(node, op="reshape", attrs={})]


def linear_chains(graph: Graph) -> Graph:
    """Merge to a fixed point; a graph without sparse nodes comes back as it is."""
    if not any(node.op == "sparse" for node in graph.nodes):
        return graph
    graph = rewrite(graph, [_squeeze])
    graph = rewrite(graph, [_nothing, partial(_chain, graph, set()), partial(_parallel, graph)])
    return rewrite(graph, [partial(_columns, graph)])  # last: the parts of a rotary embedding belong together
