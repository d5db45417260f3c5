"""The chance that a request fails: that noise wraps the modulus of a reply, or that a refresh goes wrong (`security`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from he_backend import refresh, security
from he_backend.circuit import Circuit
from he_backend.params import Params

NEVER = -1000.0  # JSON has no infinity


def largest_output(params: Params) -> float:
    """Magnitude of a stored output slot, without noise, above which it wraps the first modulus."""
    return 2.0 ** (params.first_bits - params.scale_bits - 1)


def failure_log2(circuit: Circuit, error: float, bounds: Sequence[float] | None = None) -> float:
    """log2 of the chance that a request fails, by a union bound over its reply and all its refreshes; at least `NEVER`.

    What is asked for at a step is a sequence: the chance is that of any of its T steps to fail, T times as large.

    The noise is the simulated one: the promised error, in stored slots, spread over coefficients. A promise is above the
    largest error seen, so that taking it for a standard deviation errs on the safe side. States are not in it: they are at
    higher levels, where the modulus is larger by a scale and more.

    Args:
        error: the promised one, in the model's units.
        bounds: largest |slot| of each ciphertext of the reply, with a margin; None for those of the circuit's ops.
    """
    params = circuit.params
    if bounds is None:
        replies = {s.name for s in circuit.outputs}
        bounds = [op.bound for op in circuit.ops if op.kind == "output" and op.attrs["name"] in replies]
    slot = max(error / abs(signature.factor) for signature in circuit.outputs)
    noise = slot * 2.0**params.scale_bits / math.sqrt(params.slots)
    noise_bits = math.log2(max(noise, 2.0**security.FRESH_NOISE_BITS))
    refreshes = circuit.refreshes
    each = refresh.failure_log2(params) if refreshes else 0.0
    log2 = security.circuit_failure(params, bounds, noise_bits=noise_bits, refresh_log2=each, refreshes=refreshes)
    return max(NEVER, min(0.0, log2 + math.log2(max(1, circuit.steps))))


def over_budget(circuit: Circuit, error: float, bounds: Sequence[float] | None = None) -> str:
    """What a plan says of a circuit that fails too often; empty if it does not. Arguments as for `failure_log2`."""
    if not math.isfinite(error):
        return "no error is predicted: noise runs away, or a sum has two scales"
    log2 = failure_log2(circuit, error, bounds)
    if log2 <= security.FAILURE_BUDGET:
        return ""
    what = f"a sequence of {circuit.steps} steps" if circuit.steps else "a request"
    return f"{what} fails with probability 2^{log2:.1f}, the budget is 2^{security.FAILURE_BUDGET:.0f}"
