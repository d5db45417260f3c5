"""One block of a deep model at its true shape and levels, cut out of the compiled circuit, and multiplied.

The block's inputs are encrypted afresh, with the values that the simulator finds there, at the level that the circuit gives them. What the
block does not show: what a cold cache of weights costs later blocks, and noise that earlier blocks would have added.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Target, compile_onnx
from he_backend import security
from he_backend.circuit import Circuit, Op, Signature
from he_backend.simulator import simulate
from he_backend.trace import trace

from . import records
from .parties import parties
from .registry import Progress, Record


def cut(circuit: Circuit, prefix: str, tensors: dict[str, np.ndarray]) -> tuple[Circuit, np.ndarray, np.ndarray]:
    """The ops whose source starts with a prefix, as a circuit of slot vectors.

    Args:
        tensors: an input of the whole circuit.

    Returns:
        The circuit, with input "x" and output "y" [ciphertexts, slots]; the values that the whole circuit has there for `tensors`.

    Raises:
        ValueError: no op starts so; lists the prefixes that there are.
    """
    chosen = [op for op in circuit.ops if op.source.startswith(prefix) and op.kind not in ("input", "output")]
    if not chosen:
        known = sorted({op.source.partition(".")[0] for op in circuit.ops})
        raise ValueError(f"no op of the circuit comes from {prefix!r}*; its sources begin with {', '.join(known)}")
    inside = {op.id for op in chosen}
    enter = sorted({a for op in chosen for a in op.args} - inside)
    leave = sorted({a for op in circuit.ops if op.id not in inside for a in op.args} & inside)
    top = max(circuit.ops[a].level for a in enter)
    ops: list[Op] = []
    ids: dict[int, int] = {}
    for part, a in enumerate(enter):
        ids[a] = len(ops)
        ops.append(Op(id=len(ops), kind="input", args=(), attrs={"name": "x", "part": part}, level=top))
    for op in chosen:
        ids[op.id] = len(ops)
        ops.append(replace(op, id=len(ops), args=tuple(ids[a] for a in op.args)))
    bottom = min(circuit.ops[a].level for a in leave)
    for part, a in enumerate(leave):
        attrs = {"name": "y", "part": part}
        ops.append(Op(id=len(ops), kind="output", args=(ids[a],), attrs=attrs, level=bottom, source=prefix))
    values = simulate(circuit, tensors).values
    x, y = (np.stack([values[a] for a in ends]) for ends in (enter, leave))
    layouts = {
        name: np.arange(data.size, dtype=np.int32).reshape(data.shape) for name, data in (("input", x), ("output", y))
    }

    def signature(name: str, layout: str, data: np.ndarray, level: int) -> Signature:
        bound = float(np.max(np.abs(data)))
        return Signature(name=name, shape=data.shape, layout=layout, factor=1.0, bound=bound, level=level)

    piece = replace(
        circuit,
        ops=tuple(ops),
        client_arrays=layouts,
        inputs=(signature("x", "input", x, top),),
        outputs=(signature("y", "output", y, bottom),),
        embedding=False,
    )
    traced = trace(piece)
    return replace(piece, keys=dict(traced.keys), relin_level=traced.relin_level), x, y


def measure(
    name: str,
    path: Path,
    calibration: np.ndarray,
    *,
    blocks: int,
    target: Target,
    progress: Progress,
    keep: Callable[[Record], None],
) -> dict[str, Any]:
    """Measure the middle block of an encoder of `blocks` blocks (sources "0.", "1.", ...).

    Returns:
        A record (see `records`). Measured: block_evaluate_s, block_refreshes, max_abs_error (of a slot of the block's results),
        compile_s, keygen_s, prepare_s, key_gb (as the block's keys travel, relinearisation and refresh included), peak_gb (compiler,
        client and server in one process). Projected: projected_evaluate_s and projected_refreshes, `blocks` times the block's.
        Predicted by the plan for the whole circuit: predicted_evaluate_s. `keep` gets what is known before the evaluation.
    """
    progress(0, 3, "compile")
    start = time.perf_counter()
    whole = compile_onnx(path, calibration[:-1], target=target).circuit
    compile_s = time.perf_counter() - start
    circuit, x, y = cut(whole, f"{blocks // 2}.", {whole.inputs[0].name: calibration[-1].astype(np.float64)})
    params = circuit.params
    metrics: dict[str, Any] = {
        "predicted_evaluate_s": whole.predicted["evaluate_s"],
        "block_refreshes": circuit.refreshes,
        "projected_refreshes": blocks * circuit.refreshes,
        "compile_s": compile_s,
        "logqp": params.log_qp,
        "logqp_limit": None if params.insecure else security.limit(params),
        "weights": "random, seed 0",
        "parameters": params.name,
    }

    def made() -> dict[str, Any]:
        return records.record(name, metrics=metrics, params=params.to_json(), threads=target.threads, seed=0)

    progress(1, 3, "keys and weights")
    with parties(circuit, threads=target.threads) as both:
        metrics |= {"keygen_s": both.keygen_s, "prepare_s": both.prepare_s, "key_gb": both.key_bytes / 1e9}
        keep(made())
        progress(2, 3, "evaluate")
        result, timing = both.ask({"x": x})
    progress(3, 3, "done")
    metrics |= {
        "block_evaluate_s": timing.wall_s,
        "projected_evaluate_s": blocks * timing.wall_s,
        "max_abs_error": float(f"{np.max(np.abs(result - y)):.1e}"),
        "peak_gb": records.peak_gb(),
        "primitives_s": dict(timing.primitives),
        "counts": dict(timing.counts),
    }
    return made()
