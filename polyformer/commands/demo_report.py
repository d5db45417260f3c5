"""What the demo measured, as report.json and as a benchmark record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.noise import Noise
    from polyformer.commands.demo import Options, Story

NOTES = (
    "One request, one run: no median, no spread.",
    "Client and server ran on this machine at the same time and share its memory; the network between them was the loopback.",
    "The server is trusted to follow the protocol (semi-honest): a wrong answer would not be noticed, "
    "and the circuit's shape is public.",
    "Replies are rounded to the promised accuracy and decryptions are counted; noise flooding is not built, "
    "so do not give decrypted logits to whoever saw the ciphertext.",
    "The error is that of the decrypted logits before rounding, against onnxruntime in float32.",
)


def benchmark_record(options: Options, story: Story, seen: Noise) -> dict[str, Any]:
    """The record `demo`."""
    from benchmarks import records

    f = story.facts
    security = security_of(f)
    tables = efficiency_of(f)
    metrics: dict[str, Any] = {
        "evaluate_s": f["timing"]["wall_s"],
        "predicted_evaluate_s": f["plan"]["predicted"]["evaluate_s"],
        "total_s": f["total_s"],
        "keygen_s": story.seconds("keygen"),
        "peak_gb": f["peak_server_gb"] + f["peak_client_gb"],
        "upload_bytes": f["key_bytes"] + f["input_bytes"],
        "request_bytes": f["input_bytes"],
        "reply_bytes": f["reply_bytes"],
        **{name: tables[name] for name in ("efficiency", "bound_s", "operators", "primitives")},
        **errors(f),
        "promised_error": f["plan"]["error_bound"],
        "top1_equal": f["prediction"]["top1_equal"],
        "logqp": security["log_qp"],
        "logqp_limit": security["limit"],
    }
    for name in ("softmax", "power", "polynomial"):
        metrics[f"heldout_loss_{name}"] = f["metrics"].get(f"heldout_loss_{name}")
    record = records.record(
        "demo",
        metrics=metrics,
        params={**f["plan"]["params"], "model": recipe(options)},
        threads=options.threads,
        seed=options.seed,
        seen=seen,
    )
    return {**record, "insecure": True} if options.quick else record


def build_report(options: Options, story: Story, record: Mapping[str, Any]) -> dict[str, Any]:
    """All that `benchmarks.report` shows."""
    f = story.facts
    plan = f["plan"]
    measured = {
        "evaluate_s": f["timing"]["wall_s"],
        "total_s": f["total_s"],
        "keygen_s": story.seconds("keygen"),
        "prepare_s": f["prepare_s"],
        **errors(f),
        "peak_gb": record["metrics"]["peak_gb"],
        "peak_server_gb": f["peak_server_gb"],
        "peak_client_gb": f["peak_client_gb"],
        "key_bytes": f["key_bytes"],
        "input_bytes": f["input_bytes"],
        "reply_bytes": f["reply_bytes"],
        "circuit_bytes": (options.model / "model.circuit").stat().st_size,
    }
    kept = [] if story.seconds("train") else ["The model was trained by an earlier run of this command."]
    busy = [] if record["quiet"] else ["The machine had other work to do during this run."]
    return {
        "format": "polyformer-report",
        "version": 1,
        "name": "demo --quick" if options.quick else "demo",
        "created": record["created"],
        "commit": record["commit"],
        "machine": record["machine"],
        "versions": record["versions"],
        "insecure": options.quick,
        "model": recipe(options),
        "losses": {name: f["metrics"].get(f"heldout_loss_{name}") for name in ("softmax", "power", "polynomial")},
        "params": plan["params"],
        "circuit_sha256": f["circuit_sha256"],
        "security": security_of(f),
        "certificate": plan["certificate"],
        "plan": plan["plan"],
        "predicted": plan["predicted"],
        "error_bound": plan["error_bound"],
        "measured": measured,
        "phases": story.phases,
        "ops": operators(plan, f["timing"]),
        "primitives": f["timing"].get("primitives", {}),
        "tables": efficiency_of(f),
        "prediction": f["prediction"],
        "notes": [*NOTES, *kept, *busy],
    }


def errors(facts: Mapping[str, Any]) -> dict[str, float]:
    """Of the unrounded decryption, so to two digits: more of them would publish the noise that rounding hides."""
    return {name: float(f"{facts[name]:.2g}") for name in ("max_abs_error", "mean_abs_error")}


def operators(plan: Mapping[str, Any], timing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every op of the circuit with predicted and measured thread-seconds."""
    measured = {row["op"]: row for row in timing.get("ops", ())}
    return [
        {
            **op,
            "predicted_s": plan["op_seconds"].get(str(op["id"])),
            "measured_s": measured.get(op["id"], {}).get("seconds"),
            "primitives": measured.get(op["id"], {}).get("primitives", {}),
        }
        for op in plan["ops"]
    ]


def efficiency_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The run against its bound, by node and by primitive; errors are predicted ones: no key opens a value inside the server."""
    from he_backend import efficiency

    plan = facts["plan"]
    foretold = {int(i): float(error) for i, error in plan["op_errors"].items()}
    return efficiency.tables(plan["ops"], [facts["timing"]], predicted_errors=foretold)


def security_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """log2(QP) against the limit, and the chance of nonsense."""
    from he_backend import security
    from he_backend.params import Params

    params = Params.from_json(facts["plan"]["params"])
    return {
        "log_qp": float(params.log_qp),
        "limit": None if params.insecure else security.limit(params),
        "secret": params.secret,
        "failure_log2": facts["plan"]["predicted"].get("failure_log2"),
        "text": security.status(params),
    }


def recipe(options: Options) -> dict[str, Any]:
    """The model's sizes, as its folder says them."""
    data = json.loads((options.model / "config.json").read_text())["recipe"]
    names = ("blocks", "width", "heads", "hidden", "length", "vocab", "power", "activation", "exact_norms")
    return {name: data[name] for name in names if name in data}
