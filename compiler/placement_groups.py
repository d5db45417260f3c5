"""A smaller placement problem: what is alike is one step, what is one sum is one step.

Two reductions, in this order:

    chain  a value that only one reader takes, both without depth, where a refresh of the reader's result serves as well as one of
           the value: partial sums of one sum, and what a unary op (a rotation, a bias) makes of a value
    group  values of equal prices whose arguments are alike and whose readers are alike (the shifted keys of attention, its score
           ciphertexts, the tiles of a wide tensor) become one step of as many ciphertexts

The first loses nothing. The second leaves out placements that treat like ciphertexts differently; a bound of the smaller
problem holds for those that do not. A block of attention has a few hundred ops and some thirty steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .placement_problem import Placement, Problem, Site, Step, peak_bytes, site_seconds

Chain = tuple[int, ...]  # steps of the large problem; the last one makes the value


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The large problem, the small one, and the chains that each small step stands for."""

    large: Problem
    small: Problem
    chains: tuple[tuple[Chain, ...], ...]

    @property
    def order(self) -> list[int]:
        """The steps of the large problem in the order of the small one's: what is alike stands together."""
        return [v for chains in self.chains for chain in chains for v in chain]

    def expand(self, placement: Placement) -> Placement:
        """A placement of the small problem as one of the large problem: seconds and bytes are those of the large one."""
        levels = [0] * len(self.large.steps)
        owner: dict[int, int] = {}
        for step, chains in enumerate(self.chains):
            for chain in chains:
                owner.update(dict.fromkeys(chain, step))
                for v in chain:
                    levels[v] = placement.levels[step]
        reads = {
            (step.id, a)
            for step in self.large.steps
            for a in step.args
            if (owner[step.id], owner[a]) in placement.refreshed
        }
        sites = self._sites(placement.sites)
        replaced = {v for site in sites if site.kind == "functional" for v in site.values}
        seconds = sum(s.seconds[levels[s.id]] for s in self.large.steps if s.id not in replaced)
        return replace(
            placement,
            levels=tuple(levels),
            sites=sites,
            refreshed=frozenset(reads),
            seconds=seconds + sum(site_seconds(self.large, site) for site in sites),
            peak_bytes=peak_bytes(self.large, levels, {a for _, a in reads}),
        )

    def _sites(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """Each ciphertext of a small step in turn takes the next of its sites."""
        left = [[chain[-1] for chain in reversed(chains)] for chains in self.chains]
        found = [replace(site, values=tuple(left[v].pop() for v in site.values)) for site in sites]
        return tuple(sorted(found, key=lambda site: max(site.values)))


def group(problem: Problem, kinds: Sequence[Hashable]) -> Groups:
    """Reduce a problem.

    Args:
        kinds: what tells steps apart beside their prices; steps that may be one sum have a kind that begins with "sum", and those of
            the same sum the same one.
    """
    chains = _chains(problem, kinds)
    end = {v: chain[-1] for chain in chains for v in chain}
    args = {c[-1]: _outside(problem, c) for c in chains}
    colours = _colours(problem, kinds, chains, args)
    members: dict[int, list[Chain]] = defaultdict(list)
    for chain in chains:
        members[colours[chain[-1]]].append(chain)
    # In the order of their last member, which its arguments' groups precede: members of one group have one depth in the graph.
    rank = _depths(chains, args)
    order = sorted(members, key=lambda c: (rank[members[c][0][-1]], members[c][0][-1]))
    number = {colour: i for i, colour in enumerate(order)}
    steps = []
    for colour in order:
        group_chains = members[colour]
        first = problem.steps[group_chains[0][-1]]
        rows = np.array([problem.steps[v].seconds for chain in group_chains for v in chain])
        inputs = sorted({number[colours[end[a]]] for chain in group_chains for a in args[chain[-1]]})
        steps.append(
            Step(
                id=number[colour],
                args=tuple(inputs),
                depth=problem.steps[group_chains[0][0]].depth,
                seconds=tuple(float(s) for s in rows.sum(axis=0)),
                ciphertexts=sum(problem.steps[chain[-1]].ciphertexts for chain in group_chains),
                may_refresh=first.may_refresh,
                absorbs=all(
                    problem.steps[v].absorbs for v in group_chains[0] if _reads_outside(problem, v, group_chains[0])
                ),
                slots=first.slots,
                function=first.function,
            )
        )
    small = replace(problem, steps=tuple(steps))
    return Groups(large=problem, small=small, chains=tuple(tuple(members[c]) for c in order))


def reordered(problem: Problem, order: Sequence[int]) -> Problem:
    """The same problem with its steps in another order, in which arguments still come first."""
    place_of = {v: i for i, v in enumerate(order)}
    return replace(
        problem,
        steps=tuple(
            replace(problem.steps[v], id=i, args=tuple(place_of[a] for a in problem.steps[v].args))
            for i, v in enumerate(order)
        ),
    )


def _chains(problem: Problem, kinds: Sequence[Hashable]) -> list[Chain]:
    """Steps joined with their only reader, in order of use within a chain; chains in the order of their last step."""
    into: dict[int, int] = {}
    for step in problem.steps:
        readers = problem.readers[step.id]
        if len(readers) != 1 or step.function or not step.args:
            continue
        reader = problem.steps[readers[0]]
        if reader.depth or reader.function or (step.may_refresh and not reader.may_refresh):
            continue
        same_sum = step.depth == 0 and str(kinds[step.id]).startswith("sum") and kinds[step.id] == kinds[reader.id]
        # A shorter period makes a refresh cheaper: nothing is joined that would lose one.
        if same_sum or (len(reader.args) == 1 and _no_dearer(step.slots, reader.slots)):
            into[step.id] = reader.id
    found: dict[int, list[int]] = defaultdict(list)
    for step in problem.steps:
        v = step.id
        while v in into:
            v = into[v]
        found[v].append(step.id)
    return [tuple(found[v]) for v in sorted(found)]


def _no_dearer(before: int, after: int) -> bool:
    return before == 0 or 0 < after <= before


def _outside(problem: Problem, chain: Chain) -> tuple[int, ...]:
    """What a chain reads, with repetitions."""
    return tuple(a for v in chain for a in problem.steps[v].args if a not in chain)


def _reads_outside(problem: Problem, v: int, chain: Chain) -> bool:
    return any(a not in chain for a in problem.steps[v].args)


def _colours(
    problem: Problem, kinds: Sequence[Hashable], chains: Sequence[Chain], args: dict[int, tuple[int, ...]]
) -> dict[int, int]:
    """Equal numbers for chains that are alike: equal themselves, in what they read, and in who reads them."""
    end = {v: chain[-1] for chain in chains for v in chain}
    colours: dict[int, int] = {}
    known: dict[Hashable, int] = {}
    for chain in chains:
        if not args[chain[-1]]:
            colours[chain[-1]] = known.setdefault(("input", kinds[chain[-1]]), len(known))
            continue
        own = tuple((problem.steps[v].depth, problem.steps[v].seconds, problem.steps[v].slots, kinds[v]) for v in chain)
        rest = (
            problem.steps[chain[-1]].may_refresh,
            problem.steps[chain[-1]].function,
            len(problem.readers[chain[-1]]) > 0,
        )
        key = (own, rest, _counted(colours[end[a]] for a in args[chain[-1]]))
        colours[chain[-1]] = known.setdefault(key, len(known))
    while True:  # split those whose readers differ, until none is split any more
        readers = {c[-1]: _counted(colours[end[r]] for r in problem.readers[c[-1]]) for c in chains}
        keys = {v: (colours[v], readers[v], _counted(colours[end[a]] for a in args[v])) for v in colours}
        fresh: dict[Hashable, int] = {}
        after = {v: fresh.setdefault(keys[v], len(fresh)) for v in colours}
        if len(fresh) == len(set(colours.values())):
            return after
        colours = after


def _counted(items: Iterable[int]) -> frozenset[tuple[int, int]]:
    return frozenset(Counter(items).items())


def _depths(chains: Sequence[Chain], args: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Longest path from an input to each chain, in chains."""
    end = {v: chain[-1] for chain in chains for v in chain}
    rank: dict[int, int] = {}
    for chain in chains:
        rank[chain[-1]] = 1 + max((rank[end[a]] for a in args[chain[-1]]), default=-1)
    return rank
