"""Fold plaintext constants into weights, and move per-token factors behind linear maps.

(x . c) W         -> x (c W)              affine parts of norms, scales
(x + c) W         -> x W + c W
(x W + b) . c     -> x (W c) + b c
(x W) + c         -> x W + c
(x . r) W         -> (x W) . r            r one number a token: the inverse square root of a norm is then computed
                                          beside the product by W instead of before it, which saves a level
(A . r) B         -> (A B) . r            rows of attention are divided after the product with the values, likewise
(x . r) . c       -> (x . c) . r          where c differs by feature: a norm's gain
(A B) . M         -> masked product       attention masks, row factors and 1/sqrt(d) join the matmul node
(A B) . R[step]   -> masked product       the same of a decoding step, whose row of factors is that of its number
(x U + v) W       -> x (U W) + v W        where nobody else reads the inner map
reshape of reshape, transpose of transpose -> one
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..ir import STEP, Graph, Node
from .rewrite import View, rewrite


def feature_vector(const: np.ndarray | None, features: int) -> np.ndarray | None:
    """A constant as one number a feature of the last axis [features], or None if it varies along another axis."""
    if const is None or any(n != 1 for n in const.shape[:-1]) or (const.ndim and const.shape[-1] not in (1, features)):
        return None
    return np.broadcast_to(const.reshape(-1), (features,)) if const.size in (1, features) else None


def _into_next(node: Node, view: View) -> list[Node] | None:
    """(x . c) W and (x + c) W."""
    maker = view.maker(node.inputs[0], "mul_const", "add_const") if node.op == "linear" else None
    if maker is None or node.const is None:
        return None
    c = feature_vector(maker.const, node.const.shape[-2])
    if c is None:
        return None
    if maker.op == "mul_const":
        return [replace(node, inputs=maker.inputs, const=c[:, None] * node.const)]
    shift = c @ node.const
    return [replace(node, inputs=maker.inputs, bias=shift if node.bias is None else node.bias + shift)]


def _into_previous(node: Node, view: View) -> list[Node] | None:
    """(x W + b) . c and (x W + b) + c."""
    maker = view.maker(node.inputs[0], "linear") if node.op in ("mul_const", "add_const") else None
    if maker is None or maker.const is None or not view.only_user(maker.name, node) or "unused" in node.attrs:
        return None
    c = feature_vector(node.const, maker.const.shape[-1])
    if c is None:
        return None
    if node.op == "add_const":
        return [replace(maker, name=node.name, bias=c if maker.bias is None else maker.bias + c)]
    bias = None if maker.bias is None else maker.bias * c
    return [replace(maker, name=node.name, const=maker.const * c, bias=bias)]


def _token_factor(node: Node, view: View) -> list[Node] | None:
    """(x . r) W -> (x W) . r with r of last axis 1."""
    maker = view.maker(node.inputs[0], "mul") if node.op == "linear" else None
    if maker is None:
        return None
    shapes = {name: view.nodes[name].shape if name in view.nodes else maker.shape for name in maker.inputs}
    rows = [name for name in maker.inputs if shapes[name][-1] == 1 and maker.shape[-1] != 1]
    if len(rows) != 1:
        return None
    (r,) = rows
    x = next(name for name in maker.inputs if name != r)
    product = replace(node, name=f"{node.name}.product", inputs=(x,), bias=None)
    scaled = replace(node, op="mul", inputs=(product.name, r), const=None, bias=None, attrs={})
    if node.bias is None:
        return [product, scaled]
    scaled = replace(scaled, name=f"{node.name}.scaled")
    return [product, scaled, replace(node, op="add_const", inputs=(scaled.name,), const=node.bias, bias=None)]


def _row_factor(node: Node, view: View) -> list[Node] | None:
    """(A . r) B -> (A B) . r, and (x . r) . c -> (x . c) . r, with r of last axis 1."""
    if node.op != "matmul" and (node.op != "mul_const" or node.const is None or node.const.size == 1):
        return None
    maker = view.maker(node.inputs[0], "mul") if len(node.inputs) == (2 if node.op == "matmul" else 1) else None
    if maker is None or not view.only_user(maker.name, node) or node.shape[:-1] != maker.shape[:-1]:
        return None
    rows = [x for x in maker.inputs if x in view.nodes and view.nodes[x].shape == (*maker.shape[:-1], 1) != maker.shape]
    if len(rows) != 1:
        return None
    (x,) = (x for x in maker.inputs if x != rows[0])
    inner = replace(node, name=f"{node.name}.product", inputs=(x, *node.inputs[1:]))
    return [inner, replace(node, op="mul", inputs=(inner.name, rows[0]), const=None, attrs={})]


def _mask(node: Node, view: View) -> list[Node] | None:
    """(A B) . M."""
    maker = view.maker(node.inputs[0], "matmul") if node.op == "mul_const" else None
    if maker is None or not view.only_user(maker.name, node) or maker.shape != node.shape:
        return None
    mask = maker.attrs.get("mask")
    return [replace(maker, name=node.name, attrs={"mask": node.const if mask is None else mask * node.const})]


def _step_rows(node: Node, view: View) -> list[Node] | None:
    """(A B) . R[step]."""
    maker = view.maker(node.inputs[0], "matmul") if node.op == "mul_step" else None
    if maker is None or STEP in maker.inputs or not view.only_user(maker.name, node) or maker.shape != node.shape:
        return None
    return [replace(maker, name=node.name, inputs=(*maker.inputs, STEP), const=node.const)]


def _chain(node: Node, view: View) -> list[Node] | None:
    """(x U + v) W."""
    maker = view.maker(node.inputs[0], "linear") if node.op == "linear" else None
    if maker is None or maker.const is None or node.const is None or not view.only_user(maker.name, node):
        return None
    bias = node.bias
    if maker.bias is not None:
        bias = maker.bias @ node.const + (0.0 if bias is None else bias)
    return [replace(node, inputs=maker.inputs, const=maker.const @ node.const, bias=bias)]


def _views(node: Node, view: View) -> list[Node] | None:
    """reshape(reshape(x)) and transpose(transpose(x))."""
    maker = view.maker(node.inputs[0], node.op) if node.op in ("reshape", "transpose") else None
    if maker is None:
        return None
    if node.op == "reshape":
        return [replace(node, inputs=maker.inputs)]
    perm = [maker.attrs["perm"][p] for p in node.attrs["perm"]]
    return [replace(node, inputs=maker.inputs, attrs={"perm": perm})]


def fold(graph: Graph) -> Graph:
    """Apply all foldings to a fixed point."""
    return rewrite(graph, [_into_next, _into_previous, _token_factor, _row_factor, _mask, _step_rows, _chain, _views])
