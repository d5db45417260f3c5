"""Functions inside a refresh: three ways at a test ring, the library's depths, refusals."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from he_backend import keys, openfhe_backend, refresh
from he_backend.base import CapabilityError, LevelError, ParamsError, RangeError
from he_backend.circuit import Circuit, Op, Signature
from he_backend.execute import Executor
from he_backend.params import FOURIER_LEVELS, Params
from he_backend.simulator import simulate, simulate_noise
from he_backend.trace import trace
from tests.he_backend.refreshing import REFRESHING
from tests.he_backend.small_circuit import WIDTH, diagonals, weights

FUNCTIONAL = replace(REFRESHING, levels=23, digits=6, first_bits=55, refresh_terms=17)
STEEP = 8.0


def logistic(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-STEEP * x))


def fourier(terms: int = 17, ridge: float = 1e-13) -> list[list[float]]:
    """Least squares on half the period, with a little ridge against coefficients that grow (Huybrechs 2010, doi 10.1137/090752456)."""
    x = 0.5 * np.cos(np.pi * (np.arange(2000) + 0.5) / 2000)
    j = np.arange(terms)
    rows = np.concatenate([2 * np.cos(np.pi * np.outer(x, j)), -2 * np.sin(np.pi * np.outer(x, j[1:]))], axis=1)
    small = math.sqrt(ridge * len(x)) * np.eye(rows.shape[1])
    c = np.linalg.lstsq(np.vstack([rows, small]), np.concatenate([logistic(x), np.zeros(len(small))]), rcond=None)[0]
    return [[float(re), float(im)] for re, im in zip(c[:terms], [0.0, *c[terms:]], strict=True)]


def reference(x: np.ndarray) -> np.ndarray:
    first, bias, _ = weights()
    return first @ logistic(x**2 / 2) + bias


def functional(params: Params = FUNCTIONAL) -> Circuit:
    """first @ logistic(x^2 / 2) + bias."""
    stride = params.slots // WIDTH
    first, bias, _ = weights()
    plan = [[g * stride, [[b * stride, g + b] for b in range(4)]] for g in range(0, WIDTH, 4)]
    low, high = params.refresh_input + 1, params.refresh_output
    attrs = {"kind": "functional", "scale": 0.5, "fourier": fourier()}
    ops = (
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=low + 1),
        Op(id=1, kind="mul", args=(0, 0), level=low),
        Op(id=2, kind="refresh", args=(1,), attrs=attrs, level=high),
        Op(id=3, kind="linear", args=(2,), attrs={"plan": plan, "weights": "w", "bias": "b"}, level=high - 1),
        Op(id=4, kind="output", args=(3,), attrs={"name": "y", "part": 0}, level=0),
    )

    def side(name: str, level: int) -> Signature:
        return Signature(name=name, shape=(WIDTH,), layout="features", factor=1.0, bound=4.0, level=level)

    draft = Circuit(
        params=params,
        ops=ops,
        arrays={"w": diagonals(first), "b": bias},
        client_arrays={"features": (np.arange(params.slots, dtype=np.int32) // stride).reshape(1, -1)},
        inputs=(side("x", low + 1),),
        outputs=(side("y", 0),),
        keys={},
        relin_level=-1,
        error_bound=2.0**-16,
    )
    found = trace(draft)
    return replace(draft, keys=found.keys, relin_level=found.relin_level)


@pytest.fixture(scope="module")
def run():
    circuit, module = functional(), keys.backend("openfhe")
    client = module.Client(FUNCTIONAL, allow_insecure=True)
    evaluator = module.Evaluator(FUNCTIONAL, allow_insecure=True)
    for kind, k, level in keys.wanted(circuit.spec()):
        evaluator.load_key(kind, k, level, client.make_key(kind, k, level))
    x, level = np.random.default_rng(5).uniform(-1, 1, WIDTH), circuit.inputs[0].level
    slots = np.repeat(x, FUNCTIONAL.slots // WIDTH)
    residues = client.export_ciphertext(client.encrypt(slots, level=level))
    done = Executor(circuit, evaluator, threads=2).run({("x", 0): evaluator.import_ciphertext(residues, level=level)})
    out = evaluator.export_ciphertext(done.outputs["y", 0])
    values = client.decrypt(client.import_ciphertext(out, level=0), scale=done.scales["y", 0])
    yield SimpleNamespace(circuit=circuit, x=x, values=values, client=client, evaluator=evaluator)
    evaluator.close()


def test_a_function_three_ways(run):
    clear = simulate(run.circuit, {"x": run.x}).outputs["y"]
    np.testing.assert_allclose(clear, reference(run.x), rtol=0, atol=1e-5)  # the fit
    noisy = [simulate_noise(run.circuit, {"x": run.x}, seed=s)["y"] - clear for s in range(8)]
    predicted = math.sqrt(np.mean(np.square(noisy)))
    everywhere = run.values - np.repeat(clear, FUNCTIONAL.slots // WIDTH)
    assert predicted / 8 < everywhere.std() < 2 * predicted < 2.0**-24
    assert np.abs(everywhere).max() < 8 * predicted


def test_it_is_more_precise_than_a_plain_refresh(run):
    clear = simulate(run.circuit, {"x": run.x}).outputs["y"]
    everywhere = run.values - np.repeat(clear, FUNCTIONAL.slots // WIDTH)
    assert everywhere.std() < refresh.error_std(REFRESHING) / 16


def test_a_short_series_takes_the_levels_of_the_longest(run):
    """The identity's interval is checked too: 2 Re(c_1 exp(i pi x)) with c_1 = -i / 2 is sin(pi x)."""
    level, params = FUNCTIONAL.refresh_input, FUNCTIONAL
    x = np.random.default_rng(1).uniform(-0.5, 0.5, params.slots)
    residues = run.client.export_ciphertext(run.client.encrypt(x, level=level))
    fresh = run.evaluator.refresh_function(
        run.evaluator.import_ciphertext(residues, level=level), [0.0, 0.0, 0.0, -0.5]
    )
    back = run.evaluator.export_ciphertext(fresh)
    values = run.client.decrypt(run.client.import_ciphertext(back, level=params.refresh_output))
    np.testing.assert_allclose(values, np.sin(np.pi * x), rtol=0, atol=16 * refresh.function_std(params))
    with pytest.raises(CapabilityError, match="exclude each other"):
        run.evaluator.refresh(run.evaluator.import_ciphertext(residues, level=level))
    with pytest.raises(CapabilityError, match="18 terms"):
        run.evaluator.refresh_function(run.evaluator.import_ciphertext(residues, level=level), [0.0] * 36)


@pytest.mark.skipif(openfhe_backend.available() is not None, reason="OpenFHE is not installed")
@pytest.mark.parametrize("terms", sorted({t for most, _ in FOURIER_LEVELS for t in (most, most + 1)} - {121} | {7}))
def test_levels_are_those_of_the_library(terms):
    o = openfhe_backend.library()
    params = replace(FUNCTIONAL, refresh_terms=terms, levels=30, digits=4)
    depth = o.CryptoContext.GetFEFBTDepth([3, 2], [0.1] * terms, o.SPARSE_ENCAPSULATED, params.first_bits)
    assert params.refresh_output == params.levels - depth + params.refresh_decode


REFUSED = {
    "too many terms": ({"refresh_terms": 121}, "7 to 120"),
    "too few terms": ({"refresh_terms": 3}, "7 to 120"),
    "first modulus": ({"first_bits": 60}, "first modulus of 55 bits"),
    "pairs": ({"refresh_complex": True}, "wants real slots"),
    "levels": ({"levels": 20, "digits": 1}, "pays from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_cannot_are_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ParamsError, match=message):
        replace(FUNCTIONAL, **changes)


def test_circuits_that_cannot_are_refused():
    circuit = functional()
    plain = replace(circuit.ops[2], attrs={"kind": "plain"})
    with pytest.raises(CapabilityError, match="exclude each other"):
        trace(replace(circuit, ops=(*circuit.ops[:2], plain, *circuit.ops[3:])))
    long = replace(circuit.ops[2], attrs={**circuit.ops[2].attrs, "fourier": fourier(18)})
    with pytest.raises(CapabilityError, match="18 terms"):
        trace(replace(circuit, ops=(*circuit.ops[:2], long, *circuit.ops[3:])))
    low = replace(circuit.ops[1], level=FUNCTIONAL.refresh_input)
    with pytest.raises(LevelError, match=f"wants level {FUNCTIONAL.refresh_input + 1}"):
        trace(replace(circuit, ops=(circuit.ops[0], low, *circuit.ops[2:])))
    with pytest.raises(RangeError, match=r"at most 0\.5"):
        simulate(circuit, {"x": np.full(WIDTH, 1.1)})
