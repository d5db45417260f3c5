"""The heap of a process that evaluates: memory is taken from the system once, before a request comes, and kept.

A primitive at N = 2^16 takes tens of megabytes in pieces of half a megabyte. Whatever of it the system has to find first comes page by
page (2.5 to 13 microseconds for 4 KB on a virtual machine: 60 ms beside a rotation of 145 ms, measured), and glibc gives back what is
freed at the end of the heap, to fetch it again a moment later.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np

# One thread inside each primitive, because the executor runs primitives side by side; one heap for all threads, because
# what one frees is what another wants next; no piece of a ciphertext outside of that heap (glibc's largest bound), and nothing of it
# given back. All are read when a process starts.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
BLOCK = 16 << 20  # bytes of a piece: one that the heap keeps
PAGE = 4096


def keeps() -> bool:
    """Whether this process was started with `ENVIRONMENT`'s rules of the heap."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items() if name.startswith("MALLOC"))


def reserve(size: int) -> None:
    """Touch as many bytes, for later use; nothing where the heap would give them back."""
    if keeps():
        blocks = [np.empty(BLOCK, dtype=np.uint8) for _ in range(-(-size // BLOCK))]
        for block in blocks:
            block[::PAGE] = 1


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes.

    Of this program only: what getrusage tells begins, for a process that another one started, with what that one held.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
