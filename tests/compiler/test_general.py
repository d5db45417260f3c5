"""Shapes that no structured layout knows, three ways: onnxruntime, the simulator, encryption."""

from pathlib import Path

import numpy as np
import pytest

from compiler import Target, compile_onnx
from he_backend.base import ParamsError

from .models import Builder, attention, mlp
from .test_three_ways import three_ways


def feed_forward(path: Path) -> Path:
    """Hidden features fill two ciphertexts: [1, 16, 16] -> 64 -> 16 at 512 slots, with a residual."""
    b = Builder((1, 16, 16))
    h = b.linear("x", 16, 64, name="up")
    h = b.op("Mul", h, h, name="square")
    h = b.linear(h, 64, 16, name="down")
    y = b.op("Add", "x", h, name="residual")
    return b.save(path, y, (1, 16, 16))


def wide_tensor(path: Path) -> Path:
    """The stream itself fills two ciphertexts: 16 tokens of 64 features at 512 slots."""
    b = Builder((1, 16, 64))
    h = b.linear("x", 64, 64, name="a")
    h = b.op("Mul", h, h, name="square")
    y = b.linear(h, 64, 8, name="b")
    return b.save(path, y, (1, 16, 8))


def long_vector(path: Path) -> Path:
    """600 inputs in ciphertexts of 512 slots."""
    return mlp(path, features=(600, 32, 10))


def cnn(path: Path) -> Path:
    """Convolution, square, average pooling, convolution, square, linear: [1, 1, 10, 10] -> 5."""
    b = Builder((1, 1, 10, 10))
    h = b.op("Conv", "x", b.rng.normal(0, 0.3, (3, 1, 3, 3)), b.rng.normal(0, 0.1, 3), name="conv1")
    h = b.op("Mul", h, h, name="square1")
    h = b.op("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2], name="pool")
    h = b.op("Conv", h, b.rng.normal(0, 0.3, (4, 3, 2, 2)), name="conv2")
    h = b.op("Mul", h, h, name="square2")
    h = b.op("Flatten", h, name="flat")
    y = b.op("Gemm", h, b.rng.normal(0, 0.2, (36, 5)), b.rng.normal(0, 0.2, 5), name="head")
    return b.save(path, y, (1, 5))


def linear_attention(path: Path) -> Path:
    """x + (q k^T . causal) v without division, 3 features of 5 tokens: no power of two anywhere."""
    t, d = 5, 3
    b = Builder((1, t, d))
    q, k, v = (b.linear("x", d, d, name=n) for n in "qkv")
    kt = b.op("Transpose", k, perm=[0, 2, 1], name="kt")
    s = b.op("Mul", b.op("MatMul", q, kt, name="scores"), np.tril(np.ones((t, t)))[None], name="masked")
    y = b.op("Add", "x", b.op("MatMul", s, v, name="values"), name="residual")
    return b.save(path, y, (1, t, d))


def classifier(path: Path) -> Path:
    """A map over tokens, then a head that reads the first token alone."""
    b = Builder((1, 8, 8))
    h = b.linear("x", 8, 8, name="mix")
    h = b.op("Mul", h, h, name="square")
    h = b.op("Slice", h, np.array([0]), np.array([1]), np.array([1]), name="first")
    h = b.op("Reshape", h, np.array([1, 8]), name="pooled")
    y = b.linear(h, 8, 2, name="head")
    return b.save(path, y, (1, 2))


CASES = {
    "hidden features in two ciphertexts": (feed_forward, 10),
    "the stream in two ciphertexts": (wide_tensor, 10),
    "a vector in two ciphertexts": (long_vector, 10),
    "cnn": (cnn, 11),
    "linear attention of odd sizes": (linear_attention, 10),
    "classification head": (classifier, 10),
    "attention, 12 tokens of 3 heads": (lambda p: attention(p, tokens=6, heads=3, channels=4, causal=False), 11),
}


@pytest.mark.parametrize("name", CASES)
def test_three_ways(tmp_path, name):
    make, log_n = CASES[name]
    three_ways(make(tmp_path / "m.onnx"), Target(insecure_log_n=log_n), scale=0.3)


def test_a_latency_that_nothing_meets_is_refused_with_the_nearest(tmp_path):
    path = mlp(tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(0, 0.3, (4, 64)).astype(np.float32)
    with pytest.raises(ParamsError, match=r"and 1e-06 s:\n.*slower than 1e-06 s"):
        compile_onnx(path, x, target=Target(insecure_log_n=11, max_latency_s=1e-6))
