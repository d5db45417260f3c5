"""The report renders from whatever was measured, on its own, and says so in red when nothing was protected."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import charts, records, report
from benchmarks.style import STYLE
from polyformer import cli

OPS = [
    {
        "id": i,
        "kind": "linear",
        "source": source,
        "level": 3 - i,
        "predicted_s": 0.5 * i,
        "measured_s": 0.6 * i,
        "primitives": {"rotate": {"count": i, "seconds": 0.4 * i}, "something_new": {"count": 1, "seconds": 0.2 * i}},
    }
    for i, source in enumerate(["tokens", "blocks.0.mixer.q.matmul", "blocks.0.mlp.up", "head.matmul"])
]
FULL: dict[str, Any] = {
    "format": "polyformer-report",
    "name": "demo",
    "created": "2026-01-01T00:00:00Z",
    "commit": "abc",
    "insecure": False,
    "machine": {"cpu": "<CPU>", "threads": 2},
    "versions": {"openfhe": "1.6.1"},
    "model": {"blocks": 1, "width": 8, "length": 4},
    "losses": {"softmax": 1.0, "power": 1.1, "polynomial": None},
    "params": {"backend": "openfhe", "log_n": 16, "levels": 3},
    "security": {"log_qp": 1700.0, "limit": 1747, "failure_log2": -33.0},
    "measured": {
        "evaluate_s": 12.3456,
        "peak_gb": 9.0,
        "max_abs_error": 3.94e-6,
        "mean_abs_error": 1e-7,
        "key_bytes": 8e9,
    },
    "predicted": {"evaluate_s": 11.0, "key_bytes": 8e9},
    "error_bound": 1e-5,
    "phases": [{"name": "train", "seconds": 200.0}, {"name": "evaluate", "seconds": 12.0}],
    "ops": OPS,
    "primitives": {"rotate": {"count": 6, "seconds": 2.4}},
    "prediction": {
        "prompt": "<script>alert(1)</script>",
        "encrypted": [{"token": "<b>", "logit": 1.0, "probability": 0.5}],
        "clear": [{"token": "<b>", "logit": 1.0, "probability": 0.5}],
        "top1_equal": True,
        "clear_margin": 0.5,
    },
    "notes": ["One run."],
}
VOID = {"meta", "br", "line", "rect", "path", "circle", "link", "img"}


class Strict(HTMLParser):
    """Fails on tags that do not nest, and collects those that load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if names & {"src", "href", "srcset"} or tag in ("script", "link", "iframe"):
            self.loads.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(data: dict[str, Any]) -> str:
    """The page, checked for form."""
    text = report.render(data)
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == [], "the page must need nothing but itself"
    return text


def test_full_report() -> None:
    text = page(FULL)
    for piece in (
        "12.3 s",
        "3.94·10⁻⁶",
        "1,700 of 1,747",
        "2^-33",
        "calibrated ranges",
        "blocks.0.mixer",
        "&lt;CPU&gt;",
        "something new",
    ):
        assert piece in text
    assert "INSECURE" not in text


def test_insecure_is_said_in_red() -> None:
    text = page({**FULL, "insecure": True, "security": {"log_qp": 1700.0, "limit": None, "failure_log2": -1e9}})
    assert "<div class='danger'>INSECURE TEST RING" in text
    assert "at no security" in text
    assert "128-bit security" not in text
    assert "below 2^-128" in text


@pytest.mark.parametrize("missing", sorted(FULL))
def test_a_missing_part_is_left_out(missing: str) -> None:
    page({k: v for k, v in FULL.items() if k != missing})


def test_many_operators_are_folded() -> None:
    ops = [{**OPS[1], "id": i, "source": f"node{i}"} for i in range(200)]
    text = report.operators({**FULL, "ops": ops})
    assert text.count("<text") < 250  # of 800
    assert "smaller ones" in text


def test_charts_are_told_in_words_and_letters_stay_readable() -> None:
    """A chart on a page of 390 pixels keeps letters of 10 pixels at least: it scrolls instead of shrinking."""
    charts_of = re.findall(r"<svg [^>]*>.*?</svg>", page(FULL), re.DOTALL)
    assert len(charts_of) == 5  # phases, operators, primitives, levels, predicted and measured
    for chart in charts_of:
        head = chart.partition(">")[0]
        assert 'role="img"' in head and re.search(r'aria-label="[^"]{10,}"', head)
        assert re.search(r"<desc>[^<]{10,}</desc>", chart)
        width, least = (float(re.search(p, head)[1]) for p in (r"viewBox=\"0 0 (\d+)", r"min-width:(\d+)px"))  # type: ignore[index]
        assert 12 * max(least, 390) / width >= 10
    assert ".scroll{overflow-x:auto}" in STYLE
    assert page(FULL).count('<div class="scroll"><svg') == 5


def test_segments_carry_their_names() -> None:
    """Colour alone tells nothing to many readers."""
    chart = charts.stacked_bars(
        [charts.Row(label="q", segments=[("rotate_hoisted", 5.0), ("encode", 0.01)])], label="what it shows"
    )
    assert 'class="inside">rotate hoisted</text>' in chart and 'class="inside">encode' not in chart
    assert "q: rotate_hoisted 5 s, encode 0.01 s" in chart  # for those that have no room


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1234.5, "1,234"), (0.5, "0.5"), (2e-7, "2.00·10⁻⁷"), (float("inf"), "inf")],
    ids=str,
)
def test_figures(value: float, shown: str) -> None:
    assert charts.figure(value) == shown


def test_the_command_renders_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(FULL, tmp_path)
    first = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert cli.run(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == first
    (tmp_path / "report.json").write_text("[]")
    assert cli.run(["report", str(tmp_path)]) == 1
    assert "is not a report" in " ".join(capsys.readouterr().err.split())


def test_a_record_has_its_keys_and_never_replaces_another(tmp_path: Path) -> None:
    record = records.record("demo", metrics={"evaluate_s": 1.0}, params={}, threads=2, seed=3)
    told = "name version status created commit machine versions params seed repeats peak_gb quiet noise metrics"
    assert set(record) == set(told.split())
    first, second = records.write(record, tmp_path), records.write(record, tmp_path)
    assert first.name == f"demo-{record['created'][:10]}.json"
    assert first != second
    assert json.loads(first.read_text()) == record
