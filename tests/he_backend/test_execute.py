"""The executor: right values on both backends, keys and levels checked first, errors that name the op, cancellation."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from he_backend import execute, keys
from he_backend.base import HEError, LevelError, ManifestError, MissingKeyError
from he_backend.execute import Cancelled, Executor
from he_backend.liveness import value_bytes
from tests.he_backend.small_circuit import TEST_PARAMS, WIDTH, mlp, reference

X = np.linspace(-1, 1, WIDTH)


@pytest.fixture(scope="module", params=["openfhe", "tenseal"])
def world(request, tmp_path_factory):
    digits = TEST_PARAMS.levels + 1 if request.param == "tenseal" else TEST_PARAMS.digits
    circuit = mlp(replace(TEST_PARAMS, log_n=11, backend=request.param, digits=digits))
    folder = tmp_path_factory.mktemp(request.param)
    keys.generate(circuit.spec(), folder, allow_insecure=True)
    client = keys.open_client(circuit.spec(), folder, allow_insecure=True)
    ev = keys.backend(request.param).Evaluator(circuit.params, key_id=client.key_id, allow_insecure=True)
    keys.load(ev, folder)
    yield SimpleNamespace(circuit=circuit, client=client, ev=ev)
    ev.close()


def inputs(world, level=None):
    top = world.circuit.inputs[0].level if level is None else level
    slots = np.repeat(X, world.ev.slots // WIDTH)
    residues = world.client.export_ciphertext(world.client.encrypt(slots, level=top))
    return {("x", 0): world.ev.import_ciphertext(residues, level=top)}


def result(world, run):
    a = run.outputs["y", 0]
    residues = world.ev.export_ciphertext(a)
    a = world.client.import_ciphertext(residues, level=world.ev.level(a))
    return world.client.decrypt(a, scale=run.scales["y", 0]).reshape(WIDTH, -1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_the_reference(world, threads):
    run = Executor(world.circuit, world.ev, threads=threads).run(inputs(world))
    np.testing.assert_allclose(result(world, run), reference(X)[:, None] * np.ones(world.ev.slots // WIDTH), atol=1e-5)


def test_weights_are_encoded_ahead_within_the_budget(world):
    everything = Executor(world.circuit, world.ev)
    prepared = everything.prepare()
    assert prepared.done == prepared.total > 0 and prepared.bytes == prepared.total_bytes
    timing = everything.run(inputs(world)).timing
    assert timing.encoded_during == 0 and timing.encoded_ahead >= prepared.total
    half = Executor(world.circuit, world.ev, plaintext_budget=prepared.bytes // 2)
    part = half.prepare()
    assert 0 < part.done < part.total and part.bytes <= prepared.bytes // 2
    run = half.run(inputs(world))
    assert run.timing.encoded_during == part.total - part.done
    np.testing.assert_allclose(result(world, run)[:, 0], reference(X), atol=1e-5)


def test_timing_and_progress(world):
    seen = []
    executor = Executor(world.circuit, world.ev)
    run = executor.run(inputs(world), progress=lambda done, total, source: seen.append((done, total, source)))
    nodes = len(executor.trace.nodes)
    assert len(seen) == nodes and max(seen)[:2] == (nodes, nodes)
    assert {"/up/MatMul", "/square/Mul", "/down/MatMul"} <= {source for _, _, source in seen}
    timing = run.timing
    by_op = sum(row["seconds"] for row in timing.ops)
    assert by_op == pytest.approx(sum(timing.primitives.values())) and 0 < by_op <= 1.1 * timing.wall_s * timing.threads
    expected = {n.op for n in executor.trace.nodes} - {"input"}
    assert expected <= set(timing.counts) and expected <= set(timing.primitives)
    assert 0 < timing.max_live_bytes < sum(value_bytes(n, executor.circuit.params) for n in executor.trace.nodes)


def test_missing_keys_are_said_before_anything_runs(world):
    bare = keys.backend(world.circuit.params.backend).Evaluator(world.circuit.params, allow_insecure=True)
    started = []
    with pytest.raises(MissingKeyError, match="rotation keys are missing"):
        Executor(world.circuit, bare).run(inputs(world), progress=lambda *a: started.append(a))
    assert not started


def test_memory_is_taken_once_weights_and_keys_are_here(world, monkeypatch):
    taken = []
    monkeypatch.setattr(execute.heap, "reserve", taken.append)
    bare = keys.backend(world.circuit.params.backend).Evaluator(world.circuit.params, allow_insecure=True)
    without_keys = Executor(world.circuit, bare)
    without_keys.prepare()
    without_weights = Executor(world.circuit, world.ev, threads=1)
    without_weights.reserve()
    assert not taken
    without_weights.prepare()
    timing = without_weights.run(inputs(world)).timing
    assert len(taken) == 1 and taken[0] >= timing.max_live_bytes


def test_wrong_inputs_are_refused(world):
    executor = Executor(world.circuit, world.ev)
    with pytest.raises(ManifestError):
        executor.run({})
    with pytest.raises(LevelError, match="arrives at level 1"):
        executor.run(inputs(world, level=1))


def test_cancellation(world):
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        Executor(world.circuit, world.ev).run(
            inputs(world), progress=lambda done, *_: cancel.set() if done == 5 else None, cancel=cancel
        )


def test_an_error_names_the_op_and_its_source(world, monkeypatch):
    def broken(*_):
        raise ValueError("boom")

    monkeypatch.setattr(world.ev, "relinearize", broken)
    with pytest.raises(HEError, match=r"mul.*# /square/Mul failed in relinearize.*boom"):
        Executor(world.circuit, world.ev).run(inputs(world))


def test_what_a_run_counts_is_counted_under_its_lock(world, monkeypatch):
    loose = []

    class Watched(execute._State):
        def __setattr__(self, name, value):
            if name == "ahead" and "condition" in vars(self) and not self.condition._is_owned():
                loose.append(value)
            super().__setattr__(name, value)

    monkeypatch.setattr(execute, "_State", Watched)
    executor = Executor(world.circuit, world.ev)
    executor.prepare()
    assert executor.run(inputs(world)).timing.encoded_ahead > 0 and not loose
