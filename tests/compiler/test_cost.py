"""Cost tables and forecasts: what is chosen, what scales, what a budget changes."""

import json
from pathlib import Path

import pytest

from compiler import cost
from compiler.cost import CostTable, work
from he_backend.base import HEError
from he_backend.params import Params

PARAMS = Params(log_n=16, levels=20, scale_bits=40, first_bits=46, digits=3)


def write(folder: Path, name: str, cpu: str, created: str) -> None:
    record = {"cpu": cpu, "created": created, "params": PARAMS.to_json(), "ms": {"rotate": {"20": 300.0, "10": 100.0}}}
    (folder / name).write_text(json.dumps(record))


def test_the_newest_table_of_this_processor_is_taken_else_the_reference(tmp_path, monkeypatch):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    here = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), None)
    if here is None:
        pytest.skip("this machine does not name its processor")
    monkeypatch.setattr(cost, "COSTS", tmp_path)
    monkeypatch.setattr(cost, "REFERENCE", "reference.json")
    write(tmp_path, "reference.json", "another processor", "2026-01-03")
    assert CostTable.load().name == "reference.json"
    write(tmp_path, "old.json", here, "2026-01-01")
    write(tmp_path, "new.json", here, "2026-01-02")
    assert CostTable.load().name == "new.json"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"cpu": "x", "params": {}, "ms": []}'], ids=["empty", "no fields", "bad fields"]
)
def test_what_is_no_table_says_how_to_make_one(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(HEError, match="bench ops"):
        CostTable.load(tmp_path / "t.json")


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
