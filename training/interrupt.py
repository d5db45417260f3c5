"""Ctrl-C while a loop trains: the step in progress is finished and kept, a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C, and yield the question whether there was one.

    Where others take the signal, or in another thread than the main one, which never gets it, nothing is held.
    """
    held = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: held
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
