"""What a circuit promises, the last and dearest question of the search: its error, by simulated noise, and that it seldom fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from he_backend.base import ScaleError
from he_backend.circuit import Circuit

from .errors import Noise, promised_error, simulated_noise
from .failure import over_budget
from .placed import Lowered
from .plan import Candidate, Target, as_circuit
from .samples import Samples

NOISY = 3  # requests or sequences that noise is simulated on, at most


@dataclass(frozen=True, kw_only=True)
class Found:
    """A candidate that keeps its promises: the circuit, still without keys and bounds; its lowering; its promised error and the
    simulated noise that this comes from.
    """

    candidate: Candidate
    circuit: Circuit
    lowered: Lowered
    error: float
    noise: Noise

    @property
    def seconds(self) -> float:
        return self.candidate.evaluate_s


def promise(
    candidate: Candidate, program: Lowered, samples: Samples, target: Target, bounds: Sequence[float] | None = None
) -> Found | str:
    """The circuit of a traced candidate, or what rules it out.

    Args:
        program: in the candidate's style.
        bounds: as for `failure.failure_log2`.
    """
    assert candidate.trace is not None
    circuit = as_circuit(program, candidate.params)
    try:
        noise = simulated_noise(circuit, candidate.trace, samples.few(NOISY))
    except ScaleError as error:  # as the server would say
        return str(error)
    promised = promised_error(noise)
    if why := over_budget(circuit, promised, bounds):
        return why
    if promised > target.max_error:
        return f"predicted error {promised:.2g} above {target.max_error:.2g}"
    return Found(candidate=candidate, circuit=circuit, lowered=program, error=promised, noise=noise)
