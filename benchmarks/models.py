"""ONNX models of the request benchmarks: true shapes, seeded random weights, nothing but onnx.helper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Built = tuple[Path, np.ndarray]  # the file and calibration inputs [n, ...]


class Builder:
    """Collects nodes and constants; every op returns the name of its result."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str | np.ndarray, name: str = "", **attributes: Any) -> str:
        names = []
        for i in inputs:
            if not isinstance(i, str):
                values = np.asarray(i, dtype=np.float32 if np.asarray(i).dtype.kind == "f" else np.int64)
                self.constants.append(numpy_helper.from_array(values, f"constant{len(self.constants)}"))
                i = self.constants[-1].name
            names.append(i)
        output = name or f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def linear(self, x: str, n_in: int, n_out: int, name: str, gain: float = 1.0) -> str:
        y = self.op("MatMul", x, self.rng.normal(0, gain * n_in**-0.5, (n_in, n_out)), name=f"{name}.matmul")
        return self.op("Add", y, self.rng.normal(0, 0.1, n_out), name=name)

    def save(self, path: Path, shape: tuple[int, ...], output: str, result: tuple[int, ...]) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "benchmark",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, result)],
            self.constants,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
        return path


def mlp_784(folder: Path) -> Built:
    """784 -> 128 -> x^2 -> 10."""
    b = Builder(0)
    h = b.linear("x", 784, 128, "hidden")
    y = b.linear(b.op("Mul", h, h, name="square"), 128, 10, "logits")
    return b.save(folder / "mlp-784.onnx", (1, 784), y, (1, 10)), b.rng.uniform(0, 1, (16, 784)).astype(np.float32)


def cnn_28(folder: Path) -> Built:
    """LeNet's shape: 6 and 16 windows of 5 x 5, each squared and averaged over 2 x 2, then 120, 84 (squared) and 10."""
    b = Builder(0)
    h = b.op("Conv", "x", b.rng.normal(0, 0.2, (6, 1, 5, 5)), b.rng.normal(0, 0.1, 6), name="conv1")
    h = b.op("AveragePool", b.op("Mul", h, h, name="square1"), kernel_shape=[2, 2], strides=[2, 2], name="pool1")
    h = b.op("Conv", h, b.rng.normal(0, 0.08, (16, 6, 5, 5)), b.rng.normal(0, 0.1, 16), name="conv2")
    h = b.op("AveragePool", b.op("Mul", h, h, name="square2"), kernel_shape=[2, 2], strides=[2, 2], name="pool2")
    h = b.op("Flatten", h, name="flat")
    for i, (n_in, n_out) in enumerate(((256, 120), (120, 84))):
        h = b.linear(h, n_in, n_out, f"fc{i + 1}")
        h = b.op("Mul", h, h, name=f"square{i + 3}")
    y = b.linear(h, 84, 10, "logits")
    x = b.rng.uniform(0, 1, (16, 1, 28, 28)).astype(np.float32)
    return b.save(folder / "cnn-28.onnx", (1, 1, 28, 28), y, (1, 10)), x


def encoder(folder: Path, *, blocks: int, width: int, heads: int, hidden: int, tokens: int, classes: int = 2) -> Built:
    """Bidirectional encoder with PowerSoftmax (p = 2, quadratic reciprocal), quadratic activation, foldable norms, and a head on
    the first token; its input is the embedded text.
    """
    b = Builder(0)
    x = "x"
    for i in range(blocks):
        parts = {}
        for name in "qkv":
            h = b.linear(x, width, width, f"{i}.{name}")
            h = b.op("Reshape", h, np.array([1, tokens, heads, width // heads]), name=f"{i}.{name}.split")
            parts[name] = b.op("Transpose", h, perm=[0, 2, 1, 3], name=f"{i}.{name}.heads")
        kt = b.op("Transpose", parts["k"], perm=[0, 1, 3, 2], name=f"{i}.kt")
        scale = np.full((1, 1, 1, 1), (width // heads) ** -0.5)
        s = b.op("Mul", b.op("MatMul", parts["q"], kt, name=f"{i}.products"), scale, name=f"{i}.scores")
        p = b.op("Mul", s, s, name=f"{i}.powers")
        d = b.op("ReduceSum", p, np.array([-1]), keepdims=1, name=f"{i}.sum")
        d = b.op("Add", b.op("Mul", d, np.array(1.0 / tokens)), np.array(1.0), name=f"{i}.denominator")
        # 1 / d on [1, 4] to about 0.1 by a quadratic: the weights are random, the work is the same.
        r = b.op("Mul", b.op("Mul", d, d), np.array(0.1 / tokens))
        r = b.op("Add", r, b.op("Mul", d, np.array(-0.7 / tokens)), name=f"{i}.slope")
        r = b.op("Add", r, np.array(1.55 / tokens), name=f"{i}.reciprocal")
        y = b.op("Mul", b.op("MatMul", p, parts["v"], name=f"{i}.values"), r, name=f"{i}.attended")
        y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([1, tokens, width]), name=f"{i}.merged")
        x = b.op("Add", x, b.linear(y, width, width, f"{i}.o", 0.5), name=f"{i}.mixed")
        h = b.linear(x, width, hidden, f"{i}.up", 0.5)
        h = b.op("Add", b.op("Mul", b.op("Mul", h, h), np.array(0.2)), b.op("Mul", h, np.array(0.5)), name=f"{i}.act")
        x = b.op("Add", x, b.linear(h, hidden, width, f"{i}.down", 0.5), name=f"{i}.out")
    h = b.op("Slice", x, np.array([0]), np.array([1]), np.array([1]), name="first")
    y = b.linear(b.op("Reshape", h, np.array([1, width])), width, classes, "head")
    path = folder / f"encoder-{blocks}x{width}x{tokens}.onnx"
    samples = b.rng.normal(0, 0.5, (16, tokens, width)).astype(np.float32)
    return b.save(path, (1, tokens, width), y, (1, classes)), samples
