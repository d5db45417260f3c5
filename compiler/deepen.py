"""Refreshing candidates of the search: what to try when no leveled chain is long enough.

Only plain refreshes of all slots are tried, because those are what the backend runs. A refresh wants slots within [-1, 1]: values
that left that interval in simulation, with margin, are no sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from he_backend import refresh, security
from he_backend.base import HEError, LevelError, ParamsError
from he_backend.circuit import Circuit
from he_backend.params import SINE_LEVELS, Params
from he_backend.simulator import simulate

from .cost import CostTable
from .lower import Lowered
from .placement_problem import RefreshTimes
from .plan import BACKENDS, Candidate, Target, as_circuit, judge, predicted_error
from .refreshes import Refreshing, place_refreshes

SCALE = 54  # bits; the error model of a refresh was fitted at this scale
BUDGETS = ((3, 3), (2, 2))  # levels of the two transforms
DIGITS = (4, 6, 9)
USABLE = range(4, 14)  # levels between two refreshes that are tried
MARGIN = 1.25  # over the largest slot seen on samples
SECONDS = 30.0  # of one placement


@dataclass(frozen=True, kw_only=True)
class Deepened:
    """Rows for the plan's table and, if one of them serves, the circuit with its refreshes."""

    rows: list[Candidate] = field(default_factory=list)
    candidate: Candidate | None = None
    circuit: Circuit | None = None
    lowered: Lowered | None = None
    error: float = 0.0


def chains(log_n: int, insecure: bool) -> Iterator[Params]:
    """The longest chain within 128 bits of each budget and digit count; of a test ring, one short chain."""
    for encode, decode in BUDGETS:
        for digits in DIGITS:
            longest: Params | None = None
            for usable in USABLE:
                params = Params(
                    log_n=log_n,
                    levels=SINE_LEVELS + encode + decode + 1 + usable,
                    scale_bits=SCALE,
                    first_bits=min(60, SCALE + 6),
                    digits=digits,
                    secret="sparse192",
                    insecure=insecure,
                    refresh_encode=encode,
                    refresh_decode=decode,
                )
                if insecure or params.log_qp <= security.limit(params):
                    longest = params
                if insecure:
                    break
            if longest is not None:
                yield longest
            if insecure:
                return


def deepen(
    lowered: Lowered,
    log_n: int,
    samples: Sequence[np.ndarray],
    target: Target,
    table: CostTable,
    report: Callable[[str, int, int], None],
) -> Deepened:
    """The fastest circuit with refreshes that keeps the promises, if there is one.

    Args:
        lowered: with leveled levels assigned; samples: input tensors.
    """
    insecure = target.insecure_log_n is not None
    known = insecure or log_n in security.LIMITS["sparse192"]
    if "bootstrap" not in BACKENDS[target.backend] or not known or lowered.ops[0].level < min(USABLE):
        return Deepened()
    rows: list[Candidate] = []
    programs: dict[Params, Lowered] = {}
    allowed: set[int] | None = None
    for params in chains(log_n, insecure):
        if allowed is None:
            allowed = _bounded(lowered, params, samples)
        report(f"refreshes, budget {params.refresh_encode}+{params.refresh_decode}, {params.digits} digits", 0, 1)
        seconds = table.seconds("refresh", params, params.refresh_input)
        refreshing = Refreshing(
            level=params.refresh_output, start=params.refresh_input, times=RefreshTimes(plain=seconds)
        )
        try:
            # A ciphertext that comes in at the top would make every op above the refresh's level dear: it starts where refreshes end.
            program, placement = place_refreshes(
                lowered, params, table, refreshing, top=params.refresh_output, allowed=allowed, seconds=SECONDS
            )
            row = judge(program, params, target, table)
        except (LevelError, ParamsError) as error:
            limit = None if insecure else security.limit(params)
            rows.append(Candidate(params=params, log_qp=params.log_qp, limit=limit, why=str(error).split(";")[0]))
            continue
        if row is None:
            continue
        note = f"{len(placement.sites)} refreshes, {placement.method}, gap {placement.gap:.1%}"
        row = replace(row, why=f"{row.why}, {note}" if row.why else note)
        programs[row.params] = program
        rows.append(row)
    for i, row in sorted(enumerate(rows), key=lambda pair: (pair[1].forecast is None, pair[1].evaluate_s)):
        if row.trace is None:
            continue
        program = programs[row.params]
        circuit = as_circuit(program, row.params)
        report("noise", 0, 1)
        try:
            promised = predicted_error(circuit, row.trace, samples[:3])
            security.check_failure(refresh_failure(circuit))
        except HEError as error:
            rows[i] = replace(row, why=str(error), trace=None)
            continue
        if promised <= target.max_error:
            return Deepened(rows=rows, candidate=row, circuit=circuit, lowered=program, error=promised)
        rows[i] = replace(row, why=f"predicted error {promised:.2g} above {target.max_error:.2g}", trace=None)
    return Deepened(rows=rows)


def refresh_failure(circuit: Circuit) -> float:
    """log2 of the chance that one of a request's refreshes fails, by a union bound; minus infinity without any."""
    count = sum(op.kind == "refresh" for op in circuit.ops)
    return refresh.failure_log2(circuit.params) + float(np.log2(count)) if count else float("-inf")


def _bounded(lowered: Lowered, params: Params, samples: Sequence[np.ndarray]) -> set[int]:
    """Ops whose slots stay within [-1, 1] on samples, with margin."""
    circuit = as_circuit(lowered, params)
    peaks: np.ndarray = np.zeros(len(circuit.ops))
    for x in samples[:8]:
        values = simulate(circuit, {circuit.inputs[0].name: x}).values
        peaks = np.maximum(peaks, [np.max(np.abs(v)) for v in values])
    return {op.id for op, peak in zip(circuit.ops, peaks, strict=True) if MARGIN * peak <= 1.0}
