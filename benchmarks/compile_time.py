"""What compiling costs: seconds by stage, memory, and what the plan promises."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Target, compile_onnx
from he_backend import security

from . import records
from .registry import Progress


def measure(name: str, path: Path, calibration: np.ndarray, *, target: Target, progress: Progress) -> dict[str, Any]:
    """Compile an ONNX file and verify it in the simulator, as `compile_onnx` does; nothing is encrypted.

    Returns:
        A record (see `records`). Metrics: compile_s, stages_s (seconds by stage), peak_gb, verified (largest relative difference of a
        tensor, simulator against graph), ops, by_kind, array_gb (weights and masks of the circuit), and the plan's predicted_evaluate_s,
        predicted_memory_gb, key_gb, keys, refreshes, logqp, logqp_limit.
    """
    stages: dict[str, float] = defaultdict(float)
    start = last = time.perf_counter()
    current = "import"

    def follow(stage: str, done: int, total: int) -> None:
        nonlocal last, current
        now = time.perf_counter()
        stages[current] += now - last
        last, current = now, stage
        progress(done, total, stage)

    compiled = compile_onnx(path, calibration, target=target, progress=follow)
    follow("done", 1, 1)
    circuit = compiled.circuit
    params = circuit.params
    metrics = {
        "compile_s": time.perf_counter() - start,
        "stages_s": dict(stages),
        "peak_gb": records.peak_gb(),
        "verified": compiled.verified,
        "ops": len(circuit.ops),
        "by_kind": dict(Counter(op.kind for op in circuit.ops)),
        "array_gb": sum(a.nbytes for a in circuit.arrays.values()) / 1e9,
        "predicted_evaluate_s": circuit.predicted["evaluate_s"],
        "predicted_memory_gb": circuit.predicted["memory_gb"],
        "key_gb": circuit.predicted["key_bytes"] / 1e9,
        "keys": len(circuit.keys),
        "refreshes": circuit.refreshes,
        "logqp": params.log_qp,
        "logqp_limit": None if params.insecure else security.limit(params),
        "parameters": params.name,
    }
    return records.record(name, metrics=metrics, params=params.to_json(), threads=target.threads, seed=0)
