"""The chance that a request fails follows the error that the compiler simulated, and is held against a budget."""

from dataclasses import replace

import numpy as np
import pytest

from compiler import Target, compile_onnx
from compiler.failure import failure_log2, largest_output, over_budget
from he_backend.base import ParamsError
from tests.compiler.models import mlp as model
from tests.he_backend.small_circuit import SECURE_PARAMS, mlp


def test_a_noisy_circuit_is_likelier_to_fail() -> None:
    circuit = mlp(replace(SECURE_PARAMS, first_bits=46))
    small, large, huge = (failure_log2(circuit, error) for error in (2.0**-10, 2.0**8, 2.0**12))
    assert small == -1000.0 < large < -10 < huge


def test_the_error_is_counted_in_stored_slots() -> None:
    circuit = mlp(replace(SECURE_PARAMS, first_bits=46))
    scaled = replace(circuit, outputs=tuple(replace(s, factor=-4.0) for s in circuit.outputs))
    assert failure_log2(scaled, 2.0**11) == pytest.approx(failure_log2(circuit, 2.0**9))


def test_bounds_count_and_states_do_not() -> None:
    circuit = mlp(replace(SECURE_PARAMS, first_bits=46))
    most = largest_output(circuit.params)
    assert over_budget(circuit, 2.0**-10, [0.5 * most]) == ""
    assert "probability 2^0.0, the budget is 2^-40" in over_budget(circuit, 2.0**-10, [most])
    last = circuit.ops[-1]
    state = replace(last, id=len(circuit.ops), attrs={"name": "kept", "part": 0}, bound=2 * most)
    assert failure_log2(replace(circuit, ops=(*circuit.ops, state)), 2.0**-10) == -1000.0
    assert failure_log2(replace(circuit, ops=(*circuit.ops[:-1], replace(last, bound=2 * most))), 2.0**-10) == 0.0


def test_what_fails_too_often_is_not_chosen(tmp_path, monkeypatch) -> None:
    path, x = model(tmp_path / "m.onnx"), np.random.default_rng(0).normal(0, 0.3, (6, 64)).astype(np.float32)
    usual = compile_onnx(path, x, target=Target(insecure_log_n=11)).circuit.params.scale_bits
    monkeypatch.setattr(
        "compiler.failure.failure_log2",
        lambda circuit, error, bounds=None: -39.0 if circuit.params.scale_bits == usual else -41.0,
    )
    found = compile_onnx(path, x, target=Target(insecure_log_n=11))
    assert found.circuit.params.scale_bits != usual
    assert any("probability 2^-39.0, the budget is 2^-40" in c.why for c in found.plan.others)
    monkeypatch.setattr("compiler.pipeline.failure_log2", lambda circuit, error: -39.0)
    with pytest.raises(ParamsError, match=r"fails with probability 2\^-39"):
        compile_onnx(path, x, target=Target(insecure_log_n=11))
