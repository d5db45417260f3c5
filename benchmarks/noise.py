"""Whether something else used the processors while a benchmark ran.

The kernel counts the busy time of all processors (/proc/stat) and of this process and its children (getrusage); what is left over
belongs to others: programs, the kernel's own threads, and time stolen by the host.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUIET_SHARE = 0.03  # of all cores: more than this by others, and a record is marked as made on a busy machine
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(kw_only=True)
class Noise:
    """What others did while this was watched; complete after the block."""

    load_before: float = field(default_factory=lambda: os.getloadavg()[0])
    wall_s: float = 0.0
    others_s: float | None = None  # processor seconds; None where the system does not tell

    @property
    def share(self) -> float | None:
        """Of all cores' time, the part that others took."""
        if self.others_s is None or not self.wall_s:
            return None
        return self.others_s / (self.wall_s * (os.cpu_count() or 1))

    @property
    def quiet(self) -> bool:
        """Nothing else ran, as far as the system tells; where it does not, judged by the load before."""
        if self.share is None:
            return self.load_before < 0.1 * (os.cpu_count() or 1)
        return self.share < QUIET_SHARE

    def to_json(self) -> dict[str, Any]:
        """The fields of a record: quiet, and noise {load_before, others_share}."""
        share = None if self.share is None else round(self.share, 4)
        return {"quiet": self.quiet, "noise": {"load_before": self.load_before, "others_share": share}}


@contextmanager
def watch() -> Iterator[Noise]:
    """Watch the machine during a block."""
    noise = Noise()
    before, own, start = _busy(), _own(), time.perf_counter()
    try:
        yield noise
    finally:
        noise.wall_s = time.perf_counter() - start
        after = _busy()
        if before is not None and after is not None:
            noise.others_s = max(0.0, after - before - (_own() - own))


def _busy() -> float | None:
    """Seconds that all cores together were not idle, since the start of the system: user, nice, system, irq, softirq, steal."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(x) for x in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICK


def _own() -> float:
    """Processor seconds of this process and of children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
