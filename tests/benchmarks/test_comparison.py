"""Two records side by side."""

import re

import pytest

from benchmarks import comparison, records


def record(**changes):
    base = records.record("x", metrics={}, params={"log_n": 13}, threads=2)
    return {**base, "quiet": True, **changes}


def test_ratios_of_common_figures() -> None:
    a = record(
        metrics={"evaluate_s": 2.0, "name": "a", "rows": [{"name": "p", "s": 1.0}], "only": 1, "zero": 0, "ok": True}
    )
    b = record(metrics={"evaluate_s": 3.0, "name": "b", "rows": [{"name": "p", "s": 4.0}], "zero": 1, "ok": True})
    ratios = {r.name: r.ratio for r in comparison.compare(a, b).ratios}
    assert ratios == {"evaluate_s": 1.5, "rows.p.s": 4.0, "zero": None}


def test_what_differs_is_told() -> None:
    result = comparison.compare(record(), record(params={"log_n": 14}))
    assert result.differ["params.log_n"] == (13, 14)
    assert "params.log_n: 13 | 14" in str(result)
    assert not result.warnings


WARNED = {
    "version": ({"version": 2}, "version 1 and 2"),
    "busy": ({"quiet": False, "noise": {"others_share": 0.5}}, r"others used the machine \(50% of it\)"),
    "cut short": ({"status": "interrupted"}, "B is interrupted"),
    "quick": ({"quick": True}, "prove nothing"),
}


@pytest.mark.parametrize(("changes", "says"), WARNED.values(), ids=WARNED)
def test_warnings(changes, says) -> None:
    (warning,) = comparison.compare(record(), record(**changes)).warnings
    assert re.search(says, warning)


def test_other_benchmarks_are_refused() -> None:
    with pytest.raises(ValueError, match="'x' and 'y'"):
        comparison.compare(record(), record(name="y"))
