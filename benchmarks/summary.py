"""All records on one page: `polyformer bench report` writes results.html and results.md from the JSON, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from . import costs_show, ops, records, registry
from .blocks import Block, Table, is_number
from .charts import figure as digits
from .comparison import flat
from .style import STYLE

Record = Mapping[str, Any]
Costs = Mapping[str, Mapping[str, Any]]  # name -> cost table
VERSIONS = ("python", "openfhe", "tenseal", "torch", "onnxruntime")
MOST_ROWS = 40  # of a record that brings no tables of its own

EXTRA_STYLE = """
.conditions{color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}
.busy{background:var(--danger);color:#fff;border-radius:6px;padding:1px 7px;font-size:.8rem;white-space:nowrap}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 1em}nav a{color:var(--accent)}
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One benchmark on the page: its name, what a reader must know first, what it measures, tables and figures, conditions."""

    name: str
    marks: Sequence[str]
    measures: str
    blocks: Sequence[Block]
    conditions: str


def shown(record: Record, found: Mapping[str, Record] | None = None) -> Sequence[Block]:
    """The tables and figures of a record: its benchmark's own, or all its figures as one table.

    Args:
        found: the records that are shown with it, for those that compare.
    """
    benchmark = registry.of_record(record["name"])
    own = benchmark.blocks(record, found) if benchmark else None
    if own is not None:
        return own
    figures = [(k, v) for k, v in flat(record["metrics"]).items() if is_number(v) or isinstance(v, (str, bool))]
    rows = figures[:MOST_ROWS]
    more = f"; {len(figures) - len(rows)} more in the file" if len(figures) > len(rows) else ""
    return [Table(caption=f"figures of the record{more}", columns=("figure", "value"), rows=rows)]


def conditions(record: Record) -> str:
    """One line with all that belongs under a figure: what ran, where, on what, how often, from which commit."""
    m, metrics, params = record["machine"], record["metrics"], record["params"]
    parts = [str(record.get("conditions") or "")]
    threads = m.get("threads", "?")
    parts.append(
        f"{threads} thread{'s' * (threads != 1)} of {m.get('cpu', '?')} ({m.get('cores', '?')} cores, {m.get('memory_gb', '?')} GB)"
    )
    parts.append(", ".join(f"{k} {v}" for k, v in record["versions"].items() if k in VERSIONS))
    parts.append(ring(params))
    repeats = record["repeats"]
    runs = f"{repeats} repeats" if repeats > 1 else "one run"
    if metrics.get("warm_ups") is not None:
        runs += f" after {metrics['warm_ups']} warm-up{'s' * (metrics['warm_ups'] != 1)}"
    if repeats > 1 and metrics.get("evaluate_spread_s") is not None:
        runs += f", longest less shortest {digits(metrics['evaluate_spread_s'])} s"
    parts.append(runs)
    if record.get("seed") is not None:
        parts.append(f"seed {record['seed']}")
    parts.append(f"benchmark version {record['version']}")
    parts.append(f"commit {record['commit']}, {record['created']}")
    return "; ".join(p for p in parts if p)


def ring(params: Mapping[str, Any]) -> str:
    """CKKS parameters in words; "" where there are none."""
    if params.get("log_n") is None:
        return ""
    names = (("levels", "levels"), ("digits", "digits"), ("scale_bits", "scale bits"))
    sizes = [f"{params[key]} {word}" for key, word in names if params.get(key) is not None]
    return ", ".join([f"CKKS N = 2^{params['log_n']}", *sizes, f"{params.get('secret', 'ternary')} secret"])


def marks(record: Record) -> list[str]:
    """What a reader must know before believing the figures."""
    share = (record.get("noise") or {}).get("others_share")
    quiet = record.get("quiet")
    result = []
    if quiet is None:
        result.append("noise unknown")
    elif not quiet:
        result.append("busy machine" + (f": others took {share:.0%}" if share is not None else ""))
    if record.get("quick"):
        result.append("quick run, its figures prove nothing")
    if record.get("status", "complete") != "complete":
        result.append(str(record["status"]))
    if record.get("insecure") or record["params"].get("insecure"):
        result.append("insecure test ring")
    return result


def by_group(found: Mapping[str, Record]) -> list[tuple[str, str, list[Record]]]:
    """(group, what it is about, records) in the registry's order; records of no benchmark come last."""
    known = {b.record or b.name: b.group for b in registry.benchmarks().values()}
    result = [
        (group, about, [found[n] for n in known if known[n] == group and n in found])
        for group, about in registry.GROUPS.items()
    ]
    result.append(("whole path", "from text to a decrypted answer", [r for n, r in found.items() if n not in known]))
    return [(g, a, rs) for g, a, rs in result if rs]


def sections(found: Mapping[str, Record], costs: Costs | None = None) -> list[tuple[str, str, list[Section]]]:
    """(group, what it is about, sections) of the page; cost tables stand with the primitives."""
    result = [
        (
            group,
            about,
            [
                Section(
                    name=record["name"],
                    marks=marks(record),
                    measures=measures(record),
                    blocks=shown(record, found),
                    conditions=conditions(record),
                )
                for record in members
            ],
        )
        for group, about, members in by_group(found)
    ]
    if costs:
        own = [cost_section(name, table) for name, table in costs.items()]
        if result and result[0][0] == "primitives":
            own = result.pop(0)[2] + own
        result.insert(0, ("primitives", registry.GROUPS["primitives"], own))
    return result


def cost_section(name: str, table: Mapping[str, Any]) -> Section:
    """A cost table as a section; which of its levels were measured is in its own blocks."""
    params, clock = table["params"], str(table.get("clock", "thread CPU time"))
    versions = ", ".join(f"{k} {v}" for k, v in table["versions"].items() if k in VERSIONS)
    parts = (
        f"{table['cpu']} ({table['cores']} cores)",
        versions,
        ring(params),
        f"{clock} of {table['repeats']} repeats after one warm-up; load {table['load']:.1f} before",
        str(table["created"]),
    )
    return Section(
        name=name,
        marks=["insecure test ring"] if params.get("insecure") else [],
        measures="thread-milliseconds of each primitive at each level: the compiler's cost table",
        blocks=costs_show.blocks(table),
        conditions="; ".join(p for p in parts if p),
    )


def html(found: Mapping[str, Record], costs: Costs | None = None) -> str:
    """The page."""
    groups = sections(found, costs)
    links = _links([g for g, _, _ in groups])
    body = []
    for group, about, members in groups:
        body.append(
            f"<h1 id='{_anchor(group)}'>{escape(group)}</h1><p class='lead'>{escape(about)}</p>"
            + _links([part.name for part in members])
        )
        for part in members:
            flags = "".join(f" <span class='busy'>{escape(m)}</span>" for m in part.marks)
            blocks = "".join(block.html() for block in part.blocks)
            body.append(
                f"<section id='{_anchor(part.name)}'><h2>{escape(part.name)}{flags}</h2>"
                f"<p>{escape(part.measures)}</p>{blocks}<p class='conditions'>{escape(part.conditions)}</p></section>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>polyformer: results</title><style>{STYLE}{EXTRA_STYLE}</style></head><body><main>"
        f"<header><p class='kicker'>polyformer · benchmark records</p><h1>Results</h1>{links}</header>"
        f"{''.join(body)}</main></body></html>\n"
    )


def _anchor(name: str) -> str:
    """The id of a group or section on the page."""
    return escape(name.replace(" ", "-"), quote=True)


def _links(names: Sequence[str]) -> str:
    """Links to groups or sections."""
    return "<nav>" + "".join(f"<a href='#{_anchor(n)}'>{escape(n)}</a>" for n in names) + "</nav>"


def markdown(found: Mapping[str, Record], costs: Costs | None = None) -> str:
    """The same as Markdown, without the figures."""
    lines = ["# Results\n", "Made from `benchmarks/results/*.json` by `polyformer bench report`.\n"]
    for group, about, members in sections(found, costs):
        lines.append(f"## {group}: {about}\n")
        for part in members:
            flags = "".join(f" **({m})**" for m in part.marks)
            lines.append(f"### {part.name}{flags}\n\n{part.measures}\n")
            lines += [block.markdown() for block in part.blocks]
            lines.append(f"<sub>{part.conditions}</sub>\n")
    return "\n".join(lines)


def measures(record: Record) -> str:
    """What the figures are, in the benchmark's words."""
    benchmark = registry.of_record(record["name"])
    return benchmark.measures if benchmark else ""


def write(folder: Path, results: Path = records.RESULTS) -> tuple[Path, Path]:
    """Write results.html and results.md of the newest record of each benchmark, and of the cost tables.

    Raises:
        ValueError: there is no record, or a file among them is none.
    """
    found = records.latest(results)
    if not found:
        raise ValueError(f"{results} holds no record; `polyformer bench run NAME` makes one")
    folder.mkdir(parents=True, exist_ok=True)
    page, text = folder / "results.html", folder / "results.md"
    costs = costs_show.newest(ops.COSTS, results)
    page.write_text(html(found, costs), encoding="utf-8")
    text.write_text(markdown(found, costs), encoding="utf-8")
    return page, text
