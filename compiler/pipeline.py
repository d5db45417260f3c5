"""The compiler, read aloud:

import -> certify -> fold means -> fuse polynomials -> fold constants -> split off the client -> calibrate ranges
       -> lower to layouts -> levels -> parameters and keys; with a verification after each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from he_backend import security
from he_backend.base import UnsupportedOpError
from he_backend.circuit import Circuit

from . import verify
from .calibrate import calibrate
from .certificate import Certificate, certify
from .cost import CostTable
from .ir import Graph
from .lower import Lowered, lower
from .matvec import PlanCost
from .passes.center import center
from .passes.client import Embedding, split_client
from .passes.fold import fold
from .passes.fuse import fuse
from .passes.levels import assign_levels
from .plan import LARGEST_RING, Candidate, Plan, Target, as_circuit, choose, predicted_error, refuse, with_bounds

SAMPLES = 48  # windows that ranges are calibrated on
ERROR_SAMPLES = 3  # of them, those that noise is simulated on

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A circuit and how it came about; `graph` is its meaning in float64 on the embedded input."""

    circuit: Circuit
    certificate: Certificate
    plan: Plan
    op_seconds: dict[int, float]
    graph: Graph = field(repr=False)
    verified: float


def import_graph(path: Path) -> Graph:
    """Read an ONNX file; the import of onnx happens here, so that everything else works without it."""
    from .onnx_import import import_onnx

    return import_onnx(path)


def simplify(graph: Graph, sample: np.ndarray) -> tuple[Graph, Embedding | None]:
    """All passes on the graph, each checked on one sample [1, ...] of the graph's input."""
    for name, run in (("center", center), ("fuse", fuse), ("fold", fold), ("fuse again", fuse)):
        after = run(graph)
        verify.same_meaning(graph, after, sample, sample, name)
        graph = after
    split, embedding = split_client(graph)
    if embedding is not None:
        verify.same_meaning(graph, split, sample, embedding(sample[0])[None], "split_client")
    return split, embedding


def compile_onnx(
    path: Path | str, calibration: np.ndarray, *, target: Target | None = None, progress: Progress | None = None
) -> Compiled:
    """Compile an ONNX file of polynomial ops.

    Args:
        calibration: sample inputs; token ids [n, T] for a model with an embedding, else [n, T, D].

    Raises:
        UnsupportedOpError: an op or a layout that cannot be compiled.
        ParamsError: no parameters hold the circuit at 128 bits within the memory.
        VerificationError: a pass changed the meaning (a bug of the compiler).
    """
    path, target = Path(path), target or Target()
    report = progress or (lambda stage, done, total: None)
    table = CostTable.load(target.costs)
    report("import", 0, 1)
    graph = import_graph(path)
    certificate = certify(graph)
    graph, embedding = simplify(graph, calibration[:1])
    samples = [embedding(row) if embedding is not None else row for row in calibration[:SAMPLES]]
    ranges = calibrate(graph, [x[None] for x in samples], progress=lambda i: report("calibrate", i, len(samples)))

    rows: list[Candidate] = []
    levels = 0
    reason: Exception | None = None
    chosen: tuple[Candidate, Lowered, Circuit, float] | None = None
    rings = (
        [target.insecure_log_n] if target.insecure_log_n is not None else range(13, LARGEST_RING[target.backend] + 1)
    )
    for log_n in rings:
        report(f"lower at N = 2^{log_n}", 0, 1)
        slots = 1 << (log_n - 1)
        try:
            built = lower(graph, ranges, slots, plan_cost(table, log_n))
        except UnsupportedOpError as error:
            reason = error
            continue
        built = replace(built, ops=assign_levels(built.ops, built.arrays, slots))
        levels = built.ops[0].level
        found = choose(built, levels, log_n, target, table)
        rows += found
        for candidate in (c for c in found if c.forecast is not None):
            circuit = as_circuit(built, candidate.params)
            report("noise", 0, 1)
            assert candidate.trace is not None
            promised = predicted_error(circuit, candidate.trace, samples[:ERROR_SAMPLES])
            if promised <= target.max_error:
                chosen = candidate, built, circuit, promised
                break
            why = f"predicted error {promised:.2g} above {target.max_error:.2g}"
            rows[rows.index(candidate)] = replace(candidate, why=why)
        if chosen is not None:
            break
    if chosen is None:
        raise reason if reason is not None and not rows else refuse(rows, levels, target)
    candidate, built, circuit, error_bound = chosen
    report("verify", 0, 1)
    verify.levels(circuit)
    verified = verify.against_graph(circuit, built, graph, samples[:2])
    circuit = _finish(with_bounds(circuit, samples[:8]), candidate, error_bound, embedding, graph, path)
    security.check(circuit.params, allow_insecure=target.insecure_log_n is not None)
    others = tuple(
        c for c in sorted(rows, key=lambda c: (c.forecast is None, c.evaluate_s)) if c.params != candidate.params
    )
    assert candidate.forecast is not None
    return Compiled(
        circuit=circuit,
        certificate=certificate,
        plan=Plan(chosen=candidate, others=others, costs=table.name),
        op_seconds=candidate.forecast.by_op,
        graph=graph,
        verified=verified,
    )


def plan_cost(table: CostTable, log_n: int) -> PlanCost:
    """Seconds of a linear map by its counts, at the middle of the table's chain: only the ratios matter for a plan."""
    params = replace(table.params, log_n=log_n)
    level = params.levels // 2
    cost = {op: table.seconds(op, params, level) for op in ("hoist", "rotate_extended", "mod_down", "rotate")}
    term = table.seconds("weighted_sum_extended", params, level)

    def seconds(diagonals: int, babies: int, giants: int, folds: int) -> float:
        giant = cost["mod_down"] + cost["hoist"] + cost["rotate_extended"]
        return diagonals * term + babies * cost["rotate_extended"] + (giants - 1) * giant + folds * cost["rotate"]

    return seconds


def _finish(
    circuit: Circuit, candidate: Candidate, error: float, embedding: Embedding | None, graph: Graph, path: Path
) -> Circuit:
    """Keys, predictions and what the client needs."""
    params, t, f = candidate.params, candidate.trace, candidate.forecast
    assert t is not None and f is not None
    client: dict[str, Any] = dict(circuit.client_arrays)
    if embedding is not None:
        client["embedding"] = embedding.table.astype(np.float32)
        client["positions"] = embedding.positions.astype(np.float32)
    predicted = {
        "evaluate_s": f.evaluate,
        "prepare_s": f.prepare,
        "work_s": f.work,
        "memory_gb": candidate.memory_gb,
        "plaintext_bytes": float(f.kept),
        "key_bytes": candidate.key_gb * 1e9,
        "input_bytes": float(sum(params.ciphertext_bytes(s.level) for s in circuit.inputs)),
        "reply_bytes": float(sum(params.ciphertext_bytes(s.level) for s in circuit.outputs)),
        "error": error,
        "failure_log2": _failure(circuit, error),
    }
    model: Mapping[str, Any] = {
        "onnx_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **{k: v for k, v in graph.metadata.items() if isinstance(v, str)},
    }
    return replace(
        circuit,
        keys=dict(t.keys),
        relin_level=t.relin_level,
        client_arrays=client,
        error_bound=error,
        predicted=predicted,
        model=model,
        embedding=embedding is not None,
    )


def _failure(circuit: Circuit, error: float) -> float:
    """log2 of the chance that noise wraps the modulus of a reply; see `security`.

    The noise is the simulated one: the promised error, in stored slots, spread over coefficients. A promise is above the
    largest error seen, so that taking it for a standard deviation errs on the safe side.
    """
    params = circuit.params
    bounds = [op.bound for op in circuit.ops if op.kind == "output"]
    slot = max(error / abs(signature.factor) for signature in circuit.outputs)
    noise = slot * 2.0**params.scale_bits / math.sqrt(params.slots)
    noise_bits = math.log2(max(noise, 2.0**security.FRESH_NOISE_BITS))
    log2 = security.circuit_failure(params, bounds, noise_bits=noise_bits)
    return max(-1000.0, log2)  # JSON has no infinity; 2^-1000 is never
