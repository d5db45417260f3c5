"""A step's ONNX file, fed with the tokens of a window one by one, gives the rows of the whole model's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from polyformer.export_step import export_step
from polyformer.model import ModelConfig
from tests.polyformer.test_export import BASE, OPS, POLYNOMIAL, make

LLAMA: dict = {
    "heads": 4, "kv_heads": 2, "rotary": 4, "positions": "none", "biases": False, "gated": True, "head_bias": False,
}  # fmt: skip
CASES: dict[str, ModelConfig] = {
    "rows, polynomial": POLYNOMIAL,
    "mean": replace(POLYNOMIAL, form="mean", power=4),
    "exact form": replace(BASE, form="exact", power=2),
    "exact division": BASE,
    "goldschmidt": replace(POLYNOMIAL, reciprocal="goldschmidt", reciprocal_degree=3),
    "goldschmidt, one step": replace(POLYNOMIAL, reciprocal="goldschmidt", reciprocal_degree=1),
    "LaS decay, 4 heads": replace(POLYNOMIAL, las_decay=1.0, heads=4, norms=("affine",) * 5),
    "LaS decay, p = 4, exact division": replace(BASE, las_decay=0.3, power=4),
    "shared key heads": replace(BASE, heads=4, kv_heads=2),
    "rotary": replace(BASE, rotary=8, positions="none"),
    "rotary on some channels, LaS": replace(BASE, rotary=4, las_decay=0.5),
    "GPT-2": replace(BASE, head="tied", head_bias=False, norms=("layer",) * 5, activation="gelu_tanh"),
    "Llama": replace(BASE, **LLAMA, activation="silu"),
    "Llama, polynomial": replace(POLYNOMIAL, **LLAMA, blocks=1, norms=("affine",) * 3),
    "parallel": replace(POLYNOMIAL, parallel=True, norms=("affine", "affine", "affine")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_prefix_equals_the_whole_model(tmp_path: Path, name: str) -> None:
    config = CASES[name]
    model = make(config).double()
    export_step(make(config), tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"))
    states = {i.name: np.zeros(i.shape, dtype=np.float32) for i in session.get_inputs()[2:]}
    tokens = np.random.default_rng(1).integers(0, config.vocab, (1, config.length))
    for t in range(config.length):
        feed = {"token": tokens[:, t : t + 1], "step": np.array(t, dtype=np.int64), **states}
        logits, *new = session.run(None, feed)
        states = dict(zip(states, new, strict=True))
        with torch.no_grad():
            wanted = model(torch.from_numpy(tokens[:, : t + 1]))[0, -1].numpy()
        np.testing.assert_allclose(logits[0, 0], wanted, atol=2e-4 * max(1.0, float(np.abs(wanted).max())))


def test_a_polynomial_step_holds_only_polynomial_ops(tmp_path: Path) -> None:
    export_step(make(POLYNOMIAL), tmp_path / "step.onnx")
    proto = onnx.load(str(tmp_path / "step.onnx"))
    assert {n.op_type for n in proto.graph.node if n.domain == ""} <= OPS
    names = [o.name for o in proto.graph.output[1:]]
    assert [i.name for i in proto.graph.input[2:]] == [n.replace(".next", ".state") for n in names]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"causal": False}, "not causal"),
        ({"las_width": 3}, "las_width=3"),
        ({"mixer": "softmax"}, "Softmax"),
        ({"order": "post"}, "order='post'"),
    ],
)
def test_what_is_no_step_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        export_step(make(replace(POLYNOMIAL, **change)), tmp_path / "step.onnx")  # type: ignore[arg-type]
