"""Every op three ways: its file in onnxruntime = the lowered circuit in the simulator = one op of a kind under encryption."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from compiler import Target, compile_onnx
from compiler.errors import promised_error, simulated_noise
from compiler.samples import requests
from he_backend import keys
from he_backend.base import ParamsError, UnsupportedOpError
from he_backend.params import Params
from he_backend.simulator import simulate
from he_backend.trace import trace

from .op_cases import CASES, Model
from .test_three_ways import asked, parties

SINGLE = 2e-6  # relative to the largest element: onnxruntime computes in float32
TARGET = Target(insecure_log_n=10)
PARAMS = Params(log_n=10, levels=4, scale_bits=45, first_bits=60, digits=5, insecure=True)  # one context for all ops

# Their input or output has a first axis that is not the one request: refused, and compiled between two reshapes.
NO_REQUEST = (
    "flatten",
    "transpose",
    "sum over all",
    "matmul, batched constant left",
    "gemm, A transposed",
    "gemm, constant left",
    "gemm of encrypted",
    "einsum, two axes summed",
)
ENCRYPTED = (
    *("conv grouped", "average pool, pads counted", "global average pool", "batch normalization", "slice"),
    *("split and concat", "expand", "tile", "pad", "pad, reflected", "cumsum", "flatten", "transpose"),
    *("gather many, repeated", "gather elements", "trilu", "depth to space", "where of a constant mask"),
    *("sum over all", "mean over two axes", "sum of squares", "constant minus", "divided by a constant", "power"),
    *("sum of three", "constant larger than x", "matmul", "matmul, constant left", "matmul of encrypted"),
    *("gemm, A transposed", "gemm of encrypted", "einsum, scores", "einsum, outer", "mask made of its shape"),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By name: (circuit, one input without its leading axis, what onnxruntime makes of it); each is compiled once."""
    made = {}

    def of(name):
        if name not in made:
            shape, make = CASES[name]
            m = Model(shape)
            output = make(m)
            path = tmp_path_factory.mktemp("op") / "m.onnx"
            m.save(path, m.as_request(output) if name in NO_REQUEST else output)
            samples = np.random.default_rng(1).normal(size=(4, *m.shape[1:])).astype(np.float32)
            session = onnxruntime.InferenceSession(str(path))
            clear = session.run(None, {"x": samples[:1]})[0]
            made[name] = compile_onnx(path, samples, target=TARGET).circuit, samples[0], clear
        return made[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_the_lowered_op_means_what_onnxruntime_computes(compiled, name):
    circuit, x, clear = compiled(name)
    got = simulate(circuit, {"x": x}).outputs["y"]
    assert got.shape == clear.shape[1:]
    np.testing.assert_allclose(got, clear[0], rtol=0, atol=SINGLE * np.max(np.abs(clear)))


@pytest.mark.parametrize("name", NO_REQUEST)
def test_what_is_no_single_request_is_refused(tmp_path, name):
    shape, make = CASES[name]
    m = Model(shape)
    path = m.save(tmp_path / "m.onnx", make(m))
    with pytest.raises(
        UnsupportedOpError, match=r"put '.*' has shape \(.*\); one request, \[1, \.\.\.\], is compiled at a time"
    ):
        compile_onnx(path, np.zeros((4, *shape[1:])), target=TARGET)


def test_samples_of_another_shape_are_refused(tmp_path):
    m = Model((1, 4, 6))
    path = m.save(tmp_path / "m.onnx", m.op("Mul", "x", "x"))
    with pytest.raises(
        ParamsError, match=r"calibration of shape \(3, 4, 5\); input 'x' .* is calibrated on \[n, 4, 6\]"
    ):
        compile_onnx(path, np.zeros((3, 4, 5)), target=TARGET)


@pytest.fixture(scope="module")
def sides():
    with parties(PARAMS) as both:
        yield both


@pytest.mark.parametrize("name", ENCRYPTED)
def test_the_op_keeps_its_promise_under_encryption(compiled, sides, name):
    """In one context for all: the circuit's own parameters would need keys and primes of their own for every op."""
    made, x, clear = compiled(name)
    draft = replace(made, params=PARAMS)
    t = trace(draft)
    circuit = replace(draft, keys=t.keys, relin_level=t.relin_level)
    client, server = sides
    for kind, k, _ in keys.wanted(circuit.spec()):
        if not (server.relin_level >= 0 if kind == "relin" else k in server.key_levels):
            server.load_key(kind, k, PARAMS.levels, client.make_key(kind, k, PARAMS.levels))
    promised = promised_error(simulated_noise(circuit, t, requests([x])))
    size = np.max(np.abs(clear))
    error = np.max(np.abs(asked(circuit, client, server, x) - clear[0]))
    assert error <= promised + SINGLE * size, f"{error:.2e} above the promised {promised:.2e}"
    assert promised < 1e-6 * size
