"""compile: from ONNX to a circuit for the server and a specification for the client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.commands.console import (
    Advance,
    Failure,
    bar,
    emit,
    load_array,
    must_exist,
    out,
    say,
    size,
    warn_insecure,
)
from polyformer.commands.options import (
    BACKEND,
    MAX_ERROR,
    THREADS,
    Approximate,
    Backend,
    Calibration,
    Error,
    InsecureRing,
    Json,
    Latency,
    Memory,
    Model,
    Threads,
)

if TYPE_CHECKING:
    from he_backend.circuit import Circuit


def register(app: typer.Typer) -> None:
    app.command(
        "compile",
        rich_help_panel="Model",
        epilog="Example: polyformer compile runs/mine/model.onnx --calibration runs/mine/calibration.npz",
    )(compile_)
    app.command(rich_help_panel="Model", epilog="Example: polyformer plan runs/mine/model.onnx --max-latency 60")(plan)


def plan(
    model: Model,
    calibration: Calibration = None,
    backend: Backend = BACKEND,
    max_memory_gb: Memory = None,
    max_latency: Latency = None,
    max_error: Error = MAX_ERROR,
    threads: Threads = THREADS,
    insecure_log_n: InsecureRing = None,
    approximate: Approximate = False,
) -> None:
    """Print parameters, predicted seconds, memory and error, with the runners-up; nothing is written, no key is made."""
    with bar("plan") as advance:
        result = compile_files(
            model,
            calibration or model.with_name("calibration.npz"),
            None,
            backend=backend,
            max_memory_gb=max_memory_gb,
            max_latency_s=max_latency,
            max_error=max_error,
            threads=threads,
            insecure_log_n=insecure_log_n,
            approximate=approximate,
            progress=advance,
        )
    if result["insecure"]:
        warn_insecure(result["name"])
    _show(result)
    out.print(f"promised error {result['error_bound']:.2g}", markup=False)


def compile_(
    model: Model,
    calibration: Calibration = None,
    to: Annotated[Path | None, typer.Option("--out", help="Circuit file; default: beside the model.")] = None,
    backend: Backend = BACKEND,
    max_memory_gb: Memory = None,
    max_latency: Latency = None,
    max_error: Error = MAX_ERROR,
    threads: Threads = THREADS,
    insecure_log_n: InsecureRing = None,
    approximate: Approximate = False,
    json: Json = False,
) -> None:
    """Choose layouts, levels, parameters and keys; write model.circuit (server) and model.client (client)."""
    with bar("compile") as advance:
        result = compile_files(
            model,
            calibration or model.with_name("calibration.npz"),
            to or model.with_suffix(".circuit"),
            backend=backend,
            max_memory_gb=max_memory_gb,
            max_latency_s=max_latency,
            max_error=max_error,
            threads=threads,
            insecure_log_n=insecure_log_n,
            approximate=approximate,
            progress=advance,
        )
    if result["insecure"]:
        warn_insecure(result["name"])
    if json:
        emit(result)
        return
    _show(result)
    for name in ("circuit", "client"):
        say(f"{result[name]}: {size(Path(result[name]).stat().st_size)}")


def _show(result: dict[str, Any]) -> None:
    for line in ("approximations", "certificate", "plan", "sequence"):
        if result[line]:
            out.print(result[line], markup=False)


def compile_files(
    model: Path,
    calibration: Path,
    to: Path | None,
    *,
    backend: str,
    max_memory_gb: float | None,
    threads: int,
    insecure_log_n: int | None,
    approximate: bool = False,
    max_latency_s: float | None = None,
    max_error: float = MAX_ERROR,
    progress: Advance,
) -> dict[str, Any]:
    """Compile one ONNX file into `to`, its client specification and `.plan.json` (predictions by op) beside it.

    Without `to` nothing is written.

    Args:
        max_memory_gb: cap of client and server together; None for 80 % of this machine's memory.

    Returns:
        Parameters, predictions and the plan as plain data; `circuit` and `client` are paths.
    """
    import json

    import numpy as np

    from compiler import Target, compile_onnx

    must_exist(model, "polyformer export")
    archive = load_array(must_exist(calibration, "polyformer export"))
    if isinstance(archive, np.ndarray) or not {"tokens", "inputs"} & set(archive):
        raise Failure(
            f"{calibration} holds no `tokens` [n, T], which `polyformer export` writes, and no `inputs` [n, ...] of a "
            "model that starts from numbers"
        )
    with archive as file:
        samples = file["tokens"] if "tokens" in file else file["inputs"]
    target = Target(
        backend=backend,
        max_memory_gb=0.8 * machine_memory_gb() if max_memory_gb is None else max_memory_gb,
        max_latency_s=max_latency_s,
        max_error=max_error,
        insecure_log_n=insecure_log_n,
        threads=threads,
    )
    compiled = compile_onnx(
        model,
        samples,
        target=target,
        approximate=approximate,
        progress=lambda stage, done, total: progress(done, total, stage),
    )
    circuit = compiled.circuit
    result = {
        "name": circuit.params.name,
        "insecure": circuit.params.insecure,
        "params": circuit.params.to_json(),
        "predicted": dict(circuit.predicted),
        "error_bound": circuit.error_bound,
        "approximations": str(compiled.approximations or ""),
        "certificate": str(compiled.certificate),
        "plan": str(compiled.plan),
        "sequence": sequence(circuit) if circuit.steps else "",
        "op_seconds": {str(k): v for k, v in compiled.op_seconds.items()},
        "op_errors": {str(k): v for k, v in circuit.errors.items()},
        "ops": [{"id": op.id, "kind": op.kind, "level": op.level, "source": op.source} for op in circuit.ops],
    }
    if to is not None:
        result |= {"circuit": str(to), "client": str(to.with_suffix(".client")), "sha256": circuit.save(to)}
        circuit.spec().save(to.with_suffix(".client"))
        to.with_suffix(".plan.json").write_text(json.dumps(result, indent=1))
    return result


def sequence(circuit: Circuit) -> str:
    """What many steps of one circuit come to: memory that is kept, error that grows, failures that add up."""
    levels, predicted = [s.level for s in circuit.states], circuit.predicted
    return (
        f"at most {circuit.steps} steps, {len(levels)} tensors kept at levels {min(levels)} to {max(levels)}, "
        f"{size(circuit.state_bytes)} a sequence; predicted error {predicted['first_step_error']:.2g} at the first step, "
        f"{predicted['error']:.2g} at the worst; a sequence fails with probability 2^{predicted['failure_log2']:.0f} at most: "
        f"that of a step times {circuit.steps}"
    )


def machine_memory_gb() -> float:
    """RAM of this machine, or of its container if that has less, in GB (1e9 bytes)."""
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cap = Path("/sys/fs/cgroup/memory.max")
    text = cap.read_text().strip() if cap.exists() else "max"
    return min(total, int(text) if text.isdecimal() else total) / 1e9
