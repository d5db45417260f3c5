"""Encoders, vision models, Hyena and linear attention: the ONNX file equals torch, so does the compiled circuit in
the simulator, and under encryption within its promise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compiler import Target, compile_onnx
from he_backend.simulator import simulate
from polyformer.approx import reciprocal
from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.export import export_onnx
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer
from polyformer.norms import BatchNorm
from polyformer.vision import VisionConfig, ViT
from tests.compiler.test_three_ways import encrypted

# One block of affine norms and a square: few levels, so that what is new here decides the circuit.
BODY = ModelConfig(
    vocab=10, length=4, width=8, heads=2, hidden=8, blocks=1, norms=("affine",) * 3, activation="square",
    form="mean", power=2, reciprocal="polynomial", reciprocal_degree=2,
)  # fmt: skip
BOTH = replace(BODY, causal=False)
BATCH = replace(BOTH, norms=("batch",) * 3, mlp_norm=True, score_norm=True, activation="quartic")
HYENA = replace(BOTH, mixer="hyena_nd", grid=(2, 2))


def image(body: ModelConfig, **changes: object) -> VisionConfig:
    return VisionConfig(body=body, classes=3, image=(4, 4), patch=2, channels=1, **changes)  # type: ignore[arg-type]


Config = ModelConfig | ClassifierConfig
MODELS: dict[str, Config] = {
    "lm, linear": replace(BODY, mixer="linear"),
    "lm, fixed decay": replace(BODY, mixer="gated_linear", decay="fixed", output_gate="none"),
    "lm, fixed decay, gate": replace(BODY, mixer="gated_linear", decay="fixed", output_gate="linear"),
    "lm, pointwise": replace(BODY, mixer="pointwise", las_decay=0.3),
    "vit, pointwise, batch norms": image(replace(BATCH, mixer="pointwise")),
    "lm, Hyena": replace(BODY, mixer="hyena"),
    "lm, Hyena of order 3": replace(BODY, mixer="hyena", hyena_order=3, hyena_window="learned"),
    "lm, hybrid": replace(BODY, blocks=2, norms=("affine",) * 5, mixers=("hyena", "power_softmax")),
    "encoder, mean": ClassifierConfig(body=BOTH, classes=3),
    "encoder, first": ClassifierConfig(body=BOTH, classes=3, pool="first"),
    "encoder, Hyena over one axis": ClassifierConfig(body=replace(HYENA, grid=(4,)), classes=3),
    "vit": image(BOTH),
    "vit, class token": image(replace(BOTH, length=5), pool="first"),
    "vit, batch norms": image(BATCH),
    "vit, batch norms, Hyena": image(replace(HYENA, norms=("batch",) * 3, mlp_norm=True)),
    "vit, 3 channels": replace(image(BOTH), channels=3),
    **{f"vit, Hyena {d}": image(replace(HYENA, hyena_direction=d)) for d in ("standard", "4dir", "4dirp")},
    "vit, Hyena parallel": image(replace(HYENA, hyena_direction="parallel", hyena_filter="joint")),
    "vit, Hyena seq": image(replace(HYENA, hyena_direction="seq", hyena_order=3)),
}
COMPILED = ("lm, fixed decay, gate", "lm, Hyena", "encoder, mean", "vit", "vit, batch norms, Hyena")
ENCRYPTED = ("lm, fixed decay, gate", "vit, batch norms, Hyena")


def make(config: Config) -> Transformer | Encoder | ViT:
    """Random weights of which none is trivial, reciprocals fitted, BatchNorms with statistics of some batches."""
    torch.manual_seed(0)
    if isinstance(config, ModelConfig):
        model: Transformer | Encoder | ViT = Transformer(config)
    else:
        model = ViT(config) if isinstance(config, VisionConfig) else Encoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    for module in model.modules():
        if isinstance(module, PowerSoftmax) and module.reciprocal is not None:
            module.reciprocal.set(reciprocal(module.reciprocal.degree, (0.5, 4.0)))
    if any(isinstance(m, BatchNorm) for m in model.modules()):
        for seed in range(3):
            model(inputs(model, 16, seed))
    return model.eval()


def inputs(model: nn.Module, n: int, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if isinstance(model, ViT):
        return torch.randn(n, model.channels, *model.size, generator=g) * 0.5
    return torch.randint(0, 10, (n, 4), generator=g)


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_equals_torch(name, tmp_path):
    model, path = make(MODELS[name]), tmp_path / "model.onnx"
    export_onnx(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given], results = session.get_inputs(), []
    assert given.name == ("images" if isinstance(model, ViT) else "tokens")
    for x in inputs(model, 3).split(1):
        results.append(session.run(["logits"], {given.name: x.numpy()})[0])
    with torch.no_grad():
        expected = model(inputs(model, 3)).numpy()
    assert expected.std(0).max() > 1e-3  # it depends on its input
    np.testing.assert_allclose(np.concatenate(results), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_circuit_in_the_simulator_equals_torch(name, tmp_path):
    model, path = make(MODELS[name]), tmp_path / "model.onnx"
    export_onnx(model, path)
    calibration = inputs(model, 8).numpy()
    circuit = compile_onnx(path, calibration, target=Target(insecure_log_n=11)).circuit
    x = calibration[2]
    if circuit.embedding:  # the client's part
        x = circuit.client_arrays["embedding"][x] + circuit.client_arrays["positions"]
    [found] = simulate(circuit, {circuit.inputs[0].name: x}).outputs.values()
    with torch.no_grad():
        expected = model(torch.from_numpy(calibration[2:3]))[0].double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if name in ENCRYPTED:
        error = np.abs(encrypted(circuit, x) - found).max()
        assert error <= circuit.error_bound < 1e-2, f"{error:.2e} above the promised {circuit.error_bound:.2e}"
