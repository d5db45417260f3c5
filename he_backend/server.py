"""The server: evaluates one circuit on ciphertexts, over HTTP, without a secret key.

    GET    /manifest                what is served: circuit hash, parameters, primes, signatures, keys wanted
    GET    /status                  progress of weights and keys, peak memory
    PUT    /keys                    manifest of a bundle (`keys.Manifest`); starts an upload or goes on with one
    GET    /keys/{key_id}           which files have arrived
    PUT    /keys/{key_id}/{name}    one key file; checked by length, hash, header and residues, then loaded
    DELETE /keys/{key_id}           forget the bundle
    POST   /evaluate                a request frame -> {"job": id}
    GET    /jobs/{id}               state, operators done, current ONNX node, seconds
    GET    /jobs/{id}/result        the reply frame
    GET    /jobs/{id}/timing        seconds by operator and primitive, peak memory
    DELETE /jobs/{id}               cancel
    POST   /sessions                begin a sequence, for a circuit with steps -> {"session": id, "step": 0, "steps": T}
    POST   /sessions/{id}/steps/{n} a request frame for step n, the next one -> {"job": id}
    GET    /sessions/{id}           the step that comes next
    DELETE /sessions/{id}           forget the sequence

Bytes from outside never shape what the crypto library parses: ciphertexts and keys arrive as residues, are checked as
numbers, and are put into envelopes that this process made (`openfhe_bytes.py`).

Errors are JSON: {"error": class, "message": text, "differences": {field: [ours, theirs]}}. Nothing that arrives is logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from . import bodies, heap, wire
from .base import HEError, ManifestError, ParamsError, WireError
from .bodies import Pace, SlowError
from .circuit import Circuit
from .jobs import BusyError, Engine, Job, Stage, Worker
from .keys import KeyFile, Manifest, find_secret
from .keystore import KeyStore
from .sessions import FullError, Sessions, Step, UnknownSessionError

log = logging.getLogger("polyformer.server")

MAX_CONNECTIONS = 32

STATUS = {
    WireError: 400,
    SlowError: 408,
    ManifestError: 409,
    BusyError: 503,
    FullError: 503,
    UnknownSessionError: 404,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for."""

    max_queue: int = 4
    max_replies: int = 8
    max_bodies: int = 4  # requests held in memory while they arrive
    max_json_bytes: int = 4 << 20
    pace: Pace = field(default_factory=Pace)  # of every body
    max_sessions: int = 8
    max_state_bytes: int = 4 << 30  # of all sessions together
    session_idle_s: float = 1800.0


def ensure_environment() -> None:
    """Start this process again with the heap's environment if it runs without; values that the user set are kept."""
    if any(name not in os.environ for name in heap.ENVIRONMENT):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**heap.ENVIRONMENT, **os.environ})


def refuse_secrets(folder: Path) -> None:
    """A server that could decrypt must not start.

    Raises:
        ParamsError: a secret key lies in the folder, at any depth.
    """
    found = find_secret(folder)
    if found is not None:
        raise ParamsError(
            f"{found} is a secret key: a server must never hold one. Move it to the client's machine, or give the server "
            "a folder of its own with --folder"
        )


class Server:
    """The state behind the endpoints: circuit, key store, worker."""

    def __init__(self, circuit: Circuit, engine: Engine, folder: Path, *, limits: Limits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_secrets(folder)
        self.circuit = circuit
        self.spec = circuit.spec()
        self.engine = engine
        self.limits = limits
        self.store = KeyStore(folder, self.spec)
        self.worker = Worker(engine, max_queue=limits.max_queue, max_replies=limits.max_replies)
        present = len(self.store.present())
        self.keys = Stage(state="running", total=present) if present else Stage()  # `start` loads them
        self.sessions = Sessions(
            circuit, most=limits.max_sessions, most_bytes=limits.max_state_bytes, idle_s=limits.session_idle_s
        )
        self.key_lock = asyncio.Lock()
        self.arrival = (
            asyncio.Lock()
        )  # of one key file at a time; `key_lock` is free meanwhile, so that keys can be removed
        self.bodies = asyncio.Semaphore(limits.max_bodies)

    async def start(self) -> None:
        """Encode weights, and load the keys that an earlier process received; one that is damaged must be sent again."""
        self.worker.start()
        async with self.key_lock:
            try:
                await self._load_present()
            except Exception as error:  # nobody awaits this task, but clients wait for its stage
                log.exception("loading keys failed")
                self.keys = Stage(state="failed", error=f"{type(error).__name__}; see the server's log")

    async def _load_present(self) -> None:
        for file in self.store.present():
            try:
                await self.load_key(self.store.folder / file.name, file)
            except HEError:
                log.warning("%s is damaged and was removed", file.name)
                self.store.reject(file)
            self.keys.done += 1
        self.update_keys()

    def manifest(self) -> dict[str, Any]:
        """What both sides must agree on; see `client.compare_manifest`."""
        c = self.circuit
        return {
            "format": "manifest",
            "version": wire.VERSION,
            "circuit_sha256": self.spec.circuit_sha256,
            "params": c.params.to_json(),
            "moduli": list(self.engine.moduli),
            "inputs": [{**vars(s), "shape": list(s.shape)} for s in c.inputs],
            "outputs": [{**vars(s), "shape": list(s.shape)} for s in c.outputs],
            "keys": {str(k): level for k, level in c.keys.items()},
            "relin_level": c.relin_level,
            "insecure": c.params.insecure,
            "max_request_bytes": self.expected("request", "").max_bytes,
            "steps": c.steps,
            "states": [{**vars(s), "shape": list(s.shape)} for s in c.states],
        }

    def expected(self, kind: str, key_id: str) -> wire.Expected:
        """What a request, or our reply, must be."""
        signatures = self.circuit.inputs if kind == "request" else self.circuit.outputs
        return wire.Expected(
            format=kind,
            circuit_sha256=self.spec.circuit_sha256,
            key_id=key_id,
            log_n=self.circuit.params.log_n,
            moduli=self.engine.moduli,
            scale=2.0**self.circuit.params.scale_bits,
            parts=wire.parts(signatures, self.circuit.client_arrays),
        )

    def status(self) -> dict[str, Any]:
        return {
            "weights": self.worker.weights.to_json(),
            "keys": self.keys.to_json(),
            "sessions": self.sessions.count,
            "peak_rss_bytes": heap.peak_rss(),
            "pid": os.getpid(),
        }

    def key_state(self) -> dict[str, Any]:
        """For whoever knows the key id."""
        missing = self.store.missing()
        return {"missing": missing, "complete": self.store.complete, **self.keys.to_json()}

    async def put_key(self, key_id: str, name: str, body: AsyncIterator[bytes]) -> dict[str, Any]:
        """Receive, check, load and keep one key file."""
        async with self.arrival:
            file, manifest = self.store.entry(key_id, name), self.store.manifest
            if name in self.store.missing():
                part = await self.store.receive(file, body)
                async with self.key_lock:
                    if self.store.manifest != manifest or not part.exists():
                        raise ManifestError(
                            "the server's keys were removed while this one arrived; send their manifest first"
                        )
                    try:
                        await self.load_key(part, file)
                    except BaseException:  # whatever it was, the file was not loaded
                        self.store.reject(file)
                        raise
                    self.store.accept(file)
                    self.update_keys()
        return self.key_state()

    async def load_key(self, path: Path, file: KeyFile) -> None:
        assert self.store.manifest is not None
        await run_in_threadpool(self.engine.load_key, path, file, self.store.manifest)

    async def forget_keys(self, key_id: str) -> None:
        """Remove a bundle from disk and memory."""
        async with self.key_lock:
            if not self.worker.idle:
                raise BusyError("keys cannot be removed while an evaluation uses them")
            self.store.remove(key_id)
            self.sessions.clear()
            await run_in_threadpool(self.engine.forget_keys)
            self.update_keys()

    def update_keys(self) -> None:
        present, total = len(self.store.present()), len(self.store.manifest.files) if self.store.manifest else 0
        self.keys = Stage(state="ready" if self.store.complete else "waiting", done=present, total=total)

    def ready(self) -> Manifest:
        """The bundle that an evaluation would use now."""
        manifest = self.store.manifest
        if self.keys.state != "ready" or manifest is None:
            raise ManifestError(
                "the evaluation keys are not all here: upload them first", {"missing": ([], self.store.missing())}
            )
        return manifest

    async def evaluate(self, request: Request) -> Job:
        """Check a request frame and queue it; nothing is read of one that could not run."""
        if self.circuit.steps:
            raise ManifestError("this circuit is a step of a sequence: begin one with POST /sessions")
        return await self._queue(request, self.ready(), None)

    def open_session(self) -> dict[str, Any]:
        """Begin a sequence under the keys that are here."""
        session = self.sessions.open(self.ready().key_id)
        return {"session": session.id, "step": session.step, "steps": self.circuit.steps}

    async def step(self, name: str, number: str, request: Request) -> Job:
        """Check a request frame for the next step of a sequence and queue it."""
        manifest = self.ready()
        turn = self.sessions.begin(name, number, manifest.key_id)
        try:
            return await self._queue(request, manifest, turn)
        except BaseException:  # whatever it was, nothing was queued
            turn.release()
            raise

    async def _queue(self, request: Request, manifest: Manifest, turn: Step | None) -> Job:
        self.worker.check_room()
        if self.bodies.locked():
            raise BusyError("other requests are arriving; try again later")
        async with self.bodies:
            expected = self.expected("request", manifest.key_id)
            body = await read_body(request, expected.max_bytes, self.limits.pace)
            inputs = await run_in_threadpool(wire.loads, body, expected)
            async with self.key_lock:  # so that no keys go between this look and the job that needs them
                if self.ready() != manifest:
                    raise ManifestError("the server's keys changed while the request arrived")
                return self.worker.submit(inputs, self.expected("reply", manifest.key_id), turn)


def create_app(server: Server) -> FastAPI:
    """The endpoints over a server's state."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(server.start())
        yield
        loading.cancel()

    app = FastAPI(title="polyformer", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HEError)
    async def refused(request: Request, error: HEError) -> JSONResponse:
        place = getattr(request.scope.get("route"), "path", "")  # the template: a path holds ids of keys and jobs
        log.info("refused %s: %s", place, type(error).__name__)
        # Whoever is too slow must not keep one of the few connections either.
        headers = {"connection": "close"} if isinstance(error, SlowError) else None
        return JSONResponse(error_json(error), status_code=STATUS.get(type(error), 422), headers=headers)

    @app.get("/manifest")
    async def manifest() -> dict[str, Any]:
        return server.manifest()

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return server.status()

    @app.put("/keys")
    async def put_index(request: Request) -> dict[str, Any]:
        limits = server.limits
        server.store.offer(wire.parse_json(await read_body(request, limits.max_json_bytes, limits.pace)))
        return server.key_state()

    @app.get("/keys/{key_id}")
    async def get_keys(key_id: str) -> dict[str, Any]:
        server.store.named(key_id)
        return server.key_state()

    @app.put("/keys/{key_id}/{name}")
    async def put_key(key_id: str, name: str, request: Request) -> dict[str, Any]:
        return await server.put_key(key_id, name, bodies.chunks(request.stream(), server.limits.pace))

    @app.delete("/keys/{key_id}")
    async def delete_keys(key_id: str) -> dict[str, Any]:
        await server.forget_keys(key_id)
        return {}

    @app.post("/evaluate", status_code=202)
    async def evaluate(request: Request) -> dict[str, Any]:
        return (await server.evaluate(request)).to_json()

    @app.get("/jobs/{job_id}")
    async def get_job(job_id: str) -> dict[str, Any]:
        return find(job_id).to_json()

    @app.get("/jobs/{job_id}/result")
    async def get_result(job_id: str) -> Response:
        job = find(job_id)
        if job.state != "done":
            raise ManifestError(f"job {job.id} is {job.state}, it has no result")
        return Response(job.reply, media_type="application/octet-stream")

    @app.get("/jobs/{job_id}/timing")
    async def get_timing(job_id: str) -> dict[str, Any]:
        return {**find(job_id).timing, "peak_rss_bytes": heap.peak_rss()}

    @app.delete("/jobs/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        job = find(job_id)
        job.cancel.set()
        return job.to_json()

    @app.post("/sessions", status_code=201)
    async def open_session() -> dict[str, Any]:
        return server.open_session()

    @app.post("/sessions/{name}/steps/{number}", status_code=202)
    async def step(name: str, number: str, request: Request) -> dict[str, Any]:
        return (await server.step(name, number, request)).to_json()

    @app.get("/sessions/{name}")
    async def get_session(name: str) -> dict[str, Any]:
        return {"step": server.sessions.look(name, server.ready().key_id).step}

    @app.delete("/sessions/{name}")
    async def close_session(name: str) -> dict[str, Any]:
        server.sessions.close(name, server.ready().key_id)
        return {}

    def find(job_id: str) -> Job:
        job = server.worker.job(job_id)
        if job is None:
            raise UnknownJobError(
                "no such job: it is too old, or the server was started again since; send the request anew"
            )
        return job

    return app


class UnknownJobError(ManifestError):
    """A job that this process never had."""


STATUS[UnknownJobError] = 404


async def read_body(request: Request, most: int, pace: Pace) -> bytes:
    """See `bodies.read`."""
    return await bodies.read(request.stream(), request.headers.get("content-length", "0"), most, pace)


def error_json(error: HEError) -> dict[str, Any]:
    differences: Mapping[str, Any] = getattr(error, "differences", {})
    return {
        "error": type(error).__name__,
        "message": str(error),
        "differences": {k: list(v) for k, v in differences.items()},
    }


def serve(server: Server, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Run until a signal comes."""
    import uvicorn

    uvicorn.run(
        create_app(server),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
    )
