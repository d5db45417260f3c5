"""A circuit with steps, small enough to write by hand: a running sum of what came so far, plus the number of the step."""

import numpy as np

from he_backend.circuit import Circuit, Op, Signature
from he_backend.container import Arrays
from he_backend.trace import trace
from tests.he_backend.small_circuit import LEVELS, TEST_PARAMS

STEPS = 4
REPLY = 1


def running_sum(steps: int = STEPS) -> Circuit:
    """Input x [1] in every slot; the kept tensor [T] has x_t at place t; y [1] = x_0 + .. + x_t + t. T is a power of two."""
    slots = TEST_PARAMS.slots
    each = slots // steps
    folds = [each << k for k in range(steps.bit_length() - 1)]
    ops = (
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=LEVELS, source="x"),
        Op(id=1, kind="input", args=(), attrs={"name": "kept", "part": 0}, level=LEVELS - 1, source="kept"),
        Op(id=2, kind="mul_step", args=(0,), attrs={"array": "place"}, level=LEVELS - 1, source="placed"),
        Op(id=3, kind="add", args=(1, 2), level=LEVELS - 1, source="next"),
        Op(id=4, kind="rotate_sum", args=(3,), attrs={"steps": folds}, level=LEVELS - 1, source="sum"),
        Op(id=5, kind="add_step", args=(4,), attrs={"array": "number"}, level=LEVELS - 1, source="number"),
        Op(id=6, kind="output", args=(5,), attrs={"name": "y", "part": 0}, level=REPLY, source="y"),
        Op(id=7, kind="output", args=(3,), attrs={"name": "kept", "part": 0}, level=LEVELS - 1, source="next"),
    )
    arrays: Arrays = {
        "place": np.eye(steps),
        "number": np.arange(steps, dtype=np.float64)[:, None],
        "places": np.repeat(np.arange(steps, dtype=np.int32), each)[None],
    }
    draft = Circuit(
        params=TEST_PARAMS,
        ops=ops,
        arrays=arrays,
        client_arrays={"one": np.zeros((1, slots), dtype=np.int32)},
        inputs=(Signature(name="x", shape=(1,), layout="one", factor=1.0, bound=1.0, level=LEVELS),),
        outputs=(Signature(name="y", shape=(1,), layout="one", factor=1.0, bound=8.0, level=REPLY),),
        states=(Signature(name="kept", shape=(steps,), layout="places", factor=1.0, bound=1.0, level=LEVELS - 1),),
        steps=steps,
        keys={},
        relin_level=-1,
        error_bound=2.0**-10,
    )
    found = trace(draft)
    return Circuit(**{**vars(draft), "keys": found.keys, "relin_level": found.relin_level})
