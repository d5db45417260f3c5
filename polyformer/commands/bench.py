"""bench: what can be measured, measure it, compare records, and put them on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polyformer.commands.console import Failure, bar, emit, error_paragraph, out, say
from polyformer.commands.options import Json

bench = typer.Typer(no_args_is_help=True, help="Measure, compare and report.", epilog="Example: polyformer bench ls")

Names = Annotated[list[str], typer.Argument(help="Benchmarks, groups or `suite`, see `polyformer bench ls`.")]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each figure; the median counts.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of each trained configuration: 0, 1, ...")]
Quick = Annotated[bool, typer.Option("--quick", help="Smallest size: shows that it runs, proves nothing.")]
Folder = Annotated[Path | None, typer.Option("--out", help="Folder for the records; default: the repository's.")]


def register(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench", rich_help_panel="Look")


@bench.command("ls", epilog="Example: polyformer bench ls")
def ls(json: Json = False) -> None:
    """The benchmarks by group: what each measures, under which conditions, minutes and memory."""
    from benchmarks import registry

    known = registry.benchmarks().values()
    if json:
        keys = ("name", "version", "group", "measures", "conditions", "minutes", "memory_gb", "suite")
        emit([{key: getattr(b, key) for key in keys} for b in known])
        return
    for group, about in registry.GROUPS.items():
        members = [b for b in known if b.group == group]
        if members:
            out.print(f"\n[bold]{group}[/]: {about}")
        for b in members:
            out.print(f"  [cyan]{b.name:<20}[/] {b.minutes:>5g} min {b.memory_gb:>4g} GB  {b.measures}", soft_wrap=True)
            out.print(f"  {'':<20} [dim]{b.conditions}{'' if b.suite else '; not in the suite'}[/]", soft_wrap=True)
    minutes = sum(b.minutes for b in registry.suite())
    out.print(
        f"\n[bold]{registry.SUITE}[/]: all of it but training and what says so, {minutes:.0f} min", soft_wrap=True
    )


@bench.command("run", epilog="Example: polyformer bench run mlp-784 cnn-28")
def run(
    names: Names, repeats: Repeats = 3, seeds: Seeds = 3, quick: Quick = False, to: Folder = None, json: Json = False
) -> None:
    """Run benchmarks or whole groups, one after another, and write their records."""
    _run(names, repeats, seeds, quick, to, json)


@bench.command("train", epilog="Example: polyformer bench train equal-budget")
def train(
    names: Annotated[list[str] | None, typer.Argument(help="Some of the group `train`; default: all.")] = None,
    seeds: Seeds = 3,
    quick: Quick = False,
    to: Folder = None,
    json: Json = False,
) -> None:
    """The evidence from training: `run` for benchmarks of the group `train`."""
    from benchmarks import registry

    members = [b.name for b in registry.benchmarks().values() if b.group == "train"]
    strangers = [name for name in names or [] if name not in members]
    if strangers:
        raise ValueError(f"no training benchmark is called {strangers[0]!r}; known are: {', '.join(members)}")
    _run(names or members, 3, seeds, quick, to, json)


def _run(names: Sequence[str], repeats: int, seeds: int, quick: bool, to: Path | None, json: bool) -> None:
    from benchmarks import registry, runner

    chosen = registry.select(names)
    outcomes = []
    with bar("bench") as advance:
        for outcome in runner.run(
            chosen, repeats=repeats, seeds=range(seeds), quick=quick, folder=to, progress=advance
        ):
            outcomes.append(outcome)
            say(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.path or ''}")
            if outcome.why:
                error_paragraph(f"{outcome.name}: {outcome.why}")
    if json:
        emit([{"name": o.name, "status": o.status, "record": o.record} for o in outcomes])
    ends = [o.status for o in outcomes]
    if "interrupted" in ends:
        raise KeyboardInterrupt
    if "crashed" in ends:
        raise Failure(f"{ends.count('crashed')} of {len(chosen)} benchmarks crashed; the others are done")


@bench.command("compare", epilog="Example: polyformer bench compare old.json new.json")
def compare(
    a: Annotated[Path, typer.Argument(help="Record A.")],
    b: Annotated[Path, typer.Argument(help="Record B.")],
    json: Json = False,
) -> None:
    """Ratios B / A of the figures of two records, with everything that differs in their conditions."""
    from benchmarks import comparison, records

    result = comparison.compare(records.read(a), records.read(b))
    if json:
        emit(result.to_json())
        return
    out.print(str(result), markup=False)


@bench.command("report", epilog="Example: polyformer bench report --out runs/results")
def report(
    to: Annotated[Path, typer.Option("--out", help="Folder for results.html and results.md.")] = Path("runs/results"),
    results: Annotated[Path | None, typer.Option(help="Folder of the records; default: the repository's.")] = None,
    update: Annotated[bool, typer.Option("--readme", help="Bring README's figures up to date as well.")] = False,
) -> None:
    """One page and one Markdown file of the newest record of each benchmark."""
    from benchmarks import evidence, readme, records, summary

    for path in summary.write(to, results or records.RESULTS):
        say(str(path))
    if update:
        say("README.md: " + ("updated" if readme.write(folder=results or records.RESULTS) else "was up to date"))
        evidence.write(records.latest(results or records.RESULTS))
        say(f"{evidence.PICTURE.relative_to(records.ROOT)}: drawn")
