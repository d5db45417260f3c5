"""The ONNX file equals the torch model for every combination of parts, and holds nothing but what the contract
names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from polyformer.activations import Activation, fit_activation
from polyformer.approx import goldschmidt_start, inverse_sqrt, reciprocal
from polyformer.export import export_onnx
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer
from polyformer.norms import Norm

BASE = ModelConfig(
    vocab=40, length=8, width=16, heads=2, hidden=24, blocks=2, norms=("affine", "rms", "rms", "rms", "rms")
)
POLYNOMIAL = replace(
    BASE,
    form="rows",
    reciprocal="polynomial",
    reciprocal_degree=3,
    activation="polynomial",
    activation_degree=2,
    norms=("affine", "rms_poly", "rms_poly", "rms_poly", "rms_poly"),
    power=2,
)
OPS = {"Gather", "Add", "Sub", "Mul", "MatMul", "ReduceSum", "ReduceMean", "Reshape", "Transpose"}


def make(config: ModelConfig) -> Transformer:
    """A model of random weights whose polynomials are fitted on plausible intervals."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for module in model.modules():
        if isinstance(module, Norm):
            torch.nn.init.normal_(module.gamma, 1.0, 0.2)
            if module.beta is not None:
                torch.nn.init.normal_(module.beta, 0.0, 0.2)
            if module.inverse_sqrt is not None:
                module.inverse_sqrt.set(inverse_sqrt(module.inverse_sqrt.degree, (0.05, 3.0)))
        if isinstance(module, Activation) and module.polynomial is not None:
            module.polynomial.set(fit_activation("gelu", module.polynomial.degree, (-4.0, 4.0)))
        if isinstance(module, PowerSoftmax):
            if module.reciprocal is not None:
                module.reciprocal.set(reciprocal(module.reciprocal.degree, (0.1, 5.0)))
            if module.steps:
                module.goldschmidt_start_T.copy_(torch.linspace(1.0, 0.5, config.length) * goldschmidt_start(0.1, 5.0))
            if module.form == "rows":
                module.row_T.mul_(torch.linspace(0.8, 1.2, config.length))
    return model


CASES = [
    pytest.param({"mixer": "softmax"}, id="softmax"),
    pytest.param({"mixer": "pointwise"}, id="pointwise"),
    pytest.param({"mixer": "pointwise", "activation": "polynomial", "length_scaling": "both"}, id="pointwise-both"),
    pytest.param({"mixer": "pointwise", "activation": "square", "las_decay": 1.0, "las_width": 2}, id="pointwise-las"),
    pytest.param({"mixer": "pointwise", "causal": False, "score_norm": True}, id="pointwise-score-norm"),
    *[pytest.param({"form": f}, id=f"power-{f}") for f in ("exact", "stable", "mean", "rows")],
    *[pytest.param({"power": p, "form": "mean"}, id=f"power-p{p}") for p in (2, 6, 8, 10, 12)],
    *[pytest.param({"norms": (n,) * 5}, id=f"norm-{n}") for n in ("affine", "rms", "layer")],
    *[
        pytest.param({"norms": (n,) * 5, "norm_degree": d, "norm_newton": t}, id=f"norm-{n}-d{d}-t{t}")
        for n in ("rms_poly", "layer_poly")
        for d, t in ((1, 0), (2, 0), (3, 2))
    ],
    *[pytest.param({"activation": a}, id=f"activation-{a}") for a in ("gelu", "silu", "relu", "square")],
    *[
        pytest.param({"activation": "polynomial", "activation_degree": n}, id=f"activation-degree{n}")
        for n in (1, 2, 4, 7)
    ],
    *[
        pytest.param({"form": "rows", "reciprocal": "polynomial", "reciprocal_degree": n}, id=f"reciprocal-degree{n}")
        for n in (1, 2, 8)
    ],
    pytest.param({"form": "mean", "reciprocal": "goldschmidt", "reciprocal_degree": 3}, id="reciprocal-goldschmidt3"),
    pytest.param({"parallel": True, "norms": ("affine", "rms", "rms")}, id="parallel"),
]


def run_both(model: Transformer, path: Path) -> tuple[np.ndarray, np.ndarray]:
    export_onnx(model, path)
    tokens = torch.randint(0, model.config.vocab, (1, model.config.length), generator=torch.Generator().manual_seed(3))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        return session.run(["logits"], {"tokens": tokens.numpy()})[0], model(tokens).numpy()


@pytest.mark.parametrize("changes", CASES)
def test_onnxruntime_equals_torch(changes, tmp_path):
    onnx_logits, torch_logits = run_both(make(replace(BASE, **changes)), tmp_path / "model.onnx")
    assert torch_logits.std() > 0.01
    np.testing.assert_allclose(onnx_logits, torch_logits, rtol=1e-4, atol=1e-4)


def test_polynomial_model_holds_only_polynomial_operators(tmp_path):
    onnx_logits, torch_logits = run_both(make(POLYNOMIAL), tmp_path / "model.onnx")
    np.testing.assert_allclose(onnx_logits, torch_logits, rtol=1e-4, atol=1e-4)
    proto = onnx.load(tmp_path / "model.onnx")
    calls = {n.op_type for n in proto.graph.node if n.domain == "polyformer"}
    assert calls == {"Polynomial_chebyshev_2", "Polynomial_chebyshev_3"} == {f.name for f in proto.functions}
    assert {n.op_type for n in proto.graph.node if n.domain == ""} <= OPS
    assert {n.op_type for f in proto.functions for n in f.node} <= {"Add", "Sub", "Mul"}
    assert ModelConfig.from_json({p.key: p.value for p in proto.metadata_props}["config"]) == POLYNOMIAL


def test_names_are_layer_paths_and_unique(tmp_path):
    model = make(POLYNOMIAL)
    export_onnx(model, tmp_path / "model.onnx", metadata={"note": "mine"})
    proto = onnx.load(tmp_path / "model.onnx")
    names = [n.name for n in proto.graph.node]
    assert len(set(names)) == len(names)
    paths = {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Norm, Activation))}
    assert paths <= set(names)
    assert all(n.output[0] in (n.name, "logits") for n in proto.graph.node)
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert (
        metadata["producer"] == "polyformer"
        and metadata["note"] == "mine"
        and json.loads(metadata["config"])["vocab"] == 40
    )


def test_non_polynomial_parts_are_visible(tmp_path):
    export_onnx(make(replace(BASE, mixer="softmax", norms=("layer",) * 5)), tmp_path / "model.onnx")
    found = {n.op_type: n.name for n in onnx.load(tmp_path / "model.onnx").graph.node}
    assert (
        found["Softmax"] == "blocks.1.mixer.weights"
        and found["Erf"] == "blocks.1.mlp.act.erf"
        and found["Sqrt"] == "norm.root"
    )


def test_levels_add_up():
    assert make(POLYNOMIAL).levels == 31
    assert make(replace(POLYNOMIAL, norms=("affine",) * 5)).levels == 23
    assert make(replace(POLYNOMIAL, norm_degree=1)).levels == 27
    with pytest.raises(ValueError, match="not polynomial"):
        _ = make(BASE).levels
