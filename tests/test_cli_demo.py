"""The demo: its verdict, its server's end, and all of it once on a test-size ring."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from he_backend.openfhe_backend import available
from polyformer.commands import demo, demo_report
from polyformer.commands.console import Failure
from polyformer.commands.server_process import server_process
from tests.he_backend.running import ROOT
from tests.he_backend.small_circuit import TEST_PARAMS, mlp

openfhe = pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")


def story(*, error: float, equal: bool, margin: float) -> demo.Story:
    prediction = {"top1_equal": equal, "clear_margin": margin}
    return demo.Story(facts={"plan": {"error_bound": 0.1}, "max_abs_error": error, "prediction": prediction})


VERDICTS = {
    "as promised": (story(error=0.05, equal=True, margin=1.0), ""),
    "a tie may fall either way": (story(error=0.05, equal=False, margin=0.05), ""),
    "error above its bound": (story(error=0.2, equal=True, margin=1.0), "above the promised"),
    "no number": (story(error=float("nan"), equal=True, margin=1.0), "above the promised"),
    "another token": (story(error=0.05, equal=False, margin=0.5), "likeliest token differs"),
}


@pytest.mark.parametrize(("told", "says"), VERDICTS.values(), ids=VERDICTS.keys())
def test_verdict(told: demo.Story, says: str) -> None:
    if says:
        with pytest.raises(Failure, match=says):
            demo.verdict(told)
    else:
        demo.verdict(told)


def test_operators_join_prediction_and_measurement() -> None:
    plan = {
        "ops": [{"id": 0, "kind": "input", "source": "x"}, {"id": 1, "kind": "mul", "source": "y"}],
        "op_seconds": {"1": 2.0},
    }
    rows = demo_report.operators(
        plan, {"ops": [{"op": 1, "seconds": 3.0, "primitives": {"mul": {"count": 1, "seconds": 3.0}}}]}
    )
    assert [(r["predicted_s"], r["measured_s"]) for r in rows] == [(None, None), (2.0, 3.0)]


def test_stored_errors_do_not_publish_the_noise() -> None:
    facts = {"max_abs_error": 0.0123456789, "mean_abs_error": 1.23456789e-5}
    assert demo_report.errors(facts) == {"max_abs_error": 0.012, "mean_abs_error": 1.2e-5}


def test_training_text_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = demo.fingerprint(tmp_path)
    (tmp_path / "b.txt").write_text("two")
    assert len({before, demo.fingerprint(tmp_path), demo.fingerprint(tmp_path / "a.txt"), demo.fingerprint(None)}) == 3


FOREIGN = {  # files of a user's project, which a run once deleted or overwrote
    "client": (["client/app.py"], False),
    "client beside a mark": (["MARK", "client/secret/key.bin", "client/app.py"], False),
    "keys of the user's own": (["client/secret/key.bin"], False),
    "server": (["MARK", "server/main.py"], False),
    "model": (["model/weights.bin"], True),
    "model of another program": (["model/weights.bin"], False),
    "model.json of another program": (["model.json"], False),
    "a file": (["MARK", "client"], False),
}


@pytest.mark.parametrize(("files", "retrain"), FOREIGN.values(), ids=FOREIGN.keys())
def test_what_no_demo_made_is_left_alone(
    files: list[str], retrain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("checked too late"))
    for name in files:
        path = tmp_path / name.replace("MARK", "model.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"quick": true, "text": ""}' if name == "MARK" else "mine")
    with pytest.raises(Failure, match="--out"):
        demo.run(options(tmp_path, retrain=retrain))


def test_what_an_earlier_demo_left_is_no_obstacle(tmp_path: Path) -> None:
    for folder in ("client/secret", "client/evaluation", "server/keys", "model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model.json").write_text('{"quick": true, "text": ""}')
    demo.refuse_foreign(options(tmp_path, retrain=True))


def options(out: Path, *, retrain: bool) -> demo.Options:
    return demo.Options(
        out=out,
        text=None,
        prompt=None,
        backend="openfhe",
        quick=True,
        retrain=retrain,
        threads=1,
        max_memory_gb=1.0,
        seed=0,
    )


def served(folder: Path) -> Path:
    circuit = folder / "m.circuit"
    mlp(replace(TEST_PARAMS, log_n=11)).save(circuit)
    return circuit


@openfhe
def test_the_server_ends_with_its_block_whatever_happens(tmp_path: Path) -> None:
    circuit = served(tmp_path)
    seen = []

    def interrupted() -> None:
        with server_process(
            circuit, tmp_path / "s", tmp_path / "log", threads=1, plaintext_gb=0.1, insecure=True
        ) as server:
            seen.append(server.process)
            assert server.process.poll() is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen[0].poll() is not None


@openfhe
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    circuit = served(tmp_path)
    with (
        pytest.raises(Failure, match=r"ended with status 1.*--insecure"),
        server_process(circuit, tmp_path / "s", tmp_path / "log", threads=1, plaintext_gb=0.1, insecure=False),
    ):
        pass


@openfhe
def test_a_killed_server_is_named_as_the_reason(tmp_path: Path) -> None:
    with server_process(
        served(tmp_path), tmp_path / "s", tmp_path / "log", threads=1, plaintext_gb=0.1, insecure=True
    ) as server:
        unrelated = ValueError("x")
        assert server.explain(unrelated) is unrelated
        server.process.kill()
        assert "ran out of memory" in str(server.explain(unrelated))


@openfhe
@pytest.mark.slow
def test_the_whole_path_on_a_test_ring(tmp_path: Path) -> None:
    """Train, convert, export, compile, serve, ask, compare, report; then again with the model kept and another prompt."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "polyformer", "demo", "--quick", "--out", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=550)
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (record_file,) = tmp_path.glob("demo-*.json")
    record = json.loads(record_file.read_text())
    assert report["insecure"] is record["insecure"] is True
    assert first.stderr.count("INSECURE TEST RING") >= 3
    assert "INSECURE TEST RING" in (tmp_path / "report.html").read_text()
    metrics = record["metrics"]
    assert set(metrics) == {
        *(
            "evaluate_s",
            "predicted_evaluate_s",
            "total_s",
            "request_bytes",
            "promised_error",
            "keygen_s",
            "peak_gb",
            "upload_bytes",
            "reply_bytes",
            "max_abs_error",
            "mean_abs_error",
        ),
        *(
            "top1_equal",
            "logqp",
            "logqp_limit",
            "efficiency",
            "bound_s",
            "operators",
            "primitives",
            "heldout_loss_softmax",
            "heldout_loss_power",
            "heldout_loss_polynomial",
        ),
    }
    assert metrics["max_abs_error"] <= report["error_bound"] == metrics["promised_error"]
    assert 0 < metrics["request_bytes"] < metrics["upload_bytes"]
    assert 0 < metrics["efficiency"] <= 1 and metrics["operators"] == report["tables"]["operators"]
    foretold = {row["name"]: row["predicted_error"] for row in metrics["operators"]}
    assert {"QKV", "scores", "division", "FFN"} <= {name for name, error in foretold.items() if error > 0}
    assert "Against the bound" in (tmp_path / "report.html").read_text()
    assert np.isfinite(metrics["heldout_loss_polynomial"])
    phases = [p["name"] for p in report["phases"]]
    assert phases == [
        "train",
        "convert",
        "export",
        "compile",
        "keygen",
        "upload",
        "encrypt",
        "evaluate",
        "decrypt",
        "clear",
    ]
    assert not list((tmp_path / "server").rglob("secret"))
    second = subprocess.run(
        [*command, "--prompt", "My"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=550
    )
    assert second.returncode == 0, second.stderr
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["phases"][0]["name"] == "export"
    assert again["prediction"]["prompt"] == "My"
