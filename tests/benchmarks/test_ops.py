"""Cost tables of both libraries and of a refresh, on test rings here."""

import json
from dataclasses import replace

import pytest

from benchmarks import ops
from benchmarks.registry import Settings, benchmarks
from compiler import cost, plan
from compiler.cost import CostTable
from he_backend import security
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


@pytest.mark.parametrize("name", ["ops", "ops-tenseal"])
def test_a_quick_table_is_one_that_the_compiler_reads(name, tmp_path):
    benchmark = benchmarks()[name]
    path = benchmark.write(benchmark.run(Settings(quick=True, repeats=1)), tmp_path)
    table, openfhe = CostTable.load(path), name == "ops"
    top = table.params.levels
    assert table.params.backend == ("openfhe" if openfhe else "tenseal") and table.params.insecure
    # What SEAL lacks has no row; on two threads its binding's lock decides, which a thread's own time does not show.
    assert ("hoist" in table.ms, "rotate_extended" in table.ms) == (openfhe, openfhe)
    assert ("ms_2_threads" in json.loads(path.read_text())) is openfhe
    for op in ("encode", "rotate", "mul", "mul_plain", "weighted_sum", "relinearize", "rescale", "keygen"):
        assert table.seconds(op, table.params, top) > 0, op
    assert table.seconds("rotate", table.params, top) > table.seconds("add", table.params, top)


def test_the_table_of_seal_is_of_its_largest_ring_at_128_bits():
    from benchmarks.entries.primitives import CHAINS

    log_n, levels, first, digits = CHAINS["tenseal"]
    params = Params(backend="tenseal", log_n=log_n, levels=levels, scale_bits=40, first_bits=first, digits=digits)
    assert log_n == plan.LARGEST_RING["tenseal"] and levels == plan.levels_at_most("tenseal", log_n)
    assert params.log_qp <= security.limit(params) < replace(params, levels=levels + 1, digits=digits + 1).log_qp
