"""Sequences under way: what a server keeps, encrypted, between the steps of a circuit with `steps`.

A session is known by an id that only its client has been told. It holds the states' ciphertexts as the backend has them, under
a key that the server does not have, and the number of the step that comes next: a step is done once, in order, and one at a
time. A step that fails or is cancelled leaves the session as it was. Sessions end with their client's word, with their keys,
after a while without a step, and with the process: nothing of them is written to disk.
"""

from __future__ import annotations

import math
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .base import HEError, ManifestError, ParamsError, WireError
from .circuit import Circuit

AGAIN = "start the sequence anew from its first token"


class UnknownSessionError(ManifestError):
    """A session that this process never had, or has no longer."""


class FullError(HEError):
    """As many sessions are kept as may be; the client may come back later."""


@dataclass(kw_only=True)
class Session:
    """One sequence. `state` is the engine's, None before the first step; `step` comes next; `busy` while a step is queued or runs."""

    id: str
    key_id: str
    state: Any = field(default=None, repr=False)
    step: int = 0
    busy: bool = False
    used: float = 0.0


@dataclass(frozen=True)
class Step:
    """One step of a session under way: the worker's `jobs.Turn`."""

    sessions: Sessions
    session: Session

    @property
    def state(self) -> Any:
        return self.session.state

    @property
    def step(self) -> int:
        return self.session.step

    def finish(self, state: Any) -> None:
        self.sessions.finish(self.session, state)

    def release(self) -> None:
        self.sessions.release(self.session)


class Sessions:
    """All sessions of one circuit.

    Args:
        most: sessions at once. most_bytes: memory of their states together, by the circuit's own account.
        idle_s: seconds without a step after which a session ends.
        now: the clock, seconds that only grow.

    Raises:
        ParamsError: one state alone is larger than `most_bytes`: no sequence could ever begin.
    """

    def __init__(
        self, circuit: Circuit, *, most: int, most_bytes: int, idle_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        if circuit.steps and circuit.state_bytes > most_bytes:
            raise ParamsError(
                f"the state of one sequence is {circuit.state_bytes / 1e9:.3g} GB, larger than the {most_bytes / 1e9:.3g} GB that "
                f"all states may take: allow {math.ceil(circuit.state_bytes / 1e8) / 10:g} GB or more (`polyformer serve "
                "--state-gb`), or compile a step of fewer tokens or less width"
            )
        self.steps, self.idle_s = circuit.steps, idle_s
        self.most = min(most, most_bytes // max(1, circuit.state_bytes)) if circuit.steps else 0
        self._now = now
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def open(self, key_id: str) -> Session:
        """A new sequence under a bundle of keys.

        Raises:
            ManifestError: the circuit has no steps.
            FullError: there are as many as may be.
        """
        if not self.steps:
            raise ManifestError("this circuit is no step of a sequence: send its request to /evaluate")
        with self._lock:
            self._expire()
            if len(self._sessions) >= self.most:
                raise FullError(
                    f"{len(self._sessions)} sequences are under way, {self.most} are kept at once; one that stands still ends after "
                    f"{self.idle_s:.0f} s; try again later"
                )
            session = Session(id=secrets.token_hex(16), key_id=key_id, used=self._now())
            self._sessions[session.id] = session
            return session

    def begin(self, name: str, step: str, key_id: str) -> Step:
        """The next step of a session, which is busy until it is told how the step ended.

        Args:
            step: as it came over the network, digits.

        Raises:
            UnknownSessionError: there is none of that id under these keys.
            ManifestError: another step comes next, the sequence is full, or a step is under way already.
            WireError: `step` is no number.
        """
        if not re.fullmatch(r"[0-9]{1,9}", step):
            raise WireError("the number of a step is one to nine digits")
        with self._lock:
            session = self._find(name, key_id)
            if session.busy:
                raise ManifestError(f"step {session.step} of this sequence is under way; wait for it")
            if session.step >= self.steps:
                raise ManifestError(f"the sequence is full: it has had its {self.steps} steps; {AGAIN}")
            if int(step) != session.step:
                raise ManifestError("this is not the step that comes next", {"step": (int(step), session.step)})
            session.busy = True
            session.used = self._now()
            return Step(self, session)

    def look(self, name: str, key_id: str) -> Session:
        """A session as it stands.

        Raises:
            UnknownSessionError: there is none of that id under these keys.
        """
        with self._lock:
            return self._find(name, key_id)

    def finish(self, session: Session, state: Any) -> None:
        """A step is done and left this state."""
        with self._lock:
            session.state, session.step, session.busy, session.used = state, session.step + 1, False, self._now()
            if session.id not in self._sessions:  # closed in the meantime
                session.state = None

    def release(self, session: Session) -> None:
        """A step was not done; it may be sent again."""
        with self._lock:
            session.busy, session.used = False, self._now()

    def close(self, name: str, key_id: str) -> None:
        """Forget a session.

        Raises:
            UnknownSessionError: there is none of that id under these keys.
        """
        with self._lock:
            session = self._find(name, key_id)
            del self._sessions[session.id]
            if not session.busy:
                session.state = None

    def clear(self) -> None:
        """Forget all, because their keys go."""
        with self._lock:
            self._sessions.clear()

    @property
    def count(self) -> int:
        with self._lock:
            self._expire()
            return len(self._sessions)

    def _find(self, name: str, key_id: str) -> Session:
        self._expire()
        session = self._sessions.get(name)
        if session is None or session.key_id != key_id:
            raise UnknownSessionError(
                f"no such sequence: it stood still for more than {self.idle_s:.0f} s, its keys were removed, or the server was started "
                f"again since; {AGAIN}"
            )
        return session

    def _expire(self) -> None:
        limit = self._now() - self.idle_s
        for session in [s for s in self._sessions.values() if not s.busy and s.used < limit]:
            del self._sessions[session.id]
