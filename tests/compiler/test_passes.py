"""Passes keep the meaning of a graph and do what they are for."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from onnx import TensorProto

from compiler.certificate import certify
from compiler.ir import Graph, Node, evaluate
from compiler.layout import Heads, from_features, periodic, to_features
from compiler.matvec import plan_matvec, split
from compiler.onnx_import import import_onnx
from compiler.passes.center import center
from compiler.passes.client import split_client
from compiler.passes.fold import fold
from compiler.passes.fuse import fuse
from compiler.pipeline import simplify
from compiler.polynomials import monic_factors, prepare
from compiler.verify import VerificationError, same_meaning
from he_backend.base import UnsupportedOpError
from he_backend.circuit import Op
from he_backend.kernels import NumpySlots, apply

from .models import Builder, attention, mlp, norm_mlp
from .op_cases import Model

MODELS = {
    "mlp": mlp,
    "rms": lambda p: norm_mlp(p, layer_norm=False),
    "layer norm": lambda p: norm_mlp(p, layer_norm=True),
    "attention": attention,
    "p = 4": lambda p: attention(p, power=4),
    "bidirectional": lambda p: attention(p, causal=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_passes_keep_the_meaning(tmp_path, name):
    path = MODELS[name](tmp_path / "m.onnx")
    graph = import_onnx(path)
    x = np.random.default_rng(1).normal(0, 0.5, graph.input_shape).astype(np.float32)
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    for run in (lambda g: g, center, fuse, fold, fuse):
        graph = run(graph)
        np.testing.assert_allclose(evaluate(graph, x)[graph.output], wanted, rtol=2e-5, atol=2e-5)


def test_layer_norm_leaves_no_mean_behind(tmp_path):
    graph = fold(fuse(center(import_onnx(norm_mlp(tmp_path / "m.onnx", layer_norm=True)))))
    assert sum(n.op == "reduce_sum" for n in graph.nodes) == 2  # the variances; no mean is left
    assert sum(n.op == "polynomial" for n in graph.nodes) == 6  # a square, an inverse root and an activation each


def test_norm_factor_moves_behind_the_linear_map(tmp_path):
    graph = fold(fuse(import_onnx(norm_mlp(tmp_path / "m.onnx", layer_norm=False))))
    up = graph.by_name["0.up.matmul.product"]
    assert up.op == "linear"
    assert up.inputs == ("x",)
    assert not any(n.op == "mul_const" and n.const is not None and n.const.size > 1 for n in graph.nodes)


def test_mask_joins_the_product(tmp_path):
    graph = fold(fuse(import_onnx(attention(tmp_path / "m.onnx"))))
    assert graph.by_name["scores"].op == "matmul"
    assert graph.by_name["scores"].attrs["mask"] is not None


def test_powers_fuse_to_one_polynomial(tmp_path):
    graph = fuse(import_onnx(attention(tmp_path / "m.onnx", power=4)))
    powers = [n for n in graph.nodes if n.op == "polynomial" and n.inputs == ("scores",)]
    assert [len(n.attrs["coefficients"]) for n in powers] == [5]


@pytest.mark.parametrize("kind", ["Add", "Mul", "Sub", "Div"])
@pytest.mark.parametrize("constant", [(1, 1, 1, 5), (1, 1, 1, 1)], ids=["vector", "number"])
def test_a_constant_of_more_axes_keeps_them(tmp_path, kind, constant):
    """The result has four axes, as a transpose behind it needs; the constant is folded all the same."""
    import onnxruntime

    b = Builder((1, 4, 6))
    y = b.op(kind, b.linear("x", 6, 5, bias=False, name="up"), b.rng.normal(1, 0.1, constant))
    path = b.save(tmp_path / "m.onnx", b.op("Transpose", y, perm=[0, 2, 1, 3]), (1, 4, 1, 5))
    x = np.random.default_rng(1).normal(0, 0.5, (1, 4, 6)).astype(np.float32)
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    graph, _ = simplify(import_onnx(path), x)
    found = evaluate(graph, x)[graph.output]
    assert found.shape == wanted.shape == (1, 4, 1, 5)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not any(n.op in ("add_const", "mul_const") and constant[-1] > 1 for n in graph.nodes)


def test_a_pass_must_keep_the_shape(tmp_path):
    graph = import_onnx(mlp(tmp_path / "m.onnx"))
    last = replace(graph.nodes[-1], name="more", op="reshape", inputs=(graph.output,), shape=(1, 1, 10), const=None)
    more = replace(graph, nodes=(*graph.nodes, last), output="more")
    x = np.ones((1, 64))
    with pytest.raises(VerificationError, match=r"'p' changed the output's shape from \(1, 10\) to \(1, 1, 10\)"):
        same_meaning(graph, more, x, x, "p")
    with pytest.raises(VerificationError, match="not finite on the first sample, before pass 'p'"):
        same_meaning(graph, graph, x * np.nan, x, "p")


def test_a_second_reader_of_the_ids_is_named():
    ids = Node(name="e", op="gather", inputs=("x",), shape=(1, 3, 2), const=np.ones((5, 2)), source="embed")
    other = Node(name="o", op="mul_const", inputs=("x",), shape=(1, 3), const=np.array(2.0), source="scale")
    graph = Graph(input="x", input_shape=(1, 3), output="o", nodes=(ids, other))
    with pytest.raises(UnsupportedOpError, match=r"read by 'embed' \(gather\), 'scale' \(mul_const\)"):
        split_client(graph)


def embedded(m: Model, *, positions: bool = True) -> str:
    """Embedded tokens, as BERT adds them up."""
    x = m.op("Gather", m.normal(5, 6), "x", axis=0)
    return m.op("Add", m.op("Add", x, m.normal(1, 3, 6)), m.normal(1, 1, 6)) if positions else x


@pytest.mark.parametrize("positions", [True, False])
def test_the_exact_norm_behind_an_embedding_is_the_clients(tmp_path, positions):
    m = Model((1, 3))
    y = m.op("LayerNormalization", embedded(m, positions=positions), m.normal(6), m.normal(6), axis=-1, epsilon=1e-3)
    path = m.save(tmp_path / "m.onnx", m.op("Mul", y, y), kind=TensorProto.INT64)
    ids = np.array([[4, 0, 4]])
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": ids})[0]
    graph, embedding = simplify(import_onnx(path), ids)
    assert [n.op for n in graph.nodes] == ["polynomial"] and embedding is not None and embedding.norm is not None
    np.testing.assert_allclose(evaluate(graph, embedding(ids[0])[None])[graph.output], wanted, rtol=1e-5, atol=1e-5)


def test_a_norm_of_an_embedding_that_is_read_elsewhere_must_be_a_polynomial(tmp_path):
    m = Model((1, 3))
    x = embedded(m)
    y = m.op("Add", m.op("LayerNormalization", x, m.normal(6), m.normal(6)), x)
    path = m.save(tmp_path / "m.onnx", y, kind=TensorProto.INT64)
    with pytest.raises(
        UnsupportedOpError, match=r"of an embedding that .* reads as well.*use a norm with a polynomial"
    ):
        simplify(import_onnx(path), np.array([[4, 0, 4]]))


def test_certificate_degree(tmp_path):
    # scores 2, squared 4, values 5, reciprocal of degree 2 in a denominator of degree 4: 8, product 13
    assert certify(import_onnx(attention(tmp_path / "m.onnx"))).degree == 13


@pytest.mark.parametrize(
    ("op", "extra", "hint"),
    [
        ("Softmax", {"axis": -1}, "power_softmax"),
        ("Exp", {}, "fitted"),
        ("Relu", {}, "activation"),
        ("Sqrt", {}, "norm"),
    ],
)
def test_what_is_not_a_polynomial_is_refused_by_name(tmp_path, op, extra, hint):
    b = Builder((1, 4, 8))
    y = b.op(op, b.linear("x", 8, 8, name="blocks.0.up"), name="blocks.0.act", **extra)
    with pytest.raises(UnsupportedOpError, match=rf"'blocks.0.act' is a {op}.*{hint}"):
        import_onnx(b.save(tmp_path / "m.onnx", y, (1, 4, 8)))


def test_division_by_a_value_is_refused(tmp_path):
    b = Builder((1, 4, 8))
    y = b.op("Div", b.linear("x", 8, 8), "x", name="blocks.1.mixer.weights")
    with pytest.raises(UnsupportedOpError, match=r"blocks.1.mixer.weights.*reciprocal"):
        import_onnx(b.save(tmp_path / "m.onnx", y, (1, 4, 8)))


# Kernels of the compiler


def _evaluate(attrs: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """A polynomial op of a circuit in NumPy."""
    return apply(NumpySlots(x.size), Op(id=0, kind="polynomial", args=(0,), attrs=attrs), [x], {})


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9).filter(lambda c: abs(c[-1]) > 0.1), st.floats(0.3, 3))
def test_prepared_polynomials_are_the_polynomial(coefficients, factor):
    attrs, scale = prepare(coefficients, factor, (-1.0, 1.0), 1.0)
    x = np.linspace(-1, 1, 64)
    wanted = Polynomial(coefficients)(factor * x)
    got = scale * _evaluate(attrs, x)
    assert np.max(np.abs(got - wanted)) <= 1e-7 * max(1.0, np.max(np.abs(wanted)))


SIZES = {
    "squares of squares stay large": ([0.0] * 8 + [1.0], (-0.01, 0.01), 1e-16),
    "far beyond 1": ([0.0] * 4 + [1.0], (-1e3, 1e3), 1e12),
    "small where calibration looked": ([(-1.0) ** k * math.comb(16, k) for k in range(17)], (-0.4, 1.0), 1.0),
}


@pytest.mark.parametrize(("coefficients", "interval", "peak"), SIZES.values(), ids=SIZES)
def test_stored_results_neither_drown_nor_overflow(coefficients, interval, peak):
    attrs, scale = prepare(coefficients, 1.0, interval, peak)
    x = np.linspace(*interval, 256)
    x = x[np.abs(Polynomial(coefficients)(x)) <= peak]
    stored = _evaluate(attrs, x)
    assert 0.05 <= np.max(np.abs(stored)) <= 4.0
    np.testing.assert_allclose(scale * stored, Polynomial(coefficients)(x), atol=1e-6 * peak)


@pytest.mark.parametrize("roots", [[1, 2], [1, 2, 3], [0, 0], [1 + 1j, 1 - 1j, 2], [-1, 1, 2j, -2j]], ids=str)
def test_monic_factors(roots):
    p = Polynomial.fromroots(roots)
    p = Polynomial(np.real(p.coef))
    x = np.linspace(-2, 2, 16)
    got = _evaluate({"factors": monic_factors(p)}, x)
    np.testing.assert_allclose(got, p(x), atol=1e-9)


@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        (periodic(16, 64), periodic(16, 64), (16, 16)),
        (periodic(16, 64), periodic(64, 64), (16, 64)),
        (periodic(32, 64), periodic(8, 64), (32, 8)),
        (periodic(5, 64), periodic(3, 64), (5, 3)),
        (periodic(8, 64), Heads(tokens=4, heads=2, channels=4, positions=64).feature(), (8, 8)),
        (Heads(tokens=4, heads=2, channels=4, positions=64).feature(), periodic(8, 64), (8, 8)),
    ],
    ids=["square", "up", "down", "odd sizes", "to heads", "from heads"],
)
def test_matvec_is_the_matrix(source, target, shape):
    rng = np.random.default_rng(0)
    matrix, x = rng.normal(size=shape), rng.normal(size=shape[0])
    plan = plan_matvec(source, target, matrix, lambda d, b, g, f: d + 5 * b + 20 * g + 20 * f)
    slots = np.where(source >= 0, x[np.maximum(source, 0)], 7.0 if (source < 0).any() else 0.0)
    slots[source < 0] = 0.0
    y = sum(plan.weights[row] * np.roll(slots, -(g + b)) for g, terms in plan.plan for b, row in terms)
    for fold_by in plan.folds:
        y = y + np.roll(y, -fold_by)
    np.testing.assert_allclose(y[target >= 0], (x @ matrix)[target[target >= 0]], atol=1e-12)


@given(st.integers(0, 5), st.integers(0, 4))
def test_split_covers_every_rotation_once(a, b):
    rotations = np.arange(1 << a)[:, None] * 16 + np.arange(1 << b)[None, :]
    rotations = np.sort(rotations.reshape(-1))
    plan = split(rotations, lambda babies, giants: babies + 3 * giants)
    assert sorted(rotations[row] for _, terms in plan for _, row in terms) == list(rotations)
    assert all(rotations[row] == giant + baby for giant, terms in plan for baby, row in terms)


@given(st.integers(1, 16), st.integers(0, 3))
def test_feature_maps_round_trip(features, log_tokens):
    feature = periodic(features, 32)
    layout = from_features(feature, 1 << log_tokens, features)
    np.testing.assert_array_equal(to_features(layout, 1 << log_tokens, features), feature)
