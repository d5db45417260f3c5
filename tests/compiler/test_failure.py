"""The chance that noise wraps the modulus follows the error that the compiler simulated, not a constant."""

from dataclasses import replace

import pytest

from compiler.pipeline import _failure
from tests.he_backend.small_circuit import SECURE_PARAMS, mlp


def test_a_noisy_circuit_is_likelier_to_fail() -> None:
    circuit = mlp(replace(SECURE_PARAMS, first_bits=46))
    small, large, huge = (_failure(circuit, error) for error in (2.0**-10, 2.0**8, 2.0**12))
    assert small == -1000.0 < large < -10 < huge


def test_the_error_is_counted_in_stored_slots() -> None:
    circuit = mlp(replace(SECURE_PARAMS, first_bits=46))
    scaled = replace(circuit, outputs=tuple(replace(s, factor=-4.0) for s in circuit.outputs))
    assert _failure(scaled, 2.0**11) == pytest.approx(_failure(circuit, 2.0**9))
