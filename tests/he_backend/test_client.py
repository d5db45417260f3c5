"""The client: what it refuses to encrypt, how it reads a reply, and one real circuit at 128 bits through two processes."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from he_backend import keycheck, keys, openfhe_backend, owner, tenseal_backend
from he_backend.base import HEError, ManifestError, RangeError, WireError
from he_backend.circuit import ClientSpec
from he_backend.client import Client, ConnectError, compare_manifest
from he_backend.engine import CircuitEngine, KeyOwner
from he_backend.params import Params
from he_backend.server import Limits, Server
from tests.he_backend.running import free_port, running
from tests.he_backend.small_circuit import SECURE_PARAMS, TEST_PARAMS, WIDTH, mlp, reference
from tests.he_backend.stub import StubOwner

SPEC = mlp(TEST_PARAMS).spec()
X = np.linspace(-1, 1, WIDTH, dtype=np.float64)


def test_values_beyond_calibration_are_not_encrypted() -> None:
    for bad in (X * 1.5, np.where(X[0] == X, np.nan, X)):
        with pytest.raises(RangeError, match="was made for"):
            owner.seal(SPEC, StubOwner(), {"x": bad})
    with pytest.raises(RangeError, match="missing"):
        owner.seal(SPEC, StubOwner(), {"y": X})
    with pytest.raises(WireError, match="shape"):
        owner.seal(SPEC, StubOwner(), {"x": X[:3]})


def token_spec() -> ClientSpec:
    """A specification that embeds 4 tokens of a vocabulary of 10."""
    arrays = {**SPEC.arrays, "embedding": np.zeros((10, 4), np.float32), "positions": np.zeros((4, 4), np.float32)}
    return replace(SPEC, embedding=True, arrays=arrays)


@pytest.mark.parametrize(
    ("tokens", "says"), [([1, 2, 3], "takes 4"), ([1, 2, 3, 10], "0 to 9"), ([-1, 2, 3, 4], "0 to 9")], ids=str
)
def test_token_ids_are_checked(tokens: list[int], says: str) -> None:
    with pytest.raises(RangeError, match=says):
        owner.embed(token_spec(), np.array(tokens))


def test_a_circuit_without_embedding_takes_no_tokens() -> None:
    with pytest.raises(HEError, match="no embedding"):
        owner.embed(SPEC, np.array([1]))


@pytest.mark.parametrize("accuracy", [1e-3, 0.25, 3.0])
def test_rounding_hides_less_than_the_accuracy(accuracy: float) -> None:
    values = np.random.default_rng(0).normal(size=100)
    rounded = owner.round_to(values, accuracy)
    assert np.abs(rounded - values).max() <= accuracy / 2
    assert len(np.unique(rounded)) < 100 or accuracy < 0.01
    np.testing.assert_array_equal(owner.round_to(values, 0.0), values)


def test_decryptions_are_counted_and_end(tmp_path: Path) -> None:
    counter = owner.Counter(tmp_path / "secret" / "count.json", limit=3)
    assert [counter.count() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(HEError, match="make new keys"):
        counter.count()
    with pytest.raises(HEError, match="make new keys"):  # the count outlives the process
        owner.Counter(tmp_path / "secret" / "count.json", limit=3).count()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"decryptions": true}', '{"decryptions": -5}'])
def test_a_damaged_count_is_no_fresh_start(text: str, tmp_path: Path) -> None:
    path = tmp_path / "count.json"
    path.write_text(text)
    with pytest.raises(HEError, match="damaged"):
        owner.Counter(path).count()


def test_a_crash_while_counting_loses_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = owner.Counter(tmp_path / "count.json")
    counter.count()
    with monkeypatch.context() as patched:
        patched.setattr("he_backend.owner.json.dump", interrupted)
        with pytest.raises(KeyboardInterrupt):
            counter.count()
    assert counter.count() == 2


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_nothing_is_decrypted_that_could_not_be_rounded(bound: float, tmp_path: Path) -> None:
    with pytest.raises(HEError, match="error bound"):
        owner.open_reply(replace(SPEC, error_bound=bound), StubOwner(), b"", owner.Counter(tmp_path / "count.json"))


def manifest_of(spec: ClientSpec) -> dict[str, object]:
    """What an honest server says."""
    return {
        "format": "manifest",
        "version": 1,
        "circuit_sha256": spec.circuit_sha256,
        "params": spec.params.to_json(),
        "keys": {str(k): level for k, level in spec.keys.items()},
        "relin_level": spec.relin_level,
        "inputs": [{**vars(s), "shape": list(s.shape)} for s in spec.inputs],
        "outputs": [{**vars(s), "shape": list(s.shape)} for s in spec.outputs],
        "moduli": list(StubOwner.moduli),
    }


CHANGES: dict[str, dict[str, object]] = {
    "circuit_sha256": {"circuit_sha256": "00"},
    "params.levels": {"params": {**SPEC.params.to_json(), "levels": 9}},
    "params.insecure": {"params": {**SPEC.params.to_json(), "insecure": False}},
    "keys": {"keys": {}},
    "outputs": {"outputs": []},
    "moduli": {"moduli": [3]},
}


@pytest.mark.parametrize("field", CHANGES)
def test_manifest_differences_are_named(field: str) -> None:
    honest = manifest_of(SPEC)
    compare_manifest(SPEC, honest, StubOwner.moduli)
    with pytest.raises(ManifestError) as caught:
        compare_manifest(SPEC, {**honest, **CHANGES[field]}, StubOwner.moduli)
    assert set(caught.value.differences) == {field}


def says(*answers: object, status: int = 200) -> Client:
    """A client of a server that gives these answers, the last one for ever."""
    left = [json.dumps(a).encode() for a in answers]

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, stream=httpx.ByteStream(left.pop(0) if len(left) > 1 else left[0]))

    return Client("http://x", transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    "answer", [{}, {"job": 1}, {"job": "a", "state": "running"}, {"job": "\n", "state": "running"}]
)
def test_an_answer_of_another_shape_is_a_wire_error(answer: dict[str, object]) -> None:
    with says(answer, {}) as client, pytest.raises(WireError, match="not what a polyformer server says"):
        client.evaluate(b"", max_reply=9, every=0.0, progress=lambda job: None)


@pytest.mark.parametrize("answer", [{}, {"weights": 1, "keys": 2}, {"weights": {}, "keys": {"state": "waiting"}}])
def test_a_status_of_another_shape_is_a_wire_error(answer: dict[str, object]) -> None:
    with says(answer) as client, pytest.raises(WireError, match="not what a polyformer server says"):
        client.wait_ready()


def test_a_servers_text_cannot_write_to_the_terminal() -> None:
    evil = "\x1b[2J\r\u202eok" + "x" * 5000
    stage = {"state": "failed", "error": evil}
    job = {"job": "1", "state": "failed", "error": {"message": evil}}
    for client, call in (
        (says({"message": evil}, status=400), Client.status),
        (says({"weights": stage, "keys": stage}), Client.wait_ready),
        (says(job), lambda c: c.evaluate(b"", max_reply=9)),
    ):
        with client, pytest.raises(HEError) as caught:
            call(client)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2100
    seen: list[str] = []
    running_job = {"job": "1", "state": "running", "current": evil}
    with says(running_job, running_job, job) as client, pytest.raises(HEError):
        client.evaluate(b"", max_reply=9, every=0.0, progress=lambda j: seen.append(j["current"]))
    assert seen[0].isprintable()


@pytest.mark.parametrize("url", ["", "localhost:8000", "http://", "http://a:b", "ftp://a", "http://\x00"])
def test_what_is_not_an_address(url: str) -> None:
    with pytest.raises(ConnectError, match="is not an address"):
        Client(url)


def test_waiting_for_a_server_that_does_not_answer_yet() -> None:
    def late(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) < 3:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, stream=httpx.ByteStream(b"{}"))

    asked: list[httpx.Request] = []
    with Client("http://x", transport=httpx.MockTransport(late)) as client:
        with pytest.raises(ConnectError):
            client.wait_answer(0.0)
        client.wait_answer(10.0)
    assert len(asked) == 3


def backends() -> list[object]:
    return [
        pytest.param(
            replace(
                SECURE_PARAMS, backend=module.NAME, digits=2 if module is openfhe_backend else SECURE_PARAMS.levels + 1
            ),
            id=module.NAME,
            marks=pytest.mark.skipif(module.available() is not None, reason=f"{module.NAME} is not installed"),
        )
        for module in (openfhe_backend, tenseal_backend)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("params", backends())
def test_a_real_circuit_at_128_bits_through_two_processes(params: Params, tmp_path: Path) -> None:
    """Keys, request and reply of N = 2^14; the server is `polyformer serve`, and is killed and restarted in between."""
    circuit = mlp(params)
    assert not circuit.params.insecure
    circuit.save(tmp_path / "model.circuit")
    spec = circuit.spec()
    manifest = keys.generate(spec, tmp_path / "client")
    who = KeyOwner(spec, tmp_path / "client")
    port = free_port()
    url, folder = f"http://127.0.0.1:{port}", tmp_path / "server"
    command = [
        "-m",
        "polyformer",
        "serve",
        str(tmp_path / "model.circuit"),
        "--folder",
        str(folder),
        "--port",
        str(port),
    ]

    def ask(client: Client, x: np.ndarray) -> np.ndarray:
        most = owner.expected(spec, who, "reply").max_bytes
        reply, timing = client.evaluate(owner.seal(spec, who, {"x": x}), max_reply=most)
        assert timing["primitives"]["weighted_sum"]["count"] == 2 * WIDTH
        opened = owner.open_reply(spec, who, reply, owner.Counter(who.counter_path))
        assert np.abs(opened.tensors["y"] - opened.exact["y"]).max() <= spec.error_bound / 2
        return np.asarray(opened.exact["y"])

    with running(command, port) as process, Client(url) as client:
        client.agree(spec, who.moduli)
        client.upload(manifest, tmp_path / "client" / "evaluation")
        client.wait_ready()
        np.testing.assert_allclose(ask(client, X), reference(X), atol=1e-6)
        process.kill()
        process.wait()
    assert keys.find_secret(folder) is None
    with running(command, port), Client(url) as client:
        client.wait_ready()
        np.testing.assert_allclose(ask(client, X[::-1]), reference(X[::-1]), atol=1e-6)
        other = replace(manifest, key_id="0" * 32)
        with pytest.raises(ManifestError, match="holds other keys"):
            client.upload(other, tmp_path / "client" / "evaluation")
        np.testing.assert_allclose(ask(client, X), reference(X), atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(tenseal_backend.available() is not None, reason="tenseal is not installed")
def test_a_key_in_a_foreign_format_is_loaded_elsewhere_first(tmp_path: Path) -> None:
    """SEAL's parser sees bytes from outside, in a process that may die: whatever happens there is a WireError here."""
    params = replace(TEST_PARAMS, backend="tenseal", log_n=11, digits=TEST_PARAMS.levels + 1)
    spec = mlp(params).spec()
    manifest = keys.generate(spec, tmp_path, allow_insecure=True)
    path = tmp_path / "evaluation" / manifest.files[0].name
    keycheck.rehearse(params, manifest.files[0], path)
    good = path.read_bytes()
    for bad in (
        good[:-100],
        good[:80] + b"\xff" * 64 + good[144:],
        good[: keys.HEADER] + bytes(200),
        good[: keys.HEADER],
    ):
        path.write_bytes(bad)
        with pytest.raises(WireError):
            keycheck.rehearse(params, manifest.files[0], path)


@pytest.mark.skipif(openfhe_backend.available() is not None, reason="OpenFHE is not installed")
def test_a_key_whose_residues_are_too_large_is_refused(tmp_path: Path) -> None:
    """The right length, header and hash are not enough: the engine looks at every residue before the library does."""
    import hashlib

    params = replace(TEST_PARAMS, log_n=11)
    circuit = mlp(params)
    spec = circuit.spec()
    manifest = keys.generate(spec, tmp_path, allow_insecure=True)
    engine = CircuitEngine(circuit, threads=1, plaintext_budget=0, allow_insecure=True)
    path = tmp_path / "evaluation" / "relin.key"
    data = bytearray(path.read_bytes())
    data[-8:] = b"\xff" * 8
    path.write_bytes(data)
    file = replace(manifest.files[0], sha256=hashlib.sha256(data).hexdigest())
    assert file.name == "relin.key"
    with pytest.raises(WireError):
        engine.load_key(path, file, manifest)


@pytest.mark.skipif(openfhe_backend.available() is not None, reason="OpenFHE is not installed")
def test_a_key_that_the_disk_changed_must_be_sent_again(tmp_path: Path) -> None:
    """One flipped bit leaves a residue below its prime, so that only the hash tells."""
    circuit = mlp(replace(TEST_PARAMS, log_n=11))
    keys.generate(circuit.spec(), tmp_path / "client", allow_insecure=True)
    stored = tmp_path / "server" / "keys"
    shutil.copytree(tmp_path / "client" / "evaluation", stored)
    data = bytearray((stored / "relin.key").read_bytes())
    data[-8] ^= 1
    (stored / "relin.key").write_bytes(data)
    engine = CircuitEngine(circuit, threads=1, plaintext_budget=0, allow_insecure=True)
    server = Server(circuit, engine, tmp_path / "server", limits=Limits())
    asyncio.run(server.start())
    assert server.store.missing() == ["relin.key"]
    assert server.keys.state == "waiting"
