"""A server as another process, for the demo: started, watched, always torn down."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from polyformer.commands.console import Failure


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    """A running `polyformer serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def explain(self, error: Exception) -> Exception:
        """The server's end as the reason, if it ended; else the error itself."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return error
        why = " (killed; most likely the machine ran out of memory)" if code == -signal.SIGKILL else ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return Failure(f"the server ended with status {code}{why}: {' '.join(lines[-3:])}; all of it is in {self.log}")


@contextmanager
def server_process(
    circuit: Path, folder: Path, log: Path, *, threads: int, plaintext_gb: float, insecure: bool
) -> Iterator[ServerProcess]:
    """`polyformer serve` on a free port of the loopback, once it answers.

    Raises:
        Failure: it ended, or did not answer within two minutes.
    """
    from he_backend.heap import ENVIRONMENT

    port = free_port()
    command = [sys.executable, "-m", "polyformer", "serve", str(circuit), "--folder", str(folder), "--port", str(port)]
    command += [
        "--threads",
        str(threads),
        "--plaintext-gb",
        f"{plaintext_gb:.3f}",
        *(["--insecure"] if insecure else []),
    ]
    root = str(Path(__file__).resolve().parents[2])  # the child imports what we run, wherever it was started
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        server = ServerProcess(process=process, url=f"http://127.0.0.1:{port}", log=log)
        try:
            wait_answer(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_answer(server: ServerProcess, patience: float = 120.0) -> None:
    """Until the server answers."""
    from he_backend.client import Client, ConnectError

    deadline = time.monotonic() + patience
    while True:
        try:
            with Client(server.url) as client:
                client.manifest()
            return
        except ConnectError as error:
            if server.process.poll() is not None:
                raise server.explain(error) from error
            if time.monotonic() > deadline:
                raise Failure(f"the server did not answer within {patience:.0f} s; see {server.log}") from error
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """SIGTERM as an exception, so that `finally` blocks run."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
