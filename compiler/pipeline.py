"""The compiler, read aloud:

import -> (approximate ->) certify -> fold means -> fold positions into projections -> fuse polynomials -> fold constants
       -> merge linear chains -> pad heads to powers of two -> split off the client -> calibrate ranges
       -> for each ring: lower to layouts -> levels, refreshes -> cost and noise of every parameter set -> verify -> keys.

A model that is run once is compiled from requests, a decoding step from whole sequences: its kept tensors are those of the steps
before, and bring their noise (see `samples`).
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

from . import verify
from .certificate import Certificate, certify
from .cost import CostTable
from .errors import ERROR_MARGIN, with_errors
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
from .plan import Plan, Target, with_bounds
from .promise import Found
from .samples import Progress, Requests, Samples, Sequences
from .search import search

SAMPLES = 48  # windows that ranges are calibrated on
BOUNDED = 8  # requests or sequences that bounds are taken over, at most


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
        approximate: fit elementwise functions that are no polynomials, softmax and norms on their calibrated ranges, instead of
            refusing them.

    A file that `polyformer export --step` wrote becomes a circuit of one decoding step, see `samples`.

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
    _require_fitting(graph, calibration)
    if approximate:
        graph, fitted = fit_functions(graph, [row[None] for row in calibration[:SAMPLES]])
    certificate = certify(graph)
    samples, embedding = _simplified(graph, calibration)
    graph = samples.graph
    found, plan = search(samples, samples.ranges(report), target, table, report)
    report("verify", 0, 1)
    verify.levels(found.circuit)
    verified = verify.against_graph(found.circuit, found.lowered, graph, samples.few(2))
    circuit = finish(found, samples, embedding, path)
    verify.finished(circuit, graph, samples.few(1))
    security.check(circuit.params, allow_insecure=target.insecure_log_n is not None)
    assert found.candidate.forecast is not None
    return Compiled(
        circuit=circuit,
        certificate=certificate,
        plan=plan,
        op_seconds=found.candidate.forecast.by_op,
        graph=graph,
        verified=verified,
        embedding=embedding,
        approximations=fitted,
    )


def _require_fitting(graph: Graph, calibration: np.ndarray) -> None:
    """Refuse a graph that is not for one request, and samples that it cannot take.

    Raises:
        UnsupportedOpError, ParamsError: see `compile_onnx`.
    """
    if graph.steps:
        if calibration.ndim != 2 or calibration.shape[1] < graph.steps:
            raise ParamsError(
                f"calibration of shape {calibration.shape}; a step is calibrated on token ids [n, {graph.steps}]"
            )
        return
    one_request(graph)
    if calibration.shape[1:] != graph.input_shape[1:]:
        raise ParamsError(
            f"calibration of shape {calibration.shape}; input {graph.input!r} of shape {graph.input_shape} is calibrated on "
            f"[n, {', '.join(map(str, graph.input_shape[1:]))}]"
        )


def _simplified(graph: Graph, calibration: np.ndarray) -> tuple[Samples, Embedding | None]:
    """The graph after all passes with its samples, and what the client embeds token ids with."""
    if graph.steps:
        whole = Sequences(graph=graph, tokens=calibration, embedding=None)
        *_, (last, _) = whole.steps(0)
        graph, embedding = simplify(graph, last)
        return Sequences(graph=graph, tokens=calibration, embedding=embedding), embedding
    graph, embedding = simplify(graph, calibration[:1])
    rows = calibration[:SAMPLES]
    inputs = list(rows) if embedding is None else [embedding(row) for row in rows]
    return Requests(graph=graph, inputs=inputs), embedding


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


def finish(found: Found, samples: Samples, embedding: Embedding | None, path: Path) -> Circuit:
    """The circuit with bounds, predictions, keys and what the client needs.

    Raises:
        ParamsError: a request fails too often; the search, which asked with fewer samples, found it within the budget.
    """
    error, candidate, graph = found.error, found.candidate, samples.graph
    params, t, f = candidate.params, candidate.trace, candidate.forecast
    assert t is not None and f is not None
    circuit = with_errors(with_bounds(found.circuit, samples.few(BOUNDED)), found.noise)
    client: dict[str, Any] = dict(circuit.client_arrays)
    if embedding is not None:
        client["embedding"] = embedding.table.astype(np.float32)
        client["positions"] = embedding.positions.astype(np.float32)
        if embedding.norm is not None:
            scale, shift, eps = embedding.norm
            client |= {"norm": np.stack([scale, shift]).astype(np.float32), "norm_eps": np.array([eps])}
    outputs = found.noise.outputs
    first = error - ERROR_MARGIN * (max(outputs.values()) - outputs[0])
    predicted = {  # of one request; of a step, but error and chance to fail are those of a whole sequence
        "evaluate_s": f.evaluate,
        "prepare_s": f.prepare,
        "work_s": f.work,
        "memory_gb": candidate.memory_gb,
        "plaintext_bytes": float(f.kept),
        "key_bytes": candidate.key_gb * 1e9,
        "input_bytes": float(sum(params.ciphertext_bytes(s.level) for s in circuit.inputs)),
        "reply_bytes": float(sum(params.ciphertext_bytes(s.level) for s in circuit.outputs)),
        **({"state_bytes": float(circuit.state_bytes), "first_step_error": first} if circuit.steps else {}),
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
