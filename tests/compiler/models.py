"""Small ONNX models of polynomial ops, written with onnx.helper: what the compiler must take from anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and initializers; every op returns the name of its result."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}  # local ones, by name

    def constant(self, values: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        kind = {"f": np.float32, "b": np.bool_}.get(np.asarray(values).dtype.kind, np.int64)
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=kind), name))
        return name

    def op(self, kind: str, *inputs: str | np.ndarray, name: str = "", **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        output = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        """The parts of a Split."""
        names = [f"split{len(self.nodes)}.{i}" for i in range(len(sizes))]
        self.nodes.append(
            helper.make_node("Split", [x, self.constant(np.array(sizes))], names, name=names[0], axis=axis)
        )
        return names

    def linear(self, x: str, n_in: int, n_out: int, *, name: str = "", bias: bool = True) -> str:
        y = self.op("MatMul", x, self.rng.normal(0, n_in**-0.5, (n_in, n_out)), name=f"{name}.matmul" if bias else name)
        return self.op("Add", y, self.rng.normal(0, 0.3, n_out), name=name) if bias else y

    def save(self, path: Path, output: str, shape: tuple[int, ...]) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.constants,
        )
        domains = [f.domain for f in self.functions.values()]
        opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in sorted(set(domains)))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(self.functions.values()))
        onnx.save(model, str(path))
        return path


def mlp(path: Path, *, features: tuple[int, int, int] = (64, 32, 10)) -> Path:
    """x -> linear -> square -> linear, input [1, F]."""
    b = Builder((1, features[0]))
    h = b.linear("x", features[0], features[1], name="up")
    h = b.op("Mul", h, h, name="square")
    y = b.linear(h, features[1], features[2], name="down")
    return b.save(path, y, (1, features[2]))


def norm_mlp(path: Path, *, layer_norm: bool, tokens: int = 4, width: int = 16) -> Path:
    """Two residual blocks with a norm whose inverse square root is quadratic; LayerNorm subtracts the mean too."""
    b = Builder((1, tokens, width))
    x = "x"
    for i in range(2):
        c = x
        if layer_norm:
            c = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1], keepdims=1, name=f"{i}.mean"), name=f"{i}.centered")
        v = b.op("ReduceMean", b.op("Mul", c, c), axes=[-1], keepdims=1, name=f"{i}.variance")
        r = b.op("Add", b.op("Mul", v, np.array(-0.4)), np.array(1.3))
        r = b.op("Add", r, b.op("Mul", b.op("Mul", v, v), np.array(0.05)), name=f"{i}.inverse")
        h = b.op("Mul", b.op("Mul", c, r), b.rng.normal(1, 0.1, width), name=f"{i}.normed")
        h = b.op("Add", h, b.rng.normal(0, 0.1, width), name=f"{i}.shifted")
        h = b.linear(h, width, 2 * width, name=f"{i}.up")
        h = b.op("Add", b.op("Pow", h, np.array(2.0)), h, name=f"{i}.act")
        h = b.linear(h, 2 * width, width, name=f"{i}.down")
        x = b.op("Add", x, b.op("Mul", h, np.array(0.3)), name=f"{i}.residual")
    return b.save(path, x, (1, tokens, width))


def attention(
    path: Path,
    *,
    tokens: int = 8,
    heads: int = 2,
    channels: int = 4,
    power: int = 2,
    causal: bool = True,
    out: bool = True,
) -> Path:
    """One PowerSoftmax attention block: scores^p, sum, a quadratic for the reciprocal, values, output projection."""
    width = heads * channels
    b = Builder((1, tokens, width))
    parts = {}
    for name in ("q", "k", "v"):
        h = b.linear("x", width, width, name=name)
        h = b.op("Reshape", h, np.array([1, tokens, heads, channels]), name=f"{name}.split")
        parts[name] = b.op("Transpose", h, perm=[0, 2, 1, 3], name=f"{name}.heads")
    kt = b.op("Transpose", parts["k"], perm=[0, 1, 3, 2])
    mask = (np.tril(np.ones((tokens, tokens))) if causal else np.ones((tokens, tokens)))[None, None]
    mask = mask * b.rng.uniform(0.8, 1.2, (1, 1, tokens, 1)) / np.sqrt(channels)
    s = b.op("Mul", b.op("MatMul", parts["q"], kt), mask, name="scores")
    p = s
    for _ in range(power.bit_length() - 1):
        p = b.op("Mul", p, p)
    d = b.op("ReduceSum", p, np.array([-1]), keepdims=1, name="sum")
    d = b.op("Add", d, b.rng.uniform(2.0, 3.0, (1, 1, tokens, 1)), name="denominator")
    r = b.op("Add", b.op("Mul", b.op("Mul", d, d), np.array(0.01)), np.array(0.4))
    r = b.op("Sub", r, b.op("Mul", d, np.array(0.1)), name="reciprocal")
    y = b.op("Mul", b.op("MatMul", p, parts["v"], name="values"), r, name="attended")
    y = b.op("Transpose", y, perm=[0, 2, 1, 3])
    y = b.op("Reshape", y, np.array([1, tokens, width]), name="merged")
    y = b.linear(y, width, width, name="o") if out else y
    return b.save(path, y, (1, tokens, width))
