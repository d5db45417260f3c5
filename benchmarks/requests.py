"""One encrypted request of a model, measured whole: compile, keys, encrypt, evaluate, decrypt, and the errors of all of it.

Client and server are two objects of one process that share bytes only, so that `peak_gb` is that of both together.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Target, compile_onnx
from compiler.cost import CostTable
from compiler.ir import evaluate as evaluate_graph
from he_backend import efficiency, keys, security
from he_backend.circuit import Circuit
from he_backend.execute import Executor, Run
from he_backend.simulator import input_slots, output_tensors

from . import operators, records

Step = Callable[[int, int, str], None]
CACHE_BYTES = 4 << 30  # of weights encoded ahead, at most


def measure(
    name: str,
    path: Path,
    calibration: np.ndarray,
    *,
    target: Target,
    repeats: int,
    progress: Step,
    weights: str,
    cache_bytes: int = CACHE_BYTES,
    probe: bool = False,
) -> dict[str, Any]:
    """Measure one request of an ONNX file.

    Args:
        calibration: inputs [n, ...]; the last one is the request, the others calibrate.
        repeats: evaluations; the median of evaluate and total is reported.
        weights: where the weights come from, for the record.
        cache_bytes: of weights encoded ahead, at most.
        probe: measure the error after every node too, in one run more.

    Returns:
        A record (see `records`). Metrics in seconds, GB and output units: evaluate_s, total_s (encrypt + evaluate + decrypt),
        peak_gb, max_abs_error (against the model in the clear), promised_error, efficiency (bound / evaluate_s) with the tables
        `operators` and `primitives` (see `he_backend.efficiency`; of the run of median time), logqp, logqp_limit, refreshes,
        predicted_evaluate_s, compile_s, keygen_s, key_gb, agreement.
    """
    progress(0, 4, "compile")
    start = time.perf_counter()
    compiled = compile_onnx(path, calibration[:-1], target=target)
    compile_s = time.perf_counter() - start
    circuit = compiled.circuit
    params = circuit.params
    progress(1, 4, "keys")
    module = keys.backend(params.backend)
    client = module.Client(params, allow_insecure=params.insecure)
    server = module.Evaluator(params, key_id=client.key_id, allow_insecure=params.insecure)
    try:
        start = time.perf_counter()
        for kind, k, level in keys.wanted(circuit.spec()):
            server.load_key(kind, k, level, client.make_key(kind, k, level))
        keygen_s = time.perf_counter() - start
        progress(2, 4, "weights")
        executor = Executor(circuit, server, threads=target.threads, plaintext_budget=_budget(circuit, cache_bytes))
        executor.prepare()
        x = calibration[-1] if compiled.embedding is None else compiled.embedding(calibration[-1])
        x = x.astype(np.float64)
        runs, totals, result = [], [], np.zeros(0)
        for i in range(repeats + (repeats > 1)):  # one to warm up, where there are several
            progress(3, 4, f"request {i + 1}")
            start = time.perf_counter()
            run, result = request(circuit, client, server, executor, x)
            totals.append(time.perf_counter() - start)
            runs.append(run)
        peak_gb = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        )  # before the probes, which keep more values alive
        errors = operators.errors(circuit, client, server, x, threads=target.threads) if probe else None
    finally:
        server.close()
    if repeats > 1:
        runs, totals = runs[1:], totals[1:]
    progress(4, 4, "done")
    clear = evaluate_graph(compiled.graph, x[None])[compiled.graph.output][0]
    evaluate = statistics.median(r.timing.wall_s for r in runs)
    costs = CostTable.load(target.costs).measured(params)
    tables = efficiency.tables(
        [{"id": op.id, "kind": op.kind, "source": op.source, "level": op.level} for op in circuit.ops],
        [asdict(r.timing) for r in runs],
        table=costs,
        errors=errors,
    )
    metrics = {
        "evaluate_s": evaluate,
        "evaluate_spread_s": max(r.timing.wall_s for r in runs) - min(r.timing.wall_s for r in runs),
        "total_s": statistics.median(totals),
        "peak_gb": peak_gb,
        # Two digits: an unrounded difference of a decryption belongs into no file.
        "max_abs_error": float(f"{np.max(np.abs(result - clear)):.1e}"),
        "promised_error": circuit.error_bound,
        "agreement": float(np.mean(np.argmax(result, -1) == np.argmax(clear, -1))),
        "efficiency": tables["bound_s"] / evaluate,
        "bound_s": tables["bound_s"],
        "bound_from": "fastest call at each level of these runs" + (" and of the cost table" if costs else ""),
        "logqp": params.log_qp,
        "logqp_limit": None if params.insecure else security.limit(params),
        "refreshes": circuit.refreshes,
        "predicted_evaluate_s": circuit.predicted["evaluate_s"],
        "compile_s": compile_s,
        "keygen_s": keygen_s,
        "key_gb": circuit.predicted["key_bytes"] / 1e9,
        "operators": tables["operators"],
        "primitives": tables["primitives"],
        "encoded_ahead": runs[0].timing.encoded_ahead,
        "primitives_s": dict(runs[0].timing.primitives),
        "counts": dict(runs[0].timing.counts),
        "by_op": [{k: row[k] for k in ("source", "kind", "level", "seconds")} for row in runs[0].timing.ops],
        "weights": weights,
        "parameters": params.name,
    }
    return records.record(
        name,
        metrics=metrics,
        params=params.to_json(),
        threads=target.threads,
        seed=0,
        repeats=repeats,
    )


def request(circuit: Circuit, client: Any, server: Any, executor: Executor, x: np.ndarray) -> tuple[Run, np.ndarray]:
    """Encrypt, send, evaluate, send back, decrypt."""
    level = circuit.inputs[0].level
    sent = {
        part: server.import_ciphertext(client.export_ciphertext(client.encrypt(slots, level=level)), level=level)
        for part, slots in input_slots(circuit, {circuit.inputs[0].name: x}).items()
    }
    run = executor.run(sent)
    back = {
        part: client.decrypt(
            client.import_ciphertext(server.export_ciphertext(c), level=c.level), scale=run.scales[part]
        )
        for part, c in run.outputs.items()
    }
    return run, output_tensors(circuit, back)[circuit.outputs[0].name]


def _budget(circuit: Circuit, most: int) -> int:
    return min(most, int(circuit.predicted["plaintext_bytes"]))
