"""Benchmarks by name, found by file name: every module of `benchmarks/entries/` ends in a tuple BENCHMARKS."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import entries, records

if TYPE_CHECKING:
    from .blocks import Block

Progress = Callable[[int, int, str], None]  # done, total, what
Record = Mapping[str, Any]
Keep = Callable[[Record], None]  # what a record would be by now
GROUPS = {
    "primitives": "one CKKS primitive at a time, level by level",
    "encrypted": "models under encryption, operator by operator",
    "race": "PowerSoftmax against other ways to attention, under encryption",
    "train": "evidence from training in the clear",
    "plaintext": "the same models in the clear, beside softmax, Mamba and linear attention",
    "scaling": "latency and memory against size, measured and projected",
    "security": "lattice estimates behind the limits",
}
SUITE = "suite"  # the name of all that one machine measures in three hours


def silent(done: int, total: int, what: str) -> None:
    """No progress shown."""


def forget(record: Record) -> None:
    """Nothing kept on the way."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run a benchmark.

    `keep` may be called with what a record would be by now: a run that is interrupted or crashes leaves the last one.
    """

    repeats: int = 3
    seeds: Sequence[int] = (0, 1, 2)
    quick: bool = False  # smallest size that exercises everything; its figures prove nothing
    folder: Path | None = None  # of the record; None: where the benchmark's records live
    progress: Progress = field(default=silent, repr=False)
    keep: Keep = field(default=forget, repr=False)

    def within(self, part: int, parts: int, label: str) -> Progress:
        """The progress of one of so many equal parts, under its label."""

        def progress(done: int, total: int, what: str = "") -> None:
            self.progress(part * total + done, parts * total, f"{label}: {what}" if what else label)

        return progress


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One measurement that can be repeated by its name.

    `version` rises when figures of the old and the new one can no longer be compared. `minutes` and `memory_gb` are what a
    full run takes on 2 cores, for planning. `show` makes tables and figures of a record for the report; without it, all figures are
    listed. Both may be given as "module:function", imported when needed. `save` writes the record where it is not one of `records.RESULTS`.
    `suite` is False for what is measured once: too long to repeat with the rest, or done there by a part of it. `record` is the name of its
    records where they have another one. `beside` are records that `show` compares with: it gets those that there are, by name, as a second
    argument.
    """

    name: str
    version: int = 1
    group: str
    measures: str  # one line: what the figures are
    conditions: str  # one line: size, data, security
    minutes: float
    memory_gb: float
    run: Callable[[Settings], Record] | str
    show: Callable[[Record], Sequence[Block]] | str | None = None
    save: Callable[[Record, Path | None], Path] | None = None
    suite: bool = True
    record: str = ""
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"benchmark {self.name!r}: no group {self.group!r}; known are: {', '.join(GROUPS)}")

    def measure(self, settings: Settings) -> Record:
        """Run it."""
        return _function(self.run)(settings)

    def blocks(self, record: Record, found: Mapping[str, Record] | None = None) -> Sequence[Block] | None:
        """What it shows of a record of its own version; None where it leaves that to the report.

        Args:
            found: name -> record of the report's folder, to compare with.
        """
        if self.show is None or record["version"] != self.version:
            return None
        if not self.beside:
            return _function(self.show)(record)
        return _function(self.show)(record, {n: r for n, r in (found or {}).items() if n in self.beside})

    def write(self, record: Record, folder: Path | None) -> Path:
        """Write a record of this benchmark; the file."""
        if self.save:
            return self.save(record, folder)
        return records.write(record, folder or records.RESULTS)


def _function(name: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(name, str):
        return name
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@lru_cache(maxsize=1)
def benchmarks() -> Mapping[str, Benchmark]:
    """Name -> benchmark, in the order of the groups and their files.

    Raises:
        ValueError: two have one name.
    """
    found: list[Benchmark] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(entries.__path__)):
        found += importlib.import_module(f"{entries.__name__}.{module}").BENCHMARKS
    order = list(GROUPS)
    found.sort(key=lambda b: order.index(b.group))
    names = [b.name for b in found]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"two benchmarks are called {', '.join(twice)}")
    return {b.name: b for b in found}


def of_record(name: str) -> Benchmark | None:
    """The benchmark that makes records of a name; None if none does."""
    return next((b for b in benchmarks().values() if (b.record or b.name) == name), None)


def suite() -> list[Benchmark]:
    """What `polyformer bench run suite` measures: everything but training, which has a command of its own, and what is measured once."""
    return [b for b in benchmarks().values() if b.suite and b.group != "train"]


def select(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name, by group or as the suite, each once, in the order asked for.

    Raises:
        ValueError: a name is neither; lists those that exist.
    """
    known = benchmarks()
    chosen: dict[str, Benchmark] = {}
    for name in names:
        group = suite() if name == SUITE else [b for b in known.values() if b.group == name]
        if not group and name not in known:
            raise ValueError(
                f"no benchmark is called {name!r}; known are: {', '.join(known)}; groups are: {', '.join(GROUPS)}, {SUITE}"
            )
        for b in group or [known[name]]:
            chosen.setdefault(b.name, b)
    return list(chosen.values())
