"""What is refused, and what to use instead of it."""

from __future__ import annotations

from collections.abc import Iterable

from he_backend.base import UnsupportedOpError

from .reading import Call

ACTIVATION = "a fitted polynomial activation (polyformer/activations.py)"
NORM = "a norm with a polynomial inverse square root (polyformer/norms.py)"

# What to use instead of an op that is not a polynomial.
INSTEAD = {
    "Softmax": "the mixer 'power_softmax' (polyformer/mixers/power_softmax.py)",
    "LogSoftmax": "the logits themselves: the client, who decrypts them, can take a softmax",
    "Exp": "a polynomial fitted on the trained range (polyformer.approx.Polynomial)",
    "Log": "a polynomial fitted on the trained range (polyformer.approx.Polynomial)",
    "Div": "a product by a polynomial reciprocal (polyformer.approx, Goldschmidt or Chebyshev)",
    "Reciprocal": "a polynomial reciprocal (polyformer.approx)",
    "Sqrt": NORM,
    "LayerNormalization": NORM,
    "RMSNormalization": NORM,
    "SimplifiedLayerNormalization": NORM,
    "InstanceNormalization": NORM,
    "GroupNormalization": NORM,
    "Where": "a product with the mask: polynomials cannot branch",
    "If": "one branch alone: polynomials cannot branch",
    "ReduceMax": "nothing: a maximum is not a polynomial, and the one that a softmax subtracts over its last axis changes nothing",
    "Max": "nothing: a maximum is not a polynomial",
    "Min": "nothing: a minimum is not a polynomial",
    "MaxPool": "AveragePool: a maximum is not a polynomial",
    "GlobalMaxPool": "GlobalAveragePool: a maximum is not a polynomial",
    "ArgMax": "the logits themselves: the client, who decrypts them, can take the argmax",
    "TopK": "the logits themselves: the client, who decrypts them, can sort",
    **dict.fromkeys(
        (
            *("Erf", "Gelu", "Sigmoid", "Tanh", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "PRelu", "Clip", "Mish"),
            *("Softplus", "Softsign", "HardSigmoid", "HardSwish", "Swish", "Abs", "Sin", "Cos"),
        ),
        ACTIVATION,
    ),
}


def not_fitted(call: Call) -> UnsupportedOpError:
    """The sentence for an op that --approximate cannot fit."""
    return call.fail(
        f"is a {call.op}: --approximate fits elementwise functions, softmax and norms over features; "
        f"use {INSTEAD[call.op]} instead"
    )


def refusal(call: Call, known: Iterable[str] = (), approximate: str = "") -> UnsupportedOpError:
    """The sentence for an op that is not compiled; `known` are those that are, `approximate` a remark on --approximate."""
    instead = INSTEAD.get(call.op)
    hint = (
        f"use {instead} instead"
        if instead
        else f"the compiler reads {', '.join(sorted(known))} and Polynomial functions"
    )
    return call.fail(f"is a {call.op}, which is not a polynomial this compiler knows: {hint}{approximate}")
