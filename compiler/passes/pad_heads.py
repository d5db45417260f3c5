"""Pad the heads of attention, and the channels of a head, to powers of two, which the layout of `layout.Heads` wants.

SmolLM2 has 9 heads: 7 more of zeros, and all that is between the projections and the output map has 16. The projections get
columns of zeros, the output map rows of zeros; nothing else changes its meaning. What the padding holds on the way:

    channels   exactly 0 in queries, keys and values, so that sums over channels are what they were
    heads      anything in scores and denominators; they meet the zeros of a padded head's values

Where that cannot be kept (a polynomial with a constant term on channels, a sum over heads), the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..ir import Graph, Node
from ..layout import power_of_two

Labels = tuple[str, ...]  # of each axis: "H" heads, "K" channels of a head, "F" both in one, "" anything else


class _CannotError(Exception):
    """The padding does not stay where it is harmless."""


def pad_heads(graph: Graph) -> Graph:
    """The same function, heads and channels padded wherever tokens are a power of two; the graph itself if none need it."""
    for split in graph.nodes:
        if _splits(graph, split) and split.shape[2:] != tuple(map(power_of_two, split.shape[2:])):
            try:
                return pad_heads(_Padding(graph, split.shape[2], split.shape[3]).run())
            except _CannotError:
                continue
    return graph


def _splits(graph: Graph, node: Node) -> bool:
    """Whether a node makes heads [1, T, H, K] of features [1, T, F], of a size that attention can have."""
    if node.op != "reshape" or len(node.shape) != 4 or graph.steps:
        return False
    before = graph.shape(node.inputs[0])
    return (
        before == (1, node.shape[1], node.shape[2] * node.shape[3]) and node.shape[1] == power_of_two(node.shape[1]) > 1
    )


class _Padding:
    """One pass over a graph whose heads are `heads` x `channels`, with the labels of every tensor so far."""

    def __init__(self, graph: Graph, heads: int, channels: int) -> None:
        self.graph, self.nodes = graph, graph.by_name
        self.sizes = {"H": heads, "K": channels, "F": heads * channels}
        self.wanted = {"H": power_of_two(heads), "K": power_of_two(channels)}
        self.wanted["F"] = self.wanted["H"] * self.wanted["K"]
        self.labels: dict[str, Labels] = {name: ("",) * len(shape) for name, shape in graph.inputs.items()}
        self.seeds: set[str] = set()
        for node in graph.nodes:
            if _splits(graph, node) and node.shape[2:] == (heads, channels):
                self._seed(node.inputs[0])

    def run(self) -> Graph:
        """Raises _CannotError where the padding would do harm."""
        made = tuple(self._padded(node) for node in self.graph.nodes)
        if any(self.labels[self.graph.output]):
            raise _CannotError
        return replace(self.graph, nodes=made)

    def _seed(self, name: str) -> None:
        """Find the linear maps whose features become heads: through what acts on each element alone."""
        node = self.nodes.get(name)
        if node is None:
            raise _CannotError
        if node.op == "linear":
            self.seeds.add(name)
        elif node.op in ("add", "mul", "add_const", "mul_const", "polynomial"):
            for wide in (i for i in node.inputs if self.graph.shape(i)[-1] == self.sizes["F"]):
                self._seed(wide)
        else:
            raise _CannotError

    def _padded(self, node: Node) -> Node:
        given = [self.labels[name] for name in node.inputs]
        if node.name not in self.seeds and not any(any(labels) for labels in given):
            self.labels[node.name] = ("",) * len(node.shape)
            return node
        if node.op not in RULES:
            raise _CannotError
        labels, node = RULES[node.op](self, node, *given)
        self.labels[node.name] = labels
        return replace(node, shape=tuple(self.wanted.get(x, n) for x, n in zip(labels, node.shape, strict=True)))

    def pad(self, array: np.ndarray, labels: Labels, *, edge: bool = False) -> np.ndarray:
        """An array whose axes have these labels, padded with zeros, or with its last entries; axes of length 1 stay."""
        for axis, label in enumerate(labels):
            if not label or array.shape[axis] == 1:
                continue
            if label == "F":
                moved = np.moveaxis(array, axis, -1)
                split = moved.reshape(*moved.shape[:-1], self.sizes["H"], self.sizes["K"])
                split = self.pad(split, ("",) * (moved.ndim - 1) + ("H", "K"))
                array = np.moveaxis(split.reshape(*moved.shape[:-1], -1), -1, axis)
            else:
                width = [(0, 0)] * array.ndim
                width[axis] = (0, self.wanted[label] - self.sizes[label])
                array = np.pad(array, width, mode="edge" if edge else "constant")
        return array


def _linear(p: _Padding, node: Node, given: Labels) -> tuple[Labels, Node]:
    """Rows of zeros for padded features, columns of zeros for features that become heads."""
    assert node.const is not None
    if set(given[:-1]) - {""} or given[-1] not in ("", "F"):
        raise _CannotError
    out = "F" if node.name in p.seeds else ""
    lead = ("",) * (node.const.ndim - 2)
    bias = None if node.bias is None else p.pad(node.bias, (*("",) * (node.bias.ndim - 1), out))
    return (*given[:-1], out), replace(node, const=p.pad(node.const, (*lead, given[-1], out)), bias=bias)


def _reshape(p: _Padding, node: Node, given: Labels) -> tuple[Labels, Node]:
    if given == ("", "", "F") and node.shape[2:] == (p.sizes["H"], p.sizes["K"]):
        return ("", "", "H", "K"), node
    if given == ("", "", "H", "K") and node.shape[2:] == (p.sizes["F"],):
        return ("", "", "F"), node
    raise _CannotError


def _transpose(p: _Padding, node: Node, given: Labels) -> tuple[Labels, Node]:
    return tuple(given[axis] for axis in node.attrs["perm"]), node


def _matmul(p: _Padding, node: Node, a: Labels, b: Labels, *step: Labels) -> tuple[Labels, Node]:
    if step or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2] or a[-1] not in ("", "K"):
        raise _CannotError
    labels = (*a[:-1], b[-1])
    mask = node.attrs.get("mask")
    if mask is not None:
        mask = p.pad(mask, labels[len(labels) - mask.ndim :])
    return labels, replace(node, attrs={**node.attrs, "mask": mask})


def _both(p: _Padding, node: Node, a: Labels, b: Labels) -> tuple[Labels, Node]:
    """Sum or product of two tensors: an axis is padded in both, or of length 1 in one of them."""
    shapes = [p.graph.shape(name) for name in node.inputs]
    if len(a) != len(b):
        raise _CannotError
    for x, y, m, n in zip(a, b, *shapes, strict=True):
        if x != y and (n if x else m) != 1:
            raise _CannotError
        if node.op == "add" and x != y and {x, y} & {"K", "F"}:
            raise _CannotError  # the other's numbers would stand in padded channels
    return tuple(x or y for x, y in zip(a, b, strict=True)), node


def _constant(p: _Padding, node: Node, given: Labels) -> tuple[Labels, Node]:
    """A constant written out along the padded axes, so that what is added to padded channels is 0."""
    assert node.const is not None
    own = (1,) * (len(given) - node.const.ndim) + node.const.shape
    if len(own) != len(given) or len(node.shape) != len(given):
        raise _CannotError
    const = node.const.reshape(own)
    if node.op == "add_const":
        const = np.broadcast_to(const, [n if label else m for label, n, m in zip(given, node.shape, own, strict=True)])
    return given, replace(node, const=p.pad(const, given, edge=not {"K", "F"} & set(given)))


def _polynomial(p: _Padding, node: Node, given: Labels) -> tuple[Labels, Node]:
    if {"K", "F"} & set(given) and node.attrs["coefficients"][0] != 0.0:
        raise _CannotError
    return given, node


def _reduce_sum(p: _Padding, node: Node, given: Labels) -> tuple[Labels, Node]:
    if given[-1] == "H":
        raise _CannotError
    return (*given[:-1], ""), node


RULES: dict[str, Callable[..., tuple[Labels, Node]]] = {
    "linear": _linear,
    "reshape": _reshape,
    "transpose": _transpose,
    "matmul": _matmul,
    "add": _both,
    "mul": _both,
    "add_const": _constant,
    "mul_const": _constant,
    "polynomial": _polynomial,
    "reduce_sum": _reduce_sum,
}
