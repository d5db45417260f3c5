"""What the primes of the modulus, which are near the scale and not equal to it, add to the error where values are added."""

from __future__ import annotations

import math

from he_backend.base import ScaleError
from he_backend.circuit import Circuit
from he_backend.primes import moduli
from he_backend.trace import Trace, assign_scales


def mismatch_error(circuit: Circuit, traced: Trace) -> float:
    """Bound on the error of an output element from sums of values whose scales differ a little.

    It is the largest relative difference times the largest output, and infinite where the server would refuse the sum whatever is
    promised; 0 for other libraries than OpenFHE, which choose other primes: there it is left to the server's check.
    """
    return mismatch(circuit, traced) * max((signature.bound for signature in circuit.outputs), default=0.0)


def mismatch(circuit: Circuit, traced: Trace) -> float:
    """Largest relative difference of two scales that are added, under the same conditions."""
    params = circuit.params
    if params.backend != "openfhe":
        return 0.0
    try:
        return assign_scales(traced, moduli(params), 2.0**params.scale_bits).mismatch
    except ScaleError:
        return math.inf
