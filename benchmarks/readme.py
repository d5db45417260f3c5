"""What README.md says of records, made from them; a test compares, so that it cannot grow stale."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records
from .blocks import Table
from .summary import marks

Record = Mapping[str, Any]
README = records.ROOT / "README.md"
WIDTH = 140  # of its lines


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: which record, and in which words."""

    name: str
    what: str
    target_s: float | None = None  # of the encrypted evaluation


ROWS = (
    Row(name="demo", what="2 blocks, d = 128, 32 tokens, trained (`make demo`)", target_s=45),
    Row(name="request-2x128x32", what="encoder, 2 blocks, d = 128, 32 tokens, random weights", target_s=45),
    Row(name="request-2x128x128", what="encoder, 2 blocks, d = 128, 128 tokens, random weights", target_s=240),
    Row(name="request-4x256x64", what="encoder, 4 blocks, d = 256, 64 tokens, random weights", target_s=900),
    Row(
        name="request-6x512x128", what="encoder, 6 blocks, d = 512, 8 heads, 128 tokens, random weights", target_s=3600
    ),
    Row(name="generate-2x128", what="one more token, key/value state encrypted, trained", target_s=25),
    Row(name="cnn-28", what="LeNet-like CNN, one 28 x 28 image, random weights", target_s=1),
    Row(name="mlp-784", what="MLP 784-128-10, one input, random weights", target_s=0.03),
)


# --- The proof on the first screen ---------------------------------------------------------------------------------------


def proof(found: Mapping[str, Record]) -> str:
    """What `make demo` measured: a sentence and a table. Its agreement and its quality are of records of their own."""
    if (demo := found.get("demo")) is None:
        return "No record of `make demo`."
    m, params, machine = demo["metrics"], demo["params"], demo["machine"]
    model, backend = params["model"], params["backend"]
    sentence = (
        f"Measured by `make demo` ({_link(demo)}): a transformer of {model['blocks']} blocks, width {model['width']}, "
        f"{model['heads']} heads, feed-forward {model['hidden']}, context {model['length']}, {model['vocab']:,}-token vocabulary, "
        f"just trained on real speeches, answers an encrypted prompt in **{_seconds(m['evaluate_s'])} on {machine['threads']} cores "
        "at 128-bit security**."
    )
    secret = params["secret"].replace("uniform", "uniform ternary")
    minutes, seconds = divmod(round(m["total_s"]), 60)
    rows = {
        "machine": f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, no GPU; "
        f"{backend} {demo['versions'][backend]}; one request alone, one run, weights encoded when the server starts; "
        f"{', '.join(marks(demo)) or 'quiet machine'}",
        "security": f"CKKS, N = 2^{params['log_n']}, {params['levels']} levels, {secret} secret, "
        f"log2(QP) = {m['logqp']:,.0f} of {m['logqp_limit']:,} allowed",
        "error": "; ".join([_error(m, model), *_agreement(found.get("agreement-100"))]),
        "time": f"predicted {_seconds(m['predicted_evaluate_s'])}; {m['efficiency']:.2f} of what its primitives allow at their fastest "
        f"([notes](benchmarks/NOTES.md)); whole command {minutes} min {seconds} s after the set-up",
        "memory": f"{m['peak_gb']:.1f} GB: the peaks of server and client, added",
        "traffic": _traffic(m),
    }
    if "demo-twin" in found:
        rows["quality"] = _quality(found["demo-twin"])
    lines = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"{textwrap.fill(sentence, WIDTH, break_on_hyphens=False)}\n\n| | |\n|---|---|\n{lines}"


def _error(m: Record, model: Record) -> str:
    promised = f", promised {m['promised_error']:.1e}" if "promised_error" in m else ""
    return f"largest of {model['length']} x {model['vocab']:,} logits {m['max_abs_error']:.1e}{promised}"


def _agreement(record: Record | None) -> list[str]:
    if record is None:
        return []
    m = record["metrics"]
    n = round(m["predictions"])
    return [
        f"over {n} predictions of {m['prompts']} held-out prompts {m['max_abs_error']:.1e}, promised {m['promised_error']:.1e}, "
        f"and the likeliest token is that of the clear model in {round(n * m['agreement'])} of them ({_link(record)})"
    ]


def _traffic(m: Record) -> str:
    reply, made = f"reply {m['reply_bytes'] / 1e6:.1f} MB", f"made in {m['keygen_s']:.0f} s and sent once"
    if "request_bytes" not in m:  # records from before it was told apart
        return f"keys and request {m['upload_bytes'] / 1e9:.1f} GB, of which the keys were {made}; {reply}"
    keys = (m["upload_bytes"] - m["request_bytes"]) / 1e9
    return f"request {m['request_bytes'] / 1e6:.1f} MB, {reply}; evaluation keys {keys:.1f} GB, {made}"


def _quality(record: Record) -> str:
    with_decay, without = (record["metrics"]["summary"][name] for name in ("LaS decay", "no decay"))
    losses = [f"{side[name]['mean']:.3f}" for side in (with_decay, without) for name in ("polynomial", "softmax")]
    return (
        f"held-out loss, nats a token, at equal budget, mean of {len(record['params']['seeds'])} seeds: polynomial {losses[0]}, "
        f"softmax twin with the same decay of scores {losses[1]}; without that decay {losses[2]} and {losses[3]} "
        f"({_link(record)}, [notes](benchmarks/NOTES-models.md))"
    )


def _link(record: Record) -> str:
    return f"[record](benchmarks/results/{record['file']})"


# --- The results ---------------------------------------------------------------------------------------------------------


def results(found: Mapping[str, Record]) -> str:
    """The table, and which targets were missed."""
    missed = [row.what for row in ROWS if row.name in found and _missed(row, found[row.name])]
    verdict = f"missed by: {'; '.join(missed)} ([why](benchmarks/NOTES.md))" if missed else "all are reached"
    text = (
        f"Targets are what we set out to reach; {verdict}. In all rows but that of `make demo`, client and server are one process, which "
        "measures the memory of both."
    )
    return f"{table(found)}\n\n{textwrap.fill(text, WIDTH, break_on_hyphens=False)}"


def _missed(row: Row, record: Record) -> bool:
    seconds = record["metrics"].get("evaluate_s")
    return seconds is not None and row.target_s is not None and seconds > row.target_s


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown table of all rows that have a record."""
    rows = []
    for row in ROWS:
        record = found.get(row.name)
        if record is None:
            continue
        m, params = record["metrics"], record["params"]
        error = m.get("max_abs_error")
        rows.append(
            (
                f"[{row.what}](benchmarks/results/{record['file']})",
                _seconds(m.get("evaluate_s")),
                _seconds(row.target_s),
                _seconds(m.get("predicted_evaluate_s")),
                "–" if m.get("peak_gb") is None else f"{m['peak_gb']:.1f} GB",
                "–" if error is None else f"{float(error):.1e}",
                f"2^{params['log_n']}" if "log_n" in params else "–",
                m.get("refreshes", 0),
                ", ".join(marks(record)) or "quiet",
            )
        )
    columns = (
        "model",
        "evaluation",
        "target",
        "predicted",
        "peak memory",
        "largest error",
        "ring",
        "refreshes",
        "machine",
    )
    return Table(caption="", columns=columns, rows=rows).markdown().strip()


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


# --- Where it stands -----------------------------------------------------------------------------------------------------

PLACES: Mapping[str, Callable[[Mapping[str, Record]], str]] = {"proof": proof, "results": results}


def ends(place: str) -> tuple[str, str]:
    """The lines between which a place lies."""
    return f"<!-- {place}: made by `polyformer bench report --readme`, do not edit -->", f"<!-- end of {place} -->"


def split(text: str, place: str) -> tuple[str, str, str]:
    """README's text before a place, in it and behind it.

    Raises:
        ValueError: the two lines between which it lies are not there.
    """
    first, last = ends(place)
    begin, end = text.find(first), text.find(last)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md has no place for the {place}: a line {first!r}, later a line {last!r}")
    begin += len(first)
    return text[:begin], text[begin:end], text[end:]


def updated(text: str, found: Mapping[str, Record]) -> str:
    """README's text with what these records say.

    Raises:
        ValueError: it has no place for something (see `split`).
    """
    for place, make in PLACES.items():
        before, _, behind = split(text, place)
        text = f"{before}\n\n{make(found)}\n\n{behind}"
    return text


def write(path: Path = README, folder: Path = records.RESULTS) -> bool:
    """Bring README up to date with the records of a folder; whether that changed it."""
    old = path.read_text(encoding="utf-8")
    new = updated(old, records.latest(folder))
    path.write_text(new, encoding="utf-8")
    return new != old
