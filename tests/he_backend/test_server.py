"""The server survives whatever is sent to it, keeps its keys, and comes back after being killed. Cryptography is a stub."""

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from he_backend import container, owner
from he_backend.base import Array, HEError, ManifestError, WireError
from he_backend.circuit import Circuit, ClientSpec
from he_backend.client import Client, LostJobError
from he_backend.keys import SECRET_MAGIC, Manifest
from tests.he_backend.running import ROOT, free_port, running
from tests.he_backend.small_circuit import TEST_PARAMS, WIDTH, mlp, reference
from tests.he_backend.stub import StubOwner, make_keys

X: Array = np.linspace(-1, 1, WIDTH, dtype=np.float64)
OTHER = "6" * 32


@dataclass(frozen=True, kw_only=True)
class Site:
    """A circuit, a client's view of it and its keys, and where a server for it lives."""

    circuit: Circuit
    spec: ClientSpec
    folder: Path
    port: int
    owner: StubOwner
    manifest: Manifest

    @property
    def command(self) -> list[str]:
        return [
            "-m",
            "tests.he_backend.stub",
            str(self.folder / "circuit"),
            str(self.folder / "server"),
            str(self.port),
        ]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def request(self) -> bytes:
        return owner.seal(self.spec, self.owner, {"x": X})

    @property
    def max_reply(self) -> int:
        return owner.expected(self.spec, self.owner, "reply").max_bytes

    def ask(self, client: Client, **options: object) -> np.ndarray:
        reply, _ = client.evaluate(self.request, max_reply=self.max_reply, every=0.02, **options)  # type: ignore[arg-type]
        opened = owner.open_reply(self.spec, self.owner, reply, owner.Counter(self.folder / "count.json"))
        return opened.exact["y"]


def make_site(folder: Path) -> Site:
    circuit = mlp(TEST_PARAMS)
    circuit.save(folder / "circuit")
    who = StubOwner()
    manifest = make_keys(circuit.spec(), folder, who.key_id)
    return Site(circuit=circuit, spec=circuit.spec(), folder=folder, port=free_port(), owner=who, manifest=manifest)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Client]]:
    """One server with its keys, for all tests that must not harm it."""
    site = make_site(tmp_path_factory.mktemp("served"))
    with running(site.command, site.port), Client(site.url) as client:
        client.upload(site.manifest, site.folder)
        client.wait_ready(every=0.02)
        yield site, client


def test_an_encrypted_request_is_answered(served: tuple[Site, Client]) -> None:
    site, client = served
    client.agree(site.spec, site.owner.moduli)
    seen: list[str] = []
    y = site.ask(client, progress=lambda job: seen.append(job["state"]))
    np.testing.assert_allclose(y, reference(X), atol=1e-5)
    assert seen[-1] == "done"


def test_manifest_differences_are_named(served: tuple[Site, Client]) -> None:
    _, client = served
    with pytest.raises(ManifestError) as caught:
        client.agree(mlp(TEST_PARAMS, seed=1).spec())
    assert set(caught.value.differences) == {"circuit_sha256"}


def still_alive(site: Site, client: Client) -> None:
    np.testing.assert_allclose(site.ask(client), reference(X), atol=1e-5)


@pytest.mark.parametrize("change", ["truncated", "oversized", "noise", "empty"])
def test_malformed_requests(served: tuple[Site, Client], change: str) -> None:
    site, client = served
    request = site.request
    data = {
        "truncated": request[:-100],
        "oversized": request + bytes(1 << 20),
        "noise": bytes(range(256)),
        "empty": b"",
    }[change]
    with pytest.raises(WireError):
        client.evaluate(data, max_reply=site.max_reply)
    still_alive(site, client)


def test_request_for_another_circuit_or_key(served: tuple[Site, Client]) -> None:
    site, client = served
    other = mlp(TEST_PARAMS, seed=1).spec()
    with pytest.raises(ManifestError, match="circuit_sha256"):
        client.evaluate(owner.seal(other, site.owner, {"x": X}), max_reply=site.max_reply)
    with pytest.raises(ManifestError, match="key_id"):
        client.evaluate(owner.seal(site.spec, StubOwner(OTHER), {"x": X}), max_reply=site.max_reply)
    still_alive(site, client)


@pytest.mark.parametrize("key_id", ["0" * 32, "", None])
def test_no_answer_tells_the_id_of_the_keys(served: tuple[Site, Client], key_id: object) -> None:
    site, _ = served
    header, arrays = container.loads(site.request)
    frame = container.dumps({**header, "key_id": key_id, "log_n": 5}, arrays)
    answer = httpx.post(site.url + "/evaluate", content=frame)
    assert answer.status_code == 409
    assert set(answer.json()["differences"]) == {"key_id", "log_n"}
    assert site.owner.key_id not in answer.text


@settings(max_examples=30)
@given(data=st.data())
def test_mutated_bytes(served: tuple[Site, Client], data: st.DataObject) -> None:
    site, client = served
    request = bytearray(site.request)
    at = data.draw(st.integers(0, min(len(request), 700) - 1))  # the header, where a byte has a meaning
    request[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError, ManifestError):
        client.evaluate(bytes(request), max_reply=site.max_reply, every=0.01)
    assert client.status()["keys"]["state"] == "ready"


def test_keys_stay_after_another_bundle_is_offered(served: tuple[Site, Client]) -> None:
    site, client = served
    other = replace(site.manifest, key_id=OTHER)
    with pytest.raises(ManifestError, match="holds other keys"):
        client.upload(other, site.folder)
    with pytest.raises(ManifestError):
        client.forget_keys(OTHER)
    still_alive(site, client)


def test_unknown_job(served: tuple[Site, Client]) -> None:
    _, client = served
    with pytest.raises(LostJobError):
        client._json("GET", "/jobs/nothing")


@pytest.mark.parametrize("path", [f"/keys/{'5' * 32}/..%2f..%2fx", f"/keys/{'5' * 32}/none.key", "/keys/%00/x"])
def test_key_paths_cannot_leave_their_folder(served: tuple[Site, Client], path: str) -> None:
    site, client = served
    answer = httpx.put(site.url + path, content=b"KEY")
    assert answer.status_code in (400, 404, 409)
    still_alive(site, client)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1" * (2 << 20), b"[" * 100_000, b'{"params": NaN}', b"Infinity"])
def test_malformed_index(served: tuple[Site, Client], body: bytes) -> None:
    site, client = served
    answer = httpx.put(site.url + "/keys", content=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "WireError")
    still_alive(site, client)


def test_bad_key_file_is_not_kept_and_upload_goes_on(site: Site) -> None:
    with running(site.command, site.port), Client(site.url) as client:
        bad = make_keys(site.spec, site.folder / "bad", site.owner.key_id, bad="rotation-128.key")
        with pytest.raises(WireError, match="is not a key"):
            client.upload(bad, site.folder / "bad")
        state = client._json("GET", f"/keys/{site.owner.key_id}")
        assert "rotation-128.key" in state["missing"]
        assert 0 < len(state["missing"]) < len(bad.files)
        with pytest.raises(ManifestError, match="not all here"):
            site.ask(client)
        client.forget_keys(site.owner.key_id)
        sent: list[int] = []
        client.upload(site.manifest, site.folder, lambda done, total: sent.append(done))
        assert sent[-1] == sum(f.bytes for f in site.manifest.files)
        client.wait_ready(every=0.02)
        still_alive(site, client)
        sent.clear()
        client.upload(site.manifest, site.folder, lambda done, total: sent.append(done))
        assert sent == [sum(f.bytes for f in site.manifest.files)]  # all there: nothing travels again


def test_key_file_with_another_hash(site: Site) -> None:
    with running(site.command, site.port), Client(site.url) as client:
        client._json("PUT", "/keys", content=json.dumps(site.manifest.to_json()).encode())
        right = (site.folder / "relin.key").read_bytes()
        for data in (right[:-1] + b"x", right[:-1], right + b"x", b""):
            with pytest.raises(WireError):
                client._json("PUT", f"/keys/{site.owner.key_id}/relin.key", content=data)
        assert "relin.key" in client._json("GET", f"/keys/{site.owner.key_id}")["missing"]
        assert not list((site.folder / "server" / "keys").glob("*.part"))


def test_killed_in_the_middle_it_comes_back_with_its_keys(site: Site) -> None:
    """The client's retry finds the new process and is answered, without a second upload."""
    answer: dict[str, np.ndarray] = {}
    started = threading.Event()

    def ask() -> None:
        with Client(site.url) as client:
            answer["y"] = site.ask(client, progress=lambda job: started.set(), patience=30.0)

    thread = threading.Thread(target=ask)
    with running(site.command, site.port, POLYFORMER_STUB_SLOW="2") as process:
        with Client(site.url) as client:
            client.upload(site.manifest, site.folder)
            client.wait_ready(every=0.02)
        thread.start()
        assert started.wait(30)
        process.kill()
        process.wait()
    with running(site.command, site.port):
        thread.join(timeout=60)
    np.testing.assert_allclose(answer["y"], reference(X), atol=1e-5)


def test_a_job_can_be_cancelled_and_the_queue_is_bounded(site: Site) -> None:
    with running(site.command, site.port, POLYFORMER_STUB_SLOW="1"), Client(site.url) as client:
        client.upload(site.manifest, site.folder)
        client.wait_ready(every=0.02)
        jobs = [client._json("POST", "/evaluate", content=site.request) for _ in range(4)]
        with pytest.raises(HEError, match="queued already"):
            client._json("POST", "/evaluate", content=site.request)
        for job in jobs:
            client._json("DELETE", f"/jobs/{job['job']}")
        for _ in range(200):
            states = [client._json("GET", f"/jobs/{job['job']}")["state"] for job in jobs]
            if set(states) == {"cancelled"}:
                break
            time.sleep(0.05)
        assert set(states) == {"cancelled"}


@pytest.mark.parametrize("depth", ["", "a/b"])
def test_refuses_to_start_beside_a_secret_key(site: Site, depth: str) -> None:
    place = site.folder / "server" / depth
    place.mkdir(parents=True)
    (place / "x.bin").write_bytes(SECRET_MAGIC)
    done = subprocess.run(
        [sys.executable, *site.command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "is a secret key: a server must never hold one" in done.stderr


def test_keys_of_another_circuit_are_refused_at_start(site: Site) -> None:
    keys = site.folder / "server" / "keys"
    keys.mkdir(parents=True)
    foreign = {**site.manifest.to_json(), "circuit_sha256": hashlib.sha256(b"").hexdigest()}
    (keys / "manifest.json").write_text(json.dumps(foreign))
    done = subprocess.run(
        [sys.executable, *site.command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert "not for this circuit" in done.stderr


def test_a_circuit_that_asks_for_keys_in_vain_is_refused_at_start(site: Site) -> None:
    replace(site.circuit, keys={**site.circuit.keys, 5: 1}).save(site.folder / "circuit")
    done = subprocess.run(
        [sys.executable, *site.command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "rotation by 5 is used by no op; the circuit's list wants a key for level 1" in done.stderr
