"""Does encryption change what a model says? Logits of every position of held-out prompts, encrypted against clear."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from compiler import Target, compile_onnx
from he_backend import security
from polyformer.export import export_onnx
from training import load_model, load_task

from . import records
from .parties import parties
from .registry import Settings
from .trained import demo_model

PREDICTIONS = 100  # at least
PROMPTS = 4  # at least
QUICK_RING = 14  # the vocabulary times the tokens must fit the slots
TARGET = Target(max_memory_gb=19.5)  # as the demo


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Evaluate held-out windows encrypted, until there are PROMPTS of them and PREDICTIONS positions.

    Returns:
        A record. Metrics: agreement (share of positions whose likeliest token is that of the clear logits), mse (of all logits,
        squared difference), predictions, prompts, max_abs_error, promised_error, closest_margin (of the two likeliest tokens in the
        clear, the smallest over all positions: below twice the error they may swap), clear_rms of the logits, evaluate_s of a request
        (median), logqp, logqp_limit, peak_gb, predicted_evaluate_s, compile_s, keygen_s, refreshes.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = demo_model(settings, Path(place))
        path = Path(place) / "model.onnx"
        export_onnx(load_model(folder, "polynomial"), path)
        windows = load_task(folder).heldout.numpy()
        length = windows.shape[1]
        count = 1 if settings.quick else max(PROMPTS, -(-PREDICTIONS // length))
        # Windows without overlap from all over the held-out text.
        prompts = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
        settings.progress(0, count + 2, "compile")
        target = Target(insecure_log_n=QUICK_RING) if settings.quick else TARGET
        start = time.perf_counter()
        circuit = compile_onnx(path, load_task(folder).calibration().numpy(), target=target).circuit
        compile_s = time.perf_counter() - start
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        clear = np.concatenate([session.run(None, {"tokens": p[None]})[0] for p in prompts]).astype(np.float64)
    settings.progress(1, count + 2, "keys and weights")
    found: list[np.ndarray] = []
    seconds: list[float] = []
    spec = circuit.spec()

    def made(keygen_s: float) -> dict[str, Any]:
        metrics = {
            **compare(np.stack(found), clear[: len(found)]),
            "prompts": len(found),
            "promised_error": circuit.error_bound,
            "evaluate_s": float(np.median(seconds)),
            "logqp": circuit.params.log_qp,
            "logqp_limit": None if circuit.params.insecure else security.limit(circuit.params),
            "peak_gb": records.peak_gb(),
            "predicted_evaluate_s": circuit.predicted["evaluate_s"],
            "compile_s": compile_s,
            "keygen_s": keygen_s,
            "refreshes": circuit.refreshes,
            "weights": "the demo's recipe" if not settings.quick else "a tiny recipe",
            "parameters": circuit.params.name,
        }
        return records.record(
            name, metrics=metrics, params=circuit.params.to_json(), threads=target.threads, seed=0, repeats=len(found)
        )

    with parties(circuit, threads=target.threads) as both:
        for i, prompt in enumerate(prompts):
            settings.progress(i + 2, count + 2, f"prompt {i + 1}")
            logits, timing = both.ask({circuit.inputs[0].name: spec.embed(prompt)})
            found.append(logits)
            seconds.append(timing.wall_s)
            settings.keep(made(both.keygen_s))
        last = made(both.keygen_s)
    settings.progress(count + 2, count + 2, "done")
    return last


def compare(found: np.ndarray, clear: np.ndarray) -> dict[str, float]:
    """Agreement and errors of logits [prompts, T, V]; differences to two digits, since an exact one belongs into no file."""
    top = np.sort(clear, -1)[..., -2:]
    return {
        "agreement": float(np.mean(found.argmax(-1) == clear.argmax(-1))),
        "mse": float(f"{np.mean((found - clear) ** 2):.1e}"),
        "predictions": float(clear.shape[0] * clear.shape[1]),
        "max_abs_error": float(f"{np.max(np.abs(found - clear)):.1e}"),
        "closest_margin": float(np.min(top[..., 1] - top[..., 0])),
        "clear_rms": float(np.sqrt(np.mean(clear**2))),
    }
