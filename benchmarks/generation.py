"""One more token of a model whose keys and values the server keeps encrypted, measured step by step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiler import Target, compile_onnx
from he_backend import security
from he_backend.execute import Timing
from he_backend.owner import embed_step
from polyformer.export_step import export_step
from polyformer.model import Transformer
from training import load_model, load_task

from . import records, requests
from .parties import parties
from .registry import Settings
from .trained import demo_model

STEPS = 6  # tokens of a held-out window that are fed; all steps are one circuit, so that none is special
QUICK_RING = 12
TARGET = Target(max_memory_gb=21.0)


def measure(name: str, settings: Settings, *, steps: int = STEPS) -> dict[str, Any]:
    """Feed the first tokens of a held-out window, each as one encrypted step.

    Returns:
        A record. Metrics in seconds, GB, bytes and logits, medians over the steps: evaluate_s and total_s (encrypt, evaluate, decrypt)
        of a token, evaluate_spread_s, peak_gb of client and server together, max_abs_error of any logit against the whole model in the
        clear, promised_error, agreement of the likeliest token, efficiency (bound_s / evaluate_s) with the tables `operators` and
        `primitives` (see `requests.efficiency_of`), logqp, logqp_limit, predicted_evaluate_s, upload_bytes (keys and request),
        request_bytes, reply_bytes, key_gb (as the keys travel), state_gb, compile_s, keygen_s, prepare_s, encode_s, refreshes.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = demo_model(settings, Path(place))
        model, task = load_model(folder, "polynomial"), load_task(folder)
        assert isinstance(model, Transformer)
        tokens = task.heldout[0].numpy()
        path = Path(place) / "step.onnx"
        export_step(model, path)
        settings.progress(0, steps + 2, "compile")
        target = Target(insecure_log_n=QUICK_RING) if settings.quick else TARGET
        start = time.perf_counter()
        compiled = compile_onnx(path, task.calibration().numpy(), target=target)
        compile_s = time.perf_counter() - start
    circuit = compiled.circuit
    steps = min(steps, circuit.steps)
    with torch.no_grad():
        clear = model.double()(torch.from_numpy(tokens[None]))[0, :steps].numpy()
    settings.progress(1, steps + 2, "keys and weights")
    found: list[np.ndarray] = []
    total: list[float] = []
    timings: list[Timing] = []

    def made(before: Mapping[str, Any], request: int) -> dict[str, Any]:
        timing = timings[-1]
        metrics = {
            **requests.efficiency_of(circuit, timings, target=target),
            **before,
            "evaluate_spread_s": requests.spread([t.wall_s for t in timings]),
            "total_s": statistics.median(total),
            "peak_gb": records.peak_gb(),
            # Two digits: an unrounded difference of a decryption belongs into no file.
            "max_abs_error": float(f"{np.max(np.abs(np.stack(found) - clear[: len(found)])):.1e}"),
            "promised_error": circuit.error_bound,
            "agreement": float(np.mean(np.argmax(found, -1) == np.argmax(clear[: len(found)], -1))),
            "logqp": circuit.params.log_qp,
            "logqp_limit": None if circuit.params.insecure else security.limit(circuit.params),
            "refreshes": circuit.refreshes,
            "predicted_evaluate_s": circuit.predicted["evaluate_s"],
            "predicted_memory_gb": circuit.predicted["memory_gb"],
            "request_bytes": request,
            "state_gb": circuit.predicted["state_bytes"] / 1e9,
            "compile_s": compile_s,
            "encode_s": requests.encode_s(timing),
            "warm_ups": 0,
            "primitives_s": dict(timing.primitives),
            "counts": dict(timing.counts),
            "by_op": requests.by_source(timing),
            "weights": "the demo's recipe" if not settings.quick else "a tiny recipe",
            "parameters": circuit.params.name,
        }
        return records.record(
            name,
            metrics=metrics,
            params=circuit.params.to_json(),
            threads=target.threads,
            seed=0,
            repeats=len(timings),
        )

    with parties(circuit, threads=target.threads) as both:
        for step in range(steps):
            settings.progress(step + 2, steps + 2, f"token {step + 1}")
            start = time.perf_counter()
            logits, timing = both.ask(embed_step(circuit.spec(), int(tokens[step]), step), step=step)
            total.append(time.perf_counter() - start)
            timings.append(timing)
            found.append(logits.reshape(-1))
            last = made(requests.prepared(both), both.traffic(circuit.inputs))
            settings.keep(last)
    settings.progress(steps + 2, steps + 2, "done")
    return last
