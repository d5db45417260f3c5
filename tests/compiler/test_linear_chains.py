"""Chains of plaintext-linear ops become one sparse map, and attention keeps its shape."""

from collections import Counter

import numpy as np
import pytest

from compiler.ir import evaluate
from compiler.onnx_import import import_onnx
from compiler.passes.fold import fold
from compiler.passes.linear_chains import linear_chains

from .models import attention
from .op_cases import Model


def conv_block(m):
    """conv, batch norm, pool, flatten, one linear layer: no activation in between, so all is linear."""
    x = m.op("Conv", "x", m.normal(3, 2, 3, 3), m.normal(3))
    variance = m.rng.uniform(0.5, 2, 3)
    x = m.op("BatchNormalization", x, m.normal(3), m.normal(3), m.normal(3), variance)
    x = m.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    return m.op("Gemm", m.op("Flatten", x), m.normal(4, 27), m.normal(4), transB=1)


def cnn(m):
    """Two convolutions with a square between them."""
    x = m.op("Conv", "x", m.normal(3, 2, 3, 3), m.normal(3))
    x = m.op("Conv", m.op("Mul", x, x), m.normal(2, 3, 3, 3))
    return m.op("Gemm", m.op("Flatten", x), m.normal(4, 32), m.normal(4), transB=1)


def rotary(m):
    """x . cos + (-x2, x1) . sin, as rotary embeddings are written."""
    first, second = m.op("Split", "x", np.array([3, 3]), outputs=2, axis=-1)
    turned = m.op("Concat", m.op("Neg", second), first, axis=-1)
    return m.op("Add", m.op("Mul", "x", m.normal(4, 6)), m.op("Mul", turned, m.normal(4, 6)))


def fused_heads(m):
    """One map for queries, keys and values, cut after its heads are split: [1, T, 3, H, C] -> three of [1, H, T, C]."""
    x = m.op("Add", m.op("MatMul", "x", m.normal(6, 18)), m.normal(18))
    x = m.op("Transpose", m.op("Reshape", x, np.array([1, 4, 3, 2, 3])), perm=[2, 0, 3, 1, 4])
    q, k, v = (m.op("Gather", x, np.array(i), axis=0) for i in range(3))
    scores = m.op("MatMul", q, m.op("Transpose", k, perm=[0, 1, 3, 2]))
    y = m.op("MatMul", m.op("Mul", scores, scores), v)
    return m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([1, 4, 6]))


def scaled_rotary_heads(m):
    """Queries cut from one map with keys, scaled; half of each head's channels turned."""
    x = m.op("Add", m.op("MatMul", "x", m.normal(6, 8)), m.normal(8))
    parts = m.op("Split", x, np.array([4, 4]), outputs=2, axis=-1)
    q, k = (m.op("Transpose", m.op("Reshape", p, np.array([1, 4, 2, 2])), perm=[0, 2, 1, 3]) for p in parts)
    first, second = m.op("Split", k, np.array([1, 1]), outputs=2, axis=-1)
    turned = m.op("Concat", m.op("Neg", second), first, axis=-1)
    k = m.op("Add", m.op("Mul", k, m.normal(4, 2)), m.op("Mul", turned, m.normal(4, 2)))
    return m.op("MatMul", m.op("Mul", q, np.array(0.5)), m.op("Transpose", k, perm=[0, 1, 3, 2]))


def scaled_cut(m):
    """A scale and a shift between the cut and the heads."""
    x = m.op("Add", m.op("MatMul", "x", m.normal(6, 8)), m.normal(8))
    q, k = m.op("Split", x, np.array([4, 4]), outputs=2, axis=-1)
    q = m.op("Add", m.op("Mul", q, np.array(0.5)), m.normal(4))
    return m.op("MatMul", q, m.op("Transpose", k, perm=[0, 2, 1]))


ORDERS = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])  # queries, keys transposed, values


def fused_split(m):
    """The same, cut before the heads are split."""
    x = m.op("Add", m.op("MatMul", "x", m.normal(6, 18)), m.normal(18))
    parts = m.op("Split", x, np.array([6, 6, 6]), outputs=3, axis=-1)
    heads = [m.op("Reshape", part, np.array([1, 4, 2, 3])) for part in parts]
    q, k, v = (m.op("Transpose", h, perm=p) for h, p in zip(heads, ORDERS, strict=True))
    y = m.op("MatMul", m.op("MatMul", q, k), v)
    return m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([1, 4, 6]))


def split_and_join(m):
    return m.op("Mul", m.op("Concat", *m.op("Split", "x", np.array([1, 5]), outputs=2, axis=-1), axis=-1), "x")


HEADS = {"linear": 3, "reshape": 4, "transpose": 4, "matmul": 2}
CASES = {
    "conv block": ((1, 2, 8, 8), conv_block, {"sparse": 1}),
    "cnn": ((1, 2, 8, 8), cnn, {"sparse": 2, "mul": 1}),
    "rotary": ((1, 4, 6), rotary, {"sparse": 1}),
    "rotary heads": (
        (1, 4, 6),
        scaled_rotary_heads,
        {"linear": 2, "reshape": 1, "transpose": 2, "sparse": 1, "mul_const": 1, "matmul": 1},
    ),
    "scaled cut": ((1, 4, 6), scaled_cut, {"linear": 2, "transpose": 1, "matmul": 1}),
    "heads cut from one map": ((1, 4, 6), fused_heads, {**HEADS, "mul": 1}),
    "one map cut, then heads": ((1, 4, 6), fused_split, HEADS),
    "concat of all parts": ((1, 4, 6), split_and_join, {"reshape": 1, "mul": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_chains_merge_and_keep_the_meaning(tmp_path, name):
    shape, make, ops = CASES[name]
    m = Model(shape)
    before = import_onnx(m.save(tmp_path / "m.onnx", make(m)))
    after = fold(linear_chains(fold(before)))
    x = np.random.default_rng(2).normal(size=shape)
    wanted = evaluate(before, x)[before.output]
    got = evaluate(after, x)[after.output]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * np.max(np.abs(wanted)))
    assert Counter(n.op for n in after.nodes) == Counter(ops)


def test_a_product_that_fills_in_stays_two_steps(tmp_path):
    m = Model((1, 1, 40))
    sums = m.op("ReduceSum", "x", np.array([1, 2]), keepdims=1)
    spread = m.op("Expand", sums, np.array([1, 40, 40]))
    graph = linear_chains(import_onnx(m.save(tmp_path / "m.onnx", spread)))
    assert [n.op for n in graph.nodes] == ["sparse", "sparse"]  # 40 + 1600 entries; the product has 64000


def test_a_graph_without_sparse_nodes_is_left_alone(tmp_path):
    graph = import_onnx(attention(tmp_path / "m.onnx"))
    assert linear_chains(graph) is graph
