"""Exact scales: where sums lose nothing, and what the others lose."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from he_backend import keys
from he_backend.base import ScaleError
from he_backend.circuit import Circuit, Signature
from he_backend.execute import Executor
from he_backend.params import Params
from he_backend.primes import moduli
from he_backend.scales import assign_scales
from he_backend.simulator import simulate, simulate_noise
from he_backend.trace import trace
from tests.he_backend.test_trace import BOTH, LINEAR, PLAN, circuit

LEVELS = 6
MODULI = tuple((1 << (50 if i == 0 else 40)) + (-1) ** i * 129 * (i + 1) for i in range(LEVELS + 1))
SCALE = 2.0**40
UNEQUAL: tuple[
    tuple[str, tuple[int, int], dict[str, int], int], ...
] = (  # x^4 + x^3: two products that wait for the same rescale
    ("mul", (0, 0), {}, 5),
    ("mul", (1, 1), {}, 4),
    ("mul", (1, 0), {}, 4),
    ("add", (2, 3), {}, 4),
)


def test_plain_products_come_out_at_the_exact_scale():
    found = trace(circuit(LINEAR, ("linear", (1,), {"weights": "w", "plan": PLAN, "bias": None}, 4)))
    scales = assign_scales(found, MODULI, SCALE)
    assert scales.mismatch == 0.0
    assert scales.result[found.outputs["y", 0]] == pytest.approx(SCALE, rel=1e-15)


def test_ciphertext_products_carry_their_real_scale():
    found = trace(circuit(("mul", (0, 0), {}, 5)))
    scales = assign_scales(found, MODULI, SCALE)
    assert scales.result[found.outputs["y", 0]] == SCALE * SCALE / MODULI[6]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((("mul", (0, 0), {}, 5), ("add", (1, 0), {}, 5)), id="a product and an older value"),
        pytest.param((LINEAR, ("mul", (0, 0), {}, 5), ("sub", (1, 2), {}, 5)), id="a linear map and a product"),
        pytest.param(
            (("mul", (0, 0), {}, 5), LINEAR, ("rotate_sum", (2,), {"steps": [1, 2]}, 5), ("add", (1, 3), {}, 5)),
            id="a product and folds of a linear map",
        ),
        pytest.param(
            (("polynomial", (0,), {"chebyshev": list(np.arange(1.0, 9.0)), "domain": [0.5, 0.1]}, 1),),
            id="a series of degree 7",
        ),
    ],
)
def test_a_sum_with_a_plaintext_factor_below_it_is_exact(rows):
    found = trace(circuit(*rows))
    scales = assign_scales(found, MODULI, SCALE)
    assert scales.mismatch == 0.0
    for (
        node
    ) in found.nodes:  # what was chosen is consistent: products and rescales give the scales that they are said to
        s = [scales.result[a] for a in node.args]
        match node.op:
            case "mul_plain" | "mul_scalar" | "weighted_sum":
                assert scales.result[node.id] == pytest.approx(s[0] * scales.plain[node.id], rel=1e-14)
            case "rescale":
                assert scales.result[node.id] == pytest.approx(s[0] / MODULI[node.level + 1], rel=1e-14)
            case "add" | "sub":
                assert s == pytest.approx([scales.result[node.id]] * 2, rel=1e-14)


def test_scales_that_differ_too_much_are_refused():
    found = trace(circuit(*UNEQUAL))
    assert 0 < assign_scales(found, MODULI, SCALE).mismatch < 2.0**-20
    for prime in (MODULI[-1] * 2, int(2**40 * (1 + 2.0**-13))):
        with pytest.raises(ScaleError, match=r"op 4.* is allowed"):
            assign_scales(found, (*MODULI[:-1], prime), SCALE)


def test_a_mismatch_above_the_promised_error_is_refused_where_the_promise_knew_other_primes():
    output = Signature(name="y", shape=(1,), layout="", factor=1.0, bound=4.0, level=4)
    ev = SimpleNamespace(capabilities=BOTH, moduli=MODULI, scale=SCALE)
    kept = replace(circuit(*UNEQUAL), outputs=(output,), error_bound=2.0**-18)
    mismatch = Executor(kept, ev).scales.mismatch
    broken = replace(kept, error_bound=2.0 * mismatch)
    with pytest.raises(ScaleError, match=r"op 4.* is allowed"):
        Executor(broken, ev)
    known = SimpleNamespace(capabilities=BOTH, moduli=moduli(kept.params), scale=SCALE)
    assert Executor(broken, known).scales.mismatch > 0


def squares(params: Params) -> Circuit:
    """UNEQUAL with one value a slot."""
    layout = np.arange(params.slots, dtype=np.int32).reshape(1, -1)
    x, y = (
        Signature(name=name, shape=(params.slots,), layout="slots", factor=1.0, bound=2.0, level=level)
        for name, level in (("x", LEVELS), ("y", 4))
    )
    return replace(circuit(*UNEQUAL), params=params, client_arrays={"slots": layout}, inputs=(x,), outputs=(y,))


def test_what_unequal_scales_add_is_simulated_as_it_is_under_encryption():
    params = Params(log_n=13, levels=LEVELS, scale_bits=40, first_bits=50, digits=3, insecure=True)
    c = squares(params)
    x = np.random.default_rng(0).uniform(-1, 1, params.slots)
    found = trace(c, capabilities=BOTH)
    scales = assign_scales(found, moduli(params), SCALE)
    (total,) = (n for n in found.nodes if n.op == "add")
    first, second = (scales.result[a] for a in total.args)
    apart = second / first - 1.0
    late = found.nodes[total.args[1]].op  # which of the two is read at the other one's scale
    wanted = apart * (x**3 if late == "mul" else x**4)
    simulated = simulate_noise(c, {"x": x}, traced=found)["y"] - simulate(c, {"x": x}).outputs["y"]

    module = keys.backend("openfhe")
    client = module.Client(params, allow_insecure=True)
    server = module.Evaluator(params, key_id=client.key_id, allow_insecure=True)
    try:
        server.load_key("relin", 0, LEVELS, client.make_key("relin", 0, LEVELS))
        run = Executor(c, server, threads=1)
        sent = client.export_ciphertext(client.encrypt(x, level=LEVELS))
        done = run.run({("x", 0): server.import_ciphertext(sent, level=LEVELS)})
        back = client.import_ciphertext(server.export_ciphertext(done.outputs["y", 0]), level=4)
        encrypted = client.decrypt(back, scale=done.scales["y", 0]) - (x**4 + x**3)
    finally:
        server.close()
    for error in (simulated, encrypted):  # beside noise, which is orthogonal to what was foretold
        assert np.dot(error, wanted) / np.dot(wanted, wanted) == pytest.approx(1.0, abs=0.02)
