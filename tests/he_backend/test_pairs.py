"""Complex pairs: two real vectors in one refresh, three ways; the level that a reader at twice the scale spends; refusals."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from he_backend import keys, refresh
from he_backend.base import CapabilityError, LevelError
from he_backend.circuit import Circuit, Op, Signature
from he_backend.execute import Executor
from he_backend.params import Params
from he_backend.scales import assign_scales
from he_backend.simulator import simulate, simulate_noise
from he_backend.trace import trace
from tests.he_backend.refreshing import REFRESHING
from tests.he_backend.small_circuit import WIDTH, diagonals, weights

PAIRING = replace(REFRESHING, levels=18, digits=5, refresh_complex=True)


def reference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    first, bias, _ = weights()
    return (first @ x**2 + bias) * (y * x) + x**2


def pairing(params: Params = PAIRING) -> Circuit:
    """(first @ u + bias) * w + u for u = x^2 and w = x y, both out of one refresh: a map, a product and a sum read the copies."""
    stride = params.slots // WIDTH
    first, bias, _ = weights()
    plan = [[g * stride, [[b * stride, g + b] for b in range(4)]] for g in range(0, WIDTH, 4)]
    low, high = params.refresh_input, params.refresh_output
    pair = {"kind": "pair"}
    ops = (
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=low + 1),
        Op(id=1, kind="input", args=(), attrs={"name": "y", "part": 0}, level=low + 1),
        Op(id=2, kind="mul", args=(0, 0), level=low),
        Op(id=3, kind="mul", args=(0, 1), level=low),
        Op(id=4, kind="refresh", args=(2, 3), attrs=pair, level=high),
        Op(id=5, kind="refresh", args=(3, 2), attrs=pair, level=high),
        Op(id=6, kind="linear", args=(4,), attrs={"plan": plan, "weights": "w", "bias": "b"}, level=high - 1),
        Op(id=7, kind="mul", args=(6, 5), level=high - 2),
        Op(id=8, kind="add", args=(7, 4), level=high - 2),
        Op(id=9, kind="output", args=(8,), attrs={"name": "z", "part": 0}, level=0),
    )

    def side(name: str, bound: float, level: int) -> Signature:
        return Signature(name=name, shape=(WIDTH,), layout="features", factor=1.0, bound=bound, level=level)

    draft = Circuit(
        params=params,
        ops=ops,
        arrays={"w": diagonals(first), "b": bias},
        client_arrays={"features": (np.arange(params.slots, dtype=np.int32) // stride).reshape(1, -1)},
        inputs=(side("x", 1.0, low + 1), side("y", 1.0, low + 1)),
        outputs=(side("z", 20.0, 0),),
        keys={},
        relin_level=-1,
        error_bound=2.0**-12,
    )
    found = trace(draft)
    return replace(draft, keys=found.keys, relin_level=found.relin_level)


@pytest.fixture(scope="module")
def run():
    """The circuit on real ciphertexts, keys made one by one as a server gets them."""
    circuit, module = pairing(), keys.backend("openfhe")
    client = module.Client(PAIRING, allow_insecure=True)
    evaluator = module.Evaluator(PAIRING, allow_insecure=True)
    for kind, k, level in keys.wanted(circuit.spec()):
        evaluator.load_key(kind, k, level, client.make_key(kind, k, level))
    rng = np.random.default_rng(5)
    tensors = {name: rng.uniform(-1, 1, WIDTH) for name in "xy"}
    sent, stride = {}, PAIRING.slots // WIDTH
    for signature in circuit.inputs:
        slots = np.repeat(tensors[signature.name], stride)
        residues = client.export_ciphertext(client.encrypt(slots, level=signature.level))
        sent[signature.name, 0] = evaluator.import_ciphertext(residues, level=signature.level)
    executor = Executor(circuit, evaluator, threads=2)
    done = executor.run(sent)
    out = evaluator.export_ciphertext(done.outputs["z", 0])
    values = client.decrypt(client.import_ciphertext(out, level=0), scale=done.scales["z", 0])
    evaluator.close()
    return SimpleNamespace(circuit=circuit, tensors=tensors, values=values, counts=done.timing.counts)


def test_a_pair_three_ways(run):
    expected = reference(run.tensors["x"], run.tensors["y"])
    clear = simulate(run.circuit, run.tensors).outputs["z"]
    np.testing.assert_allclose(clear, expected, rtol=0, atol=1e-12)
    noisy = [simulate_noise(run.circuit, run.tensors, seed=s)["z"] - expected for s in range(8)]
    predicted = math.sqrt(np.mean(np.square(noisy)))
    everywhere = run.values - np.repeat(expected, run.circuit.params.slots // WIDTH)
    assert predicted / 8 < everywhere.std() < 2 * predicted < 2.0**-14
    assert np.abs(everywhere).max() < 8 * predicted


def test_a_pair_of_periodic_vectors():
    params = replace(PAIRING, refresh_slots=16, digits=4)
    module = keys.backend("openfhe")
    client = module.Client(params, allow_insecure=True)
    evaluator = module.Evaluator(params, allow_insecure=True)
    for kind, k, level in refresh.keys(params):
        evaluator.load_key(kind, k, level, client.make_key(kind, k, level))
    level, rng = params.refresh_input, np.random.default_rng(1)
    x = [np.tile(rng.uniform(-1, 1, 16), params.slots // 16) for _ in range(2)]
    sent = [
        evaluator.import_ciphertext(client.export_ciphertext(client.encrypt(v, level=level)), level=level) for v in x
    ]
    joined = evaluator.refresh(evaluator.join(*sent))
    parts = (evaluator.twice_real, evaluator.twice_imaginary)
    for wanted, part in zip(x, parts, strict=True):
        residues = evaluator.export_ciphertext(part(joined, evaluator.conjugate(joined)))
        back = client.decrypt(client.import_ciphertext(residues, level=params.refresh_output)) / 2
        np.testing.assert_allclose(back, wanted, rtol=0, atol=10 * refresh.error_std(params))
    evaluator.close()


def test_one_refresh_serves_both(run):
    assert run.counts["refresh"] == run.counts["join"] == run.counts["conjugate"] == 1


def test_the_way_back_to_the_scale_is_paid_with_levels_that_are_dropped():
    found = trace(pairing())
    assert found.counts()["drop", PAIRING.refresh_output] == 1  # of the sum's copy, which has two levels to spare
    assert sum(n.op == "mul_scalar" for n in found.nodes) == 2
    scales = assign_scales(found, [2**60, *[2**54] * PAIRING.levels], 2.0**54)
    parts = [n.id for n in found.nodes if n.op.startswith("twice")]
    assert [scales.result[i] for i in parts] == [2.0**55] * 2 and scales.mismatch == 0.0


def test_a_reader_at_the_copys_own_level_is_refused():
    circuit = pairing()
    ops = (*circuit.ops[:7], replace(circuit.ops[7], args=(4, 5), level=PAIRING.refresh_output - 1), *circuit.ops[8:])
    with pytest.raises(LevelError, match="give it one level less"):
        trace(replace(circuit, ops=ops))


REFUSED = {
    "real slots": ({"params": replace(PAIRING, refresh_complex=False)}, "set refresh_complex"),
    "of one value": ({"args": (2,)}, "'pair' of two"),
    "of a value with itself": ({"args": (2, 2)}, "'pair' of two"),
    "functional": ({"attrs": {"kind": "functional"}}, "kind 'functional'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_cannot_be_are_refused(case):
    changes, message = REFUSED[case]
    circuit = pairing()
    if "params" in changes:
        circuit = replace(circuit, **changes)
    else:
        ops = list(circuit.ops)
        ops[4] = replace(ops[4], **changes)
        circuit = replace(circuit, ops=tuple(ops))
    with pytest.raises(CapabilityError, match=message):
        trace(circuit)
