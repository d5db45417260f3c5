"""All records on one page: `polyformer bench report` writes results.html and results.md from the JSON, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import records, registry
from .blocks import Block, Table, is_number
from .comparison import flat
from .style import STYLE

Record = Mapping[str, Any]
MOST_ROWS = 40  # of a record that brings no tables of its own

EXTRA_STYLE = """
caption{text-align:left;color:var(--muted);font-size:.88rem;padding:0 0 6px;caption-side:top}
.picture{margin:16px 0;max-width:760px}.picture svg{background:#fff;border-radius:8px}
.conditions{color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}
.busy{background:var(--danger);color:#fff;border-radius:6px;padding:1px 7px;font-size:.8rem;white-space:nowrap}
nav a{color:var(--accent);margin-right:14px;white-space:nowrap}
"""


def shown(record: Record) -> Sequence[Block]:
    """The tables and figures of a record: its benchmark's own, or all its figures as one table."""
    benchmark = registry.benchmarks().get(record["name"])
    own = benchmark.blocks(record) if benchmark else None
    if own is not None:
        return own
    figures = [(k, v) for k, v in flat(record["metrics"]).items() if is_number(v) or isinstance(v, (str, bool))]
    rows = figures[:MOST_ROWS]
    more = f"; {len(figures) - len(rows)} more in the file" if len(figures) > len(rows) else ""
    return [Table(caption=f"figures of the record{more}", columns=("figure", "value"), rows=rows)]


def conditions(record: Record) -> str:
    """One line with all that belongs under a figure: what ran, where, on what, how often, from which commit."""
    m = record["machine"]
    parts = [str(record.get("conditions") or "")]
    parts.append(
        f"{m.get('threads', '?')} threads of {m.get('cpu', '?')} ({m.get('cores', '?')} cores, {m.get('memory_gb', '?')} GB)"
    )
    parts.append(
        ", ".join(f"{k} {v}" for k, v in record["versions"].items() if k in {"python", "openfhe", "tenseal", "torch"})
    )
    params = record["params"]
    if "log_n" in params:
        parts.append(
            f"CKKS N = 2^{params['log_n']}, {params.get('levels')} levels, {params.get('secret', 'ternary')} secret"
        )
    parts.append(f"{record['repeats']} repeats" if record["repeats"] > 1 else "one run")
    if record.get("seed") is not None:
        parts.append(f"seed {record['seed']}")
    parts.append(f"commit {record['commit']}, {record['created']}")
    return "; ".join(p for p in parts if p)


def marks(record: Record) -> list[str]:
    """What a reader must know before believing the figures."""
    share = (record.get("noise") or {}).get("others_share")
    result = []
    if not record.get("quiet"):
        result.append("busy machine" + (f": others took {share:.0%}" if share is not None else ""))
    if record.get("status", "complete") != "complete":
        result.append(str(record["status"]))
    if record.get("insecure") or record["params"].get("insecure"):
        result.append("insecure test ring")
    return result


def by_group(found: Mapping[str, Record]) -> list[tuple[str, str, list[Record]]]:
    """(group, what it is about, records) in the registry's order; records of no benchmark come last."""
    known = registry.benchmarks()
    result = [
        (group, about, [found[n] for n in known if known[n].group == group and n in found])
        for group, about in registry.GROUPS.items()
    ]
    result.append(("whole path", "from text to a decrypted answer", [r for n, r in found.items() if n not in known]))
    return [(g, a, rs) for g, a, rs in result if rs]


def html(found: Mapping[str, Record]) -> str:
    """The page."""
    groups = by_group(found)
    links = "".join(f"<a href='#{escape(g.replace(' ', '-'))}'>{escape(g)}</a>" for g, _, _ in groups)
    body = []
    for group, about, members in groups:
        body.append(
            f"<h1 id='{escape(group.replace(' ', '-'))}'>{escape(group)}</h1><p class='lead'>{escape(about)}</p>"
        )
        for record in members:
            flags = "".join(f" <span class='busy'>{escape(m)}</span>" for m in marks(record))
            blocks = "".join(block.html() for block in shown(record))
            body.append(
                f"<section id='{escape(record['name'])}'><h2>{escape(record['name'])}{flags}</h2>"
                f"<p>{escape(measures(record))}</p>{blocks}<p class='conditions'>{escape(conditions(record))}</p></section>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>polyformer: results</title><style>{STYLE}{EXTRA_STYLE}</style></head><body><main>"
        f"<header><p class='kicker'>polyformer · benchmark records</p><h1>Results</h1><nav>{links}</nav></header>"
        f"{''.join(body)}</main></body></html>\n"
    )


def markdown(found: Mapping[str, Record]) -> str:
    """The same as Markdown, without the figures."""
    lines = ["# Results\n", "Made from `benchmarks/results/*.json` by `polyformer bench report`.\n"]
    for group, about, members in by_group(found):
        lines.append(f"## {group}: {about}\n")
        for record in members:
            flags = "".join(f" **({m})**" for m in marks(record))
            lines.append(f"### {record['name']}{flags}\n\n{measures(record)}\n")
            lines += [block.markdown() for block in shown(record)]
            lines.append(f"<sub>{conditions(record)}</sub>\n")
    return "\n".join(lines)


def measures(record: Record) -> str:
    """What the figures are, in the benchmark's words."""
    benchmark = registry.benchmarks().get(record["name"])
    return benchmark.measures if benchmark else ""


def write(folder: Path, results: Path = records.RESULTS) -> tuple[Path, Path]:
    """Write results.html and results.md of the newest record of each benchmark.

    Raises:
        ValueError: there is no record, or a file among them is none.
    """
    found = records.latest(results)
    if not found:
        raise ValueError(f"{results} holds no record; `polyformer bench run NAME` makes one")
    folder.mkdir(parents=True, exist_ok=True)
    page, text = folder / "results.html", folder / "results.md"
    page.write_text(html(found), encoding="utf-8")
    text.write_text(markdown(found), encoding="utf-8")
    return page, text
