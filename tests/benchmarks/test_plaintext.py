"""Models in the clear: fits, limits, and our layers equal to independent ones."""

import math

import numpy as np
import pytest
import torch

from benchmarks import plaintext, plaintext_show, registry
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
    if name == "clear-request":
        assert record["repeats"] == 3 == record["metrics"]["rows"][0]["repeats"]  # those that ran, not those asked for
    blocks = benchmark.blocks({**record, "version": benchmark.version})
    assert blocks
    for block in blocks:
        assert block.html() and block.markdown()
    if name == "references":
        for row in record["metrics"]["rows"]:
            assert row["max_difference"] < 1e-4 * max(1.0, row["scale"])


CPU = {"cpu": "A", "cores": 2, "threads": 1}


def clear_record(**changes):
    params = {"blocks": 2, "width": 128, "tokens": 32}
    return {
        "metrics": {"rows": [{"name": "softmax", "engine": "torch", "ms": 2.0}]},
        "machine": CPU,
        "params": params,
        **changes,
    }


def encrypted(**changes):
    base = {"metrics": {"evaluate_s": 40.0}, "machine": {**CPU, "threads": 2}, "params": {"log_n": 16}}
    return {**base, **changes}


def test_slowdown_is_over_as_many_tokens_and_says_threads() -> None:
    (table,) = plaintext_show.clear_request(clear_record(), {"demo": encrypted(), "generate-2x128": encrypted()})
    assert isinstance(table, Table)
    whole, one = table.columns[-2:]
    assert table.rows[0][-2:] == (20000.0, 32 * 20000.0)  # one encrypted token beside a 32nd of the clear request
    assert "2 threads" in whole and "1/32 of this request" in one
    assert "32 tokens in the clear on 1 thread" in table.caption
    (alone,) = plaintext_show.clear_request(clear_record(), {})
    assert isinstance(alone, Table) and len(alone.columns) == 5


OTHERS = {
    "machine": ({"machine": {**CPU, "cpu": "B"}}, "made on a machine with B, not A"),
    "cores": ({"machine": {**CPU, "cores": 64}}, "64 cores, not 2"),
    "quick": ({"quick": True}, "a quick run"),
    "shape": ({"params": {"model": {"blocks": 6, "width": 128, "length": 32}}}, "blocks 6, not 2"),
    "cut short": ({"metrics": {}}, "no evaluation"),
}


@pytest.mark.parametrize(("changes", "why"), OTHERS.values(), ids=OTHERS)
def test_what_cannot_be_compared_is_left_out(changes, why: str) -> None:
    (table,) = plaintext_show.clear_request(clear_record(), {"demo": encrypted(**changes)})
    assert isinstance(table, Table) and len(table.columns) == 5 and why in table.caption


def test_the_report_compares_with_the_records_that_it_shows() -> None:
    """Those of --results, not those of the repository."""
    (benchmark,) = registry.select(["clear-request"])
    record = {**clear_record(), "version": benchmark.version}
    (table,) = benchmark.blocks(record, {"demo": encrypted(), "mlp-784": encrypted()}) or ()
    assert isinstance(table, Table) and len(table.columns) == 6
    (table,) = benchmark.blocks(record, {}) or ()
    assert isinstance(table, Table) and len(table.columns) == 5


def test_memory_of_a_pass_is_not_hidden_by_an_earlier_peak() -> None:
    """The high-water mark of the process would stay where the large array left it."""
    held = np.ones(1 << 25)  # 268 MB
    del held
    found = plaintext.growth("softmax", (2048,), 1, progress=lambda done, total, what: None)
    assert found["points"][0]["forward_gb"] > 2048 * 1024 * 4 / 1e9  # the logits


def test_one_run_has_no_spread() -> None:
    assert plaintext._ms([0.002]) == {"ms": 2.0, "spread_ms": None, "repeats": 1, "warm_ups": 1}
    assert plaintext._ms([0.001, 0.003, 0.002])["spread_ms"] == pytest.approx(2.0)
