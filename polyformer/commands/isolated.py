"""Run a function in a process of its own, so that what it imports and allocates is gone when it returns.

The demo's client so stays a client: torch, onnx and the compiler never share a process with the secret key, and memory that
is measured is the client's.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from polyformer.commands.console import Advance, Failure


def isolated(function: Callable[..., Any], *arguments: Any, progress: Advance, **named: Any) -> Any:
    """`function(*arguments, progress=..., **named)` elsewhere; its progress calls arrive here.

    Raises:
        Failure: it raised, with its message; or its process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, function, arguments, named), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "progress":
                progress(*value)
            elif kind == "result":
                return value
            else:
                raise Failure(value)
    except EOFError:
        process.join()
        raise Failure(f"{function.__name__} ended with status {process.exitcode} before it was done") from None
    finally:
        process.terminate()  # after a result there is nothing left for it to do; after Ctrl-C it must not go on
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
        process.join()


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    try:
        result = function(*arguments, progress=lambda *value: pipe.send(("progress", value)), **named)
        pipe.send(("result", result))
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        if os.environ.get("POLYFORMER_DEBUG"):
            traceback.print_exc()
        name = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
        pipe.send(("error", f"{name}{error}"))
