"""Functions fitted on calibrated ranges: what is stated is what happens, and what cannot be fitted is refused."""

import json

import numpy as np
import pytest

from compiler import Target, compile_onnx
from compiler.certificate import certify
from compiler.ir import evaluate
from compiler.onnx_import import import_onnx
from compiler.passes.approximate import approximate, widened
from he_backend.base import UnsupportedOpError
from he_backend.simulator import simulate
from polyformer import cli

from .op_cases import Model

SHAPE = (1, 4, 6)


def samples(n=8, scale=1.0):
    rng = np.random.default_rng(4)
    return [scale * rng.normal(size=SHAPE) for _ in range(n)]


def layer(kind, opset=20, **attributes):
    def make(m):
        m.opset = opset
        return m.op("MatMul", m.op(kind, m.op("MatMul", "x", m.normal(6, 5) / 3), **attributes), m.normal(5, 2))

    return make


def gelu_by_erf(m):
    """As torch writes it before opset 20."""
    gate = m.op("Add", m.op("Erf", m.op("Div", "x", np.array(2**0.5))), np.array(1.0))
    return m.op("Mul", m.op("Mul", "x", gate), np.array(0.5))


def silu(m):
    return m.op("Mul", "x", m.op("Sigmoid", "x"))


def layer_norm(m):
    """Layer normalisation by parts: the inverse root is one polynomial of the variance."""
    centred = m.op("Sub", "x", m.op("ReduceMean", "x", axes=[-1]))
    variance = m.op("ReduceMean", m.op("Mul", centred, centred), axes=[-1])
    return m.op("Div", centred, m.op("Sqrt", m.op("Add", variance, np.array(0.5))))


def with_constants(kind, *constants):
    def make(m):
        h = m.op("MatMul", "x", m.normal(6, 5) / 3)
        return m.op("MatMul", m.op(kind, *(h if c is None else c for c in constants)), m.normal(5, 2))

    return make


# None: the tensor.
WITH_CONSTANTS = {
    "Clip": ("Clip", None, np.array(-0.5), np.array(1.0)),
    "Clip, one bound": ("Clip", None, "", np.array(0.4)),
    "Max": ("Max", np.array(0.0), None),
    "Max of several": ("Max", None, np.zeros((1, 5)), np.array([-3.0])),
    "Min": ("Min", None, np.array(0.3)),
    "PRelu": ("PRelu", None, np.full(5, 0.1)),
}


CASES = {
    **{kind: (layer(kind), (kind,)) for kind in ("Relu", "Sigmoid", "Tanh", "Exp", "Erf", "Gelu", "Softplus", "Abs")},
    **{kind: (layer(kind), (kind,)) for kind in ("LeakyRelu", "Elu", "Selu", "HardSigmoid", "HardSwish", "Softsign")},
    **{kind: (layer(kind), (kind,)) for kind in ("Mish", "Sin", "Cos")},
    "Gelu, tanh": (layer("Gelu", approximate="tanh"), ("Gelu",)),
    "gelu by Erf": (gelu_by_erf, ("Erf",)),
    **{name: (with_constants(*args), (args[0],)) for name, args in WITH_CONSTANTS.items()},
    "Clip, attributes": (layer("Clip", opset=6, min=-0.5, max=1.0), ("Clip",)),
    "Celu": (layer("Celu", alpha=0.7), ("Celu",)),
    "silu": (silu, ("Sigmoid",)),
    "layer norm": (layer_norm, ("Reciprocal", "Sqrt")),
    "root": (lambda m: m.op("Pow", m.op("Add", m.op("Mul", "x", "x"), np.array(1.0)), np.array(0.5)), ("Pow",)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_stated_error_is_the_error(tmp_path, name):
    import onnxruntime

    make, functions = CASES[name]
    m = Model(SHAPE)
    path = m.save(tmp_path / "m.onnx", make(m))
    graph = import_onnx(path, approximate=True)
    inputs = samples()
    session = onnxruntime.InferenceSession(str(path))
    exact = [session.run(None, {"x": x.astype(np.float32)})[0] for x in inputs]
    for x, y in zip(inputs, exact, strict=True):  # the graph with functions is the model
        np.testing.assert_allclose(evaluate(graph, x)[graph.output], y, rtol=0, atol=2e-6 * np.max(np.abs(y)))
    after, report = approximate(graph, inputs)
    (made,) = report.approximations
    assert made.functions == functions
    assert made.error <= 0.1 * made.size
    assert made.error <= 0.01 * made.size or made.degree == 15
    assert f"degree {made.degree}" in str(report)
    assert certify(after).degree >= made.degree
    assert not any(n.op == "function" for n in after.nodes)
    change = max(np.max(np.abs(evaluate(after, x)[after.output] - y)) for x, y in zip(inputs, exact, strict=True))
    assert change == pytest.approx(report.error, abs=2e-5)
    polynomial = next(n for n in after.nodes if n.op == "polynomial" and list(made.interval) == n.attrs["interval"])
    for x in inputs:  # every argument lies inside the interval, every result within the stated error
        values = evaluate(after, x)
        argument, result = values[polynomial.inputs[0]], values[polynomial.name]
        assert made.interval[0] <= argument.min() <= argument.max() <= made.interval[1]
        wanted = evaluate(graph, x).get(polynomial.name)
        if name != "layer norm":  # whose polynomial has another product as its reader
            assert np.max(np.abs(result - wanted)) <= made.error + 1e-9


def test_ranges_follow_the_polynomials_before_them(tmp_path):
    m = Model(SHAPE)
    x = "x"
    for _ in range(3):
        x = m.op("Relu", m.op("MatMul", x, m.normal(6, 6)))
    graph = import_onnx(m.save(tmp_path / "m.onnx", x), approximate=True)
    after, report = approximate(graph, samples())
    assert len(report.approximations) == 3
    for x in samples():
        values = evaluate(after, x)
        for node in after.nodes:
            if node.op == "polynomial":
                lo, hi = node.attrs["interval"]
                assert lo <= values[node.inputs[0]].min() <= values[node.inputs[0]].max() <= hi


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: m.op("Reciprocal", "x"), r"Reciprocal.*calibrated range \[-.*"),
        (lambda m: m.op("Sqrt", "x"), r"Sqrt.*not finite everywhere"),
        (lambda m: m.op("Exp", m.op("Mul", "x", np.array(30.0))), r"away from a polynomial of degree 15.*at most 10 %"),
        (lambda m: m.op("Relu", m.op("Sub", m.op("Neg", m.op("Mul", "x", "x")), np.array(50.0))), "is zero: remove"),
    ],
    ids=["reciprocal across its pole", "root of negative numbers", "too wide", "dead"],
)
def test_what_no_polynomial_fits_is_refused(tmp_path, make, says):
    m = Model(SHAPE)
    graph = import_onnx(m.save(tmp_path / "m.onnx", make(m)), approximate=True)
    with pytest.raises(UnsupportedOpError, match=says):
        approximate(graph, samples())


@pytest.mark.parametrize("kind", ["InstanceNormalization", "TopK"])
def test_what_is_not_fitted_is_refused(tmp_path, kind):
    m = Model(SHAPE)
    y = m.op("TopK", "x", np.array([2]), outputs=2)[0] if kind == "TopK" else m.op(kind, "x", m.normal(4), m.normal(4))
    path = m.save(tmp_path / "m.onnx", y)
    says = rf"is a {kind}: --approximate fits elementwise functions, softmax and norms over features; use .* instead"
    with pytest.raises(UnsupportedOpError, match=says):
        import_onnx(path, approximate=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: m.op("Max", "x", m.op("Neg", "x")), r"Max of 2 tensors .* as b \+ Relu\(a - b\)"),
        (lambda m: m.op("Min", "x", m.op("Neg", "x"), np.array(1.0)), r"Min of 2 tensors .* as a - Relu\(a - b\)"),
        (lambda m: m.op("PRelu", "x", np.arange(6.0)), "PRelu whose slope is not one number .*6 different"),
        (lambda m: m.op("Max", "x", np.zeros((2, 1, 1, 6))), "repeats its tensor"),
        (lambda m: m.op("Clip", "x", m.op("ReduceMean", "x", keepdims=0)), "Clip whose min .* depends on the input"),
    ],
    ids=["max of two", "min of two", "slope a channel", "repeated", "bound from the input"],
)
def test_what_is_elementwise_but_not_one_function_is_refused_truly(tmp_path, make, says):
    m = Model(SHAPE)
    with pytest.raises(UnsupportedOpError, match=says):
        import_onnx(m.save(tmp_path / "m.onnx", make(m)), approximate=True)


def test_an_approximated_model_compiles(tmp_path):
    m = Model((1, 16))
    h = m.op("Relu", m.op("Gemm", "x", m.normal(16, 8) / 4, m.normal(8)))
    path = m.save(tmp_path / "m.onnx", m.op("Gemm", h, m.normal(8, 3) / 3, m.normal(3)))
    x = np.random.default_rng(0).normal(size=(16, 16))
    with pytest.raises(UnsupportedOpError, match=r"'1.Relu' is a Relu.*--approximate"):
        compile_onnx(path, x, target=Target(insecure_log_n=11))
    compiled = compile_onnx(path, x, target=Target(insecure_log_n=11), approximate=True)
    assert compiled.approximations is not None
    (made,) = compiled.approximations.approximations
    assert made.source == "1.Relu"
    assert compiled.certificate.degree == made.degree
    graph = import_onnx(path, approximate=True)
    for row in x[:4]:
        y = simulate(compiled.circuit, {"x": row}).outputs["y"]
        assert np.max(np.abs(y - evaluate(graph, row[None])[graph.output][0])) <= compiled.approximations.error + 1e-6


@pytest.mark.parametrize("approximate", [False, True])
def test_command_line_says_what_was_approximated(tmp_path, capsys, approximate):
    m = Model((1, 16))
    h = m.op("Sigmoid", m.op("Gemm", "x", m.normal(16, 8) / 4, m.normal(8)))
    path = m.save(tmp_path / "m.onnx", m.op("Gemm", h, m.normal(8, 3) / 3, m.normal(3)))
    np.savez(tmp_path / "calibration.npz", inputs=np.random.default_rng(0).normal(size=(16, 16)))
    command = ["compile", str(path), "--insecure-log-n", "11", "--json", *["--approximate"] * approximate]
    assert cli.run(command) == (0 if approximate else 1)
    shown = capsys.readouterr()
    if approximate:
        assert "1.Sigmoid: Sigmoid by a polynomial of degree" in json.loads(shown.out)["approximations"]
    else:
        assert "--approximate" in shown.err


def test_command_line_refuses_no_memory(tmp_path, capsys):
    m = Model((1, 16))
    path = m.save(tmp_path / "m.onnx", m.op("Mul", "x", "x"))
    np.savez(tmp_path / "calibration.npz", inputs=np.ones((2, 16)))
    for memory in ("0", "-3"):
        assert cli.run(["compile", str(path), "--insecure-log-n", "11", "--max-memory-gb", memory]) != 0
        assert "must be positive" in " ".join(capsys.readouterr().err.split())


def test_margins_keep_the_sign():
    assert widened((0.5, 2.0)) == (0.4, 2.5)
    assert widened((-2.0, -0.5)) == (-2.5, -0.4)
    assert widened((-1.0, 2.0)) == (-1.5, 2.5)
