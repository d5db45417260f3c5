"""Cost against size: fits, the projection against compiled models, and records that can be shown."""

import math

import numpy as np
import pytest

from benchmarks import models, projection, records, registry, scaling, wide
from benchmarks.blocks import Table, is_number
from compiler import Target, compile_onnx
from compiler.cost import CostTable
from he_backend.base import LevelError
from he_backend.params import Params
from he_backend.trace import trace

NAMES = ("encrypted-scaling", "projection-1.4b", "quality-beside-cost")

SHOWN = {
    "encrypted-scaling": ("Thread-seconds by node against tokens T", "T 8, d 16, 1 bl., 2 thr.", "| QKV |", "| FFN |"),
    "projection-1.4b": (
        "weights encoded ahead, GB",
        "128 tokens, projected |",
        "projected thread-s",
        "projected peak memory, GB",
    ),
    "quality-beside-cost": (
        *(
            "bidirectional encoder",
            "non-polynomial functions, at the 2 blocks",
            "exact degree, model",
            "levels, compiled",
            "predicted s",
            "an insecure test ring of N = 2^10",
        ),
    ),
}


@pytest.mark.parametrize("e", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(e: float) -> None:
    points = [{"tokens": n, "seconds": 0.3 * n**e} for n in (16, 32, 64)] + [{"tokens": 128, "seconds": None}]
    found = scaling.exponent(points, "tokens", "seconds")
    assert found is not None and math.isclose(found, e, rel_tol=1e-9)
    assert scaling.exponent(points[-2:], "tokens", "seconds") is None


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 8), (2, 16)], ids=["one block", "two blocks"])
def test_projected_circuit_counts_what_a_compiled_one_counts(blocks: int, tokens: int, tmp_path) -> None:
    """Products of ciphertexts; the model that is compiled has a head on its first token besides."""
    path, x = models.encoder(tmp_path, blocks=blocks, width=16, heads=2, hidden=64, tokens=tokens)
    compiled = compile_onnx(path, x, target=Target(insecure_log_n=10)).circuit
    table = CostTable.load()
    shape = wide.Shape(blocks=blocks, width=16, heads=2, hidden=64, tokens=tokens)
    circuit = wide.circuit(shape, compiled.params, table, bottom=1)
    mine, theirs = (dict.fromkeys(("mul", "square"), 0) for _ in range(2))
    for counts, c in ((mine, circuit), (theirs, compiled)):
        for node in trace(c).nodes:
            if node.op in counts:
                counts[node.op] += 1
    assert mine == theirs and sum(mine.values()) > 0
    blocks_of = {op.source.partition(".")[0] for op in circuit.ops if op.kind == "linear"}
    assert {str(i) for i in range(blocks)} <= blocks_of


def test_refreshes_make_any_depth_fit_and_too_few_are_refused() -> None:
    params = Params(
        log_n=11,
        levels=24,
        scale_bits=54,
        first_bits=60,
        digits=4,
        secret="sparse192",
        insecure=True,
        refresh_encode=2,
        refresh_decode=2,
    )
    table, shape = CostTable.load(), wide.Shape(blocks=3, width=16, heads=2, hidden=16, tokens=8)
    circuit = wide.circuit(shape, params, table, sites=("mixed", "out"))
    kinds = [op.kind for op in circuit.ops]
    assert kinds.count("refresh") == 2 * 3
    with pytest.raises(LevelError, match="refresh more values"):
        wide.circuit(shape, params, table)


def test_every_site_of_a_block_has_ciphertexts() -> None:
    """A site whose tensors are called otherwise would be refreshed nowhere, and cost nothing."""
    params = Params(log_n=11, levels=24, scale_bits=40, first_bits=46, digits=4, insecure=True)
    shape = wide.Shape(blocks=2, width=16, heads=2, hidden=16, tokens=8)
    build = wide.lowered(shape, params, CostTable.load())
    assert all(wide.ciphertexts(build, site) > 0 for site in wide.SITES)


def test_blocks_add_up() -> None:
    table = CostTable.load()
    params = Params(log_n=11, levels=24, scale_bits=40, first_bits=46, digits=4, insecure=True)
    shape = wide.Shape(blocks=1, width=16, heads=2, hidden=16, tokens=8)
    one = projection.projected(shape, params, table, plaintext_budget=0)
    many = projection.stacked(one, shape, 7)
    assert math.isclose(many["projected_evaluate_s"], 7 * one["projected_evaluate_s"], rel_tol=1e-9)
    assert np.isfinite(many["projected_peak_gb"])


def test_what_a_record_does_not_say_is_marked_as_assumed() -> None:
    """The memory of a check has the weights encoded ahead in it: a typed figure of them proves nothing."""
    assert projection.kept_gb("demo", {}) == (projection.ASSUMED_KEPT_GB["demo"], True)
    assert projection.kept_gb("demo", {"encoded_gb": 2.5}) == (2.5, False)
    shape = {"blocks": 1, "width": 16, "heads": 2, "hidden": 64, "length": 8, "vocab": 16}
    params = Params(log_n=11, levels=24, scale_bits=40, first_bits=46, digits=4, insecure=True)
    metrics = {"evaluate_s": 1.0, "peak_gb": 2.0}
    demo = {
        "file": "demo.json",
        "quiet": True,
        "machine": {"threads": 2},
        "params": {**params.to_json(), "model": shape},
        "metrics": metrics,
    }
    for encoded, ratio in ((None, False), (0.0, True)):
        said = metrics if encoded is None else {**metrics, "encoded_gb": encoded}
        rows = projection.checks({"demo": {**demo, "metrics": said}}, CostTable.load())
        (row,) = [r for r in rows if r["name"] == "demo"]
        assert (row["projected_peak_over_measured"] is not None) is ratio
        assert row["encoded_gb_from"] == ("the record" if ratio else "assumed")
        assert row["projected_over_measured"] > 0
    (row,) = [r for r in projection.checks({"demo": {**demo, "metrics": {}}}, CostTable.load()) if r["name"] == "demo"]
    assert row["why"] == "demo.json has no evaluation"


@pytest.mark.parametrize("name", NAMES)
def test_quick_size_makes_a_record_that_can_be_shown(name: str) -> None:
    (benchmark,) = registry.select([name])
    record = benchmark.measure(registry.Settings(repeats=1, quick=True))
    assert record["name"] == name
    blocks = benchmark.blocks(record)
    assert blocks
    for block in blocks:
        assert block.html() and block.markdown()
    text = "".join(block.markdown() for block in blocks)
    for what in SHOWN[name]:
        assert what in text


def test_every_projected_figure_is_called_so() -> None:
    """In a table of its own caption or heading: nothing of a large model was run."""
    (benchmark,) = registry.select(["projection-1.4b"])
    record = records.latest()["projection-1.4b"]
    large, checks, shares, _ = (b for b in benchmark.blocks(record) or () if isinstance(b, Table))
    for table in (large, shares):
        assert table.caption.startswith("PROJECTED")
        figures = [c for c, value in zip(table.columns, table.rows[0], strict=True) if is_number(value)]
        assert all(c.startswith("projected") for c in figures if c != "parameters")
    assert all(row[0].endswith("projected") for row in large.rows)
    assert all(str(row[0]).startswith("request-") or str(row[0]).startswith("demo") for row in checks.rows)
