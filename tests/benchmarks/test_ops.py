"""A refresh has a cost table of its own, on a test ring here."""

import json

import pytest

from benchmarks import ops
from benchmarks.registry import Settings, benchmarks
from compiler import cost
from compiler.cost import CostTable
from he_backend.params import Params


def test_a_measured_refresh_is_what_the_compiler_reads(tmp_path, monkeypatch):
    seen = []
    benchmark = benchmarks()["ops-refresh-4096"]
    record = benchmark.run(
        Settings(quick=True, repeats=1, progress=lambda done, total, what: seen.append((done, total)))
    )
    params = Params.from_json(record["params"])
    assert params.refreshes and params.refresh_period == 64 and seen[-1][0] == seen[-1][1]
    path = benchmark.write(record, tmp_path)
    seconds = record["ms"]["refresh"][str(params.refresh_input)] / 1000.0
    assert seconds > 0
    monkeypatch.setattr(cost, "COSTS", tmp_path)
    (tmp_path / "t.json").write_text(
        json.dumps({"cpu": ops.cpu_name(), "created": "", "params": params.to_json(), "ms": {"rotate": {"1": 1.0}}})
    )
    assert path.parent == tmp_path
    # Rounding of floats: it is the measured figure times a ratio of work that is 1.
    assert CostTable.load(tmp_path / "t.json").seconds("refresh", params, 4) == pytest.approx(seconds, rel=1e-12)
