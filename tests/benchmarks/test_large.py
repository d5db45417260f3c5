"""Benchmarks of large models: the block that is cut out of a circuit computes what the circuit does there."""

import numpy as np
import pytest

from benchmarks import compile_time, models, one_block
from benchmarks.one_block import cut
from benchmarks.registry import benchmarks
from compiler import Target, compile_onnx
from he_backend.openfhe_backend import available
from he_backend.params import Params
from he_backend.simulator import simulate


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return models.encoder(folder, blocks=2, width=8, heads=2, hidden=16, tokens=8)


def test_a_block_cut_out_is_the_circuit_there(encoder):
    path, samples = encoder
    whole = compile_onnx(path, samples[:-1], target=Target(insecure_log_n=10)).circuit
    block, x, y = cut(whole, "1.", {"x": samples[-1].astype(np.float64)})
    assert 0 < len(block.ops) < len(whole.ops)
    np.testing.assert_allclose(simulate(block, {"x": x}).outputs["y"], y, rtol=1e-12, atol=1e-12)
    assert all(level <= whole.keys[k] for k, level in block.keys.items())
    with pytest.raises(ValueError, match=r"begin with 0, 1,"):
        cut(whole, "7.", {"x": samples[-1].astype(np.float64)})


@pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")
def test_a_block_counts_all_its_keys_and_keeps_what_it_has(encoder):
    path, samples = encoder
    kept = []
    record = one_block.measure(
        *("block", path, samples),
        blocks=2,
        target=Target(insecure_log_n=10),
        progress=lambda done, total, what: None,
        keep=kept.append,
    )
    m, params = record["metrics"], Params.from_json(record["params"])
    whole = compile_onnx(path, samples[:-1], target=Target(insecure_log_n=10)).circuit
    block, *_ = one_block.cut(whole, "1.", {"x": samples[-1].astype(np.float64)})
    rotations = sum(params.key_bytes(level) for level in block.keys.values())
    assert m["key_gb"] * 1e9 == pytest.approx(rotations + params.key_bytes(block.relin_level), rel=1e-3)
    (before,) = kept
    assert before["metrics"]["key_gb"] == m["key_gb"] and "block_evaluate_s" not in before["metrics"]


def test_compile_time_by_stage_adds_up(encoder):
    path, samples = encoder
    record = compile_time.measure(
        "compile", path, samples, target=Target(insecure_log_n=10), progress=lambda done, total, what: None
    )
    metrics = record["metrics"]
    assert sum(metrics["stages_s"].values()) == pytest.approx(metrics["compile_s"], rel=0.05)
    assert metrics["verified"] < 1e-9
    assert metrics["ops"] == sum(metrics["by_kind"].values())


def test_large_benchmarks_are_found():
    wanted = {"request-2x128x32", "request-4x256x64", "compile-6x512x128", "block-6x512x128", "request-6x512x128"}
    assert wanted <= set(benchmarks())
