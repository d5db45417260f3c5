"""A circuit whose values are refreshed, as a pair, through the real server: keys over HTTP, evaluation in its process."""

from pathlib import Path

import numpy as np
import pytest

from he_backend import keys, openfhe_backend, owner, refresh
from he_backend.base import ManifestError
from he_backend.client import Client
from he_backend.engine import KeyOwner
from tests.he_backend.running import free_port, running
from tests.he_backend.small_circuit import WIDTH
from tests.he_backend.test_pairs import pairing, reference


@pytest.mark.skipif(openfhe_backend.available() is not None, reason="OpenFHE is not installed")
def test_refresh_keys_travel_and_a_job_refreshes(tmp_path: Path) -> None:
    circuit = pairing()
    circuit.save(tmp_path / "model.circuit")
    spec = circuit.spec()
    manifest = keys.generate(spec, tmp_path / "client", allow_insecure=True)
    who = KeyOwner(spec, tmp_path / "client", allow_insecure=True)
    port = free_port()
    command = [
        "-m",
        "polyformer",
        "serve",
        str(tmp_path / "model.circuit"),
        "--folder",
        str(tmp_path / "server"),
        "--insecure",
    ]
    rng = np.random.default_rng(2)
    tensors = {name: rng.uniform(-1, 1, WIDTH) for name in "xy"}
    request = owner.seal(spec, who, tensors)
    most = owner.expected(spec, who, "reply").max_bytes
    with running([*command, "--port", str(port)], port) as process, Client(f"http://127.0.0.1:{port}") as client:
        client.agree(spec, who.moduli)
        client.upload(manifest, tmp_path / "client" / "evaluation")
        client.wait_ready(every=0.05)
        reply, timing = client.evaluate(request, max_reply=most, every=0.05)
        opened = owner.open_reply(spec, who, reply, owner.Counter(who.counter_path))
        wanted = reference(tensors["x"], tensors["y"])
        assert np.abs(opened.exact["z"] - wanted).max() < spec.error_bound
        assert timing["primitives"]["refresh"]["count"] == 1
        process.kill()
        process.wait()
    stored = {f.name for f in (tmp_path / "server" / "keys").iterdir()}
    assert {keys.file_name(kind, k) for kind, k, _ in refresh.keys(circuit.params)} <= stored
    (tmp_path / "server" / "keys" / "encapsulation.key").unlink()  # one that only refreshes use
    with running([*command, "--port", str(port)], port), Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ManifestError, match="not all here"):
            client.evaluate(request, max_reply=most, every=0.05)
        client.upload(manifest, tmp_path / "client" / "evaluation")
        client.wait_ready(every=0.05)
        reply, _ = client.evaluate(request, max_reply=most, every=0.05)
        again = owner.open_reply(spec, who, reply, owner.Counter(who.counter_path))
        assert np.abs(again.exact["z"] - wanted).max() < spec.error_bound
