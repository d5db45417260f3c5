"""Kernels against plain NumPy, on random plans, polynomials and steps; and on both real backends."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import Chebyshev

from he_backend.base import UnsupportedOpError
from he_backend.circuit import Op
from he_backend.kernels import Depth, NumpySlots, Row, apply, chebyshev, depth, linear, polynomial, rotate_sum

SLOTS = 32
ops: Any = NumpySlots(SLOTS)  # Any: mypy cannot infer the value type of a protocol
counter: Any = Depth(SLOTS)
coefficients = st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=2, max_size=20)


@st.composite
def plans(draw):
    """(number of rows, plan) with distinct giant steps and every row used once."""
    giants = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=4, unique=True))
    plan, row = [], 0
    for g in giants:
        babies = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=4, unique=True))
        plan.append([g, [[b, row + i] for i, b in enumerate(babies)]])
        row += len(babies)
    return row, plan


@given(plans(), st.sampled_from([1, 2, 8, SLOTS]), st.integers(0, 2**32 - 1), st.booleans())
def test_linear_is_the_sum_of_weighted_rotations(rows_plan, m, seed, with_bias):
    rows, plan = rows_plan
    rng = np.random.default_rng(seed)
    weights, x, bias = rng.normal(size=(rows, m)), rng.normal(size=SLOTS), rng.normal(size=m)
    wide = np.repeat(weights, SLOTS // m, axis=1)
    expected = sum(wide[r] * np.roll(x, -(g + b)) for g, terms in plan for b, r in terms)
    expected = expected + with_bias * np.repeat(bias, SLOTS // m)
    got = linear(ops, x, name="w", weights=weights, plan=plan, bias=bias if with_bias else None)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@given(st.integers(2, SLOTS), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_bsgs_of_a_matrix_is_the_matrix(size, babies, seed):
    """A cyclic matrix-vector product over all slots, whatever the number of baby steps."""
    rng = np.random.default_rng(seed)
    matrix, x = np.zeros((SLOTS, SLOTS)), rng.normal(size=SLOTS)
    i = np.arange(SLOTS)
    diagonals = rng.normal(size=(size, SLOTS))
    for d in range(size):
        matrix[i, (i + d) % SLOTS] += diagonals[d]
    plan = [[g, [[b, g + b] for b in range(min(babies, size - g))]] for g in range(0, size, babies)]
    np.testing.assert_allclose(
        linear(ops, x, name="w", weights=diagonals, plan=plan, bias=None), matrix @ x, atol=1e-10
    )


@given(coefficients)
def test_chebyshev_is_numpys(c):
    u = np.linspace(-1, 1, SLOTS)
    if not any(c[1:]):
        with pytest.raises(UnsupportedOpError):
            chebyshev(ops, u, c)
        return
    np.testing.assert_allclose(chebyshev(ops, u, c), Chebyshev(c)(u), atol=1e-10)


@given(coefficients.filter(lambda c: any(c[1:])))
def test_chebyshev_is_as_deep_as_it_says(c):
    degree = max(k for k, value in enumerate(c) if value)
    assert chebyshev(counter, 0, c) <= np.ceil(np.log2(degree + 1)) + 1


@given(st.lists(st.tuples(st.floats(-2, 2), st.one_of(st.none(), st.floats(-2, 2))), min_size=1, max_size=4))
def test_factors_are_their_product(factors):
    x = np.linspace(-1, 1, SLOTS)
    expected = np.prod([(x + a) if b is None else (x + a) ** 2 + b for a, b in factors], axis=0)
    np.testing.assert_allclose(polynomial(ops, x, {"factors": factors}), expected, atol=1e-9)


def test_a_domain_is_applied():
    x = np.linspace(0, 4, SLOTS)
    got = polynomial(ops, x, {"chebyshev": [0.0, 1.0, 0.5], "domain": [0.5, -1.0]})
    np.testing.assert_allclose(got, Chebyshev([0, 1, 0.5])(0.5 * x - 1), atol=1e-12)


@given(st.integers(0, 5), st.integers(0, 4))
def test_rotate_sum_sums_a_cyclic_axis(log_count, log_stride):
    count, stride = 1 << log_count, 1 << log_stride
    x = np.arange(SLOTS, dtype=float)
    steps = [stride << i for i in range(log_count)]
    expected = sum(np.roll(x, -stride * i) for i in range(count))
    np.testing.assert_allclose(rotate_sum(ops, x, steps), expected)


@given(st.lists(st.integers(0, SLOTS), min_size=1, max_size=6), st.data())
def test_runs_of_steps_change_nothing(steps, data):
    runs = []
    while sum(runs) < len(steps):
        runs.append(data.draw(st.integers(1, len(steps) - sum(runs))))
    x = np.arange(SLOTS, dtype=float) ** 2
    np.testing.assert_allclose(rotate_sum(ops, x, steps, runs), rotate_sum(ops, x, steps))
    assert rotate_sum(counter, 3, steps, runs) == 3


def test_a_row_is_repeated_then_rolled():
    row = Row("w", 1, 3, 8, np.array([[0.0, 0.0], [1.0, 2.0]]))
    np.testing.assert_array_equal(row.slots(), np.roll([1, 1, 1, 1, 2, 2, 2, 2], 3))


def test_unknown_ops_are_refused():
    with pytest.raises(UnsupportedOpError, match="softmax"):
        apply(ops, Op(id=0, kind="softmax", args=(0,)), [np.zeros(SLOTS)], {})
    assert depth(Op(id=0, kind="output", args=(0,)), {}, SLOTS) == 0
