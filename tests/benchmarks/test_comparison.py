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


def test_rows_are_compared_by_what_they_are_called() -> None:
    """Not by their place: records may have them in another order, or some that the other lacks."""
    rows = [{"source": f"n{i}", "kind": "linear", "level": i + 1, "seconds": float(i + 1)} for i in range(3)]
    twice = [{"name": "same", "s": 1.0}, {"name": "same", "s": 2.0}]
    a = record(metrics={"by_op": rows, "t": twice})
    b = record(metrics={"by_op": rows[::-1], "t": twice})
    result = comparison.compare(a, b)
    assert all(r.ratio == 1.0 for r in result.ratios)
    names = {r.name for r in result.ratios}
    assert {"by_op.n0/linear/1.seconds", "t.same.s", "t.same#2.s"} <= names


def test_long_tables_are_left_out() -> None:
    many = [{"name": str(i), "s": 1.0} for i in range(comparison.MOST_ROWS + 1)]
    a = record(metrics={"many": many, "few": many[:-1]})
    assert {r.name.split(".")[0] for r in comparison.compare(a, a).ratios} == {"few"}


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
    "noise unknown": ({"quiet": None}, "B does not say whether others used the machine"),
    "machine": (
        {"machine": {"cpu": "Z", "cores": 64, "threads": 8}},
        "different machines.* Z cpu, 64 cores, 8 threads",
    ),
}


@pytest.mark.parametrize(("changes", "says"), WARNED.values(), ids=WARNED)
def test_warnings(changes, says) -> None:
    (warning,) = comparison.compare(record(), record(**changes)).warnings
    assert re.search(says, warning)


def test_other_benchmarks_are_refused() -> None:
    with pytest.raises(ValueError, match="'x' and 'y'"):
        comparison.compare(record(), record(name="y"))
