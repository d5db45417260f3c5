"""What the server does, one thing at a time: prepare weights, evaluate requests.

One thread does the work, because an evaluation wants all cores and all memory; the web server only asks for states. The
queue is bounded, finished replies are few, and nothing of a request is kept once its job ends.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import wire
from .base import HEError
from .execute import Cancelled
from .keys import KeyFile, Manifest
from .wire import Part, Sealed

log = logging.getLogger("polyformer.server")

Progress = Callable[[int, int, str], None]  # done, total, what is being done


@dataclass(frozen=True, kw_only=True)
class Result:
    """Output ciphertexts of one evaluation, and where its time went (plain data for JSON).

    state: what a step leaves for the next one, ciphertexts in the engine's own form; None for a circuit without steps.
    """

    outputs: Mapping[Part, Sealed]
    timing: Mapping[str, Any]
    state: Any = None


class Engine(Protocol):
    """One circuit on one backend, as the server uses it. `prepare`, `run` and `run_step` are called from one thread.

    `run_step` takes the state that the step before left, None for the first one, and does not change it.
    """

    moduli: tuple[int, ...]

    def prepare(self, progress: Progress) -> None: ...
    def load_key(self, path: Path, file: KeyFile, manifest: Manifest) -> None: ...  # from any thread; WireError
    def forget_keys(self) -> None: ...
    def run(self, inputs: Mapping[Part, Sealed], progress: Progress, cancel: threading.Event) -> Result: ...
    def run_step(
        self, inputs: Mapping[Part, Sealed], state: Any, step: int, progress: Progress, cancel: threading.Event
    ) -> Result: ...


class Turn(Protocol):
    """A step of a sequence, as the worker needs it: what to start from, and whom to tell how it ended."""

    @property
    def state(self) -> Any: ...
    @property
    def step(self) -> int: ...
    def finish(self, state: Any) -> None: ...
    def release(self) -> None: ...


class BusyError(HEError):
    """The queue is full; the client may come back later."""


@dataclass(kw_only=True)
class Job:
    """One request. `state` is queued, running, done, failed or cancelled."""

    id: str
    state: str = "queued"
    done: int = 0
    total: int = 0
    current: str = ""
    started: float = 0.0
    ended: float = 0.0
    error: dict[str, Any] | None = None
    reply: bytes = field(default=b"", repr=False)
    timing: Mapping[str, Any] = field(default_factory=dict, repr=False)
    cancel: threading.Event = field(default_factory=threading.Event, repr=False)

    def to_json(self) -> dict[str, Any]:
        seconds = (self.ended or time.monotonic()) - self.started if self.started else 0.0
        return {
            "job": self.id,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "current": self.current,
            "seconds": round(seconds, 3),
            "error": self.error,
        }


@dataclass(kw_only=True)
class Stage:
    """Progress of what precedes evaluation. `state` is waiting, running, ready or failed."""

    state: str = "waiting"
    done: int = 0
    total: int = 0
    error: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Worker:
    """The working thread and all that it knows."""

    def __init__(self, engine: Engine, *, max_queue: int = 4, max_replies: int = 8) -> None:
        self.engine = engine
        self.weights = Stage()
        self._max_replies = max_replies
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._max_queue = max_queue
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="evaluate", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._tasks.put(lambda: self._stage(self.weights, self.engine.prepare))

    @property
    def idle(self) -> bool:
        return not any(j.state in ("queued", "running") for j in self._all())

    def submit(self, inputs: Mapping[Part, Sealed], expected_reply: wire.Expected, turn: Turn | None = None) -> Job:
        """Queue an evaluation, or a step of a sequence.

        Raises:
            BusyError: the queue is full.
        """
        with self._lock:
            self._check_room()
            job = Job(id=secrets.token_hex(16))
            self._jobs[job.id] = job
            finished = [j.id for j in self._jobs.values() if j.state in ("done", "failed", "cancelled")]
            for name in finished[: -self._max_replies]:
                del self._jobs[name]
        self._tasks.put(lambda: self._evaluate(job, inputs, expected_reply, turn))
        return job

    def check_room(self) -> None:
        """BusyError when `submit` would raise it, for who wants to know before reading a request."""
        with self._lock:
            self._check_room()

    def _check_room(self) -> None:
        if sum(j.state in ("queued", "running") for j in self._jobs.values()) >= self._max_queue:
            raise BusyError(f"{self._max_queue} evaluations are queued already; try again later")

    def job(self, name: str) -> Job | None:
        with self._lock:
            return self._jobs.get(name)

    def _all(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it holds the request's ciphertexts

    def _stage(self, stage: Stage, action: Callable[[Progress], None]) -> None:
        def progress(done: int, total: int, what: str) -> None:
            stage.done, stage.total = done, total

        stage.state, started = "running", time.monotonic()
        try:
            action(progress)
            stage.state = "ready"
        except HEError as error:
            stage.error, stage.state = f"{type(error).__name__}: {error}", "failed"
        except Exception as error:
            log.exception("a stage failed")
            stage.error, stage.state = f"{type(error).__name__}; see the server's log", "failed"
        stage.seconds = time.monotonic() - started

    def _evaluate(
        self, job: Job, inputs: Mapping[Part, Sealed], expected_reply: wire.Expected, turn: Turn | None
    ) -> None:
        def progress(done: int, total: int, what: str) -> None:
            job.done, job.total, job.current = done, total, what

        if job.cancel.is_set():
            if turn is not None:
                turn.release()
            job.state = "cancelled"
            return
        job.started, job.state = time.monotonic(), "running"
        state = "failed"
        try:
            if self.weights.state != "ready":
                raise HEError(f"the server's weights are {self.weights.state}: {self.weights.error or 'not there yet'}")
            if turn is None:
                result = self.engine.run(inputs, progress, job.cancel)
            else:
                result = self.engine.run_step(inputs, turn.state, turn.step, progress, job.cancel)
            job.reply = wire.dumps(expected_reply, result.outputs)
            job.timing = result.timing
            if turn is not None:
                turn.finish(result.state)
            state = "done"
        except Cancelled:
            state = "cancelled"
        except HEError as error:
            job.error = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # a fault of ours: the client learns its kind, the log its place, nobody its data
            log.exception("evaluation failed")
            job.error = {
                "error": "HEError",
                "message": f"the evaluation failed inside the server: {type(error).__name__}",
            }
        if turn is not None and state != "done":
            turn.release()
        job.ended = time.monotonic()
        job.state = state
