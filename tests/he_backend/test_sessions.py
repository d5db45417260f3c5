"""Sequences on a server: in order, one step at a time, apart from each other, forgotten in the end. Over HTTP with a stub."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from he_backend import owner
from he_backend.base import HEError, LevelError, ManifestError, ParamsError, ScaleError, WireError
from he_backend.circuit import Circuit, ClientSpec
from he_backend.client import Client, LostSessionError
from he_backend.execute import Executor
from he_backend.server import Limits
from he_backend.sessions import FullError, Sessions, UnknownSessionError
from he_backend.simulator import simulate, simulate_noise
from tests.he_backend.parties import parties
from tests.he_backend.running import free_port, running
from tests.he_backend.small_circuit import LEVELS, TEST_PARAMS, mlp
from tests.he_backend.small_step import STEPS, running_sum
from tests.he_backend.stub import StubOwner, make_keys
from tests.he_backend.test_server import Site

CIRCUIT = running_sum()
X = (0.5, -0.25, 0.75, 0.125)
KEY = "5" * 32


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def kept(clock: Clock, *, most: int = 2, most_bytes: int = 1 << 40) -> Sessions:
    return Sessions(CIRCUIT, most=most, most_bytes=most_bytes, idle_s=60.0, now=clock)


def test_steps_are_done_once_and_in_order() -> None:
    sessions = kept(Clock())
    name = sessions.open(KEY).id
    with pytest.raises(ManifestError, match="ours 1, theirs 0"):
        sessions.begin(name, "1", KEY)
    first = sessions.begin(name, "0", KEY)
    assert (first.state, first.step) == (None, 0)
    with pytest.raises(ManifestError, match="under way"):
        sessions.begin(name, "0", KEY)
    first.release()
    sessions.begin(name, "0", KEY).finish("after 0")
    with pytest.raises(ManifestError, match="comes next"):
        sessions.begin(name, "0", KEY)
    for step in range(1, STEPS):
        turn = sessions.begin(name, str(step), KEY)
        assert turn.state == f"after {step - 1}"
        turn.finish(f"after {step}")
    with pytest.raises(ManifestError, match=f"full: it has had its {STEPS} steps"):
        sessions.begin(name, str(STEPS), KEY)


@pytest.mark.parametrize("step", ["-1", "", "1e3", "٣", "9" * 10, "0x1", " 0"])
def test_a_step_that_is_no_number(step: str) -> None:
    sessions = kept(Clock())
    with pytest.raises(WireError, match="digits"):
        sessions.begin(sessions.open(KEY).id, step, KEY)


def test_sessions_end() -> None:
    clock = Clock()
    sessions = kept(clock)
    idle, other = sessions.open(KEY).id, sessions.open(KEY).id
    with pytest.raises(FullError, match="2 are kept at once"):
        sessions.open(KEY)
    clock.seconds = 50.0
    turn = sessions.begin(other, "0", KEY)
    clock.seconds = 1000.0  # a step under way is not idle, however long it takes
    for name, key in ((idle, KEY), (other, "6" * 32), ("", KEY), ("x" * 1000, KEY)):
        with pytest.raises(UnknownSessionError, match="from its first token"):
            sessions.look(name, key)
    sessions.close(other, KEY)
    turn.finish("state")
    assert turn.state is None, "a closed session keeps nothing"
    assert sessions.count == 0
    sessions.open(KEY)
    sessions.clear()
    assert sessions.count == 0


def test_memory_bounds_the_number_of_sessions() -> None:
    assert CIRCUIT.state_bytes == TEST_PARAMS.ciphertext_bytes(LEVELS - 1)
    assert kept(Clock(), most=9, most_bytes=3 * CIRCUIT.state_bytes + 1).most == 3
    with pytest.raises(ParamsError, match=r"one sequence is \S+ GB, larger than the .* GB .*--state-gb"):
        kept(Clock(), most_bytes=CIRCUIT.state_bytes - 1)
    plain = Sessions(mlp(TEST_PARAMS), most=2, most_bytes=1 << 40, idle_s=60.0)
    with pytest.raises(ManifestError, match="/evaluate"):
        plain.open(KEY)


# --- Over the network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Client]]:
    folder = tmp_path_factory.mktemp("steps")
    CIRCUIT.save(folder / "circuit")
    spec, who = Circuit.load(folder / "circuit").spec(), StubOwner()
    manifest = make_keys(spec, folder, who.key_id)
    site = Site(circuit=CIRCUIT, spec=spec, folder=folder, port=free_port(), owner=who, manifest=manifest)
    with running(site.command, site.port), Client(site.url) as client:
        client.agree(site.spec, site.owner.moduli)
        client.upload(site.manifest, site.folder)
        client.wait_ready(every=0.02)
        yield site, client


def frame(site: Site, x: float) -> bytes:
    return owner.seal(site.spec, site.owner, {"x": np.array([x])})


def ask(site: Site, client: Client, session: str, step: int, x: float) -> float:
    reply, _ = client.step(session, step, frame(site, x), max_reply=site.max_reply, every=0.02)
    counter = owner.Counter(site.folder / "count.json")
    return float(owner.open_reply(site.spec, site.owner, reply, counter).exact["y"][0])


def test_two_sequences_side_by_side(served: tuple[Site, Client]) -> None:
    site, client = served
    one, two = client.open_session(), client.open_session()
    for step, x in enumerate(X):
        assert ask(site, client, one, step, x) == pytest.approx(sum(X[: step + 1]) + step, abs=1e-6)
        assert ask(site, client, two, step, -x) == pytest.approx(-sum(X[: step + 1]) + step, abs=1e-6)
    with pytest.raises(ManifestError, match="full"):
        ask(site, client, one, STEPS, 0.0)
    client.close_session(one)
    client.close_session(one)
    client.close_session(two)
    assert client.status()["sessions"] == 0


def test_what_goes_wrong_leaves_a_sequence_as_it_was(served: tuple[Site, Client]) -> None:
    site, client = served
    session = client.open_session()
    assert ask(site, client, session, 0, X[0]) == pytest.approx(X[0], abs=1e-6)
    with pytest.raises(ManifestError, match="comes next"):
        ask(site, client, session, 0, X[0])
    with pytest.raises(WireError):
        client.step(session, 1, frame(site, X[1])[:-50], max_reply=site.max_reply)
    stranger = owner.seal(site.spec, StubOwner("6" * 32), {"x": np.array([0.0])})
    with pytest.raises(ManifestError, match="key_id"):
        client.step(session, 1, stranger, max_reply=site.max_reply)
    assert client._json("GET", f"/sessions/{session}") == {"step": 1}
    assert ask(site, client, session, 1, X[1]) == pytest.approx(X[0] + X[1] + 1, abs=1e-6)
    client.close_session(session)


def test_unknown_sequences_and_wrong_places(served: tuple[Site, Client]) -> None:
    site, client = served
    with pytest.raises(LostSessionError, match="from the first token"):
        ask(site, client, "0" * 32, 0, 0.0)
    with pytest.raises(ManifestError, match="POST /sessions"):
        client.evaluate(frame(site, 0.0), max_reply=site.max_reply)
    session = client.open_session()
    for step in ("-1", "x", "1" * 400, "%00"):
        answer = httpx.post(f"{site.url}/sessions/{session}/steps/{step}", content=frame(site, 0.0))
        assert (answer.status_code, answer.json()["error"]) == (400, "WireError")
    client.close_session(session)


def test_as_many_as_may_be(served: tuple[Site, Client]) -> None:
    _, client = served
    opened = [client.open_session() for _ in range(Limits().max_sessions)]
    with pytest.raises(HEError, match="kept at once"):
        client.open_session()
    for session in opened:
        client.close_session(session)


def test_sequences_go_with_their_keys_and_their_server(tmp_path: Path, served: tuple[Site, Client]) -> None:
    site, _ = served
    site = replace(site, folder=tmp_path, port=free_port(), manifest=make_keys(site.spec, tmp_path, KEY))
    CIRCUIT.save(tmp_path / "circuit")
    with running(site.command, site.port), Client(site.url) as client:
        with pytest.raises(ManifestError, match="not all here"):
            client.open_session()
        client.upload(site.manifest, tmp_path)
        client.wait_ready(every=0.02)
        session = client.open_session()
        client.forget_keys(KEY)
        client.upload(site.manifest, tmp_path)
        client.wait_ready(every=0.02)
        with pytest.raises(LostSessionError):
            ask(site, client, session, 0, 0.0)
        session = client.open_session()
        ask(site, client, session, 0, 0.0)
    with running(site.command, site.port), Client(site.url) as client:
        client.wait_ready(every=0.02)
        with pytest.raises(LostSessionError, match="started again"):
            ask(site, client, session, 1, 0.0)


# --- The circuit itself -----------------------------------------------------------------------------------------------


def test_files_keep_steps_and_states(tmp_path: Path) -> None:
    CIRCUIT.save(tmp_path / "circuit")
    CIRCUIT.spec().save(tmp_path / "client")
    loaded, spec = Circuit.load(tmp_path / "circuit"), ClientSpec.load(tmp_path / "client")
    assert loaded.sha256 == CIRCUIT.sha256 == spec.circuit_sha256
    assert (loaded.steps, loaded.states) == (spec.steps, spec.states) == (STEPS, CIRCUIT.states)
    assert "places" not in spec.arrays, "how states lie is no business of the client"


def test_simulations_agree_step_by_step() -> None:
    state: np.ndarray = np.zeros(STEPS)
    for step, x in enumerate(X):
        tensors = {"x": np.array([x]), "kept": state}
        found = simulate(CIRCUIT, tensors, step=step).outputs
        noisy = simulate_noise(CIRCUIT, tensors, step=step)
        state = found["kept"]
        np.testing.assert_allclose(found["y"], sum(X[: step + 1]) + step, atol=1e-12)
        np.testing.assert_allclose(noisy["y"], found["y"], atol=1e-5)
    np.testing.assert_allclose(state, X, atol=1e-12)


@pytest.mark.parametrize("backend", ["openfhe", "tenseal"])
def test_encrypted_steps_start_from_nothing(backend: str) -> None:
    """Through the executor on real ciphertexts, the first states being residues of 0."""
    pair = parties(backend)
    circuit = replace(CIRCUIT, params=pair.params, arrays=dict(CIRCUIT.arrays))
    each = pair.params.slots // STEPS
    ops = tuple(
        replace(op, attrs={**op.attrs, "steps": [each, 2 * each]}) if op.kind == "rotate_sum" else op for op in circuit
    )
    circuit = replace(circuit, ops=ops)
    for k in (each, 2 * each):
        pair.ev.load_key("rotation", k, LEVELS, pair.client.make_key("rotation", k, LEVELS))
    executor = Executor(circuit, pair.ev)
    level, n = circuit.states[0].level, 2 * pair.params.slots
    kept = pair.ev.import_ciphertext(np.zeros((2, level + 1, n), dtype=np.uint64), level=level)
    for step, x in enumerate(X):
        sent = {("x", 0): pair.send(np.full(pair.params.slots, x), level=LEVELS), ("kept", 0): kept}
        run = executor.run(sent, step=step)
        kept = run.outputs["kept", 0]
        out = run.outputs["y", 0]
        back = pair.client.import_ciphertext(pair.ev.export_ciphertext(out), level=pair.ev.level(out))
        values = pair.client.decrypt(back, scale=run.scales["y", 0])
        np.testing.assert_allclose(values, sum(X[: step + 1]) + step, atol=1e-4)
    with pytest.raises(ManifestError, match=f"steps 0 to {STEPS - 1}"):
        executor.run(sent, step=STEPS)
    pair.ev.close()


def test_a_state_that_changes_its_level_is_refused() -> None:
    ops = tuple(replace(op, level=1) if op.kind == "output" and op.attrs["name"] == "kept" else op for op in CIRCUIT)
    pair = parties("openfhe")
    changed = replace(CIRCUIT, params=pair.params, ops=ops)
    with pytest.raises(LevelError, match="'kept' comes in at level"):
        Executor(changed, pair.ev)
    pair.ev.close()


def test_a_state_that_changes_its_scale_is_refused() -> None:
    """x * x is at the scale of no single prime, so that the sum would drift from step to step."""
    changed = {2: replace(CIRCUIT.ops[2], kind="mul", args=(0, 0), attrs={}), 3: replace(CIRCUIT.ops[3], args=(2, 1))}
    ops = tuple(changed.get(op.id, op) for op in CIRCUIT)
    pair = parties("openfhe")
    with pytest.raises(ScaleError):
        Executor(replace(CIRCUIT, params=pair.params, ops=ops, error_bound=0.0), pair.ev)
    pair.ev.close()


def test_who_gives_up_stops_the_step(tmp_path: Path) -> None:
    """Ctrl-C in the client cancels the job; the sequence stands where it was."""
    who = StubOwner()
    spec = CIRCUIT.spec()
    CIRCUIT.save(tmp_path / "circuit")
    manifest = make_keys(spec, tmp_path, who.key_id)
    site = Site(circuit=CIRCUIT, spec=spec, folder=tmp_path, port=free_port(), owner=who, manifest=manifest)

    def interrupted(job: object) -> None:
        raise KeyboardInterrupt

    with running(site.command, site.port, POLYFORMER_STUB_SLOW="0.2"), Client(site.url) as client:
        client.upload(manifest, tmp_path)
        client.wait_ready(every=0.02)
        session = client.open_session()
        with pytest.raises(KeyboardInterrupt):
            client.step(session, 0, frame(site, 0.5), max_reply=site.max_reply, every=0.02, progress=interrupted)
        for _ in range(100):
            with contextlib.suppress(ManifestError):  # until the worker has seen it
                assert ask(site, client, session, 0, 0.25) == pytest.approx(0.25, abs=1e-6)
                break
            time.sleep(0.05)
        else:
            pytest.fail("the cancelled step never ended")
