"""Rotary positions join the projection before them, however they are written; what is no such map is left alone."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from compiler.ir import Graph, Node, evaluate
from compiler.onnx_import import import_onnx
from compiler.passes import positions as pass_
from compiler.passes.fold import fold
from compiler.passes.linear_chains import linear_chains
from he_backend.base import UnsupportedOpError

from .models import attention
from .op_cases import Model

T, H, K = 4, 2, 4
SPLIT, HEADS, KEYS = np.array([1, T, H, K]), [0, 2, 1, 3], [0, 2, 3, 1]


def project(m, *, bias=True, width=H * K):
    y = m.op("MatMul", "x", m.normal(6, width))
    return m.op("Add", y, m.normal(width)) if bias else y


def attended(m, q, k, v):
    scores = m.op("MatMul", q, k)
    y = m.op("MatMul", m.op("Mul", scores, scores), v)
    return m.op("Reshape", m.op("Transpose", y, perm=HEADS), np.array([1, T, H * K]))


def values(m):
    return m.op("Transpose", m.op("Reshape", project(m), SPLIT), perm=HEADS)


def gathered(m):
    """As polyformer.export writes it: heads split, channels gathered, then heads first."""

    def turned(perm):
        x = m.op("Reshape", project(m, bias=False), SPLIT)
        partner = m.op("Gather", x, np.array([2, 3, 0, 1]), axis=3)
        x = m.op("Add", m.op("Mul", x, m.normal(1, T, 1, K)), m.op("Mul", partner, m.normal(1, T, 1, K)))
        return m.op("Transpose", x, perm=perm)

    return attended(m, turned(HEADS), turned(KEYS), values(m))


def halves(m):
    """As torch exports a Llama: heads first, halves by slices, the keys transposed at the end, scores scaled."""

    def turned():
        x = m.op("Transpose", m.op("Reshape", project(m), SPLIT), perm=HEADS)
        low = m.op("Slice", x, np.array([0]), np.array([2]), np.array([3]))
        high = m.op("Slice", x, np.array([2]), np.array([4]), np.array([3]))
        across = m.op("Concat", m.op("Neg", high), low, axis=-1)
        return m.op("Add", m.op("Mul", x, m.normal(1, 1, T, K)), m.op("Mul", across, m.normal(1, 1, T, K)))

    q = m.op("Mul", turned(), np.array(0.5))
    return attended(m, q, m.op("Transpose", turned(), perm=[0, 1, 3, 2]), values(m))


def shared_key_head(m):
    """One head of keys for both heads of queries, turned and then repeated."""
    q = m.op("Transpose", m.op("Reshape", project(m), SPLIT), perm=HEADS)
    k = m.op("Reshape", project(m, width=K), np.array([1, T, 1, K]))
    k = m.op("Mul", k, m.normal(1, T, 1, K))
    k = m.op("Expand", m.op("Transpose", k, perm=KEYS), np.array([1, H, K, T]))
    return attended(m, q, k, values(m))


PLAIN = {"linear": 3, "reshape": 4, "transpose": 4, "matmul": 2, "polynomial": 0, "mul": 1}
CASES = {"gather": gathered, "halves": halves, "shared key head": shared_key_head}


@pytest.mark.parametrize("name", CASES)
def test_positions_join_the_projection_and_keep_the_meaning(tmp_path, name):
    m = Model((1, T, 6))
    before = import_onnx(m.save(tmp_path / "m.onnx", CASES[name](m)))
    after = fold(linear_chains(fold(pass_.positions(before))))
    x = np.random.default_rng(2).normal(size=(1, T, 6))
    wanted = evaluate(before, x)[before.output]
    np.testing.assert_allclose(evaluate(after, x)[after.output], wanted, rtol=0, atol=1e-12 * np.max(np.abs(wanted)))
    found = Counter(n.op for n in after.nodes)
    assert found == Counter({op: n for op, n in PLAIN.items() if n})
    assert max(n.const.ndim for n in after.nodes if n.op == "linear") == 3


def test_without_a_sparse_map_between_the_graph_is_left_alone(tmp_path):
    graph = import_onnx(attention(tmp_path / "m.onnx"))
    assert pass_.positions(graph) is graph


def test_maps_that_mix_tokens_are_left_alone(tmp_path):
    m = Model((1, T, 6))
    smooth = m.op("MatMul", m.normal(1, 1, T, T), values(m))
    k = m.op("Transpose", m.op("Reshape", project(m), SPLIT), perm=KEYS)
    graph = import_onnx(m.save(tmp_path / "m.onnx", attended(m, values(m), k, smooth)))
    assert Counter(n.op for n in pass_.positions(graph)) == Counter(n.op for n in graph)


def test_weights_beyond_memory_are_refused_with_both_numbers(tmp_path, monkeypatch):
    m = Model((1, T, 6))
    graph = import_onnx(m.save(tmp_path / "m.onnx", gathered(m)))
    monkeypatch.setattr(pass_, "MAX_WEIGHTS", 100)
    with pytest.raises(UnsupportedOpError, match=r"4 tokens a projection of 6 x 8, 192 weights, 100 are allowed: take"):
        pass_.positions(graph)


WIDE = (1, T, 8)


def folds(output: str, *nodes: Node) -> list[str]:
    """Ops of a folded graph on x [1, T, 6], which means what it meant before."""
    graph = Graph(input="x", input_shape=(1, T, 6), output=output, nodes=nodes)
    x, after = np.random.default_rng(3).normal(size=(1, T, 6)), fold(graph)
    np.testing.assert_allclose(evaluate(after, x)[output], evaluate(graph, x)[output], atol=1e-12)
    return [n.op for n in after.nodes]


@pytest.mark.parametrize("biased", [False, True])
def test_weights_by_token_fold_as_one_matrix_does(biased):
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(T, 8)) if biased else None
    turn = Node(name="y", op="linear", inputs=("c",), shape=WIDE, const=rng.normal(size=(T, 6, 8)), bias=bias)
    before = (
        Node(name="r", op="reduce_sum", inputs=("x",), shape=(1, T, 1)),
        Node(name="a", op="mul", inputs=("x", "r"), shape=(1, T, 6)),
        Node(name="b", op="mul_const", inputs=("a",), shape=(1, T, 6), const=rng.normal(size=6)),
        Node(name="c", op="add_const", inputs=("b",), shape=(1, T, 6), const=rng.normal(size=6)),
    )
    assert folds("y", *before, turn) == ["reduce_sum", "linear", "mul", "add_const"]
    after = (
        Node(name="s", op="mul_const", inputs=("y",), shape=WIDE, const=rng.normal(size=8)),
        Node(name="t", op="add_const", inputs=("s",), shape=WIDE, const=rng.normal(size=8)),
    )
    assert folds("t", replace(turn, inputs=("x",)), *after) == ["linear"]
