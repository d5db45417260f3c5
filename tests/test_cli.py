"""The command line: help with examples, errors as a sentence, exit codes, JSON, and a request from file to file."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer.main

from he_backend import owner
from he_backend.circuit import Circuit
from he_backend.openfhe_backend import available
from polyformer import cli
from polyformer.commands import infer, isolated
from polyformer.commands.console import Advance, Failure
from tests.he_backend.running import ROOT, free_port, running
from tests.he_backend.small_circuit import SECURE_PARAMS, TEST_PARAMS, WIDTH, mlp, reference
from tests.he_backend.stub import StubEngine, StubOwner

COMMANDS = (
    *(
        "train",
        "adopt",
        "convert",
        "export",
        "plan",
        "compile",
        "keygen",
        "serve",
        "encrypt",
        "evaluate",
        "decrypt",
        "infer",
    ),
    *("generate", "report", "inspect", "bench", "demo"),
)


def polyformer(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own."""
    command = [sys.executable, "-m", "polyformer", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_every_command_exists() -> None:
    assert set(typer.main.get_command(cli.app).commands) == set(COMMANDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    assert re.search(rf"Example:\s+polyformer\s+{command}", capsys.readouterr().out)


def test_an_option_is_described_once() -> None:
    """Two commands with one option take it from `options.py`, or from a name of their module."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "polyformer" / "commands").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
                found.setdefault(ast.unparse(node), []).append(f"{path.name}:{node.lineno}")
    assert len(found) > 20
    assert {option: places for option, places in found.items() if len(places) > 1} == {}


WRONG_USAGE = {
    "unknown command": ["bogus"],
    "unknown option": ["inspect", "--bogus"],
    "missing argument": ["keygen"],
    "backend": ["compile", "x.onnx", "--backend", "foo"],
    "no threads": ["compile", "x.onnx", "--threads", "0"],
    "no ring": ["compile", "x.onnx", "--insecure-log-n", "0"],
    "port out of range": ["serve", "x", "--port", "70000"],
}


@pytest.mark.parametrize("arguments", WRONG_USAGE.values(), ids=WRONG_USAGE.keys())
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert cli.run(arguments) == 2


FAILURES = {
    "no such file": (["inspect", "/nothing"], "does not exist"),
    "what to run first": (["keygen", "/nothing.client", "--out", "/tmp/x"], "`polyformer compile` makes it"),
    "not an artefact": (["inspect", str(ROOT / "Makefile")], "no artefact of polyformer"),
    "no server": (["serve", "/nothing.circuit"], "`polyformer compile` makes it"),
    "unknown benchmark": (["bench", "run", "bogus"], "no benchmark is called 'bogus'; known are: ops, "),
    "no model": (["convert", "/nothing"], "`polyformer train /nothing` makes it"),
}


@pytest.mark.parametrize(("arguments", "says"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_1_and_a_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert "Traceback" not in error


BAD_INPUT = {
    "calibration without tokens": (["compile", "bad.onnx", "--calibration", "other.npz"], "no `tokens`"),
    "calibration of one array": (["compile", "bad.onnx", "--calibration", "x.npy"], "no `tokens`"),
    "garbage as ONNX": (["inspect", "bad.onnx"], "not an ONNX file"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_a_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.onnx").write_bytes(b"\xff garbage")
    np.save("x.npy", np.zeros(3))
    np.savez("other.npz", x=np.zeros(3))
    test_failures_are_1_and_a_sentence(arguments, says, capsys)


@pytest.mark.parametrize("name", ["empty.npy", "other.npz", "text.npy"])
def test_a_tensor_that_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(Failure, match=r"\.npy|one array"):
        infer.read_input(mlp(TEST_PARAMS).spec(), tmp_path, None, None, tmp_path / name, None)


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failure):
        cli.run(["inspect", "/nothing", "--debug"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polyformer.commands.inspecting.describe", interrupted)
    assert cli.run(["inspect", str(ROOT)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "openfhe", "tenseal", "fastapi", "matplotlib", "numpy")
    code = f"import sys, polyformer.cli; print(*[n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_inspect_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit = mlp(TEST_PARAMS)
    circuit.save(tmp_path / "m.circuit")
    circuit.spec().save(tmp_path / "m.client")
    (tmp_path / "request").write_bytes(owner.seal(circuit.spec(), StubOwner(), {"x": np.zeros(WIDTH)}))
    for name, what in (("m.circuit", "circuit"), ("m.client", "client-spec"), ("request", "request")):
        assert cli.run(["inspect", str(tmp_path / name), "--json"]) == 0
        shown = capsys.readouterr()
        facts = json.loads(shown.out)
        assert facts["what"] == what
        assert circuit.sha256 in facts.values()
        assert ("INSECURE" in shown.err) == (name != "request")
        assert "predicted error after" not in facts
    replace(circuit, errors={1: 0.0078125, 2: 2e-5, 3: 0.001}).save(tmp_path / "m.circuit")
    assert cli.run(["inspect", str(tmp_path / "m.circuit"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted error after"] == {"FFN": 0.0078, "activation": 2e-5}


def test_a_test_ring_must_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlp(TEST_PARAMS).spec().save(tmp_path / "m.client")
    assert cli.run(["keygen", str(tmp_path / "m.client"), "--out", str(tmp_path / "keys")]) == 1
    error = capsys.readouterr().err
    assert "INSECURE" in error
    assert "--insecure" in error


@pytest.mark.parametrize(
    ("predicted", "options", "budget"),
    [
        ({"plaintext_bytes": 123456789.0}, [], 123456789),
        ({}, [], 4e9),
        ({"plaintext_bytes": 5.0}, ["--plaintext-gb", "2"], 2e9),
    ],
    ids=["the plan's", "no plan", "an option"],
)
def test_serve_keeps_to_the_plan(
    predicted: dict[str, float], options: list[str], budget: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(mlp(TEST_PARAMS), predicted=predicted).save(tmp_path / "m.circuit")
    seen: dict[str, object] = {}

    class Engine(StubEngine):
        def __init__(self, circuit: Circuit, **kwargs: object) -> None:
            super().__init__(circuit)
            seen.update(kwargs)

    monkeypatch.setattr("he_backend.server.ensure_environment", lambda: None)
    monkeypatch.setattr("he_backend.engine.CircuitEngine", Engine)
    monkeypatch.setattr("he_backend.server.serve", lambda server, **_: None)
    assert cli.run(["serve", str(tmp_path / "m.circuit"), "--folder", str(tmp_path / "s"), "--insecure", *options]) == 0
    assert seen["plaintext_budget"] == budget


def test_serve_refuses_to_start_beside_a_secret_key(tmp_path: Path) -> None:
    mlp(TEST_PARAMS).save(tmp_path / "m.circuit")
    place = tmp_path / "server" / "deep" / "secret"
    place.mkdir(parents=True)
    (place / "key.bin").write_bytes(b"x")
    done = polyformer("serve", tmp_path / "m.circuit", "--folder", tmp_path / "server", "--insecure")
    assert done.returncode == 1
    assert "must never hold one" in " ".join(done.stderr.split())


def test_likeliest_tokens_are_those_of_the_last_position() -> None:
    logits = np.array([[9.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    rows = infer.likeliest(logits, str, 2)
    assert [row["id"] for row in rows] == [2, 1]
    assert rows[0]["probability"] == pytest.approx(np.exp(2) / (1 + np.e + np.exp(2)))


def work(*, progress: Advance, fail: bool = False) -> int:
    """For the test below: importable by the process that runs it."""
    progress(1, 2, "half")
    if fail:
        raise ValueError("this is why")
    return 7


def test_isolated_work_reports_and_fails_with_its_reason() -> None:
    seen: list[object] = []
    assert isolated.isolated(work, progress=lambda *value: seen.append(value)) == 7
    assert seen == [(1, 2, "half")]
    with pytest.raises(Failure, match="ValueError: this is why"):
        isolated.isolated(work, fail=True, progress=lambda *value: None)


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")
def test_from_file_to_file_at_128_bits(tmp_path: Path) -> None:
    """keygen, serve, encrypt, evaluate, decrypt, infer: each on what the one before left on disk."""
    circuit = mlp(SECURE_PARAMS)
    circuit.save(tmp_path / "m.circuit")
    circuit.spec().save(tmp_path / "m.client")
    x = np.linspace(-1, 1, WIDTH)
    np.save(tmp_path / "x.npy", x)
    client, keys = tmp_path / "m.client", tmp_path / "keys"
    made = polyformer("keygen", client, "--out", keys, "--json")
    assert json.loads(made.stdout)["circuit_sha256"] == circuit.sha256
    common = [client, "--keys", keys, "--json"]
    assert polyformer("encrypt", *common, "--tensor", tmp_path / "x.npy", "--out", tmp_path / "request").returncode == 0
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = [
        "-m",
        "polyformer",
        "serve",
        str(tmp_path / "m.circuit"),
        "--folder",
        str(tmp_path / "s"),
        "--port",
        str(port),
    ]
    with running(server, port):
        asked = polyformer(
            "evaluate",
            client,
            tmp_path / "request",
            "--keys",
            keys,
            "--url",
            url,
            "--out",
            tmp_path / "reply",
            "--json",
        )
        assert json.loads(asked.stdout)["timing"]["threads"] == 2
        direct = polyformer("infer", *common, "--url", url, "--tensor", tmp_path / "x.npy")
    opened = polyformer("decrypt", client, tmp_path / "reply", "--keys", keys, "--save", tmp_path / "y.npy", "--json")
    for done in (direct, opened):
        np.testing.assert_allclose(json.loads(done.stdout)["output"], reference(x), atol=SPEC_ACCURACY)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), reference(x), atol=SPEC_ACCURACY)
    count = json.loads((keys / "secret" / "decryptions.json").read_text())
    assert count == {"decryptions": 2}
    gone = polyformer("infer", *common, "--url", url, "--tensor", tmp_path / "x.npy")
    assert gone.returncode == 1
    assert "is `polyformer serve` running?" in " ".join(gone.stderr.split())


SPEC_ACCURACY = mlp(TEST_PARAMS).error_bound  # decrypted values are rounded to it
