"""The server's state under what a network cannot time: keys that go while a request arrives, loaders that break."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request

from he_backend import owner
from he_backend.base import ManifestError
from he_backend.bodies import Pace, SlowError, chunks
from he_backend.jobs import BusyError
from he_backend.keys import Manifest
from he_backend.server import Limits, Server, create_app
from tests.he_backend.small_circuit import TEST_PARAMS, WIDTH, mlp
from tests.he_backend.stub import StubEngine, StubOwner, make_keys

CIRCUIT = mlp(TEST_PARAMS)
FRAME = owner.seal(CIRCUIT.spec(), StubOwner(), {"x": np.zeros(WIDTH)})
KEY_ID = StubOwner().key_id


class Broken(StubEngine):
    """A loader with a fault of its own."""

    def load_key(self, *_: object) -> None:
        raise RuntimeError("a fault of ours")


def started(folder: Path, engine: type[StubEngine] = StubEngine, **limits: Any) -> Server:
    """A server whose keys are on its disk, and loaded unless the engine breaks."""
    keys = folder / "keys"
    manifest = make_keys(CIRCUIT.spec(), keys, KEY_ID)
    Server(CIRCUIT, engine(CIRCUIT), folder, limits=Limits()).store.offer(manifest.to_json())
    server = Server(CIRCUIT, engine(CIRCUIT), folder, limits=Limits(**limits))
    asyncio.run(server.start())
    return server


def request(server: Server, before: str = "") -> Request:
    """A request whose body arrives after something happened."""

    async def receive() -> dict[str, object]:
        if before == "never read":
            pytest.fail("the body was read")
        if before == "keys go":
            await server.forget_keys(KEY_ID)
        return {"type": "http.request", "body": FRAME}

    return Request({"type": "http", "headers": [], "method": "POST"}, receive)


def test_keys_that_go_while_a_request_arrives(tmp_path: Path) -> None:
    server = started(tmp_path)
    with pytest.raises(ManifestError, match="not all here"):
        asyncio.run(server.evaluate(request(server, "keys go")))
    assert server.worker.idle


def test_nothing_is_read_without_keys_or_room(tmp_path: Path) -> None:
    server = started(tmp_path, max_queue=0)
    with pytest.raises(BusyError, match="queued already"):
        asyncio.run(server.evaluate(request(server, "never read")))
    server = started(tmp_path, max_bodies=0)
    with pytest.raises(BusyError, match="arriving"):
        asyncio.run(server.evaluate(request(server, "never read")))
    asyncio.run(server.forget_keys(KEY_ID))
    with pytest.raises(ManifestError):
        asyncio.run(server.evaluate(request(server, "never read")))


def test_a_loader_that_breaks_ends_the_wait(tmp_path: Path) -> None:
    server = started(tmp_path, Broken)
    assert server.keys.state == "failed"
    assert "RuntimeError" in server.keys.error


def test_a_key_whose_loader_breaks_is_not_kept(tmp_path: Path) -> None:
    manifest: Manifest = make_keys(CIRCUIT.spec(), tmp_path / "client", KEY_ID)
    server = Server(CIRCUIT, Broken(CIRCUIT), tmp_path / "server", limits=Limits())
    server.store.offer(manifest.to_json())

    async def body() -> AsyncIterator[bytes]:
        yield (tmp_path / "client" / "relin.key").read_bytes()

    with pytest.raises(RuntimeError):
        asyncio.run(server.put_key(KEY_ID, "relin.key", body()))
    assert "relin.key" in server.store.missing()
    assert not list((tmp_path / "server" / "keys").glob("relin.key*"))


STALLED, TRICKLE = Pace(idle_s=0.05, bytes_per_s=1.0), Pace(idle_s=0.2, bytes_per_s=1000.0)


async def standing_still() -> AsyncIterator[bytes]:
    yield b"PF"
    await asyncio.sleep(60)


async def trickling() -> AsyncIterator[bytes]:
    while True:
        yield b"."
        await asyncio.sleep(0.02)


def test_a_body_has_a_pace() -> None:
    async def read(stream: AsyncIterator[bytes], pace: Pace) -> int:
        return sum([len(chunk) async for chunk in chunks(stream, pace)])

    with pytest.raises(SlowError, match=r"stood still for 0\.05 s after 2 bytes"):
        asyncio.run(read(standing_still(), STALLED))
    with pytest.raises(SlowError, match=r"\d+ bytes of the body took 0 s; after 0\.2 s there must be 1 kB a second"):
        asyncio.run(read(trickling(), TRICKLE))

    async def steady() -> AsyncIterator[bytes]:
        for _ in range(20):  # in all twice as long as any pause may be
            yield b"." * 100
            await asyncio.sleep(0.02)

    assert asyncio.run(read(steady(), TRICKLE)) == 2000


def test_slow_requests_give_their_places_back(tmp_path: Path) -> None:
    """As many as may be held: all of them, and the next, are answered within the limit, and nothing stays taken."""
    server = started(tmp_path, pace=STALLED)
    app = create_app(server)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=5.0) as http:
            slow = [http.post("/evaluate", content=standing_still()) for _ in range(server.limits.max_bodies)]
            answers = await asyncio.gather(*slow)
            return [*answers, await http.post("/evaluate", content=FRAME)]

    *slow, next_one = asyncio.run(ask())
    assert {(a.status_code, a.headers["connection"]) for a in slow} == {(408, "close")}
    assert next_one.status_code == 202


def test_keys_can_be_removed_while_one_arrives(tmp_path: Path) -> None:
    manifest: Manifest = make_keys(CIRCUIT.spec(), tmp_path / "client", KEY_ID)
    server = Server(CIRCUIT, StubEngine(CIRCUIT), tmp_path / "server", limits=Limits())
    server.store.offer(manifest.to_json())

    async def body() -> AsyncIterator[bytes]:
        await asyncio.wait_for(server.forget_keys(KEY_ID), 1.0)
        server.store.offer(manifest.to_json())  # the same keys again: not even then does this file count
        yield (tmp_path / "client" / "relin.key").read_bytes()

    with pytest.raises(ManifestError, match="removed while this one arrived"):
        asyncio.run(server.put_key(KEY_ID, "relin.key", body()))
    assert "relin.key" in server.store.missing()


def test_ids_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Server(CIRCUIT, StubEngine(CIRCUIT), tmp_path, limits=Limits()))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as http:
            await http.get(f"/keys/{KEY_ID}")

    with caplog.at_level(logging.INFO, logger="polyformer.server"):
        asyncio.run(ask())
    assert "refused /keys/{key_id}: ManifestError" in caplog.text
    assert KEY_ID not in caplog.text
