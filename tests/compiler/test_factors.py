"""Constants folded for refreshes: the same outputs, every value within the limit, no op and no level more."""

from dataclasses import replace

import numpy as np
import pytest

from compiler.cost import CostTable
from compiler.factors import TINY, fold_factors
from compiler.lower import Lowered
from compiler.passes.levels import assign_levels
from compiler.plan import as_circuit
from he_backend.circuit import Op, Signature
from he_backend.kernels import depth
from he_backend.simulator import simulate

from .test_refreshes import MODELS, PARAMS, lowered

LIMIT = 0.7


@pytest.fixture(scope="module")
def table():
    return CostTable.load()


@pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS.keys())
def test_every_value_is_within_the_limit_and_means_the_same(tmp_path, table, model, shape):
    build, x = lowered(model(tmp_path / "m.onnx"), shape, table)
    build = replace(build, ops=assign_levels(build.ops, build.arrays, PARAMS.slots))
    params = replace(PARAMS, levels=build.ops[0].level)
    before = simulate(as_circuit(build, params), {"x": x})
    peaks = [float(np.abs(v).max()) for v in before.values]
    assert max(peaks) > LIMIT
    done, m = fold_factors(build, peaks, LIMIT)
    after = simulate(as_circuit(done, params), {"x": x})
    assert max(np.abs(v).max() for v in after.values) <= LIMIT * (1 + 1e-6)
    np.testing.assert_allclose(after.outputs["y"], before.outputs["y"], rtol=1e-6, atol=1e-9)
    for op, old, new in zip(done.ops, before.values, after.values, strict=True):
        np.testing.assert_allclose(new, m[op.id] * old, rtol=1e-5, atol=1e-6)
    assert [op.level for op in assign_levels(done.ops, done.arrays, PARAMS.slots)] == [op.level for op in build.ops]


def test_what_is_tied_to_itself_stays_above():
    """x + x^2: the sum ties the factor of x to its own square, so that only 1 is left."""
    side = Signature(name="x", shape=(8,), layout="x", factor=3.0, bound=1.0, level=1)
    build = Lowered(
        ops=(
            Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}),
            Op(id=1, kind="mul", args=(0, 0)),
            Op(id=2, kind="add", args=(0, 1)),
            Op(id=3, kind="output", args=(2,), attrs={"name": "y", "part": 0}),
        ),
        arrays={},
        client_arrays={},
        inputs=(side,),
        outputs=(replace(side, name="y"),),
        tensors={},
    )
    done, m = fold_factors(build, [10.0, 100.0, 110.0, 110.0], LIMIT)
    np.testing.assert_allclose(m, 1.0, rtol=1e-9)
    assert done.inputs[0].factor == pytest.approx(3.0)


ONE = {"weights": "one", "plan": [[0, [[0, 0]]]], "bias": None}


def chain(*ops: tuple[str, tuple[int, ...], dict]) -> Lowered:
    """Ops of x, which is op 0, and the last one as output."""
    side = Signature(name="x", shape=(8,), layout="x", factor=1.0, bound=1.0, level=1)
    rows = (("input", (), {"name": "x", "part": 0}), *ops, ("output", (len(ops),), {"name": "y", "part": 0}))
    return Lowered(
        ops=tuple(Op(id=i, kind=kind, args=args, attrs=attrs) for i, (kind, args, attrs) in enumerate(rows)),
        arrays={"one": np.ones((1, 1))},
        client_arrays={},
        inputs=(side,),
        outputs=(replace(side, name="y"),),
        tensors={},
    )


@pytest.mark.parametrize(
    ("series", "free"),
    [
        pytest.param([0.2, 0.9, 1.0, 0.3, 0.0, 0.1, 0.0, 0.1, 0.0, 0.1], True, id="on a short path"),
        pytest.param([0.1, 0.0, 1.0], False, id="on the longest path"),
    ],
)
def test_a_coefficient_of_1_ties_a_series_only_where_it_saves_a_level(series, free):
    build = chain(
        ("linear", (0,), ONE), ("polynomial", (1,), {"chebyshev": series, "domain": [0.7, 0.0]}), ("linear", (2,), ONE)
    )
    done, m = fold_factors(build, [0.5, 0.5, 1.6, 0.5, 0.5], LIMIT)
    assert depth(done.ops[2], done.arrays, 8) == depth(build.ops[2], build.arrays, 8)
    assert (1.6 * m[2] <= LIMIT * (1 + 1e-6)) == free


def test_no_value_drowns_so_that_others_keep_the_limit():
    """(a b)^8 where a b is 2^-5 of the limit at most, though a and b fill it (a norm of outliers): a b has no constant of its own."""
    power = {"factors": [[0.0, 0.0]] * 4}
    build = chain(("linear", (0,), ONE), ("linear", (0,), ONE), ("mul", (1, 2), {}), ("polynomial", (3,), power))
    build = replace(build, ops=(*build.ops[:-1], replace(build.ops[-1], kind="linear", attrs=ONE)))
    end = Op(id=6, kind="output", args=(5,), attrs={"name": "y", "part": 0})
    peaks = [LIMIT, LIMIT, LIMIT, LIMIT / 32, (LIMIT / 32) ** 8, LIMIT, LIMIT]
    _, m = fold_factors(replace(build, ops=(*build.ops, end)), peaks, LIMIT)
    assert peaks[4] * m[4] >= LIMIT * 2.0 ** (-TINY - 1e-6)
    assert peaks[1] * m[1] > LIMIT  # which is no place for a refresh, then
