"""report.json -> report.html: one page that needs nothing else, to be read by someone who was not there.

`render` takes what `polyformer/commands/demo_report.py` makes and shows what is in it; a figure that is missing is left out or
shown as a dash, never invented.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import charts
from .charts import Row, figure
from .style import STYLE
from .two_tables import two_tables

Report = Mapping[str, Any]
MOST_BARS = 48


def write(report: Report, folder: Path) -> Path:
    """Write report.json and report.html into a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render(report), encoding="utf-8")
    return page


def render(report: Report) -> str:
    """The page as HTML."""
    sections = [
        headline(report),
        answer(report),
        security(report),
        phases(report),
        operators(report),
        primitives(report),
        bound(report),
        levels(report),
        layers(report),
        promises(report),
        setting(report),
        notes(report),
    ]
    title = escape(f"polyformer: {report.get('name', 'report')}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def headline(r: Report) -> str:
    """What was done, in one sentence with all its conditions, and the figures that people ask for first."""
    m, machine, model = r.get("measured", {}), r.get("machine", {}), r.get("model", {})
    params = r.get("params", {})
    banner = ""
    if r.get("insecure"):
        banner = (
            "<div class='danger'>INSECURE TEST RING. These parameters protect nothing, and no figure on this page says "
            "anything about encrypted inference at 128 bits.</div>"
        )
    blocks = model.get("blocks")
    sizes = [f"{blocks} block{'' if blocks == 1 else 's'}"] if blocks else []
    sizes += [f"{model[key]} {word}" for key, word in (("width", "wide"), ("heads", "heads")) if key in model]
    sizes += [f"{model['length']} tokens"] if "length" in model else []
    backend = str(params.get("backend", "?"))
    version = str(r.get("versions", {}).get(backend, ""))
    ring = 1 << params["log_n"] if "log_n" in params else "?"
    sentence = (
        f"A transformer ({', '.join(sizes)}) answered an encrypted prompt "
        f"{'at no security' if r.get('insecure') else 'at 128-bit security'} in <b>{value(m.get('evaluate_s'), 's')}</b> "
        f"on {machine.get('threads', '?')} threads of {escape(str(machine.get('cpu', '?')))}: CKKS with N = {ring}, "
        f"{params.get('levels', '?')} levels, {escape(backend)} {escape(version)}, one request alone."
    )
    predicted = r.get("predicted", {})
    cards = [
        (
            "encrypted evaluation",
            value(m.get("evaluate_s"), "s"),
            f"predicted {value(predicted.get('evaluate_s'), 's')}",
        ),
        ("largest logit error", value(m.get("max_abs_error")), f"promised {value(r.get('error_bound'))}"),
        ("peak memory", value(m.get("peak_gb"), "GB"), "client and server together"),
        ("request", octets(m.get("input_bytes")), f"reply {octets(m.get('reply_bytes'))}"),
        ("evaluation keys", octets(m.get("key_bytes")), f"sent once; made in {value(m.get('keygen_s'), 's')}"),
    ]
    tiles = "".join(f"<div class='tile'><span>{a}</span><strong>{b}</strong><em>{c}</em></div>" for a, b, c in cards)
    name, created = escape(str(r.get("name", "report"))), escape(str(r.get("created", "")))
    return (
        f"<header><p class='kicker'>polyformer · {name} · {created}</p><h1>Inference on encrypted text</h1>"
        f"{banner}<p class='lead'>{sentence}</p><div class='tiles'>{tiles}</div></header>"
    )


def answer(r: Report) -> str:
    """The prompt, and the likeliest next tokens from both worlds side by side."""
    p = r.get("prediction")
    if not p:
        return ""
    rows = "".join(
        f"<tr><td class='num'>{i + 1}</td>{token_cells(e)}{token_cells(c)}</tr>"
        for i, (e, c) in enumerate(zip(p["encrypted"], p["clear"], strict=True))
    )
    head = "<th></th>" + "".join(
        f"<th>{title}</th><th class='num'>logit</th><th class='num'>probability</th>"
        for title in ("decrypted", "in the clear (onnxruntime)")
    )
    verdict = "The likeliest token is the same." if p.get("top1_equal") else "The likeliest token differs."
    return section(
        "What the client read",
        f"<blockquote>{escape(p['prompt'])} <span class='caret'>▍</span></blockquote>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<p>{verdict} In the clear, it leads the second by {value(p.get('clear_margin'))} in its logit; the mean error "
        f"of all logits is {value(r.get('measured', {}).get('mean_abs_error'))}.</p>",
    )


def token_cells(row: Mapping[str, Any]) -> str:
    return (
        f"<td><code>{escape(repr(row['token']))}</code></td><td class='num'>{row['logit']:.4f}</td>"
        f"<td class='num'>{row['probability']:.1%}</td>"
    )


def security(r: Report) -> str:
    """The security line: log2 QP against the limit, and who holds what."""
    s, params = r.get("security", {}), r.get("params", {})
    if not s:
        return ""
    limit, log_qp, chance = s.get("limit"), s.get("log_qp"), s.get("failure_log2")
    ring = f"N = 2^{params.get('log_n', '?')}, {params.get('secret', '?')} secret"
    lines = [
        ("Security", "none: a test ring" if r.get("insecure") else "128-bit classical, weight-aware table"),
        (
            "log₂ QP",
            f"{value(log_qp)} of {value(limit)} bits allowed for {ring}" if limit else f"{value(log_qp)}, {ring}",
        ),
        ("Chance that noise wraps the modulus, if values stay within the calibrated ranges", power_of_two(chance)),
        (
            "Who holds what",
            "the secret key stayed in the client's process and folder; the server holds evaluation keys",
        ),
    ]
    table = "".join(f"<tr><th>{a}</th><td>{b}</td></tr>" for a, b in lines)
    gauge = f"<div class='gauge'><i style='width:{100 * log_qp / limit:.0f}%'></i></div>" if limit and log_qp else ""
    return section("Security", f"<table class='facts'>{table}</table>{gauge}")


def phases(r: Report) -> str:
    rows = [(p["name"], float(p["seconds"])) for p in r.get("phases", [])]
    if not rows:
        return ""
    total = sum(s for _, s in rows)
    return section("The whole command", f"<p>{figure(total)} s from first to last step.</p>{charts.timeline(rows)}")


def operators(r: Report) -> str:
    """Stacked bars, one a source node, in the order of the circuit."""
    ops = r.get("ops", [])
    rows = [
        Row(label=name, segments=list(charts.by_part(group).items()))
        for name, group in grouped(ops, lambda op: op["source"] or op["kind"])
    ]
    rows = [row for row in rows if row.total > 0]
    if not rows:
        return ""
    if len(rows) > MOST_BARS:
        kept = sorted(rows, key=lambda row: -row.total)[:MOST_BARS]
        rest = [row for row in rows if row not in kept]
        rows = [row for row in rows if row in kept]
        rows.append(Row(label=f"{len(rest)} smaller ones", segments=[s for row in rest for s in row.segments]))
    names = [name for row in rows for name, _ in row.segments]
    return section(
        "Where the time went, by operator",
        "<p>Thread-seconds inside primitives, in the order of the circuit; names are the ONNX nodes.</p>"
        + charts.legend(names)
        + charts.stacked_bars(rows, label="Thread-seconds by operator and primitive"),
    )


def primitives(r: Report) -> str:
    totals = r.get("primitives", {})
    rows = [
        Row(
            label=name.replace("_", " "),
            segments=[(name, float(p["seconds"]))],
            note=f"{figure(p['seconds'])} s · {p['count']:,} × {figure(1000 * p['seconds'] / max(p['count'], 1))} ms",
        )
        for name, p in sorted(totals.items(), key=lambda item: -item[1]["seconds"])
        if p["seconds"] > 0
    ]
    return (
        section(
            "By primitive", charts.stacked_bars(rows, label="Thread-seconds by primitive", label_width=150, width=840)
        )
        if rows
        else ""
    )


def bound(r: Report) -> str:
    """How near the run came to what its primitives take at their fastest, by node and by primitive."""
    if not (found := r.get("tables")):
        return ""
    return section(
        "Against the bound",
        "<p>The bound adds up all primitives, each at the cost of the fastest call of its kind at its level, spread evenly over the "
        "threads; efficiency is bound over measured.</p>"
        + "".join(table.html() for table in two_tables(found, found["threads"])),
    )


def levels(r: Report) -> str:
    ops = r.get("ops", [])
    if not ops:
        return ""
    groups, at = [], 0
    for name, group in runs(ops):
        groups.append((name, at, at + len(group)))
        at += len(group)
    return section(
        "Levels over the circuit",
        "<p>Rescales that each operator's result has left. Work is cheapest at the low end.</p>"
        + charts.steps([int(op["level"]) for op in ops], groups),
    )


def layers(r: Report) -> str:
    """One line a layer: operators, levels, primitives, predicted and measured seconds."""
    ops = r.get("ops", [])
    total = sum(float(op.get("measured_s") or 0.0) for op in ops) or 1.0
    body = []
    for name, group in grouped(ops, lambda op: layer(op["source"])):
        counts = count_primitives(group)
        measured = sum(float(op.get("measured_s") or 0.0) for op in group)
        predicted = sum(float(op.get("predicted_s") or 0.0) for op in group)
        span = [int(op["level"]) for op in group]
        cells = [
            len(group),
            f"{max(span)} → {min(span)}",
            sum(counts.get(n, 0) for n in ("rotate", "rotate_hoisted", "rotate_extended")),
            sum(counts.get(n, 0) for n in ("mul", "square")),
            sum(counts.get(n, 0) for n in ("weighted_sum", "mul_plain", "mul_scalar")),
            figure(predicted),
            figure(measured),
        ]
        numbers = "".join(f"<td class='num'>{cell}</td>" for cell in cells)
        share = f"<i style='width:{100 * measured / total:.1f}%'></i><span>{measured / total:.0%}</span>"
        body.append(f"<tr><td>{escape(name)}</td>{numbers}<td><div class='share'>{share}</div></td></tr>")
    if not body:
        return ""
    titles = ("ops", "levels", "rotations", "ct·ct", "ct·pt", "predicted s", "measured s")
    head = "<th>layer</th>" + "".join(f"<th class='num'>{t}</th>" for t in titles) + "<th>share</th>"
    return section(
        "Layer by layer",
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>",
    )


def promises(r: Report) -> str:
    """Predicted against measured."""
    p, m = r.get("predicted", {}), r.get("measured", {})
    pairs = [
        ("evaluation, s", p.get("evaluate_s"), m.get("evaluate_s"), figure),
        ("weights encoded, s", p.get("prepare_s"), m.get("prepare_s"), figure),
        ("server memory, GB", p.get("memory_gb"), m.get("peak_server_gb"), figure),
        ("evaluation keys", p.get("key_bytes"), m.get("key_bytes"), octets),
        ("request", p.get("input_bytes"), m.get("input_bytes"), octets),
        ("reply", p.get("reply_bytes"), m.get("reply_bytes"), octets),
        ("largest error (bound)", r.get("error_bound") or p.get("error"), m.get("max_abs_error"), figure),
    ]
    body = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f"<td class='num'>{x}</td>" for x in (show(a), show(b), f"{b / a:.2f}"))
        + "</tr>"
        for name, a, b, show in pairs
        if a and b is not None
    )
    points = [
        (float(op["predicted_s"]), float(op["measured_s"]), f"{op['source']} ({op['kind']})")
        for op in r.get("ops", [])
        if op.get("predicted_s") and op.get("measured_s")
    ]
    plot = charts.scatter(points, x_label="predicted, s", y_label="measured, s") if points else ""
    if not body and not plot:
        return ""
    head = "<th></th>" + "".join(f"<th class='num'>{t}</th>" for t in ("predicted", "measured", "ratio"))
    return section(
        "Predicted and measured",
        f"<div class='two'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><figure>{plot}<figcaption>Each operator once, thread-seconds.</figcaption></figure></div>",
    )


def setting(r: Report) -> str:
    """Everything that one would need to repeat the figures."""
    measured = r.get("measured", {})
    losses = {k: figure(v) for k, v in r.get("losses", {}).items() if v is not None}
    sizes = {k.removesuffix("_bytes"): octets(v) for k, v in measured.items() if k.endswith("_bytes")}
    memory = {
        k.removeprefix("peak").removesuffix("gb").strip("_") or "together": value(v, "GB")
        for k, v in measured.items()
        if k.startswith("peak_") and v
    }
    facts: list[tuple[str, Any]] = [
        ("machine", listed(r.get("machine", {}))),
        ("versions", listed(r.get("versions", {}))),
        ("commit", r.get("commit")),
        ("parameters", listed(r.get("params", {}))),
        ("circuit", r.get("circuit_sha256")),
        ("model", listed(r.get("model", {}))),
        ("held-out loss, nats a token", listed(losses)),
        ("sizes", listed(sizes)),
        ("peak memory", listed(memory)),
    ]
    table = "".join(f"<tr><th>{k}</th><td>{escape(str(v))}</td></tr>" for k, v in facts if v)
    details = "".join(
        f"<details><summary>{title}</summary><pre>{escape(str(r[key]))}</pre></details>"
        for key, title in (
            ("certificate", "Polynomial certificate"),
            ("plan", "What the compiler chose, and the runner-up"),
        )
        if r.get(key)
    )
    return section("Conditions", f"<table class='facts'>{table}</table>{details}")


def notes(r: Report) -> str:
    items = "".join(f"<li>{escape(n)}</li>" for n in r.get("notes", []))
    return section("What these figures do not say", f"<ul>{items}</ul>") if items else ""


# --- Helpers ----------------------------------------------------------------------------------------------------------


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def layer(source: str) -> str:
    """blocks.0.mixer.q.matmul -> blocks.0.mixer; norm.scale -> norm."""
    parts = source.strip("/").replace("/", ".").split(".")
    return ".".join(parts[:3] if parts[0] == "blocks" else parts[:1]) or "–"


def grouped(ops: Sequence[Mapping[str, Any]], key: Any) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Ops by a key, groups in order of their first op."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for op in ops:
        groups.setdefault(key(op), []).append(op)
    return list(groups.items())


def runs(ops: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Consecutive ops of one layer."""
    result: list[tuple[str, list[Mapping[str, Any]]]] = []
    for op in ops:
        name = layer(op["source"])
        if not result or result[-1][0] != name:
            result.append((name, []))
        result[-1][1].append(op)
    return result


def count_primitives(ops: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for op in ops:
        for name, p in (op.get("primitives") or {}).items():
            total[name] = total.get(name, 0) + int(p["count"])
    return total


def listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in facts.items())


def power_of_two(exponent: Any) -> str:
    """2^-33, or a dash; below 2^-128 the model of the noise, not the number, is what one relies on."""
    if exponent is None:
        return "–"
    return f"2^{exponent:.0f}" if exponent >= -128 else "below 2^-128"


def value(number: Any, unit: str = "") -> str:
    """A figure with its unit, or a dash."""
    return "–" if number is None else f"{figure(float(number))}{' ' + unit if unit else ''}"


def octets(count: Any) -> str:
    """Bytes, decimal units."""
    if count is None:
        return "–"
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError("unreachable")
