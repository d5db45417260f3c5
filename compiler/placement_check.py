"""The placement's rules, judged from nothing: `check` shares no arithmetic with the methods that search."""

from __future__ import annotations

import math
from collections import Counter

from .placement_problem import Placement, Problem, Site
from .verify import VerificationError


def check(problem: Problem, placement: Placement) -> None:
    """Recompute every rule of `placement_problem`'s table.

    Raises:
        VerificationError: a rule is broken; the message begins with its name: shape, range, input, read, copy, refresh, functional,
            kind, count, pair, order, memory, seconds or bound.
    """
    steps, levels = problem.steps, placement.levels
    if len(levels) != len(steps):
        raise VerificationError(f"shape: {len(levels)} levels for {len(steps)} steps")
    covered = Counter(v for site in placement.sites for v in site.values if site.kind != "functional")
    replaced = Counter(v for site in placement.sites for v in site.values if site.kind == "functional")
    _sites(problem, placement)
    for counted, what in ((covered, "refreshed"), (replaced, "replaced")):
        for v, n in counted.items():
            if n != steps[v].ciphertexts:
                raise VerificationError(f"count: {n} of %{v}'s {steps[v].ciphertexts} ciphertexts are {what}")
    for step in steps:
        level = levels[step.id]
        if not 0 <= level < len(step.seconds):
            raise VerificationError(
                f"range: %{step.id} has level {level}; its seconds are known for 0 to {len(step.seconds) - 1}"
            )
        if not step.args and level > problem.top:
            raise VerificationError(
                f"input: %{step.id} is fresh and has level {level}; encryption gives at most {problem.top}"
            )
        if step.id in covered and not step.may_refresh:
            raise VerificationError(f"refresh: %{step.id} is refreshed, and may not be")
        if step.id in covered and level < problem.refresh_from:
            raise VerificationError(
                f"refresh: %{step.id} is refreshed at level {level}; a refresh starts at {problem.refresh_from}"
            )
        if step.id in replaced and level != problem.functional_level:
            raise VerificationError(
                f"functional: %{step.id} has level {level}; a functional refresh gives {problem.functional_level}"
            )
        need = problem.functional_from if step.id in replaced else level + step.depth
        for a in step.args:
            copy = (step.id, a) in placement.refreshed
            loss = 0 if step.absorbs else problem.copy_loss
            has = problem.refresh_level - loss if copy else levels[a]
            if has < need:
                name = "the refreshed copy" if copy else "the original"
                raise VerificationError(
                    f"read: %{step.id} needs %{a} at level {need}, {name} has {has}; refresh it or lower the result's level"
                )
    for reader, a in placement.refreshed:
        if a not in covered:
            raise VerificationError(f"copy: %{reader} reads a refreshed %{a}, and no site refreshes it")
    _memory(problem, placement, set(covered))
    seconds = sum(s.seconds[levels[s.id]] for s in steps if s.id not in replaced)
    seconds += sum(_seconds(problem, site) for site in placement.sites)
    if not math.isclose(seconds, placement.seconds, rel_tol=1e-9, abs_tol=1e-12):
        raise VerificationError(f"seconds: the plan says {placement.seconds}, its steps and sites take {seconds}")
    if placement.bound > seconds * (1 + 1e-9):
        raise VerificationError(f"bound: {placement.bound} is above the plan's own {seconds}")


def _sites(problem: Problem, placement: Placement) -> None:
    """Every site is of a kind that its values allow, runs after they exist and before their copies are read."""
    steps, previous = problem.steps, -1
    for site in placement.sites:
        at = max(site.values, default=-1)
        if at >= len(steps) or min(site.values, default=-1) < 0:
            raise VerificationError(f"kind: {site} is of values that the list of {len(steps)} steps does not have")
        if at < previous:
            raise VerificationError(f"order: {site} stands after a site of %{previous}")
        previous = at
        wanted = 2 if site.kind == "pair" else 1
        if len(site.values) != wanted:
            raise VerificationError(f"kind: {site} has {len(site.values)} ciphertexts, a {site.kind} one has {wanted}")
        _seconds(problem, site)
        if site.kind == "sparse" and not 0 < steps[at].slots <= site.slots:
            raise VerificationError(
                f"kind: {site} of a value that needs {steps[at].slots or 'all its'} slots; take a larger or a plain one"
            )
        if site.kind == "functional" and steps[at].function != site.function:
            raise VerificationError(
                f"kind: {site}, and step %{at} computes {steps[at].function or 'no such function'!r}"
            )
        for reader, a in placement.refreshed if site.kind == "pair" else ():
            if a in site.values and reader <= at:
                raise VerificationError(f"pair: %{reader} reads the refreshed %{a} before {site} can run, after %{at}")


def _seconds(problem: Problem, site: Site) -> float:
    times = problem.times
    found = {
        "plain": times.plain,
        "pair": times.pair,
        "sparse": times.sparse.get(site.slots),
        "functional": times.functional.get(site.function),
    }.get(site.kind)
    if found is None:
        raise VerificationError(f"kind: {site} has no measured time")
    return found


def _memory(problem: Problem, placement: Placement, copied: set[int]) -> None:
    """Add up what is alive at every step."""
    last = {a: s.id for s in problem.steps for a in s.args}
    peak = 0
    held: dict[int, int] = {}  # value -> bytes
    for step in problem.steps:
        limbs = placement.levels[step.id] + 1
        limbs += problem.refresh_level + 1 if step.id in copied else 0
        held[step.id] = step.ciphertexts * limbs * problem.limb_bytes
        peak = max(peak, sum(held.values()))
        for a in set(step.args):
            if last[a] == step.id:
                del held[a]
    if peak != placement.peak_bytes:
        raise VerificationError(
            f"memory: the plan says {placement.peak_bytes} bytes at its peak, its values take {peak}"
        )
    if problem.max_bytes is not None and peak > problem.max_bytes:
        raise VerificationError(f"memory: {peak} bytes are alive at once, {problem.max_bytes} are allowed")
