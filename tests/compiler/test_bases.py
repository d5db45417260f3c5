"""The basis of linear maps: chosen by cost, told to the tracer, and the same result either way."""

from dataclasses import replace

import numpy as np
import pytest

from compiler.cost import CostTable
from compiler.passes.bases import BASES, choose_bases
from he_backend import keys
from he_backend.circuit import Op
from he_backend.execute import Executor
from he_backend.params import Params
from he_backend.trace import trace
from tests.he_backend.small_circuit import TEST_PARAMS, WIDTH, mlp, reference

PARAMS = Params(log_n=16, levels=20, scale_bits=40, first_bits=46, digits=3)
PLAN = [[0, [[0, 0], [1, 1]]], [2, [[0, 2], [1, 3]]]]  # one baby step, one giant step, four terms
OPS = (
    Op(id=0, kind="input", args=(), level=20),
    Op(id=1, kind="linear", args=(0,), attrs={"weights": "a", "plan": PLAN}, level=19),
    Op(id=2, kind="linear", args=(0,), attrs={"weights": "b", "plan": PLAN}, level=19),
    Op(id=3, kind="add", args=(1, 2), level=19),
    Op(id=4, kind="linear", args=(3,), attrs={"weights": "a", "plan": PLAN}, level=18),
)


def table(**ms: float) -> CostTable:
    return CostTable(name="t", cpu="x", params=PARAMS, ms={op: {20: v} for op, v in ms.items()})


COSTS = {
    "wide products are dear": (table(rotate_extended=1, weighted_sum_extended=9, mod_down=1, hoist=1, rotate=3), True),
    "mod-downs are dear": (table(rotate_hoisted=99, rotate=9, weighted_sum=1), False),
}


@pytest.mark.parametrize("name", COSTS)
def test_mixed_takes_the_cheaper_basis(name):
    costs, ordinary = COSTS[name]
    chosen = choose_bases(OPS, PARAMS, costs, "mixed")
    assert [op.attrs.get("basis") == "ordinary" for op in chosen if op.kind == "linear"] == [ordinary] * 3


def test_shared_rotations_are_paid_once():
    """A baby step costs 10 more modulo Q, a product 1 less: it pays for two maps of one value together, not for one."""
    costs = table(rotate_hoisted=7.0, weighted_sum_extended=1.0)
    chosen = choose_bases(OPS, PARAMS, costs, "mixed")
    assert [op.attrs.get("basis") for op in chosen if op.kind == "linear"] == ["ordinary", "ordinary", None]


@pytest.mark.parametrize(("mode", "count"), [("extended", 0), ("ordinary", 3)])
def test_the_modes_that_ask_for_one(mode, count):
    chosen = choose_bases(OPS, PARAMS, table(), mode)
    assert sum(op.attrs.get("basis") == "ordinary" for op in chosen) == count and len(BASES) == 3


@pytest.mark.parametrize("basis", ["extended", "ordinary"])
def test_both_bases_give_the_same(basis):
    circuit = mlp(replace(TEST_PARAMS, log_n=11))
    ops = tuple(replace(op, attrs={**op.attrs, "basis": basis}) if op.kind == "linear" else op for op in circuit.ops)
    circuit = replace(circuit, ops=ops)
    wide = [n.op for n in trace(circuit).nodes if n.extended]
    assert bool(wide) == (basis == "extended")
    x = np.linspace(-1, 1, WIDTH)
    module = keys.backend("openfhe")
    client = module.Client(circuit.params, allow_insecure=True)
    server = module.Evaluator(circuit.params, key_id=client.key_id, allow_insecure=True)
    try:
        for kind, k, level in keys.wanted(circuit.spec()):
            server.load_key(kind, k, level, client.make_key(kind, k, level))
        slots = np.repeat(x, server.slots // WIDTH)
        sent = server.import_ciphertext(client.export_ciphertext(client.encrypt(slots, level=3)), level=3)
        run = Executor(circuit, server).run({("x", 0): sent})
        back = client.import_ciphertext(server.export_ciphertext(run.outputs["y", 0]), level=0)
    finally:
        server.close()
    got = client.decrypt(back, scale=run.scales["y", 0]).reshape(WIDTH, -1)[:, 0]
    np.testing.assert_allclose(got, reference(x), atol=1e-5)
