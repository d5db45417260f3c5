"""Lowering of tensors in several ciphertexts, what is stored once, and which rings are tried at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compiler import Target
from compiler.calibrate import calibrate
from compiler.cost import CostTable
from compiler.lower import lower
from compiler.passes.levels import assign_levels
from compiler.pipeline import import_graph, simplify
from compiler.plan import as_circuit
from compiler.rings import fewest_levels, possible_rings
from compiler.search import plan_cost
from he_backend.circuit import Circuit, Op, Signature
from he_backend.kernels import NumpySlots, linear
from he_backend.params import Params
from he_backend.simulator import Case, peaks, simulate

from . import models
from .models import Builder
from .test_attention import lowered


def head_on_one_token(path: Path) -> Path:
    """Two ciphertexts of features, squared, and a head of three classes on the first token."""
    b = Builder((1, 16, 64))
    h = b.op("Mul", "x", "x", name="square")
    h = b.op("Slice", h, np.array([0]), np.array([1]), np.array([1]), name="first")
    y = b.linear(b.op("Reshape", h, np.array([1, 64])), 64, 3, name="head")
    return b.save(path, y, (1, 3))


def test_a_head_on_one_token_takes_a_diagonal_an_output(tmp_path):
    build, _, _ = lowered(head_on_one_token(tmp_path / "m.onnx"), 512, merge=None)
    maps = [op for op in build.ops if op.kind == "linear"]
    assert [sum(len(terms) for _, terms in op.attrs["plan"]) for op in maps] == [3, 3]


def test_a_norm_over_two_ciphertexts_costs_no_level_more(tmp_path):
    path = models.norm_mlp(tmp_path / "m.onnx", layer_norm=False, tokens=16, width=64)
    two, _, _ = lowered(path, 512, merge=None)
    one, _, _ = lowered(path, 1024, merge=None)
    assert sum(op.kind == "input" for op in two.ops) == 2
    assert two.ops[0].level == one.ops[0].level


def test_equal_masks_are_stored_once(tmp_path):
    """Two groups of heads, keys and values: rearrangements by the same 0/1 vectors."""
    path = models.attention(tmp_path / "m.onnx", tokens=16, heads=8, channels=8, causal=False)
    build, _, _ = lowered(path, 512, merge=True)
    used = [op.attrs["weights"] for op in build.ops if op.kind == "linear" and op.attrs["weights"].startswith("values")]
    assert len(used) > 1.5 * len(set(used))
    arrays = [(a.shape, a.tobytes()) for name, a in build.arrays.items() if not name.startswith("layout")]
    assert len(arrays) == len(set(arrays))


MODELS = {
    "mlp": models.mlp,
    "norm": lambda p: models.norm_mlp(p, layer_norm=True),
    "attention": models.attention,
    "head": head_on_one_token,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("merge", [False, True], ids=["folded", "merged"])
def test_a_graph_never_needs_fewer_levels_than_said(tmp_path, name, merge):
    path = MODELS[name](tmp_path / "m.onnx")
    graph = import_graph(path)
    x = np.random.default_rng(0).normal(0, 0.5, (2, *graph.input_shape[1:]))
    graph, _ = simplify(graph, x[:1])
    ranges = calibrate(graph, [row[None] for row in x])
    build = lower(graph, ranges, 512, plan_cost(CostTable.load(), 16), merge=merge)
    assert 0 < fewest_levels(graph) <= assign_levels(build.ops, build.arrays, 512)[0].level


def test_rings_too_small_for_the_depth_are_left_out(tmp_path):
    graph = import_graph(models.mlp(tmp_path / "m.onnx"))
    assert possible_rings(graph, Target()) == [13, 14, 15, 16]
    assert possible_rings(graph, Target(insecure_log_n=11)) == [11]
    square = next(node for node in graph.nodes if node.op == "mul")
    tower = [square]
    for i in range(18):
        tower.append(replace(square, name=f"again{i}", inputs=(tower[-1].name, tower[-1].name)))
    deep = replace(graph, nodes=(*graph.nodes[: graph.nodes.index(square)], *tower), output=tower[-1].name)
    assert fewest_levels(deep) == 20
    assert possible_rings(deep, Target()) == [16]
    assert possible_rings(deep, Target(backend="tenseal")) == [15]


def test_a_simulation_that_is_visited_keeps_no_values_and_finds_the_same(tmp_path):
    build, _, _ = lowered(models.attention(tmp_path / "m.onnx"), 512, merge=True)
    params = Params(log_n=10, levels=build.ops[0].level, scale_bits=40, first_bits=46, digits=3, insecure=True)
    circuit = as_circuit(build, params)
    x = np.random.default_rng(5).normal(0, 0.5, circuit.inputs[0].shape)
    kept = simulate(circuit, {"x": x})
    seen = []
    visited = simulate(circuit, {"x": x}, visit=lambda op, value: seen.append(value.copy()))
    assert visited.values == []
    np.testing.assert_array_equal(visited.outputs["y"], kept.outputs["y"])
    np.testing.assert_array_equal(np.stack(seen), np.stack(kept.values))
    np.testing.assert_array_equal(peaks(circuit, [Case(tensors={"x": x})]), [np.max(np.abs(v)) for v in kept.values])


def test_the_simulators_matrix_of_a_linear_map_is_the_map():
    """Weights of 32 positions of 16 slots, rotations by multiples of 16: simulated as a matrix, by the kernel as rotations."""
    rng = np.random.default_rng(2)
    weights, x = rng.normal(size=(12, 32)), rng.normal(size=512)
    plan = [[64 * g, [[16 * b, 4 * g + b] for b in range(4)]] for g in range(3)]
    ops = (
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=1),
        Op(id=1, kind="linear", args=(0,), attrs={"weights": "w", "plan": plan, "bias": None}),
    )
    circuit = Circuit(
        params=Params(log_n=10, levels=1, scale_bits=40, first_bits=46, digits=1, insecure=True),
        ops=ops,
        arrays={"w": weights},
        client_arrays={"input": np.arange(512)[None]},
        inputs=(Signature(name="x", shape=(512,), layout="input", factor=1.0, bound=9.0, level=1),),
        outputs=(),
        keys={},
        relin_level=-1,
    )
    expected = linear(NumpySlots(512), x, name="w", weights=weights, plan=plan, bias=None)
    np.testing.assert_allclose(simulate(circuit, {"x": x}).values[1], expected, rtol=1e-12, atol=1e-12)


def chain_of_reciprocal(path: Path) -> Path:
    """A small e = (x / 2)^16, of the highest degree that is fused, then Goldschmidt's (1 + e) (1 + e^2) (1 + e^4)."""
    b = Builder((1, 16, 8))
    one = np.array(1.0, dtype=np.float32)
    e = b.op("Mul", "x", np.array(0.5, dtype=np.float32), name="half")
    for i in range(4):
        e = b.op("Mul", e, e, name=f"square{i}")
    product = b.op("Add", e, one, name="factor0")
    for i in range(1, 3):
        e = b.op("Mul", e, e, name=f"e{i}")
        product = b.op("Mul", product, b.op("Add", e, one, name=f"factor{i}"), name=f"product{i}")
    return b.save(path, product, (1, 16, 8))


def test_sums_with_constants_that_dwarf_the_tensor_do_not_fill_the_modulus(tmp_path):
    build, _, _ = lowered(chain_of_reciprocal(tmp_path / "m.onnx"), 512, merge=None)
    params = Params(
        log_n=10, levels=build.ops[0].level, scale_bits=40, first_bits=46, digits=3, secret="uniform", insecure=True
    )
    x = np.random.default_rng(1).normal(0, 0.5, (1, 16, 8))  # one of those that `lowered` calibrated on
    assert (
        peaks(as_circuit(build, params), [Case(tensors={"x": row}) for row in x]).max() < 4.0
    )  # 100 and more where 1 + e is stored as e is
