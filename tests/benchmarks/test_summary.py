"""The page, the Markdown and README's table, all from records."""

import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import blocks, costs_show, ops, quality, race, readme, records, registry, scaling, summary
from benchmarks.blocks import Picture, Table
from benchmarks.registry import Benchmark
from benchmarks.style import STYLE

VOID = {"meta", "br", "img", "path", "rect", "line", "circle", "use"}


class Balance(HTMLParser):
    """Counts tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def record(name: str = "mlp-784", **changes):
    base = records.record(name, metrics={"evaluate_s": 0.5, "max_abs_error": 2e-5}, params={"log_n": 13}, threads=2)
    return {**base, "quiet": True, "conditions": "<script>", **changes}


def found(*many):
    return {r["name"]: {**r, "file": f"{r['name']}.json"} for r in many}


def balanced(page: str) -> bool:
    parser = Balance()
    parser.feed(page)
    return not parser.open


def test_page_is_whole_and_escaped() -> None:
    page = summary.html(found(record(), record("unknown", metrics={"a<b": 1})))
    assert balanced(page)
    assert "<script>" not in page and "&lt;script&gt;" in page and "a&lt;b" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # needs nothing from elsewhere


def test_every_condition_is_under_the_figures() -> None:
    line = summary.conditions(record(seed=7))
    for part in ("2 threads", "N = 2^13", "seed 7", "one run", "commit", "python", "benchmark version 1"):
        assert part in line
    params = {"log_n": 16, "levels": 27, "digits": 2, "scale_bits": 40}
    many = record(params=params, repeats=5, metrics={"warm_ups": 1, "evaluate_spread_s": 0.25})
    line = summary.conditions({**many, "versions": {"onnxruntime": "1.2.3"}})
    for part in (
        "5 repeats after 1 warm-up, longest less shortest 0.25 s",
        "2 digits",
        "40 scale bits",
        "onnxruntime 1.2.3",
    ):
        assert part in line
    assert "CKKS" not in summary.conditions(record(params={"log_n": None}))  # a grid without a test ring


MARKS = {
    "quiet": ({}, []),
    "busy": ({"quiet": False, "noise": {"others_share": 0.25}}, ["busy machine: others took 25%"]),
    "unknown": ({"quiet": None}, ["noise unknown"]),
    "quick": ({"quick": True}, ["quick run, its figures prove nothing"]),
    "cut short": ({"status": "crashed"}, ["crashed"]),
    "test ring": ({"params": {"insecure": True}}, ["insecure test ring"]),
}


@pytest.mark.parametrize(("changes", "expected"), MARKS.values(), ids=MARKS)
def test_marks(changes, expected) -> None:
    assert summary.marks(record(**changes)) == expected
    for mark in expected:
        assert mark in summary.html(found(record(**changes)))
        assert mark in summary.markdown(found(record(**changes)))


def test_a_benchmark_shows_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(r):
        return [Table(caption="own", columns=("x",), rows=[(r["metrics"]["evaluate_s"],)])]

    own = Benchmark(
        name="own",
        version=2,
        group="train",
        measures="m",
        conditions="c",
        minutes=1,
        memory_gb=1,
        run=lambda s: {},
        show=show,
    )
    other = replace(own, name="other", record="its records", group="security", show=None)
    monkeypatch.setattr(registry, "benchmarks", lambda: {"own": own, "other": other})
    ((group, _, (member,)),) = summary.by_group(found(record("its records")))
    assert (group, member["name"]) == ("security", "its records") and summary.measures(member) == "m"
    assert "own" in summary.shown(record("own", version=2))[0].caption
    assert "figures of the record" in summary.shown(record("own", version=1))[0].caption  # of an older benchmark


@pytest.mark.parametrize("name", ["operator-race", "encrypted-scaling", "quality-beside-cost"])
def test_quick_records_say_that_their_ring_protects_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parameters are a grid's or a setup's, not those of one circuit."""
    made = {
        "operator-race": lambda: race._record([], registry.Settings(quick=True)),
        "encrypted-scaling": lambda: scaling._record(scaling.QUICK, [], 1),
        "quality-beside-cost": lambda: quality._record([], quality.QUICK, {}),
    }[name]()
    assert "insecure test ring" in summary.marks(made)


COSTS = {
    "cpu": "X",
    "cores": 2,
    "versions": {"openfhe": "1"},
    "params": {"log_n": 10, "levels": 2, "digits": 2, "scale_bits": 40, "insecure": True},
    "created": "2026-01-01",
    "repeats": 3,
    "load": 0.5,
    "interpolated": [1],
    "ms": {"rotate": {"0": 1.5, "1": 2.25, "2": 3.0}, "encode": {"2": 7.0}},
}


def test_cost_tables_are_on_the_page(tmp_path: Path) -> None:
    """Also those that lie among records, as `--out` leaves them."""
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    (tmp_path / "r.json").write_text(json.dumps(record()))
    page, text = summary.write(tmp_path / "out", tmp_path)
    assert balanced(page.read_text()) and "<section id='costs'>" in page.read_text()
    assert "| rotate | 3 | 1.5 |" in text.read_text() and "| encode | 7 | – |" in text.read_text()
    assert "2.25" not in text.read_text()  # of a level that was not measured
    (group, _, members), *_ = summary.sections(found(record()), {"costs": COSTS})
    (section,) = members
    assert group == "primitives" and section.marks == ["insecure test ring"]
    assert "3 repeats" in section.conditions and "2 digits" in section.conditions
    assert list(costs_show.newest(ops.COSTS)), "the repository's own are found"


def test_table_in_both_forms() -> None:
    table = Table(caption="c", columns=("a", "b|"), rows=[("x|y", 1.23456), ("z", None)])
    assert "| x\\|y | 1.23 |" in table.markdown() and "| z | – |" in table.markdown()
    assert "---:" in table.markdown().splitlines()[3]
    assert balanced(table.html())


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234, "1,234"), (1.5e15, "1.50·10¹⁵"), (0.00001, "1.00·10⁻⁵"), (True, "yes"), (float("nan"), "–"), ("a", "a")],
)
def test_cells(value: object, text: str) -> None:
    assert blocks.cell(value) == text


def test_picture_is_the_same_for_the_same_data() -> None:
    def draw() -> Picture:
        drawing, (ax,) = blocks.panels()
        ax.plot([1, 2], [3, 4], label="a series", **blocks.look(0))
        blocks.legend(ax)
        return blocks.picture(drawing, 'what "it" shows')

    first = draw()
    assert first.svg == draw().svg
    assert 'aria-label="what &quot;it&quot; shows"' in first.svg and " width=" not in first.svg.split(">")[0]
    assert balanced(first.html())


PHONE = (
    336  # pixels that a figure is wide on a page of 390: 12 of the page's and 14 of the section's padding on both sides
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page and the Markdown of the repository's records."""
    page, text = summary.write(tmp_path_factory.mktemp("results"))
    return page.read_text(), text.read_text()


def test_figures_are_read_on_a_phone_and_captions_stay_in_sight(written: tuple[str, str]) -> None:
    """No letter of a figure is below 9 pixels where it fills the page, and no caption scrolls with its table."""
    page, _ = written
    pictures = re.findall(r"<figure class='picture'><svg (.*?)</svg>", page, re.DOTALL)
    assert len(pictures) > 5
    for svg in pictures:
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
        assert sizes and min(sizes) * PHONE / width >= 9, re.search(r'aria-label="[^"]*"', svg)
    assert "main{padding:24px 12px" in STYLE and "section{padding:16px 14px}" in STYLE
    for scroll in re.findall(r"<div class='scroll'.*?</div>", page, re.DOTALL):
        assert "caption" not in scroll


def test_no_two_series_look_alike() -> None:
    looks = [tuple(blocks.look(i).values()) for i in range(64)]
    assert len(set(looks)) == 64


def test_long_text_is_not_squeezed_to_a_word_a_line() -> None:
    table = Table(caption="c", columns=("a", "b", "c"), rows=[("x", "a remark of more than a few words", 1.0)])
    assert "<th>a</th><th class=long>b</th><th class=num>c</th>" in table.html()


def test_report_of_nothing_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no record; `polyformer bench run NAME`"):
        summary.write(tmp_path / "out", tmp_path)


def test_report_of_the_committed_records(written: tuple[str, str]) -> None:
    page, text = written
    assert balanced(page)
    for name in records.latest():
        assert f"id='{name}'" in page and f"### {name}" in text


def committed(folder: Path) -> Path:
    """The records that git knows: one that somebody just measured here is no part of the repository yet."""
    command = ["git", "-C", str(records.ROOT), "ls-files", "benchmarks/results/*.json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        return records.RESULTS  # no repository: all that came with the package
    for name in listed.stdout.split():
        if (records.ROOT / name).exists():
            (folder / Path(name).name).symlink_to(records.ROOT / name)
    return folder


def test_readme_is_up_to_date(tmp_path: Path) -> None:
    """Fails when a committed record changed and README did not: run `polyformer bench report --readme`."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text, records.latest(committed(tmp_path))) == text


# Figures of README that no record of ours holds: those of other authors, and what the set-up needs.
FOREIGN = {"230 s", "503 s", "12 GB"}
FIGURE = re.compile(r"\d[\d,.]*\s?(?:s|ms|min|h|GB|MB|kB|nats|x|%)(?![\w-])")


def test_every_figure_of_readme_comes_from_a_record() -> None:
    """Prose would say tomorrow what was true today: a measured figure stands in a generated place, or not at all."""
    text = readme.README.read_text(encoding="utf-8")
    for place in readme.PLACES:
        before, inside, behind = readme.split(text, place)
        assert FIGURE.search(inside)
        text = before + behind
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # commands and what they print
    assert {found.strip() for found in FIGURE.findall(text)} == FOREIGN


def places(inside: str = "") -> str:
    return "a\n" + "\n".join(f"{first}\n{inside}\n{last}" for first, last in map(readme.ends, readme.PLACES)) + "\nb\n"


def test_readme_grows_stale_with_a_new_record(tmp_path: Path) -> None:
    text = places("old")
    new = readme.updated(text, found(record()))
    assert "500 ms" in new and "30 ms" in new and "old" not in new and new.startswith("a\n") and new.endswith("b\n")
    assert readme.updated(new, found(record())) == new
    faster = record(metrics={"evaluate_s": 0.25})
    assert readme.updated(new, found(faster)) != new
    path = tmp_path / "README.md"
    path.write_text(text)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "x.json").write_text(json.dumps(record()))
    assert readme.write(path, tmp_path / "r") is True
    assert readme.write(path, tmp_path / "r") is False


def test_readme_says_which_targets_are_missed() -> None:
    assert "missed by: MLP 784-128-10" in readme.results(found(record()))  # 500 ms of 30
    assert "all are reached" in readme.results(found(record(metrics={"evaluate_s": 0.02})))


def test_readmes_proof_follows_its_records(tmp_path: Path) -> None:
    """Each figure of the first screen, changed in its record, changes the text."""
    known = records.latest(committed(tmp_path))
    text = readme.proof(known)
    for name, path, value in (
        ("demo", ("metrics", "evaluate_s"), 7.25),
        ("demo", ("metrics", "max_abs_error"), 1.0),
        ("demo", ("metrics", "total_s"), 61.0),
        ("demo", ("metrics", "keygen_s"), 999.0),
        ("demo", ("params", "levels"), 99),
        ("demo", ("quiet",), False),
        ("agreement-100", ("metrics", "agreement"), 0.5),
        ("demo-twin", ("metrics", "summary", "LaS decay", "polynomial", "mean"), 1.25),
    ):
        changed = json.loads(json.dumps(known))
        part = changed[name]
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert readme.proof(changed) != text, path
    assert readme.proof({}) == "No record of `make demo`."
    told = {**known["demo"], "metrics": {**known["demo"]["metrics"], "request_bytes": 17e6, "promised_error": 1.5e-4}}
    assert "request 17.0 MB" in readme.proof({"demo": told}) and "promised 1.5e-04" in readme.proof({"demo": told})


def test_readme_without_its_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the proof"):
        readme.updated("nothing", {})
