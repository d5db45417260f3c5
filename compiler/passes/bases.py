"""In which basis a linear map adds up its rotations: modulo P·Q (double hoisting) or modulo Q.

Modulo P·Q a baby step needs no mod-down, but every product and every encoded weight has the limbs of P besides: with few digits, as
many again as those of Q at low levels. Modulo Q each baby step pays its mod-down once, for all maps that read the same value, and
weights need less memory, so that fewer have to be encoded on the way. Which is faster depends on both, so that the search compares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from he_backend.circuit import Op
from he_backend.params import Params

from ..cost import CostTable

BASES = ("extended", "mixed", "ordinary")


def choose_bases(ops: Sequence[Op], params: Params, table: CostTable, mode: str) -> tuple[Op, ...]:
    """The same ops with `basis` set on linear maps.

    Args:
        ops: with their levels.
        mode: one of `BASES`; "mixed" takes the cheaper one for all maps of a value, with all weights encoded ahead.
    """
    readers: dict[int, list[Op]] = defaultdict(list)
    for op in ops:
        if op.kind == "linear":
            readers[op.args[0]].append(op)
    ordinary = {
        op.id
        for maps in readers.values()
        if mode == "ordinary"
        or (mode == "mixed" and _cost(maps, params, table, False) < _cost(maps, params, table, True))
        for op in maps
    }
    return tuple(replace(op, attrs={**op.attrs, "basis": "ordinary"}) if op.id in ordinary else op for op in ops)


def _cost(maps: Sequence[Op], params: Params, table: CostTable, extended: bool) -> float:
    """Thread-seconds of the maps of one value."""
    level = maps[0].level + 1

    def price(name: str) -> float:
        return table.seconds(name, params, level)

    babies = {int(b) % params.slots for op in maps for _, terms in op.attrs["plan"] for b, _ in terms} - {0}
    terms = sum(len(terms) for op in maps for _, terms in op.attrs["plan"])
    giants = sum(int(g) % params.slots != 0 for op in maps for g, _ in op.attrs["plan"])
    if not extended:
        return len(babies) * price("rotate_hoisted") + terms * price("weighted_sum") + giants * price("rotate")
    giant = price("mod_down") + price("hoist") + price("rotate_extended")
    ends = len(maps) * price("mod_down") + giants * giant
    return len(babies) * price("rotate_extended") + terms * price("weighted_sum_extended") + ends
