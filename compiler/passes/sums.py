"""How many steps of a sum over slots are taken at once: the cheapest cut of each `rotate_sum` into runs, by measured costs.

r steps one after the other are r rotations, each with a decomposition and a mod-down of its own; at once they are 2^r - 1 products
with keys between one decomposition and one mod-down (`Tracer.doubled_sum`). Which is less depends on the digits and the level. The
rotations of a run need a key each.

At low levels a pending rescale comes first: it saves the sum a limb, and its error, which is then summed too, is about as large as
that of the rotations (784-128-10 at N = 2^13, scale 2^24, simulated: 0.0094 against 0.005, and 28 against 32 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from he_backend.circuit import Op
from he_backend.params import Params

from ..cost import CostTable

LONGEST = 4  # steps of a run: 15 rotation keys
SETTLED = 6  # a pending rescale comes first below this level, where a limb is a sixth of the work or more


def group_sums(ops: Sequence[Op], params: Params, table: CostTable, longest: int = LONGEST) -> tuple[Op, ...]:
    """The same ops, with sums over slots settled at low levels, and with `runs` wherever several steps at once are cheaper.

    Args:
        ops: with their levels.
        longest: most steps of a run; fewer need fewer keys.
    """
    return tuple(_grouped(op, params, table, longest) if op.kind == "rotate_sum" else op for op in ops)


def _grouped(op: Op, params: Params, table: CostTable, longest: int) -> Op:
    runs = cheapest(len(op.attrs["steps"]), op.level, params, table, longest)
    attrs = {"steps": op.attrs["steps"]}
    if op.level < SETTLED:
        attrs["settled"] = True
    if runs:
        attrs["runs"] = list(runs)
    return replace(op, attrs=attrs)


def cheapest(steps: int, level: int, params: Params, table: CostTable, longest: int = LONGEST) -> tuple[int, ...]:
    """Lengths of runs that sum to `steps`, longest first; empty where one by one is best."""

    def price(run: int) -> float:
        if run == 1:
            return table.seconds("rotate", params, level)
        terms = (1 << run) - 1
        each = table.seconds("rotate_extended", params, level) * terms
        sums = table.seconds("add_extended", params, level) * (terms - 1)
        return each + sums + table.seconds("hoist", params, level) + table.seconds("mod_down", params, level)

    @cache
    def best(left: int) -> tuple[float, tuple[int, ...]]:
        if not left:
            return 0.0, ()
        return min(
            (price(run) + best(left - run)[0], (run, *best(left - run)[1])) for run in range(1, min(longest, left) + 1)
        )

    runs = best(steps)[1]
    return tuple(sorted(runs, reverse=True)) if max(runs, default=1) > 1 else ()
