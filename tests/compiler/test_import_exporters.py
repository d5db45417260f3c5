"""Files from torch's exporters, old and new, and from onnxscript: imported, simplified, and equal to the torch model."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compiler import Target, compile_onnx
from compiler.ir import evaluate
from compiler.onnx_import import import_onnx
from compiler.pipeline import simplify
from he_backend.simulator import simulate

from .test_import_ops import check


class Square(nn.Module):
    def forward(self, x):
        return x * x


def cnn():
    layers = [nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), Square(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(27, 5)), (1, 1, 12, 12)


class Vision(nn.Module):
    """Patches, one map for queries, keys and values, attention by squares, the mean over tokens, a head."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q @ k.transpose(-2, -1) * 0.1) ** 2
        x = x + self.out((a @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(dim=1))


class LinearAttention(nn.Module):
    """phi(q) (sum over the past of phi(k) v') with a cumulative sum, phi a square; einsums throughout."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q(x) ** 2, self.k(x) ** 2, self.v(x)
        state = torch.einsum("btc,btd->btcd", k, v).cumsum(dim=1)
        return torch.einsum("btc,btcd->btd", q, state)


class Hyena(nn.Module):
    """Order 2: a short depthwise convolution, two gates, a long causal filter as a Toeplitz matrix."""

    def __init__(self):
        super().__init__()
        self.project, self.short = nn.Linear(4, 12), nn.Conv1d(12, 12, 3, padding=2, groups=12)
        self.filter = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        u = self.short(self.project(x).transpose(1, 2))[..., : x.shape[1]]
        a, b, v = u.chunk(3, dim=1)
        steps = torch.arange(6)
        lags = steps[:, None] - steps[None, :]
        toeplitz = self.filter[:, lags.clamp(min=0)] * (lags >= 0)
        return (a * torch.einsum("cts,bcs->bct", toeplitz, b * v)).transpose(1, 2)


MODELS = {
    "cnn": cnn,
    "vision transformer": lambda: (Vision(), (1, 1, 8, 8)),
    "linear attention": lambda: (LinearAttention(), (1, 6, 4)),
    "hyena": lambda: (Hyena(), (1, 6, 4)),
}


EXPORTS = [
    *(pytest.param(name, False, id=f"{name}, old exporter") for name in MODELS),
    *(pytest.param(name, True, id=f"{name}, new exporter", marks=pytest.mark.slow) for name in MODELS),
]


@pytest.mark.parametrize(("name", "dynamo"), EXPORTS)
def test_torch_models(tmp_path, name, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model = model.eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    path = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old exporter is deprecated, the new one warns about itself
        torch.onnx.export(model, (torch.zeros(shape),), str(path), dynamo=dynamo, verbose=False)
    graph = check(path, shape, tolerance=2e-6)
    x = np.random.default_rng(1).normal(size=shape)
    simple, _ = simplify(graph, x)
    assert len(simple.nodes) <= len(graph.nodes)
    wanted = model(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(evaluate(simple, x)[simple.output], wanted, rtol=0, atol=2e-6 * np.max(np.abs(wanted)))


def test_onnxscript(tmp_path):
    pytest.importorskip("onnxscript")
    from onnxscript import FLOAT, script
    from onnxscript import opset18 as op
    from onnxscript.values import Opset

    mine = Opset("mine", 1)

    @script(mine, default_opset=op)
    def gate(a, b):
        return a * b + op.Identity(a)

    @script(default_opset=op)
    def model(x):
        y = gate(x, x)
        return op.ReduceMean(y - op.CumSum(x, op.Constant(value_int=1)), op.Constant(value_ints=[-1]))

    path = tmp_path / "m.onnx"
    proto = model.to_model_proto(input_types=[FLOAT[1, 4, 6]], output_types=[FLOAT[1, 4, 1]])
    onnx.save(proto, str(path))
    check(path, (1, 4, 6))


def test_vision_transformer_keeps_the_shape_of_attention(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Vision().eval(), (torch.zeros(1, 1, 8, 8),), str(path), dynamo=False)
    graph, _ = simplify(import_onnx(path), np.random.default_rng(1).normal(size=(1, 1, 8, 8)))
    scores = next(n for n in graph.nodes if n.op == "matmul")
    for name, perm in zip(scores.inputs, ([0, 2, 1, 3], [0, 2, 3, 1]), strict=True):
        turned = graph.by_name[name]
        assert (turned.op, list(turned.attrs["perm"])) == ("transpose", perm)
        split = graph.by_name[turned.inputs[0]]
        assert (split.op, split.shape) == ("reshape", (1, 5, 2, 4))
        assert graph.by_name[split.inputs[0]].op == "linear"


@pytest.mark.parametrize("name", MODELS)
def test_torch_models_compile(tmp_path, name):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model, path = model.eval(), tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(shape),), str(path), dynamo=False)
    x = np.random.default_rng(0).normal(0, 0.5, size=(4, *shape[1:]))
    compiled = compile_onnx(path, x, target=Target(insecure_log_n=12))
    wanted = model(torch.tensor(x[:1], dtype=torch.float32)).detach().numpy()[0]
    got = simulate(compiled.circuit, {"x": x[0]}).outputs["y"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted)))
