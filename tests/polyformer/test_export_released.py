"""The families of released checkpoints, once their functions are polynomials: ONNX in onnxruntime equals torch, so does
the compiled circuit in the simulator, and under encryption within its promise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from compiler import Target, compile_onnx
from compiler.calibrate import calibrate
from compiler.cost import CostTable
from compiler.lower import Lowered, lower
from compiler.passes.levels import assign_levels
from compiler.pipeline import import_graph, simplify
from compiler.search import plan_cost
from he_backend.simulator import simulate
from polyformer.architectures import family
from polyformer.export import export_onnx
from polyformer.model import ModelConfig, Transformer
from polyformer.ranges import measure
from tests.compiler.test_three_ways import encrypted
from training.substitution import KINDS, polynomial_config, with_polynomials
from training.swap import swap_attention

T = 8
SHAPE = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": T}
VALUES = {
    "llama": SHAPE | {"num_key_value_heads": 2, "hidden_act": "silu", "tie_word_embeddings": True},
    "gpt_neox": SHAPE | {"rotary_pct": 0.5, "hidden_act": "gelu", "use_parallel_residual": True},
    "bert": SHAPE | {"type_vocab_size": 2, "hidden_act": "gelu", "model_type": "bert"},
    "gpt2": {"vocab_size": 20, "n_embd": 16, "n_inner": 16, "n_layer": 1, "n_head": 4, "n_positions": T}
    | {"activation_function": "gelu_new"},
}
ENCRYPTED = ("llama", "bert")


def polynomial(config: ModelConfig) -> Transformer:
    """Random weights of a family's config, its attention swapped, its functions fitted on the ranges that it has."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
        model.token.weight.div_(model.token.weight.std(-1, keepdim=True))  # variances that a parabola can follow
        for name, p in model.named_parameters():
            if name.endswith(("o.weight", "down.weight")):
                p.mul_(0.5)
    power = swap_attention(model, power=2, eps=1.0, form="mean")
    kept = {name: (r.low, r.high) for name, r in measure(power, tokens(256)).items()}
    fitted = {n: (lo * 1.1, hi * 1.1) if lo < 0 else (lo / 1.1, hi * 1.1) for n, (lo, hi) in kept.items()}
    made = polynomial_config(power.config, KINDS, division=2, activation=2, norm=2)
    return with_polynomials(power, made, fitted)


def tokens(n: int) -> torch.Tensor:
    return torch.randint(0, 20, (n, T), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", VALUES)
def test_three_ways(name, tmp_path):
    model, path = polynomial(family(name).config(VALUES[name], T)), tmp_path / "model.onnx"
    export_onnx(model, path)
    circuit = compile_onnx(path, tokens(4).numpy(), target=Target(insecure_log_n=10)).circuit
    ids = tokens(4)[2]
    with torch.no_grad():
        expected = model(ids[None])[0].numpy()
    assert expected.std(0).max() > 1e-2  # it depends on its input
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    clear = session.run(None, {"tokens": ids[None].numpy()})[0][0]
    np.testing.assert_allclose(clear, expected, rtol=1e-4, atol=1e-5)
    assert circuit.client_arrays["positions"].any() == (model.position is not None)
    assert ("norm" in circuit.client_arrays) == (name == "bert")  # the norm that opens a post-norm stack
    x = circuit.spec().embed(ids.numpy())  # the client's part
    [found] = simulate(circuit, {circuit.inputs[0].name: x}).outputs.values()
    np.testing.assert_allclose(found, clear, rtol=1e-4, atol=1e-4)
    if name in ENCRYPTED:
        error = np.abs(encrypted(circuit, x) - found).max()
        assert error <= circuit.error_bound < 1e-2, f"{error:.2e} above the promised {circuit.error_bound:.2e}"


def lowered(model: Transformer, path: Path) -> Lowered:
    """The circuit of a model without parameters."""
    export_onnx(model, path)
    graph, embedding = simplify(import_graph(path), tokens(1).numpy())
    assert embedding is not None
    ranges = calibrate(graph, [embedding(row)[None] for row in tokens(8).numpy()])
    program = lower(graph, ranges, 512, plan_cost(CostTable.load(), 16))
    return replace(program, ops=assign_levels(program.ops, program.arrays, 512))


def test_rotary_positions_cost_no_level_and_no_rotation(tmp_path):
    config = family("llama").config(VALUES["llama"], T)
    turned, still = (
        lowered(polynomial(replace(config, rotary=rotary)), tmp_path / f"{rotary}.onnx") for rotary in (4, 0)
    )
    assert turned.ops[0].level == still.ops[0].level
    assert [(op.kind, op.args) for op in turned.ops] == [(op.kind, op.args) for op in still.ops]
    plans = [[op.attrs["plan"] for op in c.ops if op.kind == "linear"] for c in (turned, still)]
    assert plans[0] == plans[1]
