"""Refreshing candidates of the search: what to try when no leveled chain is long enough.

A refresh wants slots within [-1, 1]: constants are folded so that all values lie there (`factors`); those that still leave that
interval in simulation, with margin, are no sites. Every chain is placed for real slots and, where two values can share a refresh,
for complex ones too; and for the period of the values most often refreshed, whose matrices and keys are smaller. The fastest
placements are then traced and costed as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from he_backend import refresh, security
from he_backend.base import BACKENDS, HEError, LevelError, ParamsError
from he_backend.circuit import Circuit
from he_backend.params import SINE_LEVELS, Params

from .cost import CostTable
from .factors import fold_factors
from .lower import Lowered
from .passes.bases import BASES
from .passes.levels import top_level
from .placement_problem import Placement, RefreshTimes
from .plan import (
    PROCESS_BYTES,
    Candidate,
    Style,
    Target,
    as_circuit,
    best_style,
    largest_slots,
    with_style,
)
from .promise import Found, promise
from .refreshes import Refreshing, period, place_refreshes
from .samples import Progress, Samples

SCALE = 54  # bits; the error model of a refresh was fitted at this scale
BUDGETS = ((3, 3), (2, 2))  # levels of the two transforms
DIGITS = (4, 6, 9)
USABLE = range(4, 14)  # levels between two refreshes that are tried
MARGIN = 1.25  # over the largest slot seen on samples
BOUNDED = 8  # requests or sequences that bounds are taken over, at most
SECONDS = 20.0  # of one placement
STYLES = tuple(Style(basis=basis) for basis in BASES)  # few: a trace of six wide blocks takes 5 seconds
COSTED = 4  # placements, fastest first, that are costed as a whole: a trace of four blocks takes seconds


@dataclass(frozen=True, kw_only=True)
class Deepened:
    """Rows for the plan's table and, if one of them serves, what it is."""

    rows: list[Candidate] = field(default_factory=list)
    found: Found | None = None


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """One placement under some parameters."""

    params: Params
    program: Lowered
    placement: Placement

    @property
    def least_gb(self) -> float:
        """Memory without the keys of the circuit's own rotations, which only a trace knows."""
        fixed = refresh.matrix_bytes(self.params) + refresh.working_bytes(self.params)
        keys = sum(self.params.key_bytes(level, kind) for kind, level in refresh.own_keys(self.params).items())
        return (PROCESS_BYTES + fixed + keys + self.placement.peak_bytes) / 1e9

    @property
    def note(self) -> str:
        kinds = [site.kind for site in self.placement.sites]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        return f"{len(kinds)} refreshes ({counts}), {self.placement.method}, gap {self.placement.gap:.1%}"


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
    lowered: Lowered, log_n: int, samples: Samples, target: Target, table: CostTable, report: Progress
) -> Deepened:
    """The fastest circuit with refreshes that keeps the promises, if there is one.

    Args:
        lowered: with leveled levels assigned.
    """
    insecure = target.insecure_log_n is not None
    known = insecure or log_n in security.LIMITS["sparse192"]
    if "bootstrap" not in BACKENDS[target.backend] or not known or top_level(lowered.ops) < min(USABLE):
        return Deepened()
    if not (chain := list(chains(log_n, insecure))):
        return Deepened()
    folded, allowed = _bounded(lowered, chain[0], samples)
    rows: list[Candidate] = []
    placed: list[_Placed] = []
    for i, real in enumerate(chain):
        report(f"refreshes, {real.name}", i, len(chain))
        try:
            placed.append(_place(folded, real, table, allowed))
        except (LevelError, ParamsError) as error:
            rows.append(_row(real, insecure, str(error).split(";")[0]))
            continue
        others = [replace(real, refresh_complex=True)]
        if short := _period(placed[-1]):
            others += [replace(p, refresh_slots=short) for p in (real, others[0])]
        for params in others:
            with suppress(LevelError, ParamsError):  # what all real slots can do is the row to show
                placed.append(_place(folded, params, table, allowed))
    # Without pairs, complex slots are nothing but slower.
    placed = [p for p in placed if not p.params.refresh_complex or any(s.kind == "pair" for s in p.placement.sites)]
    placed.sort(key=lambda p: (p.placement.seconds, refresh.matrix_bytes(p.params)))
    if placed:  # the leanest is costed even if it does not fit: a refusal says what would be enough
        leanest = min(one.least_gb for one in placed)
        for one in [p for p in placed if p.least_gb > max(target.max_memory_gb, leanest)]:
            why = f"needs at least {one.least_gb:.1f} GB of {target.max_memory_gb:.1f}, {one.note}"
            rows.append(_row(one.params, insecure, why))
            placed.remove(one)
    judged: list[tuple[Candidate, _Placed]] = []
    styles: Sequence[Style | None] = STYLES
    for one in placed:
        if sum(row.forecast is not None for row, _ in judged) == COSTED:
            rows.append(_row(one.params, insecure, f"{one.placement.seconds:.0f} thread-seconds, {one.note}"))
            continue
        report(f"costs, {one.params.name}", len(judged), COSTED)
        if (row := best_style(one.program, one.params, target, table, styles=styles)) is not None:
            judged.append((replace(row, why=f"{row.why}, {one.note}" if row.why else one.note), one))
            if row.forecast is not None:
                styles = (row.style,)  # what is best for one placement of a program is taken for all
    judged.sort(key=lambda pair: (pair[0].forecast is None, pair[0].evaluate_s))
    rows += [row for row, _ in judged]
    for row, one in judged:
        if row.trace is None:
            continue
        program = with_style(one.program, row.params, table, row.style)
        report("noise", 0, 1)
        try:
            found = promise(row, program, samples, target)
        except HEError as error:
            rows[rows.index(row)] = replace(row, why=str(error), trace=None)
            continue
        if isinstance(found, Found):
            return Deepened(rows=rows, found=found)
        rows[rows.index(row)] = replace(row, why=f"{found}, {one.note}", trace=None)
    return Deepened(rows=rows)


def _period(placed: _Placed) -> int:
    """The period with which most refreshed values repeat, of those that repeat; 0 if none does."""
    program = placed.program
    refreshed = [program.ops[op.args[0]].layout for op in program.ops if op.kind == "refresh"]
    periods = Counter(period(program.arrays[layout]) for layout in refreshed if layout)
    usual = max((p for p in periods if 0 < p < placed.params.slots), key=lambda p: (periods[p], -p), default=0)
    return max(8, usual) if usual else 0


def _place(folded: Lowered, params: Params, table: CostTable, allowed: set[int]) -> _Placed:
    if params.refresh_slots:
        layouts = {op.id: op.layout for op in folded.ops if op.id in allowed and op.layout}
        periods = {name: period(folded.arrays[name]) for name in set(layouts.values())}
        allowed = {v for v, name in layouts.items() if 0 < periods[name] <= params.refresh_slots}
    seconds = table.seconds("refresh", params, params.refresh_input)
    times = RefreshTimes(plain=seconds, pair=seconds if params.refresh_complex else None)
    refreshing = Refreshing(level=params.refresh_output, start=params.refresh_input, times=times)
    # A ciphertext that comes in at the top would make every op above the refresh's level dear: it starts where refreshes end.
    program, placement = place_refreshes(
        folded, params, table, refreshing, top=params.refresh_output, allowed=allowed, seconds=SECONDS
    )
    return _Placed(params=params, program=program, placement=placement)


def _row(params: Params, insecure: bool, why: str) -> Candidate:
    limit = None if insecure else security.limit(params)
    return Candidate(params=params, log_qp=params.log_qp, limit=limit, why=why)


def refresh_failure(circuit: Circuit) -> float:
    """log2 of the chance that one of a request's refreshes fails, by a union bound; minus infinity without any."""
    count = circuit.refreshes
    return refresh.failure_log2(circuit.params) + float(np.log2(count)) if count else float("-inf")


def _bounded(lowered: Lowered, params: Params, samples: Samples) -> tuple[Lowered, set[int]]:
    """The program with constants folded and bounds, and its ops whose slots stay within [-1, 1] on samples, with margin."""
    largest = largest_slots(as_circuit(lowered, params), samples.few(BOUNDED))
    folded, m = fold_factors(lowered, largest, 1.0 / MARGIN)
    ops = tuple(replace(op, bound=float(MARGIN * largest[op.id] * m[op.id])) for op in folded.ops)
    return replace(folded, ops=ops), {op.id for op in ops if op.bound <= 1.0 + 1e-6}
