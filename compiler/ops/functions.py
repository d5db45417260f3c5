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
POWERS: dict[str, Callable[[Array, Options], Array]] = {"Pow": lambda x, o: np.power(x, o["exponent"])}


def function(g: Reading, call: Call, kind: str, x: str, *, name: str | None = None, **options: Any) -> str:
    """Append a node `function`, which only the pass `approximate` can take away again."""
    meaning = {**FUNCTIONS, **POWERS}[kind]
    attrs = {"kind": kind, "call": lambda a: meaning(a, options)}
    return g.emit(call, "function", (x,), g.shapes[x], attrs=attrs, name=name)


def _activation(g: Reading, call: Call) -> None:
    if not g.approximate:
        raise refusal(call, approximate=OR_FIT)
    function(g, call, call.op, call.inputs[0], **call.attrs)


TABLE: dict[str, Handler] = dict.fromkeys(FUNCTIONS, _activation)
