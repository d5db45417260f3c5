"""The norm behind an embedding, in a stack that opens with one (BERT): it reads what the client knows, so the client computes it,
exactly. Anywhere else a LayerNormalization is no polynomial, and refused.
"""

from __future__ import annotations

import numpy as np

from .reading import Call, Handler, Reading
from .refuse import not_elementwise, refusal


def _layer_norm(g: Reading, call: Call) -> None:
    x = call.inputs[0]
    if not _embedded(g, x):
        raise not_elementwise(call) if g.approximate else refusal(call)
    shape, scale, shift = g.shapes[x], g.constant(call, 1, "scale"), g.constant(call, 2, "bias")
    if call.attrs.get("axis", -1) % len(shape) != len(shape) - 1 or scale is None:
        raise call.fail(
            "is a LayerNormalization over other axes than the last; the client normalises each token's features"
        )
    shift = np.zeros_like(scale) if shift is None else shift
    g.emit(call, "client_norm", (x,), shape, const=scale, bias=shift, attrs={"eps": call.attrs.get("epsilon", 1e-5)})


def _embedded(g: Reading, name: str) -> bool:
    """Whether a tensor is rows of a table plus constants."""
    nodes = {node.name: node for node in g.nodes}
    while name in nodes and nodes[name].op == "add_const":
        (name,) = nodes[name].inputs
    return name in nodes and nodes[name].op == "gather"


TABLE: dict[str, Handler] = {"LayerNormalization": _layer_norm}
