"""Benchmarks of large models: the block that is cut out of a circuit computes what the circuit does there."""

import numpy as np
import pytest

from benchmarks import compile_time, models
from benchmarks.one_block import cut
from benchmarks.registry import benchmarks
from compiler import Target, compile_onnx
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
