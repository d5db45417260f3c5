"""Refresh and level placement as data: what is to be placed, what a placement is, and the arithmetic that all methods share.

The rules, for a value v made by step v with depth d and result level l:

    read     a reader with result level r and depth d takes v at level r + d: the original if l >= r + d, or the refreshed copy
             if that was made and R >= r + d; a higher level drops to a lower one for nothing. Where copies come at another
             scale (halves of a pair), a reader that does not absorb it loses `copy_loss` levels of the copy
    refresh  one refresh of v serves all its readers; it runs right after the step (a pair: after the later of the two), needs
             l >= `refresh_from` and gives R
    replace  a step with `function` f may be evaluated inside a refresh of its argument: it then needs its argument at
             `functional_from` and gives `functional_level`
    input    a step without arguments is a fresh ciphertext of at most `top`
    memory   original and copy are held until the last reader has run; values that nobody reads are results, held to the end

Given the refreshed and the replaced steps the lowest levels are unique (they solve difference constraints), and if seconds rise
with levels they are the best ones: a placement is a choice of sites, and that is how every method here searches.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from he_backend.base import HEError, LevelError

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One op of the list and the value that it makes.

    depth        levels that it consumes
    seconds      by level of the result, from 0
    ciphertexts  of the value: each is refreshed by itself, or two at once in a pair
    absorbs      whether it multiplies its arguments by constants first, and so takes a copy of any scale
    slots        if the value repeats with this period, sparse refreshes of at least so many slots will do; 0 if it does not repeat
    function     name of a functional refresh that can replace the step, or empty
    """

    id: int
    args: tuple[int, ...]
    depth: int = 0
    seconds: tuple[float, ...]
    ciphertexts: int = 1
    may_refresh: bool = True
    absorbs: bool = False
    slots: int = 0
    function: str = ""


@dataclass(frozen=True, kw_only=True)
class RefreshTimes:
    """Measured seconds of one refresh, by kind.

    plain       one ciphertext
    pair        two real ciphertexts as the real and the imaginary part of one; None if the backend has none
    sparse      one ciphertext of few slots, by slots
    functional  one ciphertext, by name of the function that is evaluated inside
    """

    plain: float
    pair: float | None = None
    sparse: Mapping[int, float] = field(default_factory=dict)
    functional: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be placed.

    top               highest level of a fresh ciphertext
    refresh_level     level R after a refresh
    refresh_from      lowest level at which a refresh may start
    copy_loss         levels of a refreshed copy that a reader spends which does not absorb its scale
    functional_level  level after a functional refresh; functional_from where it may start
    max_bytes         cap on the bytes of values alive at once, None for no cap; limb_bytes of one limb of one ciphertext
    """

    steps: tuple[Step, ...]
    top: int
    refresh_level: int
    refresh_from: int = 0
    copy_loss: int = 0
    functional_level: int = 0
    functional_from: int = 0
    times: RefreshTimes
    max_bytes: int | None = None
    limb_bytes: int = 0

    def __post_init__(self) -> None:
        if self.refresh_from > self.refresh_level:
            raise LevelError(
                f"a refresh starts at level {self.refresh_from} and gives {self.refresh_level}: it gains nothing"
            )
        for i, step in enumerate(self.steps):
            if step.id != i or any(not 0 <= a < i for a in step.args):
                raise HEError(
                    f"step {i} has id {step.id} and arguments {step.args}: steps are numbered in order of use"
                )
            if len(step.seconds) <= self.highest:
                raise HEError(
                    f"step {i} has seconds for {len(step.seconds)} levels; levels 0 to {self.highest} can occur"
                )
            if step.function and (step.function not in self.times.functional or len(step.args) != 1):
                raise HEError(
                    f"step {i} of {len(step.args)} arguments names function {step.function!r}; one argument and one of "
                    f"{sorted(self.times.functional)} can be evaluated in a refresh"
                )

    @cached_property
    def highest(self) -> int:
        """The highest level that any value can have."""
        functional = self.functional_level if any(s.function for s in self.steps) else 0
        return max(self.top, self.refresh_level, functional)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Steps that read each value, in order, each once."""
        found: list[list[int]] = [[] for _ in self.steps]
        for step in self.steps:
            for a in sorted(set(step.args)):
                found[a].append(step.id)
        return tuple(map(tuple, found))

    @cached_property
    def monotone(self) -> bool:
        """Whether no step gets cheaper with a higher level."""
        return all(a <= b for s in self.steps for a, b in itertools.pairwise(s.seconds))

    def copy_level(self, reader: int) -> int:
        """The level that a refreshed copy has for this reader."""
        return self.refresh_level - (0 if self.steps[reader].absorbs else self.copy_loss)

    def refreshable(self, v: int) -> bool:
        return self.steps[v].may_refresh and bool(self.readers[v])

    def single(self, v: int) -> tuple[float, str, int]:
        """Seconds, kind and slots of the cheapest refresh of one ciphertext of value v."""
        sparse = [(t, "sparse", n) for n, t in self.times.sparse.items() if 0 < self.steps[v].slots <= n]
        return min([(self.times.plain, "plain", 0), *sparse])

    def even(self, v: int) -> float:
        """Seconds to refresh the even part of v's ciphertexts: two by two, or one by one where that is cheaper."""
        return (self.steps[v].ciphertexts // 2) * min(2 * self.single(v)[0], self._pair)

    def odd(self, v: int) -> float:
        """Seconds for the odd ciphertext of v alone, 0 if there is none."""
        return self.single(v)[0] if self.steps[v].ciphertexts % 2 else 0.0

    def functional(self, v: int) -> float:
        """Seconds of the functional refresh in place of step v."""
        return self.steps[v].ciphertexts * self.times.functional[self.steps[v].function]

    @property
    def _pair(self) -> float:
        return float("inf") if self.times.pair is None else self.times.pair

    @cached_property
    def pairs(self) -> dict[Pair, float]:
        """Values whose odd ciphertexts may share a refresh -> seconds saved: both exist before the first reader of either."""
        found: dict[Pair, float] = {}
        single = [v for v in range(len(self.steps)) if self.refreshable(v) and self.steps[v].ciphertexts % 2]
        if self.times.pair is None:
            return found
        for i, u in enumerate(single):
            for w in single[i + 1 :]:
                if w >= self.readers[u][0]:
                    break
                saved = self.odd(u) + self.odd(w) - self._pair
                if saved > 0:
                    found[u, w] = saved
        return found

    def last_reader(self, v: int) -> int:
        """The step after which value v is freed."""
        return self.readers[v][-1] if self.readers[v] else len(self.steps) - 1


@dataclass(frozen=True, kw_only=True)
class Site:
    """One refresh: of one ciphertext of one value, or of a pair of them (twice the same value: two of its ciphertexts).

    kind      plain, pair, sparse or functional; slots of a sparse one, function of a functional one
    """

    values: tuple[int, ...]
    kind: str
    slots: int = 0
    function: str = ""

    def __str__(self) -> str:
        detail = f" {self.slots} slots" if self.slots else f" {self.function}" if self.function else ""
        return f"{self.kind}{detail} refresh of {' and '.join(f'%{v}' for v in self.values)}"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where levels and refreshes are.

    levels      of each step's result, before any refresh of it
    sites       in the order in which they run
    refreshed   (reader, argument) of the reads that take the refreshed copy
    seconds     predicted, all steps and refreshes; bound: no placement takes less
    peak_bytes  of values alive at once
    """

    levels: tuple[int, ...]
    sites: tuple[Site, ...]
    refreshed: frozenset[Pair]
    seconds: float
    bound: float
    peak_bytes: int
    method: str

    @property
    def gap(self) -> float:
        """How far the placement may be above the best one, relative to itself."""
        return max(0.0, 1.0 - self.bound / self.seconds) if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        kinds = [s.kind for s in self.sites]
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds))) or "none"
        return (
            f"{self.seconds:.4g} s, at least {self.bound:.4g} s (gap {100 * self.gap:.1f} %); refreshes: {counts}; "
            f"{self.peak_bytes / 1e9:.2f} GB of values; by {self.method}"
        )


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The highest level of each result that any placement gives it.

    run    by running the step; below 0 if no refresh can bring its arguments to what it needs
    given  the better of that and a functional refresh in its place
    read   of the result or of its copy
    """

    run: tuple[int, ...]
    given: tuple[int, ...]
    read: tuple[int, ...]


def reach(problem: Problem) -> Reach:
    """Follow the highest levels from the inputs on; levels drop for nothing, so that all of them can be had at once."""
    run: list[int] = []
    given: list[int] = []
    read: list[int] = []
    copied: list[bool] = []
    for step in problem.steps:
        copies = [problem.copy_level(step.id) if copied[a] else -1 for a in step.args]
        have = min((max(given[a], c) for a, c in zip(step.args, copies, strict=True)), default=problem.top)
        run.append(have - step.depth)
        replaced = bool(step.function) and have >= problem.functional_from
        given.append(max(run[-1], problem.functional_level if replaced else -1))
        copied.append(problem.refreshable(step.id) and given[-1] >= problem.refresh_from)
        read.append(max(given[-1], problem.refresh_level if copied[-1] else -1))
    return Reach(run=tuple(run), given=tuple(given), read=tuple(read))


def least_levels(problem: Problem, refreshed: Collection[int], functional: Collection[int]) -> list[int] | None:
    """The lowest level of every result under a choice of sites; None if a fresh or functional ciphertext has too few."""
    low, high = [0] * len(problem.steps), [0] * len(problem.steps)  # needs that a refresh could serve, and the others
    levels = [0] * len(problem.steps)
    for step in reversed(problem.steps):
        v = step.id
        level = max(high[v], problem.refresh_from) if v in refreshed else max(low[v], high[v])
        if v in functional:
            if level > problem.functional_level:
                return None
            level, need = problem.functional_level, problem.functional_from
        else:
            need = level + step.depth
        if (not step.args and level > problem.top) or need > problem.highest:
            return None
        levels[v] = level
        for a in step.args:
            side = low if need <= problem.copy_level(v) else high
            side[a] = max(side[a], need)
    return levels


def peak_bytes(problem: Problem, levels: Sequence[int], refreshed: Collection[int]) -> int:
    """Largest sum of bytes alive at once when steps run in order."""
    change = [0] * (len(problem.steps) + 1)
    for step in problem.steps:
        limbs = levels[step.id] + 1 + (problem.refresh_level + 1 if step.id in refreshed else 0)
        size = step.ciphertexts * limbs * problem.limb_bytes
        change[step.id] += size
        change[problem.last_reader(step.id) + 1] -= size
    alive = peak = 0
    for delta in change:
        alive += delta
        peak = max(peak, alive)
    return peak


def assemble(
    problem: Problem,
    levels: Sequence[int],
    refreshed: Collection[int],
    functional: Collection[int],
    pairs: Sequence[Pair],
    *,
    bound: float,
    method: str,
) -> Placement:
    """The placement of a choice of sites: refreshes that nobody reads are left out, kinds are the cheapest."""
    reads: set[Pair] = set()
    for step in problem.steps:
        need = problem.functional_from if step.id in functional else levels[step.id] + step.depth
        reads.update((step.id, a) for a in step.args if levels[a] < need)
    used = {a for _, a in reads}
    pairs = [pair for pair in pairs if used.issuperset(pair)]
    timed: list[tuple[int, Site]] = []  # step after which it runs
    for v in sorted(functional):
        site = Site(values=(v,), kind="functional", function=problem.steps[v].function)
        timed += [(v, site)] * problem.steps[v].ciphertexts
    paired = {v for pair in pairs for v in pair}
    for v in sorted(used):
        count = problem.steps[v].ciphertexts
        seconds, kind, slots = problem.single(v)
        doubles = count // 2 if problem.even(v) < (count // 2) * 2 * seconds else 0
        timed += [(v, Site(values=(v, v), kind="pair"))] * doubles
        timed += [(v, Site(values=(v,), kind=kind, slots=slots))] * (count - 2 * doubles - (v in paired))
    timed += [(w, Site(values=(u, w), kind="pair")) for u, w in pairs]
    timed.sort(key=lambda t: t[0])
    sites = tuple(site for _, site in timed)
    seconds = sum(s.seconds[levels[s.id]] for s in problem.steps if s.id not in functional)
    seconds += sum(site_seconds(problem, site) for site in sites)
    return Placement(
        levels=tuple(levels),
        sites=sites,
        refreshed=frozenset(reads),
        seconds=seconds,
        bound=min(bound, seconds),
        peak_bytes=peak_bytes(problem, levels, used),
        method=method,
    )


def site_seconds(problem: Problem, site: Site) -> float:
    """Seconds of one refresh."""
    times = problem.times
    match site.kind:
        case "pair" if times.pair is not None:
            return times.pair
        case "sparse" if site.slots in times.sparse:
            return times.sparse[site.slots]
        case "functional" if site.function in times.functional:
            return times.functional[site.function]
        case "plain":
            return times.plain
    raise HEError(f"{site}: the table of refreshes has no such kind")
