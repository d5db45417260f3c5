"""One encrypted request of a model, measured whole: compile, keys, encrypt, evaluate, decrypt, and the errors of all of it.

Client and server are `parties` of one process, so that `peak_gb` is that of both together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Compiled, Target, compile_onnx
from compiler.cost import CostTable
from compiler.ir import evaluate as evaluate_graph
from compiler.samples import requests as sequences
from he_backend import efficiency, security
from he_backend.circuit import Circuit
from he_backend.execute import Timing

from . import operators, records
from .parties import Parties, parties
from .registry import Keep, Progress, forget


def measure(
    name: str,
    path: Path,
    calibration: np.ndarray,
    *,
    target: Target,
    repeats: int,
    progress: Progress,
    weights: str,
    probe: bool = False,
    exact: np.ndarray | None = None,
    keep: Keep = forget,
) -> dict[str, Any]:
    """Measure one request of an ONNX file.

    Args:
        calibration: inputs [n, ...]; the last one is the request, the others calibrate.
        repeats: evaluations; the median of evaluate and total is reported.
        weights: where the weights come from, for the record.
        probe: measure the error after every node too, in one run more.
        exact: what the model itself approximates, for this request: total_error is then recorded against it.
        keep: called with the record so far after every evaluation.

    Returns:
        A record (see `records`). Metrics in seconds, GB and output units: evaluate_s, evaluate_spread_s (None of one run), total_s
        (encrypt + evaluate + decrypt), peak_gb, max_abs_error (against the model in the clear), promised_error, efficiency (bound /
        evaluate_s) with the tables `operators` and `primitives` (see `he_backend.efficiency`; of the run of median time), logqp,
        logqp_limit, refreshes, predicted_evaluate_s, compile_s, keygen_s, key_gb (as the keys travel, relinearisation and refresh
        included), prepare_s (weights encoded before the request, wall), encode_s (thread-seconds of encodings left to the request),
        agreement, upload_bytes (keys and request, as in the demo's record), reply_bytes, warm_ups (requests before those that count).
        What `keep` gets before the first evaluation has no more than is known then.
    """
    progress(0, 3, "compile")
    start = time.perf_counter()
    compiled = compile_onnx(path, calibration[:-1], target=target)
    compile_s = time.perf_counter() - start
    circuit = compiled.circuit
    params = circuit.params
    x = request_of(compiled, calibration)
    progress(1, 3, "keys and weights")
    expected = clear(compiled, x)

    def made(metrics: Mapping[str, Any], evaluations: int) -> dict[str, Any]:
        return records.record(
            name,
            metrics={**metrics, "compile_s": compile_s, "weights": weights},
            params=params.to_json(),
            threads=target.threads,
            seed=0,
            repeats=evaluations,
        )

    timings: list[Timing] = []
    totals: list[float] = []
    result = np.zeros(0)
    with parties(circuit, threads=target.threads) as both:
        before = prepared(both)
        keep(made({**before, "predicted_evaluate_s": circuit.predicted["evaluate_s"]}, 0))
        for i in range(repeats + (repeats > 1)):  # one to warm up, where there are several
            progress(2, 3, f"request {i + 1}")
            start = time.perf_counter()
            result, timing = both.ask({circuit.inputs[0].name: x})
            totals.append(time.perf_counter() - start)
            timings.append(timing)
            keep(made({**before, **figures(compiled, timings, totals, result, expected, target=target)}, i + 1))
        # Before the probes, which keep more values alive.
        peak_gb = records.peak_gb()
        errors = (
            operators.errors(circuit, both.client, both.server, *sequences([x]), threads=target.threads)
            if probe
            else None
        )
    warm_ups = len(timings) - repeats
    timings, totals = timings[warm_ups:], totals[warm_ups:]
    progress(3, 3, "done")
    metrics = {
        **figures(compiled, timings, totals, result, expected, target=target, errors=errors),
        **before,
        "peak_gb": peak_gb,
        "warm_ups": warm_ups,
    }
    if exact is not None:
        metrics["total_error"] = float(f"{np.max(np.abs(result - exact)):.1e}")
    return made(metrics, repeats)


def request_of(compiled: Compiled, samples: np.ndarray) -> np.ndarray:
    """The input tensor of the last of some inputs [n, ...]: itself, or its embedding."""
    x = samples[-1] if compiled.embedding is None else compiled.embedding(samples[-1])
    return x.astype(np.float64)


def clear(compiled: Compiled, x: np.ndarray) -> np.ndarray:
    """The output tensor of the model in the clear."""
    output: np.ndarray = evaluate_graph(compiled.graph, x[None])[compiled.graph.output][0]
    return output


def prepared(both: Parties) -> dict[str, Any]:
    """What is known of both sides before a request: seconds of keys and of weights encoded ahead, bytes of keys and ciphertexts."""
    circuit = both.circuit
    return {
        "keygen_s": both.keygen_s,
        "prepare_s": both.prepare_s,
        "key_gb": both.key_bytes / 1e9,
        "upload_bytes": both.key_bytes + both.traffic(circuit.inputs),
        "reply_bytes": both.traffic(circuit.outputs),
    }


def figures(
    compiled: Compiled,
    timings: Sequence[Timing],
    totals: Sequence[float],
    result: np.ndarray,
    expected: np.ndarray,
    *,
    target: Target,
    errors: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """What some runs of one request say, with the metrics of `measure` that come from runs and parameters.

    Args:
        totals: seconds of encrypt + evaluate + decrypt, one a run.
        result: the decrypted output; expected: that of the model in the clear.
        errors: largest error after an op, by op id, where it was measured.
    """
    circuit = compiled.circuit
    params = circuit.params
    return {
        **efficiency_of(circuit, timings, target=target, errors=errors),
        "evaluate_spread_s": spread([t.wall_s for t in timings]),
        "total_s": statistics.median(totals),
        # Two digits: an unrounded difference of a decryption belongs into no file.
        "max_abs_error": float(f"{np.max(np.abs(result - expected)):.1e}"),
        "promised_error": circuit.error_bound,
        "agreement": float(np.mean(np.argmax(result, -1) == np.argmax(expected, -1))),
        "logqp": params.log_qp,
        "logqp_limit": None if params.insecure else security.limit(params),
        "refreshes": circuit.refreshes,
        "predicted_evaluate_s": circuit.predicted["evaluate_s"],
        "encode_s": encode_s(timings[0]),
        "encoded_ahead": timings[0].encoded_ahead,
        "encoded_gb": circuit.predicted["plaintext_bytes"] / 1e9,
        "predicted_memory_gb": circuit.predicted["memory_gb"],
        "primitives_s": dict(timings[0].primitives),
        "counts": dict(timings[0].counts),
        "by_op": by_source(timings[0]),
        "parameters": params.name,
    }


def efficiency_of(
    circuit: Circuit, timings: Sequence[Timing], *, target: Target, errors: Mapping[int, float] | None = None
) -> dict[str, Any]:
    """evaluate_s (median), efficiency, bound_s, bound_from, and the tables by node and by primitive: the suite's one efficiency.

    The bound is that of `he_backend.efficiency`: every call at the cost of the fastest of its kind at its level in these runs.
    """
    evaluate = statistics.median(t.wall_s for t in timings)
    costs = CostTable.load(target.costs, backend=circuit.params.backend).measured(circuit.params)
    tables = efficiency.tables(
        [{"id": op.id, "kind": op.kind, "source": op.source, "level": op.level} for op in circuit.ops],
        [asdict(t) for t in timings],
        table=costs,
        errors=errors,
        predicted_errors=circuit.errors,
    )
    return {
        "evaluate_s": evaluate,
        "efficiency": tables["bound_s"] / evaluate,
        "bound_s": tables["bound_s"],
        "bound_from": "fastest call at each level of these runs" + (" and of the cost table" if costs else ""),
        "operators": tables["operators"],
        "primitives": tables["primitives"],
    }


def spread(seconds: Sequence[float]) -> float | None:
    """Longest minus shortest; None of a single run, which says nothing about it."""
    return max(seconds) - min(seconds) if len(seconds) > 1 else None


def encode_s(timing: Timing) -> float:
    """Thread-seconds of encodings that were not done ahead."""
    return sum(seconds for name, seconds in timing.primitives.items() if name.startswith("encode"))


def by_source(timing: Timing) -> list[dict[str, Any]]:
    """Thread-seconds by ONNX node, kind of op and level: six wide blocks have 32,000 ops."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for op in timing.ops:
        key = (op["source"], op["kind"], op["level"])
        row = rows.setdefault(key, {"source": key[0], "kind": key[1], "level": key[2], "ops": 0, "seconds": 0.0})
        row["ops"] += 1
        row["seconds"] += op["seconds"]
    return list(rows.values())
