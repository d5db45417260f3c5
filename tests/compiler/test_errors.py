"""Predicted errors of values: at the output the promise, before it what noise and a refresh leave."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.operators import errors
from compiler import Target, compile_onnx
from compiler.errors import ERROR_MARGIN, simulated_noise, with_errors
from compiler.samples import requests
from he_backend import keys
from he_backend.simulator import Case, simulate, simulate_noise
from he_backend.trace import trace
from tests.he_backend.refreshing import refreshing
from tests.he_backend.small_circuit import TEST_PARAMS, WIDTH, mlp
from tests.he_backend.small_step import running_sum

from .models import attention
from .test_three_ways import parties

X = np.linspace(-0.9, 0.9, WIDTH)


def test_the_last_value_has_the_error_that_is_promised(tmp_path):
    samples = np.random.default_rng(1).normal(0, 0.5, (4, 8, 8)).astype(np.float32)
    circuit = compile_onnx(attention(tmp_path / "m.onnx"), samples, target=Target(insecure_log_n=10)).circuit
    assert list(circuit.errors) == [op.id for op in circuit.ends]
    assert all(0 < error < 1e-2 for error in circuit.errors.values())
    (output,) = (op for op in circuit.ops if op.kind == "output")
    assert 0.99 * circuit.error_bound <= circuit.errors[output.args[0]] <= 3 * circuit.error_bound


def test_noise_of_every_value_that_is_read():
    """Values as they are seen on the way are those of the run: its output among them, and nothing is drawn for being looked at."""
    circuit, seen = mlp(TEST_PARAMS), {}
    t = trace(circuit)
    noisy = simulate_noise(circuit, {"x": X}, seed=3, traced=t, visit=seen.__setitem__)
    assert list(seen) == [op.id for op in circuit.ops]
    np.testing.assert_array_equal(noisy["y"], simulate_noise(circuit, {"x": X}, seed=3, traced=t)["y"])
    np.testing.assert_array_equal(seen[4].reshape(WIDTH, -1)[:, -1], noisy["y"])
    clear = simulate(circuit, {"x": X}).values
    for op in circuit.ops:
        assert 0 < np.max(np.abs(seen[op.id] - clear[op.id])) < 1e-5


def predicted(circuit):
    t = trace(circuit)
    return with_errors(circuit, simulated_noise(circuit, t, requests([X]))).errors


def test_a_refresh_shows():
    circuit = refreshing()
    errors = predicted(circuit)
    assert set(errors) == {2, 3, 4}  # a refresh stands for the node whose value it refreshes
    flat = replace(circuit, ops=tuple(replace(op, factor=2.0 if op.id == 3 else 1.0) for op in circuit.ops))
    assert predicted(flat) == {**errors, 3: 2 * errors[3]}
    seen = {}
    simulate_noise(circuit, {"x": X}, visit=seen.__setitem__)
    assert errors[2] > 10 * ERROR_MARGIN * np.max(np.abs(seen[1] - simulate(circuit, {"x": X}).values[1]))


def test_errors_of_what_is_kept_grow_with_the_steps(monkeypatch):
    """Each step adds noise to all rows; and as much where few steps are simulated, and under encryption."""
    circuit, values = running_sum(64), np.random.default_rng(0).uniform(-1, 1, 64)
    rows = np.tril(np.tile(values, (64, 1)), -1)
    cases = [Case(tensors={"x": values[[i]], "kept": rows[i]}, step=i) for i in range(64)]
    t, (kept,) = trace(circuit), (op.id for op in circuit if op.kind == "output" and op.attrs["name"] == "kept")
    monkeypatch.setattr("compiler.errors.SIMULATED", 64)
    once, whole = (simulated_noise(circuit, t, [cases[:n]]) for n in (1, 64))
    assert whole.slots[kept] > 1.5 * once.slots[kept]
    monkeypatch.setattr("compiler.errors.SIMULATED", 8)
    few = simulated_noise(circuit, t, [cases])
    assert len(few.outputs) == 8 and few.slots[kept] == pytest.approx(whole.slots[kept], rel=0.5)
    with parties(circuit.params) as (client, server):
        for kind, k, level in keys.wanted(circuit.spec()):
            server.load_key(kind, k, level, client.make_key(kind, k, level))
        found = errors(circuit, client, server, cases, threads=1)
    promised = with_errors(circuit, whole).errors
    assert whole.slots[kept] / 2 < found[kept] < 2 * whole.slots[kept]
    assert found.keys() == promised.keys() and all(found[i] < promised[i] for i in found)
