"""A server in a process of its own, for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from he_backend.client import Client, ConnectError

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(command: Sequence[str], port: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The process, once it answers on `port`; killed at the end."""
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    assert process.stderr is not None
                    raise RuntimeError(f"server ended with {process.returncode}: {process.stderr.read()}")
                try:
                    with Client(f"http://127.0.0.1:{port}") as client:
                        client.manifest()
                    break
                except ConnectError:
                    time.sleep(0.1)
            yield process
        finally:
            process.kill()
