"""The outermost choice: ring, scale, digits. Every candidate is costed; the fastest one within memory and error is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from he_backend import refresh, security
from he_backend.base import BACKENDS, CapabilityError, ParamsError
from he_backend.circuit import Circuit
from he_backend.liveness import live_bytes
from he_backend.params import Params
from he_backend.simulator import Case, peaks
from he_backend.trace import Trace, trace

from .calibrate import Range
from .cost import CostTable
from .lower import Lowered
from .passes.bases import BASES, choose_bases
from .passes.sums import LONGEST, group_sums
from .schedule import Forecast, forecast

GB = 1e9
FIRST_BITS = 6  # integer bits of an output: |stored| < 2^5
SCALES = (40, 45, 50)
# (scale, integer bits of an output), besides, up to N = 2^14, where bits of the modulus are scarce: of 24 and 26 bits two primes are
# a digit with one special prime, of 35 bits three with two.
SMALL_RING_SCALES = ((24, FIRST_BITS), (26, 3), (30, FIRST_BITS), (35, FIRST_BITS))
LARGEST_RING = {"openfhe": 16, "tenseal": 15}
PROCESS_BYTES = 2.5 * GB  # client and server without keys and ciphertexts: libraries, context, circuit, heap slack
ALIKE = 0.03  # relative difference of predicted seconds that decides nothing


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile for.

    max_memory_gb    client and server together, on one machine
    max_latency_s    largest tolerable predicted evaluation; None for any
    max_error        largest tolerable |encrypted - clear| of an output element
    insecure_log_n   a test-size ring 2^n that protects nothing; None for 128 bits
    costs            a table of `polyformer bench run ops`; None for the reference machine's
    """

    backend: str = "openfhe"
    max_memory_gb: float = 19.0
    max_latency_s: float | None = None
    max_error: float = 0.01
    threads: int = 2
    insecure_log_n: int | None = None
    costs: Path | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise CapabilityError(f"backend {self.backend!r} is unknown; known are {', '.join(BACKENDS)}")
        latency = self.max_latency_s
        if min(self.threads, self.max_memory_gb, self.max_error, 1 if latency is None else latency) <= 0:
            raise ParamsError(
                f"a target of {self.threads} threads, {self.max_memory_gb} GB, error {self.max_error} and latency {latency} s: "
                "all must be positive"
            )
        if self.insecure_log_n is not None and not 10 <= self.insecure_log_n <= 17:
            raise ParamsError(f"test ring 2^{self.insecure_log_n}: from 2^10 to 2^17 can be made")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the same circuit is carried out: most steps of a sum taken at once, and the basis of linear maps (`passes/bases.py`)."""

    longest: int = LONGEST
    basis: str = "extended"


STYLES = tuple(Style(longest=longest, basis=basis) for basis in BASES for longest in (LONGEST, 2))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One choice of parameters with its predicted figures; `why` says what rules it out, empty if nothing does.

    style is how its circuit is carried out; None: as it was lowered.
    """

    params: Params
    log_qp: int
    limit: int | None
    evaluate_s: float = 0.0
    work_s: float = 0.0
    memory_gb: float = 0.0
    key_gb: float = 0.0
    why: str = ""
    style: Style | None = None
    forecast: Forecast | None = field(default=None, repr=False)
    trace: Trace | None = field(default=None, repr=False)

    def __str__(self) -> str:
        size = f"{self.params.name}: logQP {self.log_qp} of {self.limit or 'no limit'}"
        if self.forecast is None:
            return f"{size}, {self.why}"
        figures = f"{self.evaluate_s:.3g} s, {self.memory_gb:.1f} GB ({self.key_gb:.1f} GB keys)"
        return f"{size}, {figures}{', ' + self.why if self.why else ''}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The chosen candidate and all others, fastest first; `costs` names the table that the seconds come from."""

    chosen: Candidate
    others: tuple[Candidate, ...]
    costs: str

    def __str__(self) -> str:
        rows = [f"chosen  {self.chosen}", *(f"        {c}" for c in self.others[:5])]
        return "\n".join([*rows, f"costs from {self.costs}"])


def candidates(backend: str, log_n: int, levels: int, insecure: bool) -> list[Params]:
    """Parameters of one ring that could hold a circuit, one for each scale and digit count that differ in special primes."""
    found: list[Params] = []
    scales = [(scale, FIRST_BITS) for scale in SCALES]
    for scale, integer in (*SMALL_RING_SCALES, *scales) if log_n <= 14 else scales:
        seen: set[int] = set()
        for digits in range(levels + 1 if backend == "tenseal" else 1, levels + 2):
            params = Params(
                backend=backend,
                log_n=log_n,
                levels=levels,
                scale_bits=scale,
                first_bits=min(60, scale + integer) if backend == "openfhe" else 60,
                digits=digits,
                insecure=insecure,
            )
            if params.digit_limbs in seen:
                continue
            seen.add(params.digit_limbs)
            found.append(params)
    return found


def choose(build: Lowered, levels: int, log_n: int, target: Target, table: CostTable) -> list[Candidate]:
    """Cost every candidate of one ring; those that a limit rules out say why.

    Args:
        build: the lowered circuit with levels assigned.
    """
    traces: dict[object, Trace] = {}
    rows = [
        best_style(build, params, target, table, traces=traces)
        for params in candidates(target.backend, log_n, levels, target.insecure_log_n is not None)
    ]
    return sorted((row for row in rows if row is not None), key=_rank)


def best_style(
    build: Lowered,
    params: Params,
    target: Target,
    table: CostTable,
    *,
    styles: Sequence[Style | None] = STYLES,
    traces: dict[object, Trace] | None = None,
) -> Candidate | None:
    """Predicted figures of a circuit carried out in the fastest style that fits; None as in `judge`.

    Args:
        styles: to be tried, where the backend has a choice.
        traces: those of the same program by style, which do not depend on parameters; what is made is added.
    """
    traces = {} if traces is None else traces
    tried: set[object] = set()
    best: Candidate | None = None
    for style in styles if "double_hoisting" in BACKENDS[target.backend] else (None,):
        styled = with_style(build, params, table, style)
        key = tuple((tuple(op.attrs.get("runs", ())), op.attrs.get("basis")) for op in styled.ops)
        if key in tried:
            continue
        tried.add(key)
        row = judge(styled, params, target, table, traces.get(key))
        if row is None:
            break
        if row.trace is not None:
            traces[key] = row.trace
        if best is None or _rank(row) < _rank(best):
            best = replace(row, style=style)
        if row.trace is None and row.forecast is None and not row.memory_gb:
            break  # no style makes it secure
    return best


def _rank(c: Candidate) -> tuple[bool, float, int]:
    """Fastest first; of those that differ by no more than the costs are known, the most precise. Last what lacks least memory."""
    if c.forecast is None:
        return True, c.memory_gb, -c.params.scale_bits
    return False, round(math.log(c.evaluate_s) / ALIKE) if c.evaluate_s else 0, -c.params.scale_bits


def larger_ring_may_win(found: Candidate, target: Target, table: CostTable) -> bool:
    """Whether the next ring can be faster: it holds twice the slots, so that it needs no less than half of the primitives."""
    assert found.trace is not None and found.forecast is not None
    log_n = found.params.log_n + 1
    if found.params.refreshes:
        return True  # a leveled chain may fit there
    for params in candidates(target.backend, log_n, found.params.levels, False):
        if params.log_qp > security.limit(params) or params.special_limbs > 12:
            continue
        same = forecast(
            found.trace, params, table, threads=target.threads, plaintext_budget=int(found.forecast.kept * 2)
        )
        if same.work / 2 < found.work_s:
            return True
    return False


def with_style(build: Lowered, params: Params, table: CostTable, style: Style | None) -> Lowered:
    """A lowered program that says how it is carried out under some parameters."""
    if style is None:
        return build
    ops = group_sums(build.ops, params, table, style.longest)
    return replace(build, ops=choose_bases(ops, params, table, style.basis))


def judge(
    build: Lowered, params: Params, target: Target, table: CostTable, reference: Trace | None = None
) -> Candidate | None:
    """Predicted figures of a circuit under some parameters; None where the digits are too large to be worth costing.

    Args:
        build: the lowered circuit with levels assigned.
        reference: its trace, if it is known: the same for all parameters of one ring that cut sums alike.
    """
    secure = target.insecure_log_n is None
    limit = security.limit(params) if secure else None
    if limit is not None and params.log_qp > limit:
        return Candidate(params=params, log_qp=params.log_qp, limit=limit, why="above the 128-bit limit")
    if params.special_limbs > 12:
        return None
    circuit = as_circuit(build, params)
    t = reference or trace(circuit, capabilities=BACKENDS[target.backend])
    keys = sum(params.key_bytes(level) for level in t.keys.values()) + params.key_bytes(max(t.relin_level, 0))
    rest = target.max_memory_gb * GB - 1.15 * live_bytes(t, params) - PROCESS_BYTES
    if any(node.op.startswith("refresh") for node in t.nodes):
        keys += sum(params.key_bytes(level, kind) for kind, level in refresh.own_keys(params).items())
        rest -= refresh.matrix_bytes(params) + refresh.working_bytes(params)
    # A run frees a state once it is read, the server keeps it until the step is done: of one sequence; others come on top.
    rest -= keys + circuit.state_bytes
    if rest < 0:
        memory = (target.max_memory_gb * GB - rest) / GB
        why = f"needs {memory:.1f} GB of {target.max_memory_gb:.1f}"
        return Candidate(params=params, log_qp=params.log_qp, limit=limit, why=why, memory_gb=memory, key_gb=keys / GB)
    f = forecast(t, params, table, threads=target.threads, plaintext_budget=int(rest))
    slow = target.max_latency_s is not None and f.evaluate > target.max_latency_s
    return Candidate(
        params=params,
        log_qp=params.log_qp,
        limit=limit,
        evaluate_s=f.evaluate,
        work_s=f.work,
        memory_gb=(target.max_memory_gb * GB - rest + f.kept) / GB,
        key_gb=keys / GB,
        forecast=f,
        trace=None if slow else t,
        why=f"slower than {target.max_latency_s:g} s" if slow else "",
    )


def as_circuit(build: Lowered, params: Params) -> Circuit:
    """A lowered program with parameters: still without keys, bounds and predictions."""
    levels = {op.attrs["name"]: op.level for op in build.ops if op.kind == "input"}
    return Circuit(
        params=params,
        ops=build.ops,
        arrays=build.arrays,
        client_arrays=build.client_arrays,
        inputs=tuple(replace(s, level=levels[s.name]) for s in build.inputs),
        outputs=build.outputs,
        keys={},
        relin_level=-1,
        steps=build.steps,
        states=tuple(replace(s, level=levels[s.name]) for s in build.states),
    )


def largest_slots(circuit: Circuit, sequences: Sequence[Sequence[Case]]) -> np.ndarray:
    """Largest |stored slot| of every op over sequences, [ops]."""
    return peaks(circuit, [case for sequence in sequences for case in sequence])


def with_bounds(circuit: Circuit, sequences: Sequence[Sequence[Case]], margin: float = 1.25) -> Circuit:
    """Largest stored slot of every op, times a margin."""
    largest = largest_slots(circuit, sequences)
    return replace(
        circuit, ops=tuple(replace(op, bound=float(margin * p)) for op, p in zip(circuit.ops, largest, strict=True))
    )


def output_peak(circuit: Circuit, sequences: Sequence[Sequence[Case]], range_: Range, margin: float = 1.25) -> float:
    """Largest |stored slot| of the reply: of all slots over sequences, times a margin, and of its elements in all calibration.

    Args:
        range_: of the graph's output, with its margin.
    """
    (reply,) = circuit.outputs
    top = max(
        float(p)
        for op, p in zip(circuit.ops, largest_slots(circuit, sequences), strict=True)
        if op.kind == "output" and op.attrs["name"] == reply.name
    )
    return max(margin * top, max(-range_[0], range_[1]) / abs(reply.factor))


def refuse(rows: Sequence[Candidate], levels: int, target: Target, cap: float | None = None) -> ParamsError:
    """The error when nothing fits: by how much the nearest candidates miss.

    Args:
        levels: of the circuit, in the largest ring that was tried.
        cap: smallest memory cap, GB, that more memory alone would help with.
    """
    fits = max(levels_at_most(target.backend, n) for n in range(13, 16)) if target.backend == "tenseal" else 0
    if target.backend == "tenseal" and target.insecure_log_n is None and levels > fits:
        return ParamsError(
            f"the circuit needs {levels} levels, TenSEAL has at most {fits} at 128 bits: {levels - fits} too many. "
            "Use --backend openfhe, or a shallower model"
        )
    # Those that security allows come first, costed ones fastest first, others by the memory that they lack; then the nearest to
    # the security limit.
    ordered = sorted(
        rows,
        key=lambda c: (c.forecast is None, c.evaluate_s, c.memory_gb == 0.0, c.memory_gb, c.log_qp - (c.limit or 0)),
    )
    nearest = "\n  ".join(str(c) for c in ordered[:5])
    enough = "" if cap is None else f"\nthe smallest memory that is enough, all else kept: --max-memory-gb {cap:.1f}"
    return ParamsError(
        f"no parameters hold {levels} levels within 128 bits, {target.max_memory_gb} GB, error {target.max_error:g}"
        f"{'' if target.max_latency_s is None else f' and {target.max_latency_s:g} s'}:\n  {nearest}{enough}"
    )


def levels_at_most(backend: str, log_n: int, scale: int = 40) -> int:
    """Most levels of a ring at 128 bits and the smallest scale."""
    levels = 1
    while any(
        p.log_qp <= security.limit(p) for p in candidates(backend, log_n, levels + 1, False) if p.scale_bits == scale
    ):
        levels += 1
    return levels
