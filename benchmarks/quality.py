"""Quality beside cost: what each mixer learns in the clear, and what one request of its polynomial form costs under encryption.

Quality comes from the newest records `equal-budget` and `recall`, of the mixer as it was trained. Degree, depth, refreshes and seconds are
of the form that can be encrypted, with random weights: the weights change ranges, not the work. What is missing says why.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiler import Target, compile_onnx
from he_backend.base import HEError
from polyformer.activations import Activation, fit_activation
from polyformer.approx import reciprocal
from polyformer.export import export_onnx
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer
from polyformer.ranges import measure
from training.substitution import with_rows

from . import records
from .registry import Record, Settings

NAME = "quality-beside-cost"
INTERVAL = (-4.0, 4.0)  # of the activation's polynomial
MARGIN = 1.25  # by which a reciprocal's interval is wider than the denominators that were seen
FIGURES = ("heldout_loss", "recall", "degree", "depth", "refreshes", "predicted_evaluate_s", "measured_evaluate_s")
COST = ("refreshes", "predicted_evaluate_s")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mixer: its case of `equal-budget`, its model of `recall` ("" for none), and the changes that make it polynomial.

    note  where the polynomial form is another one than the trained
    """

    mixer: str
    case: str
    recall: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


POLYNOMIAL = {"reciprocal": "polynomial", "form": "mean"}
ROWS = (
    Row(mixer="softmax", case="softmax", recall="softmax"),
    *(
        Row(
            mixer=f"PowerSoftmax, p = {p}",
            case=f"power {p}",
            recall=f"power {p}",
            changes={"mixer": "power_softmax", "power": p, **POLYNOMIAL},
        )
        for p in (2, 4, 8)
    ),
    Row(
        mixer="PowerSoftmax, p = 4, tuned as a polynomial",
        case="",
        recall="polynomial",
        changes={"mixer": "power_softmax", "power": 4, **POLYNOMIAL},
        note="all its functions are polynomials in the recall task too",
    ),
    Row(mixer="pointwise", case="pointwise", changes={"mixer": "pointwise"}, note="trained with GELU"),
    Row(mixer="linear", case="linear", changes={"mixer": "linear"}),
    Row(
        mixer="gated linear",
        case="gated linear",
        changes={"mixer": "gated_linear", "decay": "fixed", "output_gate": "linear"},
        note="trained with a decay that depends on the data and a SiLU gate; the encrypted form has neither",
    ),
    Row(mixer="Hyena", case="hyena", changes={"mixer": "hyena"}),
    Row(mixer="polynomial S6", case="polynomial s6", changes={"mixer": "polynomial_s6", "state": 4}),
    Row(mixer="RWKV", case="rwkv", changes={"mixer": "rwkv"}),
    Row(mixer="Griffin", case="griffin", changes={"mixer": "griffin"}),
    Row(mixer="Mamba", case="mamba", changes={"mixer": "mamba", "state": 4}),
    Row(mixer="Mamba-2", case="mamba2", changes={"mixer": "mamba2", "state": 4}),
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model whose cost is predicted, and for what."""

    model: ModelConfig
    log_n: int | None = None  # test ring; None for 128 bits
    names: tuple[str, ...] = tuple(row.mixer for row in ROWS)


def config(length: int, width: int, heads: int) -> ModelConfig:
    """One causal block; norms fold, activation and reciprocal are quadratic."""
    return ModelConfig(
        vocab=64,
        length=length,
        width=width,
        heads=heads,
        hidden=4 * width,
        blocks=1,
        mixer="softmax",
        norms=("affine",) * 3,
        activation="polynomial",
        activation_degree=2,
        reciprocal_degree=2,
    )


FULL = Setup(model=config(32, 64, 4))
QUICK = Setup(
    model=config(8, 16, 4), log_n=10, names=("softmax", "PowerSoftmax, p = 2", "pointwise", "polynomial S6", "Mamba")
)


def beside_cost(settings: Settings) -> Record:
    """Every mixer's row."""
    setup = QUICK if settings.quick else FULL
    known = records.latest()
    chosen = [row for row in ROWS if row.mixer in setup.names]
    rows: list[dict[str, Any]] = []
    compiled: dict[ModelConfig, dict[str, Any]] = {}  # two rows may share a circuit
    for i, row in enumerate(chosen):
        settings.progress(i, len(chosen), row.mixer)
        rows.append(line(row, setup, known, compiled))
        settings.keep(_record(rows, setup, known))
    return _record(rows, setup, known)


def line(
    row: Row, setup: Setup, known: Mapping[str, Record], compiled: dict[ModelConfig, dict[str, Any]]
) -> dict[str, Any]:
    """All figures of one mixer; `why` has a reason for each that is missing."""
    made = replace(setup.model, **row.changes)
    found: dict[str, Any] = {"mixer": row.mixer, "note": row.note, **dict.fromkeys(FIGURES), "why": {}}
    why: dict[str, str] = found["why"]
    for figure, read in (("heldout_loss", heldout), ("recall", recall)):
        found[figure], reason = read(row, known)
        if reason:
            why[figure] = reason
    try:
        mixer: Any = Transformer(made).blocks[0].mixer
        found |= {"degree": mixer.degree, "depth": mixer.depth}
    except ValueError as error:
        why |= dict.fromkeys(("degree", "depth", *COST), str(error))
    else:
        if made not in compiled:
            compiled[made] = cost(made, setup.log_n)
        found |= {k: v for k, v in compiled[made].items() if k != "why"}
        why |= compiled[made]["why"]
    found["measured_evaluate_s"], reason = measured(made, known) if not setup.log_n else (None, "a test ring")
    if reason:
        why["measured_evaluate_s"] = reason
    return found


def heldout(row: Row, known: Mapping[str, Record]) -> tuple[dict[str, Any] | None, str]:
    """Mean, deviation and runs of the loss of its case, or why there is none."""
    if not row.case:
        return None, "trained on the recall tasks only"
    record = known.get("equal-budget")
    if record is None:
        return None, "no record: polyformer bench run equal-budget"
    for entry in record["metrics"]["summary"]:
        if entry["case"] == row.case:
            figure = entry["heldout_loss"]
            return (figure, "") if figure["mean"] is not None else (None, f"a run of {row.case!r} did not stay finite")
    return None, f"{record['file']} has no case {row.case!r}"


def recall(row: Row, known: Mapping[str, Record]) -> tuple[dict[str, float] | None, str]:
    """Task -> mean accuracy of its model, or why there is none."""
    if not row.recall or (record := known.get("recall")) is None:
        return None, "no record: polyformer bench run recall" if row.recall else "recall is run with attention only"
    summary = [e for e in record["metrics"]["summary"] if e.get("model") == row.recall and "accuracy" in e]
    found = {e["task"]: e["accuracy"]["mean"] for e in summary if e["accuracy"]["mean"] is not None}
    return (found, "") if found else (None, f"{record['file']} has no model {row.recall!r}")


def measured(made: ModelConfig, known: Mapping[str, Record]) -> tuple[float | None, str]:
    """Seconds of the encoder of the same shape in `encrypted-scaling`, which has PowerSoftmax with p = 2; it sees all keys and has a head
    on its first token, where the model of the prediction is causal with logits of every token.
    """
    if made.mixer != "power_softmax" or made.power != 2:
        return None, "no record measures it"
    record = known.get("encrypted-scaling")
    if record is None:
        return None, "no record: polyformer bench run encrypted-scaling"
    for p in record["metrics"]["points"]:
        shape = (p["tokens"], p["width"], p["blocks"], p["threads"])
        if shape == (made.length, made.width, made.blocks, 2) and p["evaluate_s"] is not None:
            return p["evaluate_s"], ""
    return None, f"{record['file']} did not measure this shape"


def build(made: ModelConfig, tokens: Tensor) -> Transformer:
    """The model with random weights and its polynomials fitted, reciprocals to the denominators of some windows [n, T]."""
    torch.manual_seed(0)
    model = with_rows(Transformer(made), tokens)
    ranges = measure(model, tokens)
    for name, module in model.named_modules():
        if isinstance(module, PowerSoftmax) and module.reciprocal is not None:
            seen = ranges[name]
            module.reciprocal.set(reciprocal(module.reciprocal.degree, (seen.low / MARGIN, seen.high * MARGIN)))
        elif isinstance(module, Activation) and module.polynomial is not None:
            module.polynomial.set(fit_activation("gelu", module.polynomial.degree, INTERVAL))
    return model


def cost(made: ModelConfig, log_n: int | None) -> dict[str, Any]:
    """What the compiler predicts of one request; `why` if it cannot."""
    tokens = torch.randint(0, made.vocab, (12, made.length), generator=torch.Generator().manual_seed(1))
    try:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.onnx"
            export_onnx(build(made, tokens), path)
            compiled = compile_onnx(path, tokens.numpy(), target=Target(insecure_log_n=log_n))
    except (HEError, TypeError, ValueError) as error:
        return {"why": dict.fromkeys(COST, str(error).splitlines()[0])}
    circuit = compiled.circuit
    return {
        "refreshes": circuit.refreshes,
        "predicted_evaluate_s": circuit.predicted["evaluate_s"],
        "model_degree": compiled.certificate.degree,
        "circuit_levels": circuit.ops[0].level,
        "parameters": circuit.params.name,
        "predicted_peak_gb": circuit.predicted["memory_gb"],
        "why": {},
    }


def _record(rows: list[dict[str, Any]], setup: Setup, known: Mapping[str, Record]) -> dict[str, Any]:
    sources = {n: known[n]["file"] for n in ("equal-budget", "recall", "encrypted-scaling") if n in known}
    params = {
        "model": setup.model.to_json(),
        "log_n": setup.log_n,
        "insecure": setup.log_n is not None,
        "records": sources,
        "threads": 2,
    }
    return records.record(NAME, metrics={"rows": rows}, params=params, threads=2, seed=0)
