"""The test that matters: ONNX in onnxruntime = the circuit in the simulator = the circuit under encryption."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from compiler import Target, compile_onnx
from compiler.passes.levels import assign_levels
from he_backend import keys
from he_backend.base import HEError, ParamsError, UnsupportedOpError
from he_backend.circuit import Circuit
from he_backend.execute import Executor
from he_backend.params import Params
from he_backend.simulator import input_slots, output_tensors, simulate

from .models import attention, mlp, norm_mlp

MAX_ERROR = 1e-2  # below the default, so that the comparison is a sharp one

CASES = {
    "mlp": (mlp, 11),
    "rms": (lambda p: norm_mlp(p, layer_norm=False), 11),
    "layer norm": (lambda p: norm_mlp(p, layer_norm=True), 11),
    "attention": (attention, 11),
    "attention, p = 4": (lambda p: attention(p, power=4), 11),
    "attention, bidirectional": (lambda p: attention(p, causal=False), 11),
    "attention, several score ciphertexts": (lambda p: attention(p, tokens=16, heads=2, channels=8), 10),
    "attention, 3 heads of 6 channels": (lambda p: attention(p, heads=3, channels=6), 11),
    "attention, spare copies": (lambda p: attention(p, tokens=4, heads=2, channels=2), 11),
}


@contextmanager
def parties(params: Params) -> Iterator[tuple[Any, Any]]:
    """Client and server, two objects that are given nothing in common but bytes."""
    module = keys.backend(params.backend)
    client = module.Client(params, allow_insecure=params.insecure)
    server = module.Evaluator(params, key_id=client.key_id, allow_insecure=params.insecure)
    try:
        yield client, server
    finally:
        server.close()


def asked(circuit: Circuit, client: Any, server: Any, x: np.ndarray) -> np.ndarray:
    """The reply to one request, opened."""
    level = circuit.inputs[0].level
    sent = {
        part: server.import_ciphertext(client.export_ciphertext(client.encrypt(slots, level=level)), level=level)
        for part, slots in input_slots(circuit, {"x": x}).items()
    }
    run = Executor(circuit, server).run(sent)
    back = {
        part: client.decrypt(
            client.import_ciphertext(server.export_ciphertext(c), level=c.level), scale=run.scales[part]
        )
        for part, c in run.outputs.items()
    }
    return output_tensors(circuit, back)["y"]


def encrypted(circuit: Circuit, x: np.ndarray) -> np.ndarray:
    """One evaluation under real encryption."""
    with parties(circuit.params) as (client, server):
        for kind, k, level in keys.wanted(circuit.spec()):
            server.load_key(kind, k, level, client.make_key(kind, k, level))
        return asked(circuit, client, server, x)


def three_ways(path: Path, target: Target, *, scale: float = 0.5) -> Circuit:
    """Compile and compare; returns the circuit."""
    session = onnxruntime.InferenceSession(str(path))
    shape = session.get_inputs()[0].shape
    rng = np.random.default_rng(3)
    calibration = rng.normal(0, scale, (16, *shape[1:])).astype(np.float32)
    compiled = compile_onnx(path, calibration, target=replace(target, max_error=MAX_ERROR))
    circuit = compiled.circuit
    x = calibration[3]
    clear = session.run(None, {"x": x[None]})[0][0]
    simulated = simulate(circuit, {"x": x}).outputs["y"]
    np.testing.assert_allclose(simulated, clear, rtol=2e-5, atol=2e-5)
    error = np.max(np.abs(encrypted(circuit, x) - simulated))
    assert error <= circuit.error_bound, f"{error:.2e} above the promised {circuit.error_bound:.2e}"
    assert circuit.error_bound <= MAX_ERROR
    return circuit


@pytest.mark.parametrize("name", CASES)
def test_three_ways(tmp_path, name):
    make, log_n = CASES[name]
    circuit = three_ways(make(tmp_path / "m.onnx"), Target(insecure_log_n=log_n))
    assert Circuit.load(_saved(circuit, tmp_path)).sha256 == circuit.sha256


def _saved(circuit: Circuit, folder: Path) -> Path:
    circuit.save(folder / "m.circuit")
    return folder / "m.circuit"


@pytest.mark.slow
def test_three_ways_at_128_bits(tmp_path):
    circuit = three_ways(mlp(tmp_path / "m.onnx", features=(784, 128, 10)), Target())
    assert not circuit.params.insecure
    assert circuit.params.log_n <= 14


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_tenseal(tmp_path, name):
    make, log_n = CASES[name]
    three_ways(make(tmp_path / "m.onnx"), Target(backend="tenseal", insecure_log_n=log_n))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_tenseal_at_128_bits(tmp_path, name):
    circuit = three_ways(CASES[name][0](tmp_path / "m.onnx"), Target(backend="tenseal"))
    assert not circuit.params.insecure


def test_too_deep_for_tenseal_says_by_how_many_levels(tmp_path, monkeypatch):
    real = assign_levels

    def deeper(ops, arrays, slots):
        return tuple(replace(op, level=op.level + 30) for op in real(ops, arrays, slots))

    monkeypatch.setattr("compiler.search.assign_levels", deeper)
    path = mlp(tmp_path / "m.onnx")
    with pytest.raises(ParamsError, match=r"needs \d+ levels, TenSEAL has at most \d+ at 128 bits: \d+ too many"):
        compile_onnx(path, np.zeros((2, 64), dtype=np.float32), target=Target(backend="tenseal"))


def test_a_model_too_wide_for_one_ciphertext_takes_several(tmp_path):
    three_ways(
        norm_mlp(tmp_path / "m.onnx", layer_norm=False, tokens=16, width=64), Target(insecure_log_n=11), scale=0.3
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"backend": "seal"}, "known are openfhe, tenseal"),
        ({"threads": 0}, "0 threads"),
        ({"max_memory_gb": -1.0}, "-1.0 GB"),
        ({"insecure_log_n": 3}, r"2\^3"),
    ],
    ids=["backend", "threads", "memory", "ring"],
)
def test_impossible_targets_are_refused(wrong, says):
    with pytest.raises(HEError, match=says):
        Target(**wrong)


def test_what_is_no_onnx_file_is_named(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(UnsupportedOpError, match=r"m\.onnx is not an ONNX file"):
        compile_onnx(path, np.zeros((1, 4)))


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"insecure_log_n": 11}, id="openfhe"),
        pytest.param({"backend": "tenseal", "insecure_log_n": 11}, id="tenseal"),
        pytest.param({}, id="at 128 bits, every ring", marks=pytest.mark.slow),
    ],
)
def test_memory_too_small_names_the_smallest_that_is_enough(tmp_path, limits):
    path = mlp(tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(0, 0.5, (4, 64)).astype(np.float32)
    with pytest.raises(ParamsError, match=r"needs \d+\.\d GB of 0\.1") as refused:
        compile_onnx(path, x, target=Target(max_memory_gb=0.1, **limits))
    named = float(re.search(r"enough, all else kept: --max-memory-gb (\d+\.\d)$", str(refused.value))[1])
    compiled = compile_onnx(path, x, target=Target(max_memory_gb=named, **limits))
    assert compiled.circuit.predicted["memory_gb"] <= named
    with pytest.raises(ParamsError, match=rf"--max-memory-gb {named}$"):
        compile_onnx(path, x, target=Target(max_memory_gb=named - 0.1, **limits))


def test_memory_is_not_named_where_more_of_it_would_not_help(tmp_path):
    path = mlp(tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(0, 0.5, (4, 64)).astype(np.float32)
    with pytest.raises(ParamsError) as refused:
        compile_onnx(path, x, target=Target(insecure_log_n=11, max_memory_gb=0.1, max_error=1e-30))
    assert "all else kept" not in str(refused.value)
