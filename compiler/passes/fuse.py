"""Fuse polynomial chains: products, sums and affine maps of polynomials of one tensor become one polynomial node.

Squares, powers, Newton steps and Goldschmidt iterations written as Mul and Add are found again this way, and are then
evaluated in the form that costs fewest levels. A fusion that would cost more levels than the chain is not made. Nodes that are
`kept` are steps of a form that was chosen (passes/forms.py): they are not multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from scipy import sparse

from ..ir import Graph, Node
from .rewrite import View, rewrite

NOTHING: Mapping[str, Any] = MappingProxyType({})
MAX_DEGREE = 16  # beyond it the power basis loses digits


def scalar(const: np.ndarray | None) -> float | None:
    """The one number that a constant holds, or None."""
    return float(const.reshape(-1)[0]) if const is not None and const.size == 1 else None


def polynomial_of(name: str, view: View) -> tuple[str, Polynomial]:
    """A tensor as (x, p) with tensor = p(x): through numbers added or multiplied, and one polynomial node."""
    node = view.nodes.get(name)
    if node is None:
        return name, Polynomial([0.0, 1.0])
    if node.op == "polynomial":
        return node.inputs[0], Polynomial(node.attrs["coefficients"])
    c = scalar(node.const) if node.op in ("mul_const", "add_const") else None
    if c is None or node.shape != view_shape(node, view):
        return name, Polynomial([0.0, 1.0])
    x, p = polynomial_of(node.inputs[0], view)
    return x, p * c if node.op == "mul_const" else p + c


def levels(p: Polynomial) -> int:
    return int(np.ceil(np.log2(max(1, p.degree()))))


def _node(node: Node, x: str, p: Polynomial, attrs: Mapping[str, Any] = NOTHING) -> Node:
    """A polynomial in the place of a node, with other attributes of the one that it was."""
    p = p.trim(0.0)
    if p.degree() == 0:  # x^2 - x^2: no polynomial is left to evaluate, only its constant
        size = math.prod(node.shape)
        nothing, bias = sparse.csr_matrix((size, size)), np.full(size, p.coef[0]) if p.coef[0] else None
        return replace(node, op="sparse", inputs=(x,), const=None, bias=bias, attrs={"matrix": nothing})
    attrs = {"interval": None, **attrs, "coefficients": p.coef}
    return replace(node, op="polynomial", inputs=(x,), const=None, bias=None, attrs=attrs)


def _product(node: Node, view: View) -> list[Node] | None:
    """mul(p(x), q(x)) -> (p q)(x)."""
    if node.op != "mul" or "kept" in node.attrs:
        return None
    (x, p), (y, q) = (polynomial_of(name, view) for name in node.inputs)
    if node.inputs[0] == node.inputs[1]:
        return [_node(node, x, p * p)] if p.degree() * 2 <= MAX_DEGREE else None
    if x != y:  # mul(x, q(x)): the identity of one side may be the variable of the other
        return None
    r = p * q
    fits = r.degree() <= MAX_DEGREE and levels(r) <= max(levels(p), levels(q)) + 1
    return [_node(node, x, r)] if fits else None


def _sum(node: Node, view: View) -> list[Node] | None:
    """add(p(x), q(x)) -> (p + q)(x); a plain x + x is left alone."""
    if node.op != "add":
        return None
    (x, p), (y, q) = (polynomial_of(name, view) for name in node.inputs)
    return [_node(node, x, p + q)] if x == y and max(p.degree(), q.degree()) > 1 else None


def _after(node: Node, view: View) -> list[Node] | None:
    """A number times, or added to, a polynomial that nobody else reads."""
    if node.op not in ("mul_const", "add_const"):
        return None
    c, maker = scalar(node.const), view.maker(node.inputs[0], "polynomial")
    if c is None or maker is None or not view.only_user(maker.name, node):
        return None
    p = Polynomial(maker.attrs["coefficients"])
    return [_node(node, maker.inputs[0], p * c if node.op == "mul_const" else p + c, maker.attrs)]


def _before(node: Node, view: View) -> list[Node] | None:
    """A polynomial of c x or of x + c -> a polynomial of x."""
    if node.op != "polynomial":
        return None
    maker = view.maker(node.inputs[0], "mul_const", "add_const")
    c = scalar(maker.const) if maker is not None else None
    if maker is None or c is None or maker.shape != view_shape(maker, view):
        return None
    inner = Polynomial([0.0, c]) if maker.op == "mul_const" else Polynomial([c, 1.0])
    interval = node.attrs["interval"]
    if interval is not None:
        interval = sorted((e / c if maker.op == "mul_const" else e - c) for e in interval)
    p = Polynomial(node.attrs["coefficients"])(inner)
    return [_node(node, maker.inputs[0], p, {**node.attrs, "interval": interval})]


def view_shape(node: Node, view: View) -> tuple[int, ...]:
    """Shape of a node's first input as far as it is known; a constant may have broadcast it."""
    maker = view.nodes.get(node.inputs[0])
    return node.shape if maker is None else maker.shape


def _compose(node: Node, view: View) -> list[Node] | None:
    """p(q(x)) -> (p o q)(x) when that needs no more levels."""
    if node.op != "polynomial":
        return None
    maker = view.maker(node.inputs[0], "polynomial")
    if maker is None or not view.only_user(maker.name, node) or "kept" in {**node.attrs, **maker.attrs}:
        return None
    p, q = Polynomial(node.attrs["coefficients"]), Polynomial(maker.attrs["coefficients"])
    if p.degree() * q.degree() > MAX_DEGREE or levels(p(q)) > levels(p) + levels(q):
        return None
    return [_node(node, maker.inputs[0], p(q))]


def fuse(graph: Graph) -> Graph:
    """Apply all fusions to a fixed point."""
    return rewrite(graph, [_product, _sum, _after, _before, _compose])
