"""Linears, norms, activations and MLPs as ONNX nodes."""

from __future__ import annotations

import math

from torch import nn

from polyformer.activations import Activation
from polyformer.export_graph import Graph
from polyformer.model import MLP
from polyformer.norms import Norm


def linear(
    g: Graph, layer: nn.Linear, name: str, x: str, *, weight: str | None = None, output: str | None = None
) -> str:
    """x W + b with W stored [in, out], or x W; `weight` names W where the graph holds it already."""
    weight = weight or g.constant(f"{name}.weight", layer.weight.T)
    if layer.bias is None:
        return g.node("MatMul", [x, weight], name, output=output)
    y = g.node("MatMul", [x, weight], f"{name}.matmul")
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


def opening(g: Graph, layer: Norm, name: str, x: str) -> str:
    """The norm behind an embedding: one node where it is an exact LayerNorm, else as any other."""
    if layer.kind != "layer":
        return norm(g, layer, name, x)
    assert layer.beta is not None
    inputs = [x, g.constant(f"{name}.gamma", layer.gamma), g.constant(f"{name}.beta", layer.beta)]
    return g.node("LayerNormalization", inputs, name, axis=-1, epsilon=layer.eps)


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
    if layer.kind == "gelu_tanh":
        return _gelu_tanh(g, name, x)
    erf = g.node(
        "Erf", [g.node("Mul", [x, g.constant(f"{name}.scale", math.sqrt(0.5))], f"{name}.scaled")], f"{name}.erf"
    )
    gate = g.node(
        "Mul",
        [g.node("Add", [erf, g.constant(f"{name}.one", 1.0)], f"{name}.shifted"), g.constant(f"{name}.half", 0.5)],
        f"{name}.gate",
    )
    return g.node("Mul", [x, gate], name)


def _gelu_tanh(g: Graph, name: str, x: str) -> str:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form of GPT-2 (Hendrycks and Gimpel, arXiv 1606.08415)."""

    def times(left: str, right: str, part: str) -> str:
        return g.node("Mul", [left, right], f"{name}.{part}")

    cube = times(times(x, x, "square"), x, "cube")
    inner = g.node("Add", [x, times(cube, g.constant(f"{name}.c3", 0.044715), "bent")], f"{name}.inner")
    tanh = g.node("Tanh", [times(inner, g.constant(f"{name}.scale", math.sqrt(2 / math.pi)), "scaled")], f"{name}.tanh")
    shifted = g.node("Add", [tanh, g.constant(f"{name}.one", 1.0)], f"{name}.shifted")
    return g.node("Mul", [x, times(shifted, g.constant(f"{name}.half", 0.5), "gate")], name)


def mlp(g: Graph, layer: MLP, name: str, x: str) -> str:
    """down(act(up x)), or gated down(act(gate x) * up x)."""
    up = linear(g, layer.up, f"{name}.up", x)
    bent = activation(
        g, layer.act, f"{name}.act", up if layer.gate is None else linear(g, layer.gate, f"{name}.gate", x)
    )
    return linear(
        g, layer.down, f"{name}.down", bent if layer.gate is None else g.node("Mul", [bent, up], f"{name}.gated")
    )
