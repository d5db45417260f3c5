"""The record of a measured request: bytes on the wire, warm-ups and memory, beside its seconds and errors."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import records, registry, request_show, requests
from compiler import Target, compile_onnx
from he_backend import keys, wire
from he_backend.openfhe_backend import available
from tests.compiler.models import norm_mlp

openfhe = pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")


@openfhe
@pytest.mark.parametrize(("repeats", "warm_ups"), [(1, 0), (2, 1)])
def test_a_request_records_its_bytes_and_warm_ups(tmp_path: Path, repeats: int, warm_ups: int) -> None:
    samples = np.random.default_rng(1).normal(0, 0.5, (3, 4, 8)).astype(np.float32)
    path, target = norm_mlp(tmp_path / "m.onnx", layer_norm=False, width=8), Target(insecure_log_n=10)
    kept: list[registry.Record] = []
    record = requests.measure(
        "m",
        path,
        samples,
        target=target,
        repeats=repeats,
        progress=lambda done, total, what: None,
        weights="random",
        keep=kept.append,
    )
    circuit = compile_onnx(path, samples[:-1], target=target).circuit
    assert circuit.params.to_json() == record["params"]
    moduli = keys.backend("openfhe").Client(circuit.params, allow_insecure=True).moduli
    request, reply = (
        wire.ciphertext_bytes(moduli, door[0].level, circuit.params.log_n) for door in (circuit.inputs, circuit.outputs)
    )
    metrics = record["metrics"]
    assert metrics["warm_ups"] == warm_ups and record["repeats"] == repeats
    assert metrics["reply_bytes"] == reply
    assert metrics["upload_bytes"] == pytest.approx(keys.evaluation_bytes(circuit.spec()) + request, rel=1e-3)
    assert metrics["key_gb"] == pytest.approx(keys.evaluation_bytes(circuit.spec()) / 1e9, rel=1e-3)
    assert metrics["prepare_s"] > 0 and metrics["encode_s"] >= 0
    assert (metrics["evaluate_spread_s"] is None) == (repeats == 1)  # one run says nothing about spread
    # Ctrl-C loses at most the evaluation under way.
    assert len(kept) == 1 + repeats + warm_ups
    assert "evaluate_s" not in kept[0]["metrics"] and kept[0]["metrics"]["keygen_s"] > 0
    assert all(k["metrics"]["evaluate_s"] > 0 for k in kept[1:])
    for r in (record, kept[0]):
        first, *tables = request_show.request(r)
        assert len(tables) == (2 if r is record else 0)
        shown = first.markdown()
        assert "keys made, s" in shown and first.html()
    for what in (
        "largest error",
        "peak memory",
        "keys and request sent",
        "encrypt, evaluate",
        "predicted",
        "refreshes",
    ):
        assert what in request_show.summary(record).markdown()
    assert 0.05 < metrics["peak_gb"] <= record["peak_gb"] + 1e-3


def test_peak_memory_is_in_gigabytes_of_the_kernels_high_water_mark() -> None:
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM:")]
    assert records.peak_gb() == pytest.approx(int(line.split()[1]) * 1024 / 1e9, rel=0.01)
