"""Elementwise functions that are no polynomials: refused unless they are to be approximated (passes/approximate.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import special

from he_backend.base import Array

from .reading import Call, Handler, Reading
from .refuse import refusal

Options = Mapping[str, Any]
OR_FIT = "; or compile with --approximate, which fits it on the calibrated range"


def _gelu(x: Array, o: Options) -> Array:
    if o.get("approximate") == "tanh":
        return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + special.erf(x / np.sqrt(2.0)))


def _elu(x: Array, scale: float, alpha: float) -> Array:
    return scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


# Meaning of each function, with the attributes of the ONNX op and their defaults.
FUNCTIONS: dict[str, Callable[[Array, Options], Array]] = {
    "Relu": lambda x, o: np.maximum(x, 0.0),
    "LeakyRelu": lambda x, o: np.where(x > 0, x, o.get("alpha", 0.01) * x),
    "Elu": lambda x, o: _elu(x, 1.0, o.get("alpha", 1.0)),
    "Celu": lambda x, o: _elu(x / o.get("alpha", 1.0), o.get("alpha", 1.0), 1.0),
    "Selu": lambda x, o: _elu(x, o.get("gamma", 1.0507009873554805), o.get("alpha", 1.6732632423543772)),
    "Sigmoid": lambda x, o: special.expit(x),
    "HardSigmoid": lambda x, o: np.clip(o.get("alpha", 0.2) * x + o.get("beta", 0.5), 0.0, 1.0),
    "HardSwish": lambda x, o: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "Swish": lambda x, o: x * special.expit(o.get("alpha", 1.0) * x),
    "Tanh": lambda x, o: np.tanh(x),
    "Exp": lambda x, o: np.exp(x),
    "Log": lambda x, o: np.log(x),
    "Erf": lambda x, o: special.erf(x),
    "Gelu": _gelu,
    "Softplus": lambda x, o: np.logaddexp(0.0, x),
    "Softsign": lambda x, o: x / (1.0 + np.abs(x)),
    "Mish": lambda x, o: x * np.tanh(np.logaddexp(0.0, x)),
    "Sqrt": lambda x, o: np.sqrt(x),
    "Reciprocal": lambda x, o: 1.0 / x,
    "Abs": lambda x, o: np.abs(x),
    "Sin": lambda x, o: np.sin(x),
    "Cos": lambda x, o: np.cos(x),
}
# The same of functions with constants, which their handlers hand on.
WITH_CONSTANTS: dict[str, Callable[[Array, Options], Array]] = {
    "Pow": lambda x, o: np.power(x, o["exponent"]),
    "Clip": lambda x, o: np.clip(x, o["min"], o["max"]),
    "Max": lambda x, o: np.maximum(x, o["bound"]),
    "Min": lambda x, o: np.minimum(x, o["bound"]),
    "PRelu": lambda x, o: np.where(x > 0, x, o["slope"] * x),
}


def function(g: Reading, call: Call, kind: str, x: str, *, name: str | None = None, **options: Any) -> str:
    """Append a node `function`, which only the pass `approximate` can take away again."""
    meaning = {**FUNCTIONS, **WITH_CONSTANTS}[kind]
    attrs = {"kind": kind, "call": lambda a: meaning(a, options), "options": options}
    return g.emit(call, "function", (x,), g.shapes[x], attrs=attrs, name=name)


def _activation(g: Reading, call: Call) -> None:
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    function(g, call, call.op, call.inputs[0], **call.attrs)


def _number(call: Call, what: str, value: Array) -> float:
    """A constant that is one number, however often it is repeated."""
    if np.unique(value).size != 1:
        raise call.fail(
            f"is a {call.op} whose {what} is not one number for all elements ({np.unique(value).size} different ones): "
            "--approximate fits one function of one element; use the same everywhere"
        )
    return float(value.reshape(-1)[0])


def _clip(g: Reading, call: Call) -> None:
    """Bounds are inputs, or attributes before opset 11."""
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    bounds = {}
    for i, (what, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        value = g.constant(call, i, what)
        bounds[what] = call.attrs.get(what, default) if value is None else _number(call, what, value)
    if not g.encrypted(call.inputs[0]):
        raise call.fail("is a Clip of a constant by bounds that depend on the input; constant bounds are compiled")
    function(g, call, "Clip", call.inputs[0], min=bounds["min"], max=bounds["max"])


def _extreme(g: Reading, call: Call) -> None:
    """Max or Min of one tensor and constants."""
    tensors = [name for name in call.inputs if g.encrypted(name)]
    if len(tensors) > 1:
        way = "b + Relu(a - b)" if call.op == "Max" else "a - Relu(a - b)"
        raise call.fail(
            f"is a {call.op} of {len(tensors)} tensors that depend on the input, which is not a polynomial: "
            f"write it as {way}, and compile with --approximate"
        )
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    (x,) = tensors
    constants = [g.constants[name] for name in call.inputs if name != x]
    if np.broadcast_shapes(g.shapes[x], *(c.shape for c in constants)) != g.shapes[x]:
        raise call.fail(f"is a {call.op} that repeats its tensor of shape {g.shapes[x]}; expand the tensor first")
    numbers = [_number(call, "constant", c.astype(np.float64)) for c in constants]
    none = -np.inf if call.op == "Max" else np.inf
    function(g, call, call.op, x, bound=(max if call.op == "Max" else min)([none, *numbers]))


def _prelu(g: Reading, call: Call) -> None:
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    slope = g.constant(call, 1, "slope")
    if slope is None or not g.encrypted(call.inputs[0]):
        raise call.fail("is a PRelu whose slope is not there, or whose argument is a constant")
    function(g, call, "PRelu", call.inputs[0], slope=_number(call, "slope", slope))


TABLE: dict[str, Handler] = {
    **dict.fromkeys(FUNCTIONS, _activation),
    "Clip": _clip,
    "Max": _extreme,
    "Min": _extreme,
    "PRelu": _prelu,
}
