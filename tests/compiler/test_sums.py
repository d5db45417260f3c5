"""Cutting sums over slots into runs: by cost, and changing nothing but speed."""

import numpy as np
import pytest

from compiler.cost import CostTable
from compiler.passes.sums import LONGEST, cheapest, group_sums
from he_backend.circuit import Op
from he_backend.params import Params

PARAMS = Params(log_n=16, levels=20, scale_bits=40, first_bits=46, digits=3)


def table(rotate, hoist, product, down):
    """Costs that do not depend on the level."""
    ms = {"rotate": rotate, "hoist": hoist, "rotate_extended": product, "mod_down": down, "add_extended": 0.0}
    return CostTable(name="t", cpu="x", params=PARAMS, ms={op: {20: v} for op, v in ms.items()})


# One step costs 10; r at once cost 8 + 2^r - 1 (or more), by hand.
CASES = {
    "products are free": (table(10, 4, 0, 4), 6, (4, 2)),
    "products are cheap": (table(10, 4, 1, 4), 5, (3, 2)),  # 15 + 11 against 23 + 10
    "products are dear": (table(10, 1, 9, 1), 5, ()),
    "one step": (table(10, 0, 0, 0), 1, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cheapest_runs(name):
    costs, steps, runs = CASES[name]
    assert cheapest(steps, 20, PARAMS, costs) == runs


def brute(steps, price):
    """Least price of any cut."""
    if steps == 0:
        return 0.0
    return min(price(run) + brute(steps - run, price) for run in range(1, min(steps, LONGEST) + 1))


def test_no_other_cut_is_cheaper():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rotate, hoist, product, down = rng.uniform(0.5, 10, 4)

        def price(run, r=rotate, h=hoist, p=product, d=down):
            return r if run == 1 else h + (2**run - 1) * p + d

        steps = int(rng.integers(1, 8))
        runs = cheapest(steps, 20, PARAMS, table(rotate, hoist, product, down)) or (1,) * steps
        assert sum(runs) == steps and sum(map(price, runs)) == pytest.approx(brute(steps, price))


def test_only_sums_are_changed():
    ops = (
        Op(id=0, kind="input", args=(), level=5),
        Op(id=1, kind="rotate_sum", args=(0,), attrs={"steps": [1, 2]}, level=5),
        Op(id=2, kind="rotate", args=(1,), attrs={"k": 1}, level=5),
    )
    grouped = group_sums(ops, PARAMS, table(10, 0, 1, 0))
    assert grouped[0] == ops[0] and grouped[2] == ops[2]
    assert grouped[1].attrs == {"steps": [1, 2], "settled": True, "runs": [2]}
