"""Random polynomial graphs three ways: onnxruntime = the importer's graph in float64 = the compiled circuit in the simulator."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from compiler import Target, compile_onnx
from compiler.ir import evaluate
from compiler.pipeline import import_graph
from he_backend.base import UnsupportedOpError
from he_backend.simulator import simulate

from .models import Builder
from .random_graphs import STEPS, programs

SINGLE = 1e-5  # relative to the graph's largest element: onnxruntime computes in float32
DOUBLE = 1e-7
FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def session(path):
    """The reference as the file is written: onnxruntime 1.23's fusion of Gemm with a transpose mistakes perm [0, 1] for [1, 0]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options)


def three_ways(path, log_n):
    """Compile and compare on a sample that calibration saw and on one that it did not.

    Raises:
        UnsupportedOpError: it is refused.
    """
    run = session(path)
    shape = run.get_inputs()[0].shape
    samples = np.random.default_rng(0).normal(0, 0.5, (7, *shape[1:])).astype(np.float32)
    circuit = compile_onnx(path, samples[1:], target=Target(insecure_log_n=log_n)).circuit
    graph = import_graph(path)
    for x in samples[:2]:
        values = evaluate(graph, x[None])
        size = max(np.max(np.abs(v)) for v in values.values())
        clear = run.run(None, {"x": x[None]})[0]
        assert clear.shape == values[graph.output].shape
        np.testing.assert_allclose(values[graph.output], clear, rtol=0, atol=SINGLE * size)
        np.testing.assert_allclose(
            simulate(circuit, {"x": x}).outputs["y"], values[graph.output][0], rtol=0, atol=DOUBLE * size
        )


# Fewer kinds of op at a time, so that every one is drawn: the rarer ones among some that make levels and shapes for them.
RARER = {"AveragePool", "BatchNormalization", "Split", "Pad", "Where", "local function"}
AMONG = {"Add", "Mul", "MatMul constant", "Reshape", "Transpose"}


@pytest.mark.parametrize(
    ("examples", "steps", "size", "names"),
    [
        pytest.param(160, 7, 96, set(STEPS) - RARER, id="small"),
        pytest.param(60, 6, 96, RARER | AMONG, id="windows, parts and functions"),
        pytest.param(25, 3, 1100, set(STEPS), id="several ciphertexts"),
    ],
)
def test_random_graphs(examples, steps, size, names):
    refused: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    @settings(FIXED, max_examples=examples)
    @given(programs(max_steps=steps, max_size=size, steps=names))
    def check(program):
        seen.update({"graphs": 1, **dict.fromkeys(program.ops, 1)})
        with tempfile.TemporaryDirectory() as folder:
            try:
                three_ways(program.save(Path(folder) / "m.onnx"), 10)
            except UnsupportedOpError as error:
                refused[str(error)] += 1

    check()
    assert seen["graphs"] >= examples
    if steps > 3:
        assert names <= set(seen), f"never drawn: {sorted(names - set(seen))}"
    # Every op here is on README's list, so that only the size of a tensor may rule a graph out.
    assert sum(refused.values()) <= 0.05 * seen["graphs"], "\n".join(refused)
    assert all("ciphertexts" in message or "layout" in message for message in refused), "\n".join(refused)


def no_levels(b):
    """Sums alone: a circuit that needs no level."""
    return b.op("Add", "x", "x"), b.shape


def zero(b):
    """x^2 - x^2: no polynomial is left."""
    return b.op("Sub", b.op("Mul", "x", "x"), b.op("Pow", "x", np.array(2.0))), b.shape


def nothing_left(b):
    """An exclusive running sum over one element."""
    h = b.op("Slice", "x", np.array([0]), np.array([1]), np.array([1]))
    h = b.op("CumSum", h, np.array(1), exclusive=1)
    return b.op("Add", h, np.array(0.5)), (1, 1, *b.shape[2:])


def polynomial_of_zeros(b):
    """x - x, then a square and more: calibration sees nothing but zeros."""
    h = b.op("Sub", "x", "x")
    h = b.op("CumSum", h, np.array(1))
    return b.op("Add", b.op("Mul", b.op("Add", h, np.array(2.0)), h), np.array(0.5)), b.shape


def quartic(b):
    """Of degree 4 with a leading coefficient of 0.03: without it the output would wrap the first modulus."""
    h = "x"
    for _ in range(2):
        terms = b.op("Mul", b.op("Mul", h, h), np.array(0.3)), b.op("Mul", h, np.array(0.7))
        h = b.op("Add", b.op("Add", *terms), np.array(-0.2))
    return h, b.shape


def both_broadcast(b):
    """[1, 4, 1] + [1, 1, 3]."""
    rows, columns = (b.op("ReduceSum", "x", np.array([axis]), keepdims=1) for axis in (2, 1))
    return b.op("Sub", b.op("Add", rows, columns), b.op("Mul", columns, rows)), b.shape


def means_alone(b):
    """Two sums with constants, their sum, and its mean over 64: stored as a sum it would wrap the first modulus, without a level."""
    h = b.op("Add", b.op("Add", "x", np.array(1.2)), b.op("Add", "x", np.array(1.7)))
    return b.op("ReduceMean", h, axes=[1], keepdims=1), (1, 1)


def means_of_products(b):
    """The same after weights and after a square."""
    h = b.op("MatMul", b.op("Add", "x", np.array(1.2)), b.rng.uniform(0.0, 0.1, (64, 64)))
    h = b.op("Add", b.op("ReduceMean", b.op("Mul", h, h), axes=[1], keepdims=1), np.array(0.5))
    return b.op("Add", h, b.op("ReduceMean", "x", axes=[1], keepdims=1)), (1, 1)


def window_in_the_padding(b):
    """Kernel 1, padding 1, stride 2 on 3 elements: the last window lies behind them and counts."""
    weight, bias = b.rng.normal(size=(2, 4, 1)), b.rng.normal(size=2)
    return b.op("Conv", "x", weight, bias, pads=[1, 1], strides=[2]), (1, 2, 3)


FOUND = {
    f.__name__: f
    for f in (
        *(no_levels, zero, nothing_left, polynomial_of_zeros, quartic, both_broadcast, window_in_the_padding),
        *(means_alone, means_of_products),
    )
}
WIDE = (means_alone.__name__, means_of_products.__name__)


@pytest.mark.parametrize("name", FOUND)
def test_graphs_that_once_failed(tmp_path, name):
    builder = Builder((1, 64) if name in WIDE else (1, 4, 3))
    output, shape = FOUND[name](builder)
    three_ways(builder.save(tmp_path / "m.onnx", output, shape), 10)
