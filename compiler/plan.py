"""The outermost choice: ring, scale, digits. Every candidate is costed; the fastest one within memory and error is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from he_backend import refresh, security
from he_backend.base import CapabilityError, ParamsError
from he_backend.circuit import Circuit
from he_backend.params import Params
from he_backend.simulator import simulate, simulate_noise
from he_backend.trace import Trace, trace

from .cost import CostTable, live_bytes
from .lower import Lowered
from .schedule import Forecast, forecast

GB = 1e9
FIRST_BITS = 6  # integer bits of an output: |stored| < 2^5
SCALES = (40, 45, 50)
SMALL_RING_SCALES = (30, 35)  # besides, up to N = 2^14, where bits of the modulus are scarce
BACKENDS = {
    "openfhe": frozenset({"hoisting", "double_hoisting", "bootstrap"}),
    "tenseal": frozenset(),
}
LARGEST_RING = {"openfhe": 16, "tenseal": 15}
PROCESS_BYTES = 2.5 * GB  # client and server without keys and ciphertexts: libraries, context, circuit, heap slack
ERROR_MARGIN = 4.0  # promised error over the largest one of a few simulated runs


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile for.

    max_memory_gb    client and server together, on one machine
    max_latency_s    largest tolerable predicted evaluation; None for any
    max_error        largest tolerable |encrypted - clear| of an output element
    insecure_log_n   a test-size ring 2^n that protects nothing; None for 128 bits
    costs            a table of `polyformer bench ops`; None for the reference machine's
    """

    backend: str = "openfhe"
    max_memory_gb: float = 19.0
    max_latency_s: float | None = None
    max_error: float = 0.05
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
class Candidate:
    """One choice of parameters with its predicted figures; `why` says what rules it out, empty if nothing does."""

    params: Params
    log_qp: int
    limit: int | None
    evaluate_s: float = 0.0
    memory_gb: float = 0.0
    key_gb: float = 0.0
    why: str = ""
    forecast: Forecast | None = field(default=None, repr=False)
    trace: Trace | None = field(default=None, repr=False)

    def __str__(self) -> str:
        size = f"{self.params.name}: logQP {self.log_qp} of {self.limit or 'no limit'}"
        if self.forecast is None:
            return f"{size}, {self.why}"
        figures = f"{self.evaluate_s:.0f} s, {self.memory_gb:.1f} GB ({self.key_gb:.1f} GB keys)"
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
    for scale in (*SMALL_RING_SCALES, *SCALES) if log_n <= 14 else SCALES:
        seen: set[int] = set()
        for digits in range(levels + 1 if backend == "tenseal" else 1, levels + 2):
            params = Params(
                backend=backend,
                log_n=log_n,
                levels=levels,
                scale_bits=scale,
                first_bits=min(60, scale + FIRST_BITS) if backend == "openfhe" else 60,
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
    secure = target.insecure_log_n is None
    rows = []
    reference: Trace | None = None
    for params in candidates(target.backend, log_n, levels, not secure):
        row = judge(build, params, target, table, reference)
        if row is not None:
            rows.append(row)
            reference = reference or row.trace
    return sorted(rows, key=lambda c: (c.forecast is None, c.evaluate_s))


def judge(
    build: Lowered, params: Params, target: Target, table: CostTable, reference: Trace | None = None
) -> Candidate | None:
    """Predicted figures of a circuit under some parameters; None where the digits are too large to be worth costing.

    Args:
        build: the lowered circuit with levels assigned.
        reference: its trace, if it is known: the same for all parameters of one ring.
    """
    secure = target.insecure_log_n is None
    limit = security.limit(params) if secure else None
    if limit is not None and params.log_qp > limit:
        return Candidate(params=params, log_qp=params.log_qp, limit=limit, why="above the 128-bit limit")
    if params.special_limbs > 12:
        return None
    t = reference or trace(as_circuit(build, params), capabilities=BACKENDS[target.backend])
    keys = sum(params.key_bytes(level) for level in t.keys.values()) + params.key_bytes(max(t.relin_level, 0))
    rest = target.max_memory_gb * GB - 1.15 * live_bytes(t, params) - PROCESS_BYTES
    if any(node.op.startswith("refresh") for node in t.nodes):
        keys += sum(params.key_bytes(level, kind) for kind, level in refresh.own_keys(params).items())
        rest -= refresh.matrix_bytes(params) + refresh.working_bytes(params)
    rest -= keys
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
        memory_gb=(target.max_memory_gb * GB - rest + f.kept) / GB,
        key_gb=keys / GB,
        forecast=f,
        trace=None if slow else t,
        why=f"slower than {target.max_latency_s:g} s" if slow else "",
    )


def as_circuit(build: Lowered, params: Params) -> Circuit:
    """A lowered program with parameters: still without keys, bounds and predictions."""
    top = build.ops[0].level
    return Circuit(
        params=params,
        ops=build.ops,
        arrays=build.arrays,
        client_arrays=build.client_arrays,
        inputs=tuple(replace(s, level=top) for s in build.inputs),
        outputs=build.outputs,
        keys={},
        relin_level=-1,
    )


def with_bounds(circuit: Circuit, samples: Sequence[np.ndarray], margin: float = 1.25) -> Circuit:
    """Largest stored slot of every op over samples, times a margin."""
    name = circuit.inputs[0].name
    peaks: np.ndarray = np.zeros(len(circuit.ops))
    for x in samples:
        peaks = np.maximum(peaks, [np.max(np.abs(v)) for v in simulate(circuit, {name: x}).values])
    return replace(
        circuit, ops=tuple(replace(op, bound=float(margin * p)) for op, p in zip(circuit.ops, peaks, strict=True))
    )


def predicted_error(circuit: Circuit, t: Trace, samples: Sequence[np.ndarray]) -> float:
    """Promised largest error of an output element: simulated CKKS noise on samples, times ERROR_MARGIN."""
    name, out = circuit.inputs[0].name, circuit.outputs[0].name
    worst = 0.0
    for seed, x in enumerate(samples):
        clear = simulate(circuit, {name: x}).outputs[out]
        noisy = simulate_noise(circuit, {name: x}, seed=seed, traced=t)[out]
        worst = max(worst, float(np.max(np.abs(clear - noisy))))
    return ERROR_MARGIN * worst


def refuse(rows: Sequence[Candidate], levels: int, target: Target) -> ParamsError:
    """The error when nothing fits: by how much the nearest candidates miss."""
    if target.backend == "tenseal":
        fits = max((levels_at_most(target.backend, n) for n in range(13, 16)), default=0)
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
    return ParamsError(
        f"no parameters hold {levels} levels within 128 bits, {target.max_memory_gb} GB, error {target.max_error:g}"
        f"{'' if target.max_latency_s is None else f' and {target.max_latency_s:g} s'}:\n  {nearest}"
    )


def levels_at_most(backend: str, log_n: int, scale: int = 40) -> int:
    """Most levels of a ring at 128 bits and the smallest scale."""
    levels = 1
    while any(
        p.log_qp <= security.limit(p) for p in candidates(backend, log_n, levels + 1, False) if p.scale_bits == scale
    ):
        levels += 1
    return levels
