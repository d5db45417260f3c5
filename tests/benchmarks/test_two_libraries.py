"""Two libraries beside each other, at test rings: the record, its tables, and which models fit SEAL's levels."""

import re

import numpy as np
import pytest

from benchmarks import memory, records, registry, two_libraries, two_libraries_show
from compiler import Target, compile_onnx
from he_backend import tenseal_backend

LIBRARIES = two_libraries.LIBRARIES
pytestmark = pytest.mark.skipif(tenseal_backend.available() is not None, reason="tenseal is not installed")


@pytest.fixture(scope="module")
def measured():
    """The record of the quick size, and what was kept on the way."""
    kept: list[registry.Record] = []
    benchmark = registry.benchmarks()["two-libraries"]
    record = benchmark.measure(registry.Settings(repeats=1, quick=True, keep=kept.append))
    return record, kept


def test_quick_size_makes_a_record_of_both_libraries(measured):
    record, kept = measured
    assert records.check(record, "two-libraries") is record and record["params"]["insecure"]
    m = record["metrics"]
    assert [row["name"] for row in m["models"]] == [model.name for model in two_libraries.QUICK]
    assert [len(partial["metrics"]["models"]) for partial in kept] == [1, 2]
    for row in m["models"]:
        openfhe, tenseal = (row["libraries"][name] for name in LIBRARIES)
        assert openfhe["onnx_sha256"] == tenseal["onnx_sha256"]
        assert openfhe["levels"] == tenseal["levels"]  # of the model, not of the library
        assert openfhe["params"]["backend"] == "openfhe" and tenseal["params"]["backend"] == "tenseal"
        for found in (openfhe, tenseal):
            assert 0 < found["max_abs_error"] <= found["promised_error"]
            assert 0 < found["efficiency"] <= 1 and 0 < found["evaluate_s"] < found["total_s"]
            assert found["evaluate_2_threads_s"] > 0 and found["key_bytes"] > 0 and found["request_bytes"] > 0
        assert row["ratio"]["median"] == pytest.approx(tenseal["evaluate_s"] / openfhe["evaluate_s"])  # of one turn
        rotations = {name: {r["name"]: r["count"] for r in row["libraries"][name]["primitives"]} for name in LIBRARIES}
        assert rotations["tenseal"]["ct-ct"] == rotations["openfhe"]["ct-ct"] > 0


def test_primitives_are_compared_at_one_ring(measured):
    m = measured[0]["metrics"]
    openfhe, tenseal = (m["ring"][name] for name in LIBRARIES)
    assert {k for k in openfhe if openfhe[k] != tenseal[k]} == {"backend", "first_bits"}
    rotate, hoist = m["primitives_ms"]["rotate"], m["primitives_ms"]["hoist"]
    assert set(rotate) == {"3", "1"} and all(v > 0 for row in rotate.values() for v in row.values())
    assert hoist["3"]["openfhe"] > 0 and hoist["3"]["tenseal"] is None
    for name in LIBRARIES:  # at full size: secure in both, and the largest that SEAL has
        params = two_libraries.one_ring(name, quick=False)
        assert params.special_limbs == 1 and params.digit_limbs == 1 and not params.insecure


def test_tables_stand_side_by_side(measured):
    record, kept = measured
    m = record["metrics"]
    picture, requests, nodes, primitives, ring = two_libraries_show.show(record)
    assert picture.svg.startswith("<svg") and "TenSEAL, 2 threads" in picture.svg
    for table in (requests, nodes, primitives, ring):
        assert "OpenFHE" in table.markdown() and "TenSEAL" in table.html()
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert "at most 19 at 128 bits" in requests.caption
    first = m["models"][0]
    by_name = {name: {r["name"]: r for r in first["libraries"][name]["primitives"]} for name in LIBRARIES}
    (line,) = [row for row in primitives.rows if row[:2] == (first["name"], two_libraries_show.SWITCHES)]
    sums = [sum(by_name[name].get(p, {}).get("seconds", 0.0) for p in ("rotate", "key switch")) for name in LIBRARIES]
    assert line[4:7] == pytest.approx((*sums, sums[1] / sums[0]))
    assert {row[1] for row in nodes.rows if row[0] == "block-8x8"} >= {"QKV", "scores", "power", "weighted sum", "FFN"}
    hoist = next(row for row in ring.rows if row[0] == "hoist")
    assert hoist[1] > 0 and hoist[2:4] == (None, None)
    assert len(two_libraries_show.show(kept[0])) == 4  # of a run that was cut short: no primitives yet


def test_one_block_fits_the_levels_of_seal_and_two_do_not(measured, tmp_path):
    m = measured[0]["metrics"]
    needs, most, over = map(
        int, re.findall(r"needs (\d+) levels, .* most (\d+) at 128 bits: (\d+) too", m["too_deep"])[0]
    )
    assert most == m["levels"]["tenseal"] < needs <= m["levels"]["openfhe"] and over == needs - most
    path, samples = two_libraries.block(tmp_path)
    circuit = compile_onnx(path, samples[:-1], target=Target(backend="tenseal")).circuit
    assert not circuit.params.insecure and circuit.params.levels <= most


def test_memory_is_what_a_part_grew_by():
    with memory.watch() as first:
        held = np.ones(25_000_000)  # 0.2 GB
    with memory.watch() as second:
        short = np.ones(12_500_000)
        del short
    if first.grown_gb is None:
        pytest.skip("this system does not lower the high-water mark")
    assert held.nbytes == 200_000_000
    assert 0.19 < first.grown_gb < 0.25 and 0.09 < second.grown_gb < 0.15
    assert second.peak_gb > 0.3  # all of the process


def test_memory_is_unknown_where_the_system_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    with memory.watch() as found:
        pass
    assert found == memory.Peak()
