"""Linears, norms, activations and MLPs as ONNX nodes."""

from __future__ import annotations

import math

from torch import nn

from polyformer.activations import Activation
from polyformer.export_graph import Graph
from polyformer.model import MLP
from polyformer.norms import Norm


def linear(g: Graph, layer: nn.Linear, name: str, x: str, *, output: str | None = None) -> str:
    """x W + b with W stored [in, out]."""
    y = g.node("MatMul", [x, g.constant(f"{name}.weight", layer.weight.T)], f"{name}.matmul")
    return g.node("Add", [y, g.constant(f"{name}.bias", layer.bias)], name, output=output)


def norm(g: Graph, layer: Norm, name: str, x: str) -> str:
    """Square, mean, (polynomial) inverse square root, two products; an affine norm is its last two nodes alone."""
    if layer.tap is not None:
        if layer.centre:
            x = g.node("Sub", [x, g.node("ReduceMean", [x], f"{name}.mean", axes=[-1], keepdims=1)], f"{name}.centred")
        s = g.node("ReduceMean", [g.node("Mul", [x, x], f"{name}.square")], f"{name}.variance", axes=[-1], keepdims=1)
        x = g.node("Mul", [x, _inverse_root(g, layer, name, s)], f"{name}.scaled")
    if layer.beta is None:
        return g.node("Mul", [x, g.constant(f"{name}.gamma", layer.gamma)], name)
    x = g.node("Mul", [x, g.constant(f"{name}.gamma", layer.gamma)], f"{name}.product")
    return g.node("Add", [x, g.constant(f"{name}.beta", layer.beta)], name)


def _inverse_root(g: Graph, layer: Norm, name: str, s: str) -> str:
    if layer.inverse_sqrt is None:
        root = g.node(
            "Sqrt", [g.node("Add", [s, g.constant(f"{name}.eps", layer.eps)], f"{name}.guarded")], f"{name}.root"
        )
        return g.node("Div", [g.constant(f"{name}.one", 1.0), root], f"{name}.inverse")
    y = g.polynomial(layer.inverse_sqrt, f"{name}.inverse_sqrt", s)
    for i in range(layer.newton):  # y <- 1.5 y - 0.5 (S y)(y y)
        n = f"{name}.newton.{i}"
        cube = g.node("Mul", [g.node("Mul", [s, y], f"{n}.sy"), g.node("Mul", [y, y], f"{n}.yy")], f"{n}.cube")
        y = g.node(
            "Sub",
            [
                g.node("Mul", [y, g.constant(f"{n}.c1", 1.5)], f"{n}.long"),
                g.node("Mul", [cube, g.constant(f"{n}.c3", 0.5)], f"{n}.short"),
            ],
            n,
        )
    return y


def activation(g: Graph, layer: Activation, name: str, x: str) -> str:
    """One polynomial call or one product; exact functions by their ONNX operators."""
    if layer.polynomial is not None:
        return g.polynomial(layer.polynomial, name, x)
    if layer.kind == "square":
        return g.node("Mul", [x, x], name)
    if layer.kind == "quartic":
        square = g.node("Mul", [x, x], f"{name}.square")
        return g.node("Mul", [square, square], name)
    if layer.kind == "relu":
        return g.node("Relu", [x], name)
    if layer.kind == "silu":
        return g.node("Mul", [x, g.node("Sigmoid", [x], f"{name}.sigmoid")], name)
    erf = g.node(
        "Erf", [g.node("Mul", [x, g.constant(f"{name}.scale", math.sqrt(0.5))], f"{name}.scaled")], f"{name}.erf"
    )
    gate = g.node(
        "Mul",
        [g.node("Add", [erf, g.constant(f"{name}.one", 1.0)], f"{name}.shifted"), g.constant(f"{name}.half", 0.5)],
        f"{name}.gate",
    )
    return g.node("Mul", [x, gate], name)


def mlp(g: Graph, layer: MLP, name: str, x: str) -> str:
    up = linear(g, layer.up, f"{name}.up", x)
    return linear(g, layer.down, f"{name}.down", activation(g, layer.act, f"{name}.act", up))
