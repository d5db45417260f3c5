"""Like steps as one: the same placement as without, in a fraction of the time; what is not alike stays apart."""

import time
from dataclasses import replace

import pytest

from compiler.placement import place
from compiler.placement_check import check
from compiler.placement_groups import group, reordered
from compiler.placement_problem import Problem, RefreshTimes, Step

LEVELS = 10


class Graph:
    """Steps with kinds; `seconds` rise with the level."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.kinds: list[str] = []

    def add(self, kind: str, *args: int, depth: int = 0, base: float = 0.1, **fields) -> int:
        seconds = tuple(base * (1 + k) for k in range(LEVELS + 1))
        self.steps.append(Step(id=len(self.steps), args=args, depth=depth, seconds=seconds, **fields))
        self.kinds.append(kind)
        return len(self.steps) - 1

    def problem(self, *, pair: float | None = None, loss: int = 0) -> Problem:
        return Problem(
            steps=tuple(self.steps),
            top=8,
            refresh_level=8,
            refresh_from=2,
            copy_loss=loss,
            times=RefreshTimes(plain=3.0, pair=pair),
            limb_bytes=100,
        )


def blocks(count: int, wide: int, tiles: int = 1) -> Graph:
    """Residual blocks on a stream of `tiles` ciphertexts, `wide` like products inside."""
    g = Graph()
    stream = [g.add("input x", base=0.0) for _ in range(tiles)]
    for b in range(count):
        q = g.add(f"mixed {b}", *stream, depth=1, absorbs=True)
        k = g.add(f"mixed {b}", *stream, depth=1, absorbs=True)
        parts = [g.add(f"shift {b}", k, depth=1, absorbs=True) for _ in range(wide)]
        squares = [g.add(f"square {b}", g.add(f"product {b}", q, p, depth=1), depth=1) for p in parts]
        total = squares[0]
        for s in squares[1:]:
            total = g.add(f"sum {b}", total, s, base=0.001, may_refresh=tiles == 1)
        rotated = g.add(f"rotated {b}", total, base=0.01, may_refresh=tiles == 1)
        outs = [g.add(f"out {b}", rotated, depth=2, absorbs=True) for _ in stream]
        stream = [g.add(f"stream {b}", x, y, base=0.001) for x, y in zip(stream, outs, strict=True)]
    g.add("output", *stream, base=0.0, may_refresh=False)
    return g


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_group_is_placed_as_well_as_its_members(tiles):
    g = blocks(2, 3, tiles)
    problem = g.problem()
    groups = group(problem, g.kinds)
    assert len(groups.small.steps) < 0.7 * len(problem.steps)
    whole = place(problem, method="milp", seconds=60)
    small = groups.expand(place(groups.small))
    check(problem, small)
    assert small.sites
    assert whole.method == "integer program"
    assert small.seconds == pytest.approx(whole.seconds, rel=1e-9)


def test_sums_and_unary_tails_are_one_step_and_products_one_of_many():
    g = blocks(1, 4)
    groups = group(g.problem(), g.kinds)
    lengths = sorted((len(chains), len(chains[0])) for chains in groups.chains)
    assert (4, 1) in lengths  # four shifts, in one step
    assert (1, 4) in lengths  # three sums and the rotation behind them
    assert sum(a * b for a, b in lengths) == len(g.steps)


def test_what_others_read_stays_apart():
    g = Graph()
    x = g.add("input x", base=0.0)
    a, b = (g.add("map", x, depth=1) for _ in range(2))
    g.add("output", g.add("sum s", a, b))
    g.add("output", g.add("square", b, depth=1))
    groups = group(g.problem(), g.kinds)
    assert all(len(chains) == 1 for chains in groups.chains)


@pytest.mark.parametrize("loss", [0, 1])
def test_tiles_of_a_stream_share_their_refreshes(loss):
    g = blocks(4, 3, 2)
    problem = g.problem(pair=3.6, loss=loss)
    problem = reordered(problem, group(problem, g.kinds).order)
    order = group(g.problem(), g.kinds).order
    kinds = [g.kinds[v] for v in order]
    groups = group(problem, kinds)
    small = groups.expand(place(groups.small))
    check(problem, small)  # the first of a pair is not read before the second exists
    assert {s.kind for s in small.sites} == {"pair"}
    assert all(kinds[v].startswith("stream") for s in small.sites for v in s.values)
    alone = groups.expand(place(replace(groups.small, times=RefreshTimes(plain=3.0), copy_loss=0)))
    assert small.seconds < alone.seconds


def test_a_reader_that_keeps_the_scale_loses_a_level_of_the_copy():
    for absorbs, highest in ((True, 7), (False, 6)):
        g = Graph()
        y = g.add("deep", g.add("input x", base=0.0), depth=6)
        z = g.add("map", y, depth=1, absorbs=absorbs, may_refresh=False)
        g.add("output", z, depth=highest)
        problem = g.problem(pair=3.0, loss=1)
        assert place(problem).sites
        with pytest.raises(Exception, match="no placement of 4 steps"):
            place(replace(problem, steps=(*problem.steps[:3], replace(problem.steps[3], depth=highest + 1))))


def test_six_blocks_take_seconds():
    g = blocks(6, 32)
    start = time.process_time()
    groups = group(g.problem(), g.kinds)
    placement = place(groups.small)
    assert time.process_time() - start < 10
    assert placement.gap < 0.02
    check(g.problem(), groups.expand(placement))
