"""A circuit small enough to write by hand: two linear maps with a square between them."""

import numpy as np

from he_backend.circuit import Circuit, Op, Signature
from he_backend.container import Arrays
from he_backend.params import Params
from he_backend.trace import trace

WIDTH = 16
LEVELS = 3


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First matrix, its bias, second matrix; magnitudes that keep every value below about 1."""
    rng = np.random.default_rng(seed)
    first, second = rng.uniform(-1, 1, size=(2, WIDTH, WIDTH)) / WIDTH**0.5
    return first, rng.uniform(-0.2, 0.2, size=WIDTH), second


def reference(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """What the circuit computes, [WIDTH] -> [WIDTH]."""
    first, bias, second = weights(seed)
    return second @ (first @ x + bias) ** 2


def mlp(params: Params, seed: int = 0) -> Circuit:
    """x -> second @ (first @ x + bias)^2, feature i in slots i * stride .. (i + 1) * stride - 1."""
    stride = params.slots // WIDTH
    first, bias, second = weights(seed)
    babies = 4
    plan = [[g * stride, [[b * stride, g + b] for b in range(babies)]] for g in range(0, WIDTH, babies)]
    arrays: Arrays = {"first": diagonals(first), "second": diagonals(second), "bias": bias}
    attrs = {"plan": plan, "bias": None}
    ops = (
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=LEVELS, source="x"),
        Op(
            id=1,
            kind="linear",
            args=(0,),
            attrs={**attrs, "weights": "first", "bias": "bias"},
            level=2,
            source="/up/MatMul",
        ),
        Op(id=2, kind="mul", args=(1, 1), level=1, source="/square/Mul"),
        Op(id=3, kind="linear", args=(2,), attrs={**attrs, "weights": "second"}, level=0, source="/down/MatMul"),
        Op(id=4, kind="output", args=(3,), attrs={"name": "y", "part": 0}, level=0, source="y"),
    )
    layout = (np.arange(params.slots, dtype=np.int32) // stride).reshape(1, -1)
    draft = Circuit(
        params=params,
        ops=ops,
        arrays=arrays,
        client_arrays={"features": layout},
        inputs=(Signature(name="x", shape=(WIDTH,), layout="features", factor=1.0, bound=1.0, level=LEVELS),),
        outputs=(Signature(name="y", shape=(WIDTH,), layout="features", factor=1.0, bound=8.0, level=0),),
        keys={},
        relin_level=-1,
        error_bound=2.0**-10,
        predicted={"evaluate_s": 1.0, "error": 2.0**-10, "failure_log2": -200.0},
    )
    found = trace(draft)
    return Circuit(**{**vars(draft), "keys": found.keys, "relin_level": found.relin_level})


def diagonals(matrix: np.ndarray) -> np.ndarray:
    """Row d is the d-th generalised diagonal: element i is matrix[i, i + d]."""
    i = np.arange(WIDTH)
    return np.stack([matrix[i, (i + d) % WIDTH] for d in range(WIDTH)])


TEST_PARAMS = Params(log_n=10, levels=LEVELS, scale_bits=40, first_bits=50, digits=2, insecure=True)
SECURE_PARAMS = Params(log_n=14, levels=LEVELS, scale_bits=40, first_bits=50, digits=2)
