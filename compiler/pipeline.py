"""The compiler, read aloud:

import -> (approximate ->) certify -> fold means -> fold positions into projections -> fuse polynomials -> fold constants
       -> merge linear chains -> pad heads to powers of two -> split off the client -> calibrate ranges
       -> for each ring: lower to layouts -> levels -> cost and noise of every parameter set -> verify -> keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from he_backend import security
from he_backend.base import ParamsError
from he_backend.circuit import Circuit

from . import step, verify
from .calibrate import calibrate
from .certificate import Certificate, certify
from .cost import CostTable
from .errors import with_errors
from .failure import failure_log2
from .ir import STEP, Graph
from .lower import one_request
from .passes.approximate import Report
from .passes.approximate import approximate as fit_functions
from .passes.center import center
from .passes.client import Embedding, split_client
from .passes.fold import fold
from .passes.fuse import fuse
from .passes.linear_chains import linear_chains
from .passes.pad_heads import pad_heads
from .passes.positions import positions
from .plan import Candidate, Plan, Target, few, with_bounds
from .search import ERROR_SAMPLES, Progress, search

SAMPLES = 48  # windows that ranges are calibrated on


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A circuit and how it came about; `graph` is its meaning in float64 on the embedded input.

    embedding turns token ids into the input, where the model starts with ids.
    approximations says which functions of the model were replaced by polynomials, if that was asked for.
    """

    circuit: Circuit
    certificate: Certificate
    plan: Plan
    op_seconds: dict[int, float]
    graph: Graph = field(repr=False)
    verified: float
    embedding: Embedding | None = None
    approximations: Report | None = None


def import_graph(path: Path, *, approximate: bool = False) -> Graph:
    """Read an ONNX file; the import of onnx happens here, so that everything else works without it."""
    from .step_import import import_any

    return import_any(path, approximate=approximate)


def simplify(graph: Graph, sample: np.ndarray | Mapping[str, np.ndarray]) -> tuple[Graph, Embedding | None]:
    """All passes on the graph, each checked on one sample [1, ...] of the graph's input, or on all inputs of a step."""
    passes = (
        ("center", center),
        ("positions", positions),
        ("fuse", fuse),
        ("fold", fold),
        ("fuse again", fuse),
        ("linear chains", linear_chains),
        ("fold again", fold),
        ("pad heads", pad_heads),
    )
    for name, run in passes:
        after = run(graph)
        verify.same_meaning(graph, after, sample, sample, name)
        graph = after
    split, embedding = split_client(graph)
    if embedding is not None and isinstance(sample, Mapping):
        x = embedding.step(sample[graph.input], int(sample[STEP]))
        verify.same_meaning(graph, split, sample, {**sample, split.input: x}, "split_client")
    elif embedding is not None and not isinstance(sample, Mapping):
        verify.same_meaning(graph, split, sample, embedding(sample[0])[None], "split_client")
    return split, embedding


def compile_onnx(
    path: Path | str,
    calibration: np.ndarray,
    *,
    target: Target | None = None,
    approximate: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile an ONNX file of polynomial ops.

    Args:
        calibration: sample inputs; token ids [n, T] for a model with an embedding, else [n, T, D].
        approximate: fit elementwise functions that are no polynomials on their calibrated ranges, instead of refusing them.

    A file that `polyformer export --step` wrote becomes a circuit of one decoding step, see `step`.

    Raises:
        UnsupportedOpError: an op or a layout that cannot be compiled.
        ParamsError: no parameters hold the circuit at 128 bits within the memory; or samples of another shape, or not finite.
        VerificationError: a pass changed the meaning (a bug of the compiler).
    """
    path, target = Path(path), target or Target()
    require_finite(calibration)
    report = progress or (lambda stage, done, total: None)
    table = CostTable.load(target.costs, backend=target.backend)
    report("import", 0, 1)
    graph, fitted = import_graph(path, approximate=approximate), None
    if not graph.steps:
        one_request(graph)
        if calibration.shape[1:] != graph.input_shape[1:]:
            raise ParamsError(
                f"calibration of shape {calibration.shape}; input {graph.input!r} of shape {graph.input_shape} is calibrated on "
                f"[n, {', '.join(map(str, graph.input_shape[1:]))}]"
            )
    if approximate:
        graph, fitted = fit_functions(graph, [row[None] for row in calibration[:SAMPLES]])
    certificate = certify(graph)
    if graph.steps:
        return _compile_step(path, graph, certificate, calibration, target, table, report)
    graph, embedding = simplify(graph, calibration[:1])
    samples = [embedding(row) if embedding is not None else row for row in calibration[:SAMPLES]]
    ranges = calibrate(graph, [x[None] for x in samples], progress=lambda i: report("calibrate", i, len(samples)))
    found = search(graph, ranges, samples, target, table, report)
    report("verify", 0, 1)
    verify.levels(found.circuit)
    verified = verify.against_graph(found.circuit, found.lowered, graph, samples[:2])
    chosen = found.plan.chosen
    circuit = _finish(with_bounds(found.circuit, few(samples, 8)), chosen, found.error, embedding, graph, path)
    assert chosen.trace is not None
    circuit = with_errors(circuit, chosen.trace, few(samples, ERROR_SAMPLES))
    verify.finished(circuit, graph, samples[:1])
    security.check(circuit.params, allow_insecure=target.insecure_log_n is not None)
    assert chosen.forecast is not None
    return Compiled(
        circuit=circuit,
        certificate=certificate,
        plan=found.plan,
        op_seconds=chosen.forecast.by_op,
        graph=graph,
        verified=verified,
        embedding=embedding,
        approximations=fitted,
    )


def require_finite(calibration: np.ndarray) -> None:
    """Refuse NaN and infinity before ranges are made of them.

    Raises:
        ParamsError: names the first sample that holds one, and where.
    """
    if not len(calibration):
        raise ParamsError(
            f"calibration of shape {calibration.shape} has no sample; ranges come from it, give at least one"
        )
    bad = [i for i, row in enumerate(calibration) if not np.isfinite(row).all()]
    if bad:
        row = np.asarray(calibration[bad[0]])
        where = tuple(int(n) for n in np.argwhere(~np.isfinite(row))[0])
        others = f" and {len(bad) - 1} others hold such numbers" if len(bad) > 1 else ""
        raise ParamsError(
            f"calibration sample {bad[0]} of {len(calibration)} holds {row[where]} at {list(where)}{others}: ranges would be "
            "made of it; leave it out or repair it"
        )


def _compile_step(
    path: Path,
    graph: Graph,
    certificate: Certificate,
    tokens: np.ndarray,
    target: Target,
    table: CostTable,
    report: Progress,
) -> Compiled:
    """The same for one decoding step; `tokens` [n, T] are whole sequences.

    Raises:
        ParamsError: the sequences are shorter than the model's window.
    """
    if tokens.ndim != 2 or tokens.shape[1] < graph.steps:
        raise ParamsError(f"calibration of shape {tokens.shape}; a step is calibrated on token ids [n, {graph.steps}]")
    report("import", 0, 1)
    sequences = step.Sequences(graph=graph, tokens=tokens, embedding=None)
    graph, embedding = simplify(graph, list(sequences.steps(0))[-1][0])
    sequences = step.Sequences(graph=graph, tokens=tokens, embedding=embedding)
    ranges = step.calibrate_steps(sequences, report=report)
    found = step.search_step(sequences, ranges, target, table, report)
    report("verify", 0, 1)
    verify.levels(found.circuit)
    verified = step.against_graph(found.circuit, step.require(found), sequences)
    chosen = found.plan.chosen
    circuit = _finish(step.with_bounds(found.circuit, sequences), chosen, found.error, embedding, graph, path)
    verify.sound(circuit)
    security.check(circuit.params, allow_insecure=target.insecure_log_n is not None)
    assert chosen.forecast is not None
    return Compiled(
        circuit=circuit,
        certificate=certificate,
        plan=found.plan,
        op_seconds=chosen.forecast.by_op,
        graph=graph,
        verified=verified,
    )


def _finish(
    circuit: Circuit, candidate: Candidate, error: float, embedding: Embedding | None, graph: Graph, path: Path
) -> Circuit:
    """Keys, predictions and what the client needs.

    Raises:
        ParamsError: a request fails too often; the search, which asked with fewer samples, found it within the budget.
    """
    params, t, f = candidate.params, candidate.trace, candidate.forecast
    assert t is not None and f is not None
    client: dict[str, Any] = dict(circuit.client_arrays)
    if embedding is not None:
        client["embedding"] = embedding.table.astype(np.float32)
        client["positions"] = embedding.positions.astype(np.float32)
        if embedding.norm is not None:
            scale, shift, eps = embedding.norm
            client |= {"norm": np.stack([scale, shift]).astype(np.float32), "norm_eps": np.array([eps])}
    predicted = {
        "evaluate_s": f.evaluate,
        "prepare_s": f.prepare,
        "work_s": f.work,
        "memory_gb": candidate.memory_gb,
        "plaintext_bytes": float(f.kept),
        "key_bytes": candidate.key_gb * 1e9,
        "input_bytes": float(sum(params.ciphertext_bytes(s.level) for s in circuit.inputs)),
        "reply_bytes": float(sum(params.ciphertext_bytes(s.level) for s in circuit.outputs)),
        **({"state_bytes": float(circuit.state_bytes)} if circuit.steps else {}),
        "error": error,
        "failure_log2": security.check_failure(failure_log2(circuit, error)),
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
