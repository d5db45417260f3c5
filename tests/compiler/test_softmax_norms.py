"""Softmax and norms under --approximate: from both torch exporters and by hand, stated errors, masks, three ways, refusals."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn
from torch.nn import functional as F

from compiler import Target, compile_onnx, plan
from compiler.ir import evaluate
from compiler.onnx_import import import_onnx
from compiler.passes import approximate as fitting
from compiler.passes.approximate import approximate
from compiler.pipeline import simplify
from he_backend.base import UnsupportedOpError
from he_backend.simulator import simulate

from .op_cases import Model
from .test_three_ways import encrypted

TOKENS, WIDTH, HEADS = 4, 8, 2
SHAPE = (1, TOKENS, WIDTH)


class Encoder(nn.Module):
    """What nn.TransformerEncoderLayer computes, with projections apart; `mask` says how the causal one is written."""

    def __init__(self, mask="", pre=True):
        super().__init__()
        self.mask, self.pre = mask, pre
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def attended(self, x):
        b, t, d = x.shape
        q, k, v = (m(x).reshape(b, t, HEADS, d // HEADS).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.mask == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / (d // HEADS) ** 0.5
            if self.mask == "fill":
                scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
            elif self.mask == "where":
                scores = torch.where(torch.ones(t, t, dtype=torch.bool).tril(), scores, torch.finfo(x.dtype).min)
            elif self.mask == "add":
                scores = scores + torch.full((t, t), -1e9).triu(1)
            y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, d))

    def forward(self, x):
        if self.pre:
            x = x + self.attended(self.first(x))
            return x + self.down(F.gelu(self.up(self.second(x))))
        x = self.first(x + self.attended(x))
        return self.second(x + self.down(F.gelu(self.up(x))))


def layer(pre=False):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, activation="gelu", batch_first=True, norm_first=pre)


# name: (model, exporter is the new one, opset)
EXPORTS = {
    "encoder, old exporter": (Encoder, False, 17),
    "encoder, norms by parts": (Encoder, False, 14),
    "encoder, norms behind": (lambda: Encoder(pre=False), False, 17),
    "causal, sdpa": (lambda: Encoder("sdpa"), False, 14),
    "causal, masked_fill": (lambda: Encoder("fill"), False, 17),
    "causal, where": (lambda: Encoder("where"), False, 17),
    "causal, added": (lambda: Encoder("add"), False, 17),
    "encoder, new exporter": (Encoder, True, None),
    "causal, new exporter": (lambda: Encoder("sdpa"), True, None),
    "TransformerEncoderLayer": (layer, True, None),
}


def exported(folder, name):
    make, dynamo, opset = EXPORTS[name]
    if dynamo:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    path = folder / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old exporter is deprecated, the new one warns about itself
        torch.onnx.export(
            make().eval(), (torch.zeros(SHAPE),), str(path), dynamo=dynamo, opset_version=opset, verbose=False
        )
    return path


def inputs(shape=SHAPE, n=16, scale=1.0):
    return [scale * x for x in np.random.default_rng(0).normal(size=(n, *shape))]


def exact(path, samples):
    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    return [session.run(None, {name: x.astype(np.float32)})[0] for x in samples]


@pytest.fixture
def quick(monkeypatch):
    """One scale and one style: the search for parameters takes a second instead of half a minute."""
    monkeypatch.setattr(plan, "SCALES", (45,))
    monkeypatch.setattr(plan, "SMALL_RING_SCALES", ())
    monkeypatch.setattr(plan, "STYLES", plan.STYLES[:1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if EXPORTS[n][1] else n for n in EXPORTS])
def test_exported_models_are_approximated_as_stated(tmp_path, name):
    path, samples = exported(tmp_path, name), inputs()
    wanted = exact(path, samples)
    graph = import_onnx(path, approximate=True)
    for x, y in zip(samples, wanted, strict=True):
        np.testing.assert_allclose(evaluate(graph, x)[graph.output], y, rtol=0, atol=3e-6 * np.max(np.abs(y)))
    after, report = approximate(graph, samples)
    functions = [" of ".join(a.functions) for a in report.approximations]
    activation = next(f for f in functions if f in ("Erf", "Gelu"))
    assert sorted(functions) == sorted(["Exp", "Reciprocal", *["Reciprocal of Sqrt"] * 2, activation])
    change = max(np.max(np.abs(evaluate(after, x)[after.output] - y)) for x, y in zip(samples, wanted, strict=True))
    assert change == pytest.approx(report.error, abs=2e-5)
    assert report.error < 0.02 * report.size
    if "causal" in name:  # the last token is seen by none before it
        moved = samples[0] + np.eye(TOKENS)[-1][:, None]
        before, later = (evaluate(after, x)[after.output] for x in (samples[0], moved))
        np.testing.assert_allclose(later[:, :-1], before[:, :-1], rtol=0, atol=1e-12)
        assert np.max(np.abs(later[:, -1] - before[:, -1])) > 0.1
        assert "12 of 32 at its zero, which masks them" in str(report)
    simplify(after, samples[0])


# By hand


def by_hand(m):
    """Attention with a padding mask, and norms behind, of the ops themselves."""
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        y = m.op("MatMul", "x", m.normal(WIDTH, WIDTH) / WIDTH**0.5)
        parts.append(m.op("Transpose", m.op("Reshape", y, np.array([1, TOKENS, HEADS, WIDTH // HEADS])), perm=perm))
    q, k, v = parts
    padding = np.array([0.0, 0.0, 0.0, -1e9])
    weights = m.op("Softmax", m.op("Add", m.op("Mul", m.op("MatMul", q, k), np.array(0.5)), padding), axis=-1)
    y = m.op("Transpose", m.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    y = m.op("MatMul", m.op("Reshape", y, np.array([1, TOKENS, WIDTH])), m.normal(WIDTH, WIDTH) / WIDTH**0.5)
    x = m.op("LayerNormalization", m.op("Add", "x", y), 1 + m.normal(WIDTH) / 4, m.normal(WIDTH) / 4)
    up = m.op("Gelu", m.op("MatMul", x, m.normal(WIDTH, 2 * WIDTH) / WIDTH**0.5))
    down = m.op("MatMul", up, m.normal(2 * WIDTH, WIDTH) / WIDTH**0.5)
    return m.op("LayerNormalization", m.op("Add", x, down), 1 + m.normal(WIDTH) / 4, m.normal(WIDTH) / 4)


def softmax_by_parts(m):
    x = m.op("MatMul", "x", m.normal(6, 5))
    powers = m.op("Exp", m.op("Sub", x, m.op("ReduceMax", x, axes=[-1])))
    return m.op("Div", powers, m.op("ReduceSum", powers, np.array([-1])))


def softmax_of_exponentials(m):
    powers = m.op("Exp", m.op("MatMul", "x", m.normal(6, 5) / 2))
    return m.op("Div", powers, m.op("ReduceSum", powers, np.array([-1])))


def norm_by_moments(m):
    """Variance as the mean of squares minus the square of the mean, as in ONNX's own function."""
    mean = m.op("ReduceMean", "x", axes=[-1])
    variance = m.op("Sub", m.op("ReduceMean", m.op("Mul", "x", "x"), axes=[-1]), m.op("Mul", mean, mean))
    root = m.op("Sqrt", m.op("Add", variance, np.array(1e-5)))
    return m.op("Mul", m.op("Div", m.op("Sub", "x", mean), root), m.normal(6))


def rms_by_parts(m):
    mean = m.op("ReduceMean", m.op("Pow", "x", np.array(2.0)), axes=[-1])
    inverse = m.op("Reciprocal", m.op("Sqrt", m.op("Add", mean, np.array(1e-5))))
    return m.op("Mul", m.op("Mul", "x", inverse), m.normal(6))


def scores(kind="Softmax", opset=17, **attributes):
    def make(m):
        m.opset = opset
        return m.op(kind, m.op("MatMul", "x", m.normal(6, 5)), **attributes)

    return make


def norm(shape, **attributes):
    return lambda m: m.op("LayerNormalization", "x", m.normal(*shape), m.normal(*shape), **attributes)


def rms(m):
    m.opset = 23
    return m.op("RMSNormalization", "x", m.normal(6), epsilon=1e-4)


ROWS = (1, 4, 6)
NORM, SOFTMAX = ("Reciprocal of Sqrt",), ("Exp", "Reciprocal")
BY_HAND = {
    "softmax head": ((1, 6), scores(), SOFTMAX),
    "softmax over tokens": (ROWS, scores(axis=1), SOFTMAX),
    "softmax over all, opset 11": (ROWS, scores(opset=11), SOFTMAX),
    "softmax by parts": (ROWS, softmax_by_parts, SOFTMAX),
    "softmax without its maximum": (ROWS, softmax_of_exponentials, SOFTMAX),
    "layer norm": (ROWS, norm([6], epsilon=1e-3), NORM),
    "layer norm over two axes": (ROWS, norm([4, 6], axis=1), NORM),
    "layer norm by moments": (ROWS, norm_by_moments, NORM),
    "root mean square": (ROWS, rms, NORM),
    "root mean square by parts": (ROWS, rms_by_parts, NORM),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", BY_HAND)
def test_ops_by_hand_compile_to_what_is_stated(tmp_path, name):
    shape, make, functions = BY_HAND[name]
    m = Model(shape)
    path = m.save(tmp_path / "m.onnx", make(m))
    samples = inputs(shape)
    wanted = exact(path, samples)
    graph = import_onnx(path, approximate=True)
    for x, y in zip(samples, wanted, strict=True):
        np.testing.assert_allclose(evaluate(graph, x)[graph.output], y, rtol=0, atol=2e-6 * np.max(np.abs(y)))
    compiled = compile_onnx(path, np.concatenate(samples), target=Target(insecure_log_n=10), approximate=True)
    report = compiled.approximations
    assert tuple(" of ".join(a.functions) for a in report.approximations) == functions
    assert report.error < 0.02 * report.size
    got = [simulate(compiled.circuit, {"x": x[0]}).outputs["y"] for x in samples]
    change = max(np.max(np.abs(a - b[0])) for a, b in zip(got, wanted, strict=True))
    assert change == pytest.approx(report.error, abs=2e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["by hand", "causal, sdpa"])
def test_three_ways(tmp_path, name):
    """onnxruntime, but for the stated error = the circuit in the simulator = the circuit under encryption."""
    if name == "by hand":
        m = Model(SHAPE, opset=20)
        path = m.save(tmp_path / "m.onnx", by_hand(m))
    else:
        path = exported(tmp_path, name)
    samples = inputs()
    compiled = compile_onnx(path, np.concatenate(samples), target=Target(insecure_log_n=10), approximate=True)
    circuit, x = compiled.circuit, samples[3][0]
    assert circuit.params.insecure
    simulated = simulate(circuit, {"x": x}).outputs["y"]
    change = np.max(np.abs(simulated - exact(path, samples)[3][0]))
    assert 1e-4 < change <= compiled.approximations.error + 2e-5
    error = np.max(np.abs(encrypted(circuit, x) - simulated))
    assert error <= circuit.error_bound < 1e-4


# Many keys, wide scores


@pytest.mark.parametrize("masked", [False, True], ids=["all visible", "causal"])
def test_weights_move_by_no_more_than_stated(tmp_path, masked):
    keys = 32
    m = Model((1, keys, keys))
    mask = np.triu(np.full((keys, keys), -np.inf), 1) if masked else np.zeros((keys, keys))
    path = m.save(tmp_path / "m.onnx", m.op("Softmax", m.op("Add", "x", mask)))
    samples = inputs((1, keys, keys), scale=2.0)
    after, report = approximate(import_onnx(path, approximate=True), samples)
    exponential, reciprocal = report.approximations
    assert exponential.relative <= 0.0102
    assert reciprocal.relative <= 0.0102
    assert f"{496 if masked else 0} of 1024 at its zero" in str(report) or not masked
    bound = 2.0 * exponential.relative + reciprocal.relative * (1.0 + exponential.relative)
    for x, y in zip(samples, exact(path, samples), strict=True):
        moved = np.abs(evaluate(after, x)[after.output] - y).sum(-1)
        assert np.max(moved) <= bound
        assert np.max(np.abs(evaluate(after, x)[after.output][y == 0.0]), initial=0.0) < 1e-12


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (4.6, r"'0.Softmax' \(Reciprocal\) .* of ratio .*11 Goldschmidt steps, .* relative error of .* at most 10 %"),
        (15.0, r"'0.Softmax' \(Exp\) .*comes within .*smallest sum of a row .*'power_softmax'"),
    ],
    ids=["quotients too far apart", "digits end"],
)
def test_scores_too_wide_are_refused_with_both_numbers(tmp_path, scale, says):
    m = Model((1, 8, 8))
    path = m.save(tmp_path / "m.onnx", m.op("Softmax", "x"))
    with pytest.raises(UnsupportedOpError, match=says):
        approximate(import_onnx(path, approximate=True), inputs((1, 8, 8), scale=scale))


def constant_maximum(m):
    return m.op("Mul", "x", m.op("ReduceMax", "x", axes=[-1]))


def masked_row(m):
    return m.op("Softmax", m.op("Add", "x", np.where(np.arange(4)[:, None] == 2, -np.inf, np.zeros((4, 6)))))


def masked_exponential(m):
    return m.op("Exp", m.op("Add", "x", np.array([0, 0, 0, 0, 0, -np.inf])))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (constant_maximum, "'0.ReduceMax' is a ReduceMax that no softmax over the last axis subtracts"),
        (masked_row, "'1.Softmax' is a softmax with all keys masked in 1 of 4 rows"),
        (
            masked_exponential,
            r"'1.Exp' \(Exp\) is to be fitted on \[-inf, .*a mask is compiled where a softmax follows",
        ),
        (lambda m: m.op("LogSoftmax", "x"), "LogSoftmax: --approximate fits .* use the logits themselves"),
        (lambda m: m.op("ReduceMax", "x", axes=[1]), "ReduceMax, .*the one that a softmax subtracts"),
    ],
    ids=["a maximum", "a row without keys", "a mask without a sum", "log softmax", "a maximum over tokens"],
)
def test_refusals(tmp_path, make, says):
    m = Model(ROWS)
    path = m.save(tmp_path / "m.onnx", make(m))
    with pytest.raises(UnsupportedOpError, match=says):
        approximate(import_onnx(path, approximate=True), inputs(ROWS))


@pytest.mark.parametrize("kind", ["Softmax", "LayerNormalization", "RMSNormalization"])
def test_without_the_option_the_refusal_names_it(tmp_path, kind):
    m = Model(ROWS, opset=23)
    path = m.save(tmp_path / "m.onnx", m.op(kind, "x", *[m.normal(6)] * (kind != "Softmax")))
    instead = "power_softmax" if kind == "Softmax" else "inverse square root"
    with pytest.raises(UnsupportedOpError, match=rf"'0.{kind}' is a {kind}, .*{instead}.*compile with --approximate"):
        import_onnx(path)


def test_ranges_that_grow_are_refused_with_both_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "ROUNDS", 1)
    monkeypatch.setattr(fitting, "MARGIN", 1.0)
    m = Model(ROWS)
    x = m.op("LayerNormalization", m.op("LayerNormalization", "x", m.normal(6)), m.normal(6))
    path = m.save(tmp_path / "m.onnx", x)
    says = r"argument of '1.LayerNorm.*' is fitted on \[.*\] and fills \[.*\] after 1 rounds .*train the model"
    with pytest.raises(UnsupportedOpError, match=says):
        approximate(import_onnx(path, approximate=True), inputs(ROWS))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("order", ["post", "pre"])
def test_the_norm_of_an_embedding_is_the_clients_if_nothing_else_reads_that(tmp_path, order):
    """What a residual stream starts with, too, is sent as it is, and normalised by the server."""
    m = Model((1, TOKENS), opset=20)
    x = m.op("Add", m.op("Gather", m.normal(16, WIDTH), "x"), m.normal(TOKENS, WIDTH))
    y = m.op("LayerNormalization", x, 1 + m.normal(WIDTH) / 4, m.normal(WIDTH) / 4)
    y = m.op("Add", x if order == "pre" else y, m.op("MatMul", y, m.normal(WIDTH, WIDTH)))
    if order == "pre":  # the norm that closes the stack
        y = m.op("LayerNormalization", y, 1 + m.normal(WIDTH) / 4, m.normal(WIDTH) / 4)
    path = m.save(tmp_path / "m.onnx", y, kind=TensorProto.INT64)
    tokens = np.random.default_rng(0).integers(0, 16, size=(16, TOKENS))
    if order == "pre":
        with pytest.raises(UnsupportedOpError, match=r"LayerNormalization.* compile with --approximate"):
            compile_onnx(path, tokens, target=Target(insecure_log_n=10))
    compiled = compile_onnx(path, tokens, target=Target(insecure_log_n=10), approximate=True)
    assert len(compiled.approximations.approximations) == (2 if order == "pre" else 0)
    assert (compiled.embedding.norm is not None) == (order == "post")
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": tokens[:1]})[0][0]
    got = simulate(compiled.circuit, {"x": compiled.embedding(tokens[0])}).outputs["y"]
    assert np.max(np.abs(got - wanted)) <= compiled.approximations.error + 2e-5
