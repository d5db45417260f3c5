"""Placement: the best of all choices on small graphs, every rule named when broken, transformers in time."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiler import placement, placement_paths
from compiler.placement import METHODS, place
from compiler.placement_check import check
from compiler.placement_problem import Placement, Problem, RefreshTimes, Site, Step, assemble, least_levels
from compiler.verify import VerificationError
from he_backend.base import HEError, LevelError, ParamsError

LEVELS = 12  # every table of seconds below reaches this level


def step(id: int, *args: int, depth: int = 0, base: float = 0.1, **fields) -> Step:
    """A step whose seconds rise with the level."""
    return Step(id=id, args=args, depth=depth, seconds=tuple(base * (1 + k) for k in range(LEVELS + 1)), **fields)


def chain(depths: list[int], **fields) -> tuple[Step, ...]:
    return (step(0, base=0.0), *(step(i, i - 1, depth=d, **fields) for i, d in enumerate(depths, start=1)))


def problem(steps, **fields) -> Problem:
    defaults = {"top": 4, "refresh_level": 3, "refresh_from": 1, "times": RefreshTimes(plain=2.0), "limb_bytes": 100}
    return Problem(steps=tuple(steps), **{**defaults, **fields})


def random_problem(seed: int, *, pair: bool, functional: bool, sparse: bool = False) -> Problem:
    rng = np.random.default_rng(seed)
    steps: list[Step] = [step(0, base=0.0)]
    for i in range(1, int(rng.integers(4, 9))):
        args = rng.choice(i, size=min(i, int(rng.integers(1, 3))), replace=False)
        fields: dict[str, Any] = {
            "depth": int(rng.integers(0, 3)),
            "base": float(rng.uniform(0.01, 1.0)),
            "ciphertexts": int(rng.integers(1, 4)),
            "may_refresh": bool(rng.random() < 0.8),
            "slots": int(rng.choice([0, 64])) if sparse else 0,
        }
        if functional and len(args) == 1 and rng.random() < 0.5:
            fields["function"] = "gelu"
        steps.append(step(i, *map(int, args), **fields))
    return problem(
        steps,
        top=int(rng.integers(2, 6)),
        refresh_level=int(rng.integers(2, 5)),
        refresh_from=int(rng.integers(0, 2)),
        functional_level=2,
        functional_from=1,
        times=RefreshTimes(
            plain=2.0, pair=2.3 if pair else None, sparse={128: 0.9} if sparse else {}, functional={"gelu": 2.1}
        ),
    )


# The slow reference: all choices of sites, levels and pairs by enumeration, judged by nothing but the checker


def subsets(items: list) -> Iterator[tuple]:
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


def matchings(pairs: list[tuple[int, int]]) -> Iterator[tuple]:
    for chosen in subsets(pairs):
        if len({v for p in chosen for v in p}) == 2 * len(chosen):
            yield chosen


def brute_force(p: Problem) -> Placement | None:
    """The fastest placement; levels by repeated lowering to a fixed point instead of one sweep."""
    best = None
    for refreshed in subsets([s.id for s in p.steps if p.refreshable(s.id)]):
        for functional in subsets([s.id for s in p.steps if s.function]):
            levels = fixed_point(p, set(refreshed), set(functional))
            if levels is None:
                continue
            for pairs in matchings([q for q in p.pairs if set(q) <= set(refreshed)]):
                plan = assemble(p, levels, refreshed, functional, pairs, bound=0.0, method="all")
                if p.max_bytes is not None and plan.peak_bytes > p.max_bytes:
                    continue
                if best is None or plan.seconds < best.seconds:
                    best = plan
    return best


def fixed_point(p: Problem, refreshed: set[int], functional: set[int]) -> list[int] | None:
    """Raise levels from the least possible until no reader complains."""
    levels = [0] * len(p.steps)
    for v in refreshed:
        levels[v] = p.refresh_from
    for v in functional:
        levels[v] = p.functional_level
    changed = True
    while changed:
        changed = False
        for s in p.steps:
            need = p.functional_from if s.id in functional else levels[s.id] + s.depth
            for a in s.args:
                if levels[a] >= need or (a in refreshed and p.refresh_level >= need):
                    continue
                if a in functional or need > p.highest:
                    return None
                levels[a] = need
                changed = True
    fresh = all(levels[s.id] <= p.top for s in p.steps if not s.args)
    usable = all(levels[v] >= p.refresh_from for v in refreshed)
    return levels if fresh and usable else None


CASES = {
    "plain": {"pair": False, "functional": False},
    "pairs": {"pair": True, "functional": False},
    "functional": {"pair": False, "functional": True},
    "sparse": {"pair": False, "functional": False, "sparse": True},
    "all kinds": {"pair": True, "functional": True, "sparse": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("seed", range(8))
def test_program_and_path_find_the_best_of_all_choices(seed, case):
    p = random_problem(seed, **case)
    wanted = brute_force(p)
    if wanted is None:
        with pytest.raises(LevelError, match="no placement of"):
            place(p)
        return
    for method in ("milp", "paths", "auto"):
        plan = place(p, method=method)
        assert plan.seconds == pytest.approx(wanted.seconds, rel=1e-6)
        assert plan.gap < 1e-5
        check(p, plan)


def test_a_narrow_beam_is_a_placement_without_a_proof(monkeypatch):
    p = problem(chain([1] * 14), top=4)
    monkeypatch.setattr(placement, "NARROW", 1)
    monkeypatch.setattr(placement_paths, "WIDTH", 1)
    plan = place(p, method="paths")
    assert "not all" in plan.method
    assert plan.bound <= place(p, method="milp").seconds <= plan.seconds


@pytest.mark.parametrize("largest", [0, 10_000], ids=["no program", "relaxation first"])
def test_large_graphs_fall_back_and_say_the_gap(monkeypatch, largest):
    p = problem(transformer(2), top=6, refresh_level=6, refresh_from=1, times=RefreshTimes(plain=2.0, pair=2.2))
    best = place(p)
    assert best.gap < 1e-6
    monkeypatch.setattr(placement, "NARROW", 1)
    monkeypatch.setattr(placement_paths, "WIDTH", 1)
    monkeypatch.setattr(placement, "LARGEST_PROGRAM", largest)
    monkeypatch.setattr(placement, "RELAX_FIRST", 0)
    plan = place(p, method="paths")
    assert 0.0 < plan.gap < 1.0
    assert plan.bound <= best.seconds <= plan.seconds
    floor = sum(s.seconds[0] for s in p.steps)
    assert (plan.bound > 1.01 * floor) == (largest > 0)
    assert ("bound by integer program" in plan.method) == (largest > 0)
    assert best.seconds <= place(p).seconds <= plan.seconds


# Known answers


def test_no_refresh_needed_is_the_least_levels():
    p = problem(chain([1, 0, 2, 1]))
    plan = place(p)
    assert plan.levels == (4, 3, 3, 1, 0)
    assert plan.sites == ()
    assert plan.method == "levels alone"
    assert plan.gap == 0.0


def test_a_chain_needs_its_depth_over_the_gain_in_refreshes():
    plan = place(problem(chain([1] * 10), top=4, refresh_level=3, refresh_from=1))
    # 10 levels: the first stretch goes from 4 down to 1, where a refresh starts, two from 3 to 1, the last one from 3 to 0
    assert len(plan.sites) == 3
    assert {s.kind for s in plan.sites} == {"plain"}


def test_one_refresh_serves_all_readers():
    steps = [step(0), step(1, 0, depth=3), *(step(i, 1, depth=2) for i in range(2, 6)), step(6, 2, 3), step(7, 4, 5)]
    plan = place(problem(steps))
    assert [s.values for s in plan.sites] == [(1,)]
    assert {a for _, a in plan.refreshed} == {1}
    assert len(plan.refreshed) == 4


def test_a_diamond_refreshes_the_stream_once_not_both_arms():
    # x -> two arms of depth 2 each -> sum -> depth 3: the sum is the cheapest place
    steps = [step(0), step(1, 0, depth=2), step(2, 0, depth=2), step(3, 1, 2), step(4, 3, depth=3)]
    plan = place(problem(steps))
    assert [s.values for s in plan.sites] == [(3,)]


def test_a_residual_reads_the_original_where_that_is_high_enough():
    # The branch is refreshed inside, the stream itself never: its sum needs no more than what is left.
    steps = [step(0), step(1, 0, depth=3), step(2, 1, depth=3), step(3, 0, 2)]
    plan = place(problem(steps))
    assert [s.values for s in plan.sites] == [(1,)]
    assert plan.refreshed == {(2, 1)}


def test_reader_above_the_refresh_level_takes_the_original():
    # %1 is read at level 5 by a deep step and again late: its original stands at 5, a refresh would give only 3.
    steps = [step(0), step(1, 0, depth=1), step(2, 1, depth=5), step(3, 2, 1)]
    plan = place(problem(steps, top=6))
    assert plan.levels[1] == 5
    assert plan.refreshed == frozenset()


def test_queries_and_keys_share_one_refresh():
    steps = [step(0), step(1, 0, depth=3), step(2, 0, depth=3), step(3, 1, depth=3), step(4, 2, depth=3), step(5, 3, 4)]
    p = problem(steps, times=RefreshTimes(plain=2.0, pair=2.4))
    plan = place(p)
    assert plan.sites == (Site(values=(1, 2), kind="pair"),)
    alone = place(replace(p, times=RefreshTimes(plain=2.0)))
    assert alone.seconds == pytest.approx(plan.seconds + 1.6)


def test_what_is_read_before_the_other_exists_cannot_pair():
    steps = chain([3, 2, 3])
    plan = place(problem(steps, times=RefreshTimes(plain=2.0, pair=2.4)))
    assert [s.kind for s in plan.sites] == ["plain", "plain"]


def test_ciphertexts_of_one_value_pair_among_themselves():
    steps = (step(0), step(1, 0, depth=4, ciphertexts=3), step(2, 1, depth=3))
    plan = place(problem(steps, times=RefreshTimes(plain=2.0, pair=2.4), top=5))
    assert sorted(s.kind for s in plan.sites) == ["pair", "plain"]
    assert plan.sites[0].values in ((1, 1), (1,))


@pytest.mark.parametrize(("slots", "kind"), [(0, "plain"), (256, "sparse"), (8192, "plain")])
def test_sparse_refresh_where_the_value_repeats(slots, kind):
    steps = (step(0), step(1, 0, depth=3, slots=slots), step(2, 1, depth=3))
    plan = place(problem(steps, times=RefreshTimes(plain=2.0, sparse={512: 1.0, 4096: 1.5})))
    (site,) = plan.sites
    assert (site.kind, site.slots) == (kind, 512 if kind == "sparse" else 0)


def test_a_functional_refresh_takes_the_place_of_the_polynomial():
    steps = (step(0), step(1, 0, depth=3), step(2, 1, depth=3, base=1.0, function="gelu"), step(3, 2, depth=2))
    times = RefreshTimes(plain=2.0, functional={"gelu": 2.1})
    plan = place(problem(steps, functional_level=2, functional_from=1, times=times))
    assert plan.sites == (Site(values=(2,), kind="functional", function="gelu"),)
    assert plan.levels == (4, 1, 2, 0)


@pytest.mark.parametrize("method", ["milp", "paths"])
def test_six_blocks_of_a_transformer_are_placed_with_a_proof(method):
    p = problem(transformer(6), top=12, refresh_level=8, refresh_from=2, times=RefreshTimes(plain=8.0))
    plan = place(p, method=method)
    assert plan.gap < 1e-6
    assert len(plan.sites) >= 6


def transformer(blocks: int) -> list[Step]:
    """Pre-norm blocks of attention and an MLP: norm, Q K V, scores, a reciprocal, values, out, residual, and again."""
    steps: list[Step] = [step(0, base=0.0)]

    def add(*args: int, depth: int = 0, base: float = 0.01, **fields) -> int:
        steps.append(step(len(steps), *args, depth=depth, base=base, **fields))
        return len(steps) - 1

    x = 0
    for _ in range(blocks):
        r = add(add(x, depth=1, base=0.1), depth=4, base=0.3)
        h = add(x, r, depth=1)
        q, k, v = (add(h, depth=1, base=0.4) for _ in range(3))
        scores = [add(add(add(q), add(k), depth=1), depth=2) for _ in range(2)]
        r = add(add(*scores), depth=3, base=0.2)
        values = [add(s, v, depth=1) for s in scores]
        x = add(x, add(add(add(*values), r, depth=1), depth=1, base=0.4))
        h = add(add(x, depth=1, base=0.4, ciphertexts=2), depth=2, ciphertexts=2)
        x = add(x, add(h, depth=1, base=0.4))
    return steps


# Memory


def test_under_a_cap_the_best_that_keeps_it_is_found():
    for seed in range(8):
        free = random_problem(seed, **CASES["functional"])
        plan = brute_force(free)
        if plan is None or not plan.sites:
            continue
        capped = replace(free, max_bytes=plan.peak_bytes - 1)
        wanted = brute_force(capped)
        if wanted is None:
            with pytest.raises(ParamsError, match=r"the smallest cap that can be met is \d+ bytes"):
                place(capped)
        else:
            assert place(capped).seconds == pytest.approx(wanted.seconds, rel=1e-6)


def test_a_cap_that_cannot_be_met_names_the_smallest_that_can():
    p = problem(chain([2, 2, 2], ciphertexts=2), max_bytes=100)
    with pytest.raises(
        ParamsError, match=r"within 100 bytes; the smallest cap that can be met is (\d+) bytes"
    ) as error:
        place(p)
    smallest = int(str(error.value).split()[-2])
    assert place(replace(p, max_bytes=smallest)).peak_bytes == smallest
    with pytest.raises(ParamsError):
        place(replace(p, max_bytes=smallest - 1))


def test_seconds_that_fall_with_the_level_are_used():
    falling = Step(id=1, args=(0,), depth=1, seconds=tuple(5.0 - 0.1 * k for k in range(LEVELS + 1)))
    plan = place(problem((step(0, base=0.0), falling)))
    assert plan.levels[1] == 3
    assert plan.gap < 1e-6


# Refusals


def test_no_placement_at_all_is_said():
    with pytest.raises(
        LevelError, match=r"no placement of 3 steps: %2 takes 7 levels and its arguments have at most 3"
    ):
        place(problem((step(0), step(1, 0, depth=1), step(2, 1, depth=7))))


def test_leveled_only_refuses_what_needs_a_refresh():
    with pytest.raises(LevelError, match="the steps need 10 levels, encryption gives 4"):
        place(problem(chain([1] * 10)), method="leveled")


def test_unknown_method_lists_the_known():
    with pytest.raises(ParamsError, match=", ".join(METHODS)):
        place(problem(chain([1])), method="magic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refresh_from": 4}, "gains nothing"),
        ({"top": 40}, "seconds for 13 levels"),
        ({"steps": (step(0), step(2, 0))}, "numbered in order of use"),
        ({"steps": (step(0), step(1, 0, function="tanh"))}, "names function 'tanh'"),
    ],
    ids=["no gain", "short table", "order", "function"],
)
def test_bad_problems_are_refused(change, message):
    with pytest.raises(HEError, match=message):
        replace(problem(chain([1])), **change)


# The checker: a sound plan passes, each corruption is named by its rule

STEPS = (
    step(0),
    step(1, 0, depth=3, slots=64),
    step(2, 0, depth=3),
    step(3, 1, depth=2),
    step(4, 2, depth=2, may_refresh=False),
    step(5, 3, 4),
    step(6, 5, depth=1, function="gelu"),
    step(7, 6, depth=2),
)
SOUND = problem(
    STEPS,
    functional_level=2,
    functional_from=1,
    times=RefreshTimes(plain=2.0, pair=2.4, sparse={128: 1.9}, functional={"gelu": 1.5}),
    max_bytes=10_000,
)
PAIR, GELU = Site(values=(1, 2), kind="pair"), Site(values=(6,), kind="functional", function="gelu")


def sound() -> Placement:
    return place(SOUND)


CORRUPTED = {
    "a level missing": ({"levels": (4, 1)}, "shape: 2 levels for 8"),
    "a level below 0": ({"levels": (4, 1, 1, 1, 1, 1, 2, -1)}, "range: %7 has level -1"),
    "a fresh level too high": ({"levels": (5, 1, 1, 1, 1, 1, 2, 0)}, "input: %0 is fresh and has level 5"),
    "a result that ate no level": ({"levels": (4, 2, 1, 1, 1, 1, 2, 0)}, "read: %1 needs %0 at level 5"),
    "refreshed too low": ({"levels": (4, 0, 1, 1, 1, 1, 2, 0)}, "refresh: %1 is refreshed at level 0"),
    "functional result too high": ({"levels": (4, 1, 1, 1, 1, 1, 3, 0)}, "functional: %6 has level 3"),
    "functional argument too low": ({"levels": (4, 1, 1, 0, 0, 0, 2, 0)}, "read: %6 needs %5 at level 1"),
    "a copy read that is not made": (
        {"refreshed": frozenset({(3, 1), (4, 2), (5, 3)})},
        "copy: %5 reads a refreshed %3",
    ),
    "a copy not read": ({"refreshed": frozenset({(4, 2)})}, "read: %3 needs %1 at level 3, the original has 1"),
    "a site missing": ({"sites": (GELU,)}, "copy: .* no site refreshes it"),
    "a site twice": ({"sites": (PAIR, PAIR, GELU)}, "count: 2 of %1's 1 ciphertexts"),
    "a site of what may not": ({"sites": (PAIR, Site(values=(4,), kind="plain"), GELU)}, "refresh: %4 .* may not be"),
    "an unknown kind": ({"sites": (Site(values=(1,), kind="cubic"), GELU)}, "kind: .* no measured time"),
    "half a pair": ({"sites": (Site(values=(1,), kind="pair"), GELU)}, "kind: .* has 1 ciphertexts"),
    "too sparse": ({"sites": (Site(values=(2,), kind="sparse", slots=128), GELU)}, "kind: .* needs all its slots"),
    "another function": (
        {"sites": (PAIR, Site(values=(5,), kind="functional", function="gelu"))},
        "kind: .* %5 computes 'no such function'",
    ),
    "a value that is not there": ({"sites": (PAIR, Site(values=(9,), kind="plain"))}, "kind: .* does not have"),
    "sites out of order": ({"sites": (GELU, PAIR)}, "order: pair refresh of %1 and %2 stands after"),
    "a pair after its reader": ({"sites": (Site(values=(1, 5), kind="pair"), GELU)}, "pair: %3 reads the refreshed %1"),
    "seconds": ({"seconds": 1.0}, "seconds: the plan says 1.0"),
    "bound": ({"bound": 1e6}, "bound: 1000000.0 is above"),
    "peak": ({"peak_bytes": 5}, "memory: the plan says 5 bytes"),
}


@pytest.mark.parametrize(("change", "message"), CORRUPTED.values(), ids=CORRUPTED.keys())
def test_the_checker_names_the_broken_rule(change, message):
    plan = sound()
    assert plan.levels == (4, 1, 1, 1, 1, 1, 2, 0)
    assert plan.sites == (PAIR, GELU)
    check(SOUND, plan)
    with pytest.raises(VerificationError, match=message):
        check(SOUND, replace(plan, **change))


def test_the_checker_knows_the_cap():
    plan = sound()
    with pytest.raises(VerificationError, match=r"memory: .* are allowed"):
        check(replace(SOUND, max_bytes=plan.peak_bytes - 1), plan)


def test_least_levels_is_none_where_encryption_cannot_reach():
    assert least_levels(problem(chain([3, 3])), (), ()) is None
