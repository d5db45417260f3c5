"""Cost tables and forecasts: what is chosen, what scales, what a budget changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compiler import cost
from compiler.cost import CostTable, refresh_work, work
from he_backend.base import HEError
from he_backend.params import Params
from he_backend.trace import Node, Trace

PARAMS = Params(log_n=16, levels=20, scale_bits=40, first_bits=46, digits=3)


SEAL = replace(PARAMS, backend="tenseal", log_n=15, levels=19, first_bits=60, digits=20)


def write(folder: Path, name: str, cpu: str, created: str, params: Params = PARAMS) -> None:
    record = {"cpu": cpu, "created": created, "params": params.to_json(), "ms": {"rotate": {"20": 300.0, "10": 100.0}}}
    (folder / name).write_text(json.dumps(record))


@pytest.fixture
def here() -> str:
    """This machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), None)
    if found is None:
        pytest.skip("this machine does not name its processor")
    return found


def test_the_newest_table_of_this_processor_is_taken_else_the_reference(tmp_path, monkeypatch, here):
    monkeypatch.setattr(cost, "COSTS", tmp_path)
    monkeypatch.setattr(cost, "REFERENCE", "reference.json")
    write(tmp_path, "reference.json", "another processor", "2026-01-03")
    assert CostTable.load().name == "reference.json"
    write(tmp_path, "old.json", here, "2026-01-01")
    write(tmp_path, "new.json", here, "2026-01-02")
    assert CostTable.load().name == "new.json"


def test_a_table_is_taken_for_its_own_backend_only(tmp_path, monkeypatch, here):
    monkeypatch.setattr(cost, "COSTS", tmp_path)
    monkeypatch.setattr(cost, "REFERENCE", "reference.json")
    write(tmp_path, "reference.json", "another processor", "2026-01-01")
    assert (
        CostTable.load(backend="tenseal").name == "reference.json"
    )  # by the ratio of work, where there is nothing better
    write(tmp_path, "seal-elsewhere.json", "another processor", "2026-01-05", SEAL)
    assert CostTable.load(backend="tenseal").name == "seal-elsewhere.json"
    write(tmp_path, "seal.json", here, "2026-01-03", SEAL)
    write(tmp_path, "seal-test-ring.json", here, "2026-01-09", replace(SEAL, insecure=True))
    assert CostTable.load(backend="tenseal").name == "seal.json"
    assert CostTable.load().name == "reference.json"  # newer and of this processor, but of the other library
    write(tmp_path, "mine.json", here, "2026-01-02")
    assert CostTable.load().name == "mine.json"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"cpu": "x", "params": {}, "ms": []}'], ids=["empty", "no fields", "bad fields"]
)
def test_what_is_no_table_says_how_to_make_one(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(HEError, match="bench run ops"):
        CostTable.load(tmp_path / "t.json")


REFRESHING = Params(
    log_n=16, levels=23, scale_bits=54, first_bits=60, digits=6, secret="sparse192", refresh_encode=3, refresh_decode=3
)


def write_refresh(folder: Path, name: str, cpu: str, params: Params, ms: float) -> None:
    record = {"cpu": cpu, "created": "2026-01-01", "params": params.to_json(), "ms": {"refresh": {"4": ms}}}
    (folder / name).write_text(json.dumps(record))


def test_a_refresh_costs_what_the_most_similar_one_did(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "COSTS", tmp_path)
    write(tmp_path, "t.json", "x", "2026-01-01")
    with pytest.raises(HEError, match="bench run ops-refresh"):
        CostTable.load(tmp_path / "t.json").seconds("refresh", REFRESHING, 4)
    sparse = replace(REFRESHING, refresh_slots=4096)
    write_refresh(tmp_path, "other.json", "another processor", REFRESHING, 1000.0)
    assert CostTable.load(tmp_path / "t.json").seconds("refresh", REFRESHING, 4) == pytest.approx(1.0)
    write_refresh(tmp_path, "full.json", "x", REFRESHING, 20_000.0)
    write_refresh(tmp_path, "sparse.json", "x", sparse, 15_000.0)
    table = CostTable.load(tmp_path / "t.json")  # another processor's does not count any more
    assert table.seconds("refresh", REFRESHING, 4) == pytest.approx(20.0)
    assert table.seconds("refresh", sparse, 4) == pytest.approx(15.0)
    assert table.seconds("refresh", replace(REFRESHING, refresh_slots=2048), 4) == pytest.approx(15.0)
    longer = replace(REFRESHING, levels=25)
    assert table.seconds("refresh", longer, 4) == pytest.approx(20.0 * refresh_work(longer) / refresh_work(REFRESHING))
    assert cost.default_table() == tmp_path / cost.REFERENCE  # tables of refreshes alone are no tables of a machine


def test_the_repository_knows_the_cost_of_a_refresh():
    assert 5.0 < CostTable.load(cost.COSTS / cost.REFERENCE).seconds("refresh", REFRESHING, 4) < 60.0


def test_sums_in_the_extended_basis_have_rows_of_their_own(tmp_path):
    record = {"cpu": "x", "created": "", "params": PARAMS.to_json()}
    ms = {"add": {"20": 1.0}, "add_extended": {"20": 2.0}, "mul_plain": {"20": 3.0}}
    (tmp_path / "t.json").write_text(json.dumps({**record, "ms": ms}))
    table = CostTable.load(tmp_path / "t.json")
    nodes = [
        Node(id=0, op="input", args=(), level=20),
        Node(id=1, op="add", args=(0, 0), level=20),
        Node(id=2, op="add", args=(0, 0), level=20, extended=True),
        Node(id=3, op="weighted_sum", args=(0, 0), level=20),  # no row: as dear as a product
    ]
    trace = Trace(nodes=tuple(nodes), inputs={}, outputs={}, keys={}, relin_level=-1)
    assert [table.node(n, trace, PARAMS) for n in nodes] == pytest.approx([0.0, 0.001, 0.002, 0.006])
    assert table.measured(PARAMS) == {("add", 20): 0.001, ("add_extended", 20): 0.002, ("mul_plain", 20): 0.003}
    assert table.measured(REFRESHING) is None


def test_seconds_scale_with_limb_operations(tmp_path):
    write(tmp_path, "t.json", "x", "2026-01-01")
    table = CostTable.load(tmp_path / "t.json")
    assert table.seconds("rotate", PARAMS, 20) == pytest.approx(0.3)
    smaller = Params(log_n=15, levels=20, scale_bits=40, first_bits=46, digits=3)
    assert table.seconds("rotate", smaller, 20) == pytest.approx(0.3 * 15 / 32)
    assert table.seconds("rotate", PARAMS, 11) == pytest.approx(
        0.1 * work("rotate", PARAMS, 11) / work("rotate", PARAMS, 10)
    )
    assert table.seconds("unknown", PARAMS, 5) == 0.0
