"""Constants folded for refreshes: the same outputs, every value within the limit, no op and no level more."""

from dataclasses import replace

import numpy as np
import pytest

from compiler.cost import CostTable
from compiler.factors import fold_factors
from compiler.lower import Lowered
from compiler.passes.levels import assign_levels
from compiler.plan import as_circuit
from he_backend.circuit import Op, Signature
from he_backend.simulator import simulate

from .test_refreshes import MODELS, PARAMS, lowered

LIMIT = 0.8


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
