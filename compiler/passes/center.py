"""Fold the mean of LayerNorm into weights: keep the residual stream centred instead of centring it at each norm.

x - mean(x) is the projection C = I - 11'/d. It commutes with sums, C C = C, and (a W) C = a (W C): so every map that writes
into the stream is projected once at compile time, the embedding too, and no norm has to subtract a mean.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..ir import Graph, Node
from .fuse import scalar
from .rewrite import View, rewrite


def _find(node: Node, view: View) -> list[Node] | None:
    """add(x, -mean(x)) -> center(x)."""
    if node.op != "add":
        return None
    for x, negative in (node.inputs, node.inputs[::-1]):
        factor, name = 1.0, negative
        while (maker := view.maker(name, "mul_const")) is not None and (c := scalar(maker.const)) is not None:
            factor, name = factor * c, maker.inputs[0]
        total = view.maker(name, "reduce_sum")
        if total is not None and total.inputs == (x,) and np.isclose(factor, -1.0 / node.shape[-1]):
            return [replace(node, op="center", inputs=(x,))]
    return None


def _push(node: Node, view: View) -> list[Node] | None:
    """center(a + b), center(a W + b), center(x + c), center(c x), center(center(x))."""
    if node.op != "center":
        return None
    x = node.inputs[0]
    maker = view.nodes.get(x)
    if maker is None:
        return None

    def project(m: np.ndarray) -> np.ndarray:
        m = np.broadcast_to(m, (*m.shape[:-1], node.shape[-1]))
        return m - m.mean(-1, keepdims=True)

    match maker.op:
        case "center":
            return [replace(maker, name=node.name)]
        case "add":
            halves = [replace(node, name=f"{name}.centered", inputs=(name,)) for name in maker.inputs]
            return [*halves, replace(node, op="add", inputs=tuple(h.name for h in halves))]
        case "add_const" | "add_step":
            assert maker.const is not None
            half = replace(node, name=f"{maker.inputs[0]}.centered", inputs=maker.inputs[:1])
            inputs = (half.name, *maker.inputs[1:])
            return [half, replace(node, op=maker.op, inputs=inputs, const=project(maker.const))]
        case "mul_const" if scalar(maker.const) is not None:
            half = replace(node, name=f"{maker.inputs[0]}.centered", inputs=maker.inputs)
            return [half, replace(maker, name=node.name, inputs=(half.name,))]
        case "gather":
            assert maker.const is not None
            return [replace(maker, name=node.name, const=project(maker.const))]
        case "linear":
            assert maker.const is not None
            bias = None if maker.bias is None else project(maker.bias)
            return [replace(maker, name=node.name, const=project(maker.const), bias=bias)]
    return None


def _left_over(node: Node, view: View) -> list[Node] | None:
    """Where C cannot be pushed further it is an ordinary linear map."""
    if node.op != "center":
        return None
    d = node.shape[-1]
    return [replace(node, op="linear", const=np.eye(d) - 1.0 / d)]


def _once(graph: Graph) -> Graph:
    """Make equal lookups, and equal sums of them with constants, once: each norm that reads the embedding centred its own."""
    known: dict[tuple[str, str, bytes], str] = {}
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(name, name) for name in node.inputs))
        if node.op in ("gather", "add_const") and node.const is not None:
            key = (node.op, node.inputs[0], node.const.tobytes())
            if (first := known.setdefault(key, node.name)) != node.name and node.name not in graph.outputs:
                same[node.name] = first
                continue
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def center(graph: Graph) -> Graph:
    """Fold all means; a graph without LayerNorm comes back unchanged."""
    found = rewrite(graph, [_find, _push])
    return graph if found is graph else rewrite(_once(found), [_left_over])
