"""Attention as ONNX nodes: scores, what is done to them, values; for every attention that multiplies values by a matrix.

Masks, decays, row factors and scales are constants of shape [1, H or 1, T, T]. Linear attention is written as its
matrix too, (q k^T . mask) v: under encryption the T x T products cost one level less than a state carried along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from polyformer.export_graph import Graph
from polyformer.export_layers import activation, linear
from polyformer.export_rotary import projection, turned
from polyformer.mixers.base import Attention
from polyformer.mixers.gated_linear import GatedLinear
from polyformer.mixers.linear import Linear
from polyformer.mixers.pointwise import Pointwise
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.mixers.softmax import Softmax
from polyformer.recurrence import decays


def attention(g: Graph, layer: Attention, name: str, x: str) -> str:
    """Heads split (q and k turned by their positions), scores, non-linearity, values, heads merged, (gate,) output projection."""
    t, h, k = layer.length, layer.heads, layer.head_size
    split = g.constant(f"{name}.split", np.array([1, t, h, k], dtype=np.int64))
    merge = g.constant(f"{name}.merge", np.array([1, t, h * k], dtype=np.int64))

    def heads(part: str, order: list[int]) -> str:
        y = linear(g, projection(layer, part), f"{name}.{part}", x)
        y = g.node("Reshape", [y, split], f"{name}.{part}.split")
        y = y if part == "v" else turned(g, layer, name, part, y)
        return g.node("Transpose", [y], f"{name}.{part}.heads", perm=order)

    q, key, v = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    if layer.las.width > 1:
        smoothing = g.constant(f"{name}.v.toeplitz", layer.las.toeplitz(t, layer.mask_TT)[None, None])
        v = g.node("MatMul", [smoothing, v], f"{name}.v.smooth")
    scores = g.node("MatMul", [q, key], f"{name}.scores")
    y = WEIGHTED[type(layer)](g, layer, name, scores, v)
    y = g.node(
        "Reshape", [g.node("Transpose", [y], f"{name}.out.heads", perm=[0, 2, 1, 3]), merge], f"{name}.out.merged"
    )
    if isinstance(layer, GatedLinear) and layer.g is not None:
        y = g.node("Mul", [y, linear(g, layer.g, f"{name}.g", x)], f"{name}.out.gated")
    return linear(g, layer.o, f"{name}.o", y)


def _power_softmax(g: Graph, layer: PowerSoftmax, name: str, scores: str, v: str) -> str:
    f_T1 = layer.public_factor()
    mask, shift = _score_map(layer)
    masked, u = g.constant(f"{name}.mask", mask * f_T1), f"{name}.masked"
    if shift is None:
        g.node("Mul", [scores, masked], u)
    else:
        product = g.node("Mul", [scores, masked], f"{name}.masked.product")
        g.node("Add", [product, g.constant(f"{name}.shift", shift * f_T1)], u)
    powers = power_of(g, name, u, layer.power)
    eps = g.constant(f"{name}.eps", (layer.eps * f_T1**layer.power)[None, None])
    total = g.node(
        "ReduceSum", [powers, g.constant(f"{name}.axis", np.array([-1], dtype=np.int64))], f"{name}.sum", keepdims=1
    )
    d = g.node("Add", [total, eps], f"{name}.denominator")
    numerator = g.node("MatMul", [powers, v], f"{name}.numerator")
    if layer.reciprocal is not None:
        inverse = g.polynomial(layer.reciprocal, f"{name}.reciprocal", d)
    elif layer.steps:
        inverse = _goldschmidt(g, layer, f"{name}.reciprocal", d)
    else:
        return g.node("Div", [numerator, d], f"{name}.out")
    return g.node("Mul", [numerator, inverse], f"{name}.out")


def _score_map(layer: Attention) -> tuple[Tensor, Tensor | None]:
    """Return constants [1, H or 1, T, T]: masked scores are (q k^T) scale + shift, mask, decay and BatchNorm included."""
    visible_HTT = layer.factor(layer.length).detach().double()
    visible_HTT = visible_HTT if visible_HTT.ndim == 3 else visible_HTT[None]
    if layer.score_norm is None:
        return visible_HTT[None] / math.sqrt(layer.head_size), None
    scale_H, shift_H = (c.detach().double()[:, None, None] for c in layer.score_norm.affine())
    return (visible_HTT * scale_H)[None] / math.sqrt(layer.head_size), (visible_HTT * shift_H)[None]


def power_of(g: Graph, name: str, u: str, p: int) -> str:
    """u^p by squares and products in the order of `integer_power`; the last value is called `name.power`."""
    products: list[tuple[str, str]] = []

    def product(left: str, right: str) -> str:
        products.append((left, right))
        return f"{name}.power.{len(products)}"

    base, result, k = product(u, u), "", p // 2
    while k:
        if k & 1:
            result = product(result, base) if result else base
        k >>= 1
        if k:
            base = product(base, base)
    last = f"{name}.power.{len(products)}"
    for i, (left, right) in enumerate(products, start=1):
        own = f"{name}.power.{i}"
        g.node("Mul", [left, right], f"{name}.power" if own == last else own)
    return f"{name}.power"


def _goldschmidt(g: Graph, layer: PowerSoftmax, name: str, d: str) -> str:
    start = layer.goldschmidt_start_T[: layer.length, None][None, None]
    one = g.constant(f"{name}.one", 1.0)
    y0 = g.constant(f"{name}.start", start)
    e = g.node("Sub", [one, g.node("Mul", [d, y0], f"{name}.scaled")], f"{name}.error.0")
    y = y0
    for i in range(layer.steps):
        last = i + 1 == layer.steps
        y = g.node("Mul", [g.node("Add", [e, one], f"{name}.factor.{i}"), y], name if last else f"{name}.{i}")
        if not last:
            e = g.node("Mul", [e, e], f"{name}.error.{i + 1}")
    return y


def _softmax(g: Graph, layer: Softmax, name: str, scores: str, v: str) -> str:
    scale, shift = _score_map(layer)
    plain = not any(layer.las.alphas) and shift is None
    scale_or_number: Tensor | float = 1 / math.sqrt(layer.head_size) if plain else scale
    scaled = g.node("Mul", [scores, g.constant(f"{name}.scale", scale_or_number)], f"{name}.scaled")
    if shift is not None:
        scaled = g.node("Add", [scaled, g.constant(f"{name}.shift", shift)], f"{name}.shifted")
    hidden = torch.where(layer.mask_TT == 0, -1e9, 0.0)[None, None]
    weights = g.node(
        "Softmax",
        [g.node("Add", [scaled, g.constant(f"{name}.hidden", hidden)], f"{name}.masked")],
        f"{name}.weights",
        axis=-1,
    )
    return g.node("MatMul", [weights, v], f"{name}.out")


def _pointwise(g: Graph, layer: Pointwise, name: str, scores: str, v: str) -> str:
    """sigma(scale s + shift), and the mask with the length scaling behind it: sigma(0) need not be 0."""
    decay_HTT = layer.las.decay(layer.length, layer.mask_TT).double()
    scale, u = decay_HTT[None] * (layer.before / math.sqrt(layer.head_size)), f"{name}.scaled"
    if not any(layer.las.alphas):
        scale = scale[:, :1, :1, :1]  # one number
    if layer.score_norm is None:
        g.node("Mul", [scores, g.constant(f"{name}.scale", scale)], u)
    else:
        scale_H, shift_H = (c.detach().double()[:, None, None] for c in layer.score_norm.affine())
        shift = g.constant(f"{name}.shift", decay_HTT[None] * shift_H)
        product = g.node("Mul", [scores, g.constant(f"{name}.scale", scale * scale_H)], f"{name}.product")
        g.node("Add", [product, shift], u)
    mask = g.constant(f"{name}.mask", (layer.mask_TT * layer.after)[None, None])
    weights = g.node("Mul", [activation(g, layer.act, f"{name}.act", u), mask], f"{name}.weights")
    return g.node("MatMul", [weights, v], f"{name}.out")


def _linear_attention(g: Graph, layer: Linear, name: str, scores: str, v: str) -> str:
    _check_polynomial(layer, name)
    mask_TT = layer.mask_TT.double() * layer.scale
    weights = g.node("Mul", [scores, g.constant(f"{name}.mask", mask_TT[None, None])], f"{name}.masked")
    return g.node("MatMul", [weights, v], f"{name}.out")


def _gated_linear(g: Graph, layer: GatedLinear, name: str, scores: str, v: str) -> str:
    _check_polynomial(layer, name)
    t, h = layer.length, layer.heads
    log_a = layer.log_fixed_H.double()[None, :, None, None].expand(1, h, t, 1)
    scale = layer.queries(torch.ones(1, h, t, 1, dtype=torch.float64))
    weights = g.node("Mul", [scores, g.constant(f"{name}.decays", decays(log_a)[..., 0] * scale)], f"{name}.decayed")
    return g.node("MatMul", [weights, v], f"{name}.out")


def _check_polynomial(layer: Attention, name: str) -> None:
    """Refuse what would need an operator outside of the contract: these layers have a polynomial form of their own."""
    try:
        _ = layer.degree
    except ValueError as error:
        raise ValueError(f"export_onnx cannot write {name}: {error}") from error


# scores [1, H, T, T] and values [1, H, T, K] to outputs [1, H, T, K], by the class of the layer
WEIGHTED: Mapping[type[Attention], Callable[..., str]] = {
    PowerSoftmax: _power_softmax,
    Pointwise: _pointwise,
    Softmax: _softmax,
    Linear: _linear_attention,
    GatedLinear: _gated_linear,
}
