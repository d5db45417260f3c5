"""Forms of exponentials, reciprocals and inverse roots: their errors, their levels, and the size of what they store."""

from dataclasses import replace

import numpy as np
import pytest

from compiler.calibrate import calibrate
from compiler.factors import fold_factors
from compiler.ir import Graph, Node, evaluate
from compiler.lower import lower
from compiler.passes.approximate import approximate
from compiler.passes.forms import Power, exponential, inverse, newton_constants
from compiler.passes.levels import assign_levels, top_level
from compiler.plan import as_circuit
from he_backend.params import Params
from he_backend.simulator import simulate
from polyformer.approx import goldschmidt_reciprocal, goldschmidt_start

GRID = 4001
RECIPROCAL, ROOT = Power(exponent=-1.0), Power(exponent=-0.5)


def grid(lo, hi):
    return np.linspace(lo, hi, GRID)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("on", "error"),
    [((-9.0, 0.5), 1e-3), ((-9.0, 2.0), 1e-4), ((-20.0, 2.0), 1e-3), ((-60.0, 3.0), 1e-4)],
    ids=["narrow", "precise", "wide", "very wide"],
)
def test_an_exponential_keeps_its_absolute_error(on, error, zero):
    error = max(error, 2 * np.exp(on[0]))
    form = exponential(on, error, zero=zero)
    y = form(grid(*on))
    assert np.max(np.abs(y - np.exp(grid(*on)))) <= 1.02 * error
    if "squared" in form.words:
        assert y.min() >= 0.0
    if zero:
        assert abs(y[0]) < 1e-15


def test_an_exponential_that_no_form_keeps_is_none():
    assert exponential((-90.0, 4.0), 1e-12, zero=False) is None


@pytest.mark.parametrize("ratio", [1.5, 4.0, 40.0, 1e3, 1e5])
@pytest.mark.parametrize("power", [RECIPROCAL, ROOT, Power(scale=3.0, a=0.25, b=0.5, exponent=-1.0)])
def test_inverses_keep_their_relative_error(power, ratio):
    on = 2.0, 2.0 * ratio
    form = inverse(power, on, 0.01)
    x = grid(*on)
    assert np.max(np.abs(form(x) / power(x) - 1.0)) <= 0.01 * (1 + 1e-3)


def test_relaxed_steps_are_the_best_polynomial():
    """The error of k steps is 1 / T_(2^k)(t), and plain steps are far from it."""
    lo, hi = 0.05, 2.0
    form = inverse(RECIPROCAL, (lo, hi), 0.01)
    assert form.words == "5 Goldschmidt steps, degree 31"
    x = grid(lo, hi)
    t = (hi + lo) / (hi - lo)
    assert np.max(np.abs(form(x) * x - 1.0)) == pytest.approx(1.0 / np.cosh(32 * np.arccosh(t)), rel=1e-3)
    plain = goldschmidt_reciprocal(x, goldschmidt_start(lo, hi), 5)
    assert np.max(np.abs(plain * x - 1.0)) > 0.1


def test_newton_constants_level_the_error():
    a, b, error = newton_constants(0.6, 1.4)
    t = grid(0.6, 1.4)
    y = a * t - b * t**3
    assert np.max(y) == pytest.approx(1.0 + error)
    assert (y[0], y[-1]) == pytest.approx((1.0 - error, 1.0 - error))
    plain = 1.5 * t - 0.5 * t**3
    assert error < 0.5 * np.max(np.abs(plain - 1.0))


# Levels and stored sizes


def vector(node):
    """x [1, 16] -> the function of x . x + 1/2, a sum of which nothing is known but its range."""
    square = Node(name="s", op="mul", inputs=("x", "x"), shape=(1, 16))
    shifted = Node(name="t", op="add_const", inputs=("s",), shape=(1, 16), const=np.array(0.02))
    total = Node(name="r", op="sparse", inputs=("t",), shape=(1, 16), attrs={"matrix": _swap()})
    out = Node(name="z", op="sparse", inputs=("y",), shape=(1, 16), attrs={"matrix": _swap()})
    return Graph(input="x", input_shape=(1, 16), output="z", nodes=(square, shifted, total, node, out))


def _swap():
    from scipy import sparse

    return sparse.csr_matrix(np.eye(16)[::-1])


@pytest.mark.parametrize("roomy", [False, True], ids=["leveled", "with room for refreshes"])
def test_goldschmidt_is_stored_neither_large_nor_tiny(roomy):
    """Without units, the errors of 6 steps would be stored as small as their 64th powers."""
    node = Node(
        name="y",
        op="function",
        inputs=("r",),
        shape=(1, 16),
        attrs={"kind": "Reciprocal", "call": lambda a: 1.0 / a, "options": {}},
        source="division",
    )
    rng = np.random.default_rng(0)
    samples = [rng.uniform(0.1, 2.5, size=(1, 16)) for _ in range(8)]
    graph, report = approximate(vector(node), samples)
    assert "6 Goldschmidt steps" in str(report)
    build = lower(graph, calibrate(graph, samples), 512, lambda *counts: 1.0, roomy=roomy)
    build = replace(build, ops=assign_levels(build.ops, build.arrays, 512))
    # x . x and the map before; the steps; the map behind. Room: the argument's unit, and a pause after three steps.
    assert top_level(build.ops) == 2 + 6 + 1 + 2 * roomy
    params = Params(log_n=10, levels=12, scale_bits=45, first_bits=51, digits=2, insecure=True)

    def sizes(build):
        values = simulate(as_circuit(build, params), {"x": samples[0][0]}).values
        return [float(np.abs(v).max()) for op, v in zip(build.ops, values, strict=True) if op.source == "division"]

    first = sizes(build)
    assert min(first) > 1e-3
    assert max(first) < 1e3
    if roomy:
        peaks = [float(np.abs(v).max()) for v in simulate(as_circuit(build, params), {"x": samples[0][0]}).values]
        folded, m = fold_factors(build, peaks, 0.8)
        assert (
            max(p * m[op.id] for p, op in zip(peaks, build.ops, strict=True) if op.id not in build.free) <= 0.8 + 1e-6
        )
        assert min(sizes(folded)) > 1e-3
    got = simulate(as_circuit(build, params), {"x": samples[0][0]}).outputs["y"]
    np.testing.assert_allclose(got, evaluate(graph, samples[0])["z"][0], rtol=1e-9)
