"""Every op that the importer reads: the graph's meaning against onnxruntime; what it refuses; older and newer opsets."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from compiler.ir import evaluate
from compiler.onnx_import import import_onnx
from compiler.ops import maps
from he_backend.base import UnsupportedOpError

from .op_cases import CASES, TOKENS, Model, constant_second, gemm, one


def check(path, shape, tolerance=1e-6):
    """The imported graph against onnxruntime on one input, relative to the largest element; returns the graph."""
    import onnxruntime

    graph = import_onnx(path)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path))
    wanted = session.run(None, {session.get_inputs()[0].name: x})[0]
    got = evaluate(graph, x.astype(np.float64))[graph.output]
    assert got.shape == graph.shape(graph.output) == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.max(np.abs(wanted)))
    return graph


@pytest.mark.parametrize("name", CASES)
def test_op_means_what_onnxruntime_computes(tmp_path, name):
    shape, make = CASES[name]
    m = Model(shape)
    check(m.save(tmp_path / "m.onnx", make(m)), shape)


def test_a_gemm_without_its_third_operand_has_none(tmp_path):
    """beta = 0: a product by zero would be refused later."""
    m = Model((4, 4))
    graph = check(m.save(tmp_path / "m.onnx", gemm("x", "x", "x", beta=0.0)(m)), (4, 4))
    assert [n.op for n in graph.nodes] == ["matmul", "reshape"]


# Refusals: each names the node and what to do instead


def divided(m):
    return m.op("Div", "x", m.op("Mul", "x", "x"))


REFUSED = {
    **{
        kind: (one(kind), rf"'0.{kind}' is a {kind}, .*fitted polynomial activation.*--approximate")
        for kind in ("Relu",)
    },
    **{
        kind: (one(kind), rf"'0.{kind}' is a {kind}, .*activation.*--approximate")
        for kind in ("Erf", "Sigmoid", "Tanh")
    },
    "Exp": (one("Exp"), "trained range.*--approximate"),
    "Sqrt": (one("Sqrt"), "inverse square root.*--approximate"),
    "Reciprocal": (one("Reciprocal"), "polynomial reciprocal"),
    "Softmax": (one("Softmax"), "power_softmax"),
    "LayerNormalization": (constant_second("LayerNormalization", 6), "inverse square root"),
    "quotient": (divided, "'1.Div' is a Div, .*polynomial reciprocal.*--approximate"),
    "zero divisor": (one("Div", np.array([1.0, 0, 1, 1, 1, 1])), "a zero"),
    "fractional power": (one("Pow", np.array(1.5)), "exponent 1.5; only whole exponents"),
    "enormous power": (one("Pow", np.array(1e9)), r"exponent 1e\+09; at most 256 is compiled"),
    "many exponents": (one("Pow", np.array([1.0, 2, 1, 1, 1, 1])), "exponent nan"),
    "max": (one("Max", np.array(0.0)), "a maximum is not a polynomial"),
    "max pool": (lambda m: m.op("MaxPool", "x", kernel_shape=[2]), "AveragePool"),
    "encrypted condition": (lambda m: m.op("Where", m.op("Cast", "x", to=TensorProto.BOOL), "x", "x"), "cannot round"),
    "encrypted weight": (
        lambda m: m.op("Conv", "x", m.op("Reshape", "x", np.array([6, 4, 1]))),
        "weight .* depends on",
    ),
    "infinite mask": (lambda m: m.op("Where", np.tri(4, 6) > 0, "x", np.array(-np.inf)), "infinite.*--approximate"),
    "encrypted index": (
        lambda m: m.op("Gather", m.normal(4, 2), m.op("Cast", "x", to=TensorProto.INT64)),
        "cannot round",
    ),
    "einsum of three": (lambda m: m.op("Einsum", "x", "x", "x", equation="btd,btd,btd->bt"), "3 tensors"),
    "diagonal": (lambda m: m.op("Einsum", m.op("Slice", "x", [0], [4], [2]), equation="bii->bi"), "diagonal"),
    "sum of one alone": (lambda m: m.op("Einsum", "x", "x", equation="btd,bsc->bts"), "sums an axis of one alone"),
    "random": (lambda m: m.op("Add", "x", m.op("RandomNormal", shape=[6])), "RandomNormal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_node_and_the_way_out(tmp_path, name):
    make, says = REFUSED[name]
    m = Model(TOKENS)
    with pytest.raises(UnsupportedOpError, match=says):
        import_onnx(m.save(tmp_path / "m.onnx", make(m)))


def test_a_matrix_too_large_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "MAX_ENTRIES", 500)
    m = Model(TOKENS)
    with pytest.raises(UnsupportedOpError, match=r"'0.MatMul' .* matrix of 720 entries; at most 500"):
        import_onnx(m.save(tmp_path / "m.onnx", m.op("MatMul", m.normal(30, 4), "x")))


# Local functions, older and newer opsets


def test_local_functions_are_inlined_and_polynomials_kept(tmp_path):
    from polyformer.export import polynomial_function

    body = [
        helper.make_node("Mul", ["a", "b"], ["ab"]),
        helper.make_node("Polynomial_power_2", ["ab", "one", "zero", "zero", "one", "one"], ["y"], domain="polyformer"),
    ]
    outer = helper.make_function(
        "mine",
        "Gate",
        ["a", "b", "zero", "one"],
        ["y"],
        body,
        [helper.make_opsetid(d, v) for d, v in (("", 17), ("polyformer", 1))],
    )
    m = Model(TOKENS)
    y = m.op("Gate", "x", m.normal(6), np.array(0.0), np.array(1.0), domain="mine")
    y = m.op("Polynomial_power_2", y, *(np.array(v) for v in (1.0, 0.0, 0.1, 0.5, 0.25)), domain="polyformer")
    functions = [outer, polynomial_function("power", 2)]
    graph = check(m.save(tmp_path / "m.onnx", y, functions), TOKENS)
    assert [n.op for n in graph.nodes] == ["mul_const", "polynomial", "polynomial"]


OPSETS = {
    "sum, axes as attribute": (11, lambda m: m.op("ReduceSum", "x", axes=[1])),
    "mean, axes as input": (18, lambda m: m.op("ReduceMean", "x", np.array([1, 2]), keepdims=0)),
    "squeeze, axes as attribute": (11, lambda m: m.op("Squeeze", m.op("Unsqueeze", "x", axes=[1]), axes=[1])),
    "split, sizes as attribute": (11, lambda m: m.op("Split", "x", outputs=2, axis=1, split=[1, 3])[1]),
    "split in equal parts": (18, lambda m: m.op("Split", "x", outputs=2, axis=2, num_outputs=2)[1]),
    "pad, axes as input": (18, lambda m: m.op("Pad", "x", np.array([1, 2]), "", np.array([-1]))),
    "pad, attributes": (2, lambda m: m.op("Pad", "x", pads=[0, 1, 0, 0, 0, 2], value=0.5)),
    "all of it, empty axes": (18, lambda m: m.op("ReduceSum", "x", keepdims=0)),
}


@pytest.mark.parametrize("name", OPSETS)
def test_opsets_that_moved_an_attribute(tmp_path, name):
    opset, make = OPSETS[name]
    m = Model(TOKENS, opset=opset)
    check(m.save(tmp_path / "m.onnx", make(m)), TOKENS)


def test_embedding_of_cast_ids(tmp_path):
    import onnxruntime

    m = Model((1, 5))
    table = m.normal(7, 3)
    y = m.op("Add", m.op("Gather", table, m.op("Cast", "x", to=TensorProto.INT32)), m.normal(5, 3))
    path = m.save(tmp_path / "m.onnx", y, kind=TensorProto.INT64)
    graph, ids = import_onnx(path), np.array([[3, 0, 6, 6, 1]])
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": ids})[0]
    np.testing.assert_allclose(evaluate(graph, ids)[graph.output], wanted, atol=1e-6)
    assert [n.op for n in graph.nodes] == ["gather", "add_const"]
