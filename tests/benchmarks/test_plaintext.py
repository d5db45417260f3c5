"""Models in the clear: fits, limits, and our layers equal to independent ones."""

import math

import pytest
import torch

from benchmarks import plaintext, plaintext_show, records, registry
from benchmarks.blocks import Table

QUICK = ("context-growth", "clear-request", "references")


@pytest.mark.parametrize("build", [plaintext.mamba_pair, plaintext.linear_pair], ids=["mambapy", "definition"])
@pytest.mark.parametrize("length", [1, 33, 64])
def test_our_layers_equal_independent_ones(build, length: int) -> None:
    torch.manual_seed(1)
    ours, theirs = build(length)
    x = torch.randn(2, length, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("e", [1.0, 2.0])
def test_exponent_of_a_power_law(e: float) -> None:
    points = [{"tokens": n, "forward_s": 3e-6 * n**e} for n in (128, 256, 512, 1024)]
    found = plaintext.exponent(points)
    assert found is not None and math.isclose(found, e, rel_tol=1e-9)
    assert plaintext.exponent(points[:1]) is None


def test_a_context_beyond_the_limit_is_left_out() -> None:
    fast = [{"tokens": n, "forward_s": 1e-3 * n / 128, "forward_gb": 0.0} for n in (128, 256)]
    assert plaintext._too_much(fast) == ""
    slow = [{"tokens": 128, "forward_s": 2.0, "forward_gb": 0.1}, {"tokens": 256, "forward_s": 8.0, "forward_gb": 0.4}]
    assert plaintext._too_much(slow) == "512 tokens would take about 32 s, more than 20 s"


@pytest.mark.parametrize("name", QUICK)
def test_quick_size_makes_a_record_that_can_be_shown(name: str) -> None:
    (benchmark,) = registry.select([name])
    record = benchmark.measure(registry.Settings(repeats=1, quick=True))
    assert record["name"] == name
    for block in benchmark.blocks(record) or []:
        assert block.html() and block.markdown()
    if name == "references":
        for row in record["metrics"]["rows"]:
            assert row["max_difference"] < 1e-4 * max(1.0, row["scale"])


def test_slowdown_is_shown_only_for_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "softmax", "engine": "torch", "ms": 2.0}]
    demo = {"metrics": {"evaluate_s": 40.0}}
    monkeypatch.setattr(records, "latest", lambda: {"demo": demo})
    (table,) = plaintext_show.clear_request({"metrics": {"rows": rows}})
    assert isinstance(table, Table)
    assert table.rows[0][-1] == 20000.0 and len(table.columns) == 4
