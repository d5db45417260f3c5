"""How much memory a part of a process takes at its peak, while other parts keep theirs: from the kernel's high-water mark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROCESS = Path("/proc/self")


@dataclass(kw_only=True)
class Peak:
    """Filled in when the watch ends; None where the system does not say.

    peak_gb   high-water mark of the whole process during the watch
    grown_gb  the same above what was resident before; memory that a library keeps in a pool of its own and uses again is not in it
    """

    peak_gb: float | None = None
    grown_gb: float | None = None


@contextmanager
def watch() -> Iterator[Peak]:
    """Lower the kernel's high-water mark to what is resident now, and read it at the end. Watches do not nest."""
    found = Peak()
    before = _reset()
    yield found
    if before is not None:
        found.peak_gb = _status_gb("VmHWM")
        found.grown_gb = found.peak_gb - before


def _reset() -> float | None:
    """GB resident now, or None where the mark cannot be lowered.

    What was freed goes back to the system first: from the day that TenSEAL is imported glibc keeps it (measured: 0.2 GB freed and taken
    again left no trace in the mark), and it would hide as much of what comes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return None
    return resident_gb()


def resident_gb() -> float | None:
    """Memory that this process holds now, in GB (1e9 bytes); None where the system does not say."""
    try:
        return _status_gb("VmRSS")
    except (OSError, ValueError):
        return None


def _status_gb(field: str) -> float:
    for line in (PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e9
    raise ValueError(f"{PROCESS / 'status'} has no {field}")
