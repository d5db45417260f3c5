"""The client's side of the network: manifest, key upload, evaluation. Encryption and decryption are in `owner.py`.

Nothing here holds a secret or a decrypted value, so nothing here can send one. What a server says is as hostile as what a
client says: answers are capped in length, never followed elsewhere, and errors are rebuilt from a closed list of classes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from . import base, wire
from .base import HEError, ManifestError, WireError
from .circuit import ClientSpec
from .keys import Manifest

MAX_JSON = 4 << 20
CHUNK = 1 << 20
ERRORS: dict[str, type[HEError]] = {
    name: kind for name, kind in vars(base).items() if isinstance(kind, type) and issubclass(kind, HEError)
}

Report = Callable[[Mapping[str, Any]], None]


class ConnectError(HEError):
    """The server cannot be reached, or went away."""


class LostJobError(HEError):
    """The server does not know the job (any more): it was started again since."""


class LostSessionError(HEError):
    """The server does not know the sequence (any more)."""


class Client:
    """A connection to one server; a context manager."""

    def __init__(self, url: str, *, timeout: float = 60.0, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.url, timeout=timeout, transport=transport, trust_env=False)
        except httpx.InvalidURL as error:
            raise ConnectError(f"{url!r} is not an address") from error
        if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
            raise ConnectError(f"{url!r} is not an address; one is http://127.0.0.1:8000")
        self._http.headers["accept-encoding"] = "identity"  # an answer that unpacks itself could pass every cap

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def wait_answer(self, patience: float) -> None:
        """Until the server answers at all, for one that was started a moment ago.

        Raises:
            ConnectError: it does not within `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                self.status()
                return
            except ConnectError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)

    def manifest(self) -> dict[str, Any]:
        """What the server serves."""
        return self._json("GET", "/manifest")

    def status(self) -> dict[str, Any]:
        """Progress of weights and keys, peak memory."""
        return self._json("GET", "/status")

    def agree(self, spec: ClientSpec, moduli: tuple[int, ...] | None = None) -> None:
        """Hold the server's manifest against our specification.

        Raises:
            ManifestError: every field on which they differ.
        """
        compare_manifest(spec, self.manifest(), moduli)

    def upload(
        self,
        manifest: Manifest,
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
        *,
        discard: bool = False,
    ) -> None:
        """Send the key files that the server does not have yet; calling it again goes on where it stopped.

        Args:
            folder: where the files of `manifest` lie.
            progress: called with bytes there and bytes in all.
            discard: delete each file once the server has it; for client and server on one disk.
        """
        state = self._json("PUT", "/keys", content=json.dumps(manifest.to_json()).encode())
        with _understood():
            missing = {str(name) for name in state["missing"]}
        total = sum(f.bytes for f in manifest.files)
        done = sum(f.bytes for f in manifest.files if f.name not in missing)
        if progress is not None:
            progress(done, total)
        for file in manifest.files:
            if file.name not in missing:
                continue

            def chunks(path: Path = folder / file.name, done: int = done) -> Iterator[bytes]:
                with path.open("rb") as stream:
                    while chunk := stream.read(CHUNK):
                        done += len(chunk)
                        yield chunk
                        if progress is not None:
                            progress(done, total)

            headers = {"content-length": str(file.bytes)}
            self._json("PUT", f"/keys/{manifest.key_id}/{file.name}", content=chunks(), headers=headers, timeout=600.0)
            done += file.bytes
            if discard:
                (folder / file.name).unlink()

    def forget_keys(self, key_id: str) -> None:
        """Have the server delete the bundle."""
        self._json("DELETE", f"/keys/{key_id}")

    def wait_ready(self, progress: Report | None = None, *, every: float = 0.5) -> dict[str, Any]:
        """Until weights and keys are loaded.

        Raises:
            HEError: either failed; the message is the server's.
        """
        while True:
            status = self.status()
            with _understood():
                stages = {name: status[name] for name in ("weights", "keys")}
                if progress is not None:
                    progress(status)
                for name, stage in stages.items():
                    if stage["state"] == "failed":
                        raise HEError(f"the server could not load its {name}: {clean(stage['error'])}")
                if stages["keys"]["state"] == "waiting" and not stages["keys"]["total"]:
                    raise ManifestError("the server has no keys: upload them first")
                if all(stage["state"] == "ready" for stage in stages.values()):
                    return status
            time.sleep(every)

    def evaluate(
        self,
        request: bytes,
        *,
        max_reply: int,
        progress: Report | None = None,
        every: float = 0.25,
        retries: int = 1,
        patience: float = 60.0,
    ) -> tuple[bytes, dict[str, Any]]:
        """Send a request frame, wait, and return the reply frame and the server's timing.

        The same ciphertext is sent again if the server was restarted under the job; that reveals nothing new.

        Args:
            max_reply: cap on the reply's length, `Expected.max_bytes`.
            progress: called with the job's state (done, total, current, seconds).
            retries: how often a lost server may be met.
            patience: seconds to wait for it to come back each time.
        """
        for attempt in range(retries + 1):
            try:
                return self._evaluate_once(request, max_reply, progress, every)
            except (ConnectError, LostJobError):
                if attempt == retries:
                    raise
                self._wait_alive(patience)
        raise AssertionError("unreachable")

    def _evaluate_once(
        self, request: bytes, max_reply: int, progress: Report | None, every: float
    ) -> tuple[bytes, dict[str, Any]]:
        path = self._run("/evaluate", request, progress, every)
        reply = self._request("GET", f"{path}/result", max_bytes=max_reply)
        return reply, self._json("GET", f"{path}/timing")

    def open_session(self) -> str:
        """Begin a sequence of steps; returns the id that `step` and `close_session` take."""
        said = self._json("POST", "/sessions")
        with _understood():
            return f"{int(said['session'], 16):032x}"  # a number, so that it cannot name another path

    def step(
        self,
        session: str,
        step: int,
        request: bytes,
        *,
        max_reply: int,
        progress: Report | None = None,
        every: float = 0.25,
        fetch: bool = True,
    ) -> tuple[bytes, dict[str, Any]]:
        """Send the request frame of one step, wait, and return the reply frame and the server's timing.

        Nothing is sent twice: whether a lost step was done is not known.

        Args:
            fetch: whether the reply is wanted; a token of the prompt has none that matters, and gets b"".

        Raises:
            LostSessionError: the server does not know the sequence; it must be fed again from its first token.
        """
        try:
            path = self._run(f"/sessions/{session}/steps/{step}", request, progress, every)
            reply = self._request("GET", f"{path}/result", max_bytes=max_reply) if fetch else b""
            return reply, self._json("GET", f"{path}/timing")
        except LostJobError as error:
            raise _lost_session() from error

    def close_session(self, session: str) -> None:
        """Have the server forget a sequence; one that it does not know is forgotten already."""
        with contextlib.suppress(LostSessionError):
            self._json("DELETE", f"/sessions/{session}")

    def _run(self, to: str, request: bytes, progress: Report | None, every: float) -> str:
        """Queue a frame and wait until its job is done; the job's path."""
        job = self._json("POST", to, content=request, timeout=600.0)
        with _understood():
            path = f"/jobs/{int(job['job'], 16):032x}"  # a number, so that it cannot name another path
            try:
                while job["state"] in ("queued", "running"):
                    time.sleep(every)
                    job = self._json("GET", path)
                    if progress is not None:
                        progress({**job, "current": clean(job["current"], 100)})
            except KeyboardInterrupt:  # whoever asked has gone: the server need not go on
                with contextlib.suppress(HEError):
                    self._json("DELETE", path)
                raise
            if job["state"] != "done":
                raise _error(job.get("error") or {"message": f"the job is {job['state']}"})
        return path

    def _wait_alive(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while True:
            try:
                self.wait_ready()
                return
            except ConnectError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        data = self._request(method, path, max_bytes=MAX_JSON, **options)
        try:
            value = wire.parse_json(data)
        except WireError as error:
            raise WireError(f"the server's answer to {method} {path.split('/')[1]} is not JSON") from error
        if not isinstance(value, dict):
            raise WireError("the server's answer is not an object")
        return value

    def _request(self, method: str, path: str, *, max_bytes: int, **options: Any) -> bytes:
        """One exchange, its answer read up to a cap."""
        try:
            with self._http.stream(method, path, **options) as response:
                data = bytearray()
                for chunk in response.iter_raw():
                    data += chunk
                    wire.check_length(len(data), max_bytes)
                status = response.status_code
        except httpx.HTTPError as error:
            raise ConnectError(
                f"no answer from {self.url}: {type(error).__name__}; is `polyformer serve` running?"
            ) from error
        if status == 404 and path.startswith("/jobs/"):
            raise LostJobError("the server does not know this job; it was started again since")
        if status == 404 and path.startswith("/sessions/"):
            raise _lost_session()
        if status >= 400:
            try:
                said = wire.parse_json(bytes(data))
            except WireError as error:
                raise WireError(f"the server answered {status} without saying why") from error
            raise _error(said)
        return bytes(data)


def _lost_session() -> LostSessionError:
    return LostSessionError(
        "the server does not know this sequence any more: it stood still for too long, or the server was started again; what it "
        "kept is lost, so start again from the first token"
    )


def clean(text: Any, most: int = 2000) -> str:
    """A server's text, fit for a terminal: nothing that moves the cursor or hides what else is shown."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:most])


@contextmanager
def _understood() -> Iterator[None]:
    """Whatever goes wrong with a field of the server's JSON is the server's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError("the server's answer is not what a polyformer server says") from error


def compare_manifest(spec: ClientSpec, manifest: Mapping[str, Any], moduli: tuple[int, ...] | None = None) -> None:
    """ManifestError with every field on which a server's manifest differs from our specification."""
    ours: dict[str, Any] = {"format": "manifest", "version": wire.VERSION, "circuit_sha256": spec.circuit_sha256}
    theirs: dict[str, Any] = {name: manifest.get(name) for name in ours}
    params = manifest.get("params")
    for name, value in spec.params.to_json().items():
        ours[f"params.{name}"] = value
        theirs[f"params.{name}"] = params.get(name) if isinstance(params, Mapping) else None
    ours["keys"] = {str(k): level for k, level in spec.keys.items()}
    ours["relin_level"] = spec.relin_level
    for side, signatures in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        ours[side] = [{**vars(s), "shape": list(s.shape)} for s in signatures]
    if moduli is not None:
        ours["moduli"] = list(moduli)
    if spec.steps:
        ours["steps"] = spec.steps
        ours["states"] = [{**vars(s), "shape": list(s.shape)} for s in spec.states]
    for name in ("keys", "relin_level", "inputs", "outputs", "moduli", "steps", "states"):
        theirs[name] = manifest.get(name)
    wire.compare(ours, theirs, "client and server disagree")


def _error(data: Any) -> HEError:
    """A server's error, rebuilt here; unknown classes become HEError, long texts are cut."""
    if not isinstance(data, dict):
        return HEError("the server refused without saying why")
    kind = ERRORS.get(str(data.get("error")), HEError)
    return kind(f"server: {clean(data.get('message', ''))}")
