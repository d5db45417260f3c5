"""The tracer: levels, keys, shared subexpressions, exact scales."""

import numpy as np
import pytest

from he_backend.base import LevelError
from he_backend.circuit import Circuit, Op
from he_backend.kernels import apply
from he_backend.params import Params
from he_backend.trace import Tracer, trace

PARAMS = Params(log_n=10, levels=6, scale_bits=40, first_bits=50, digits=3, insecure=True)
SLOTS = PARAMS.slots
MODULI = tuple((1 << (50 if i == 0 else 40)) + (-1) ** i * 129 * (i + 1) for i in range(7))
SCALE = 2.0**40
ARRAYS = {"w": np.random.default_rng(0).normal(size=(8, SLOTS))}
PLAN = [[g, [[b, g + b] for b in range(4)]] for g in (0, 4)]
BOTH = frozenset({"hoisting", "double_hoisting"})


def circuit(*rows, top=6):
    """Ops from (kind, args, attrs, level) rows after one input x."""
    ops = [Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=top)]
    ops += [Op(id=i, kind=k, args=a, attrs=attrs, level=lv) for i, (k, a, attrs, lv) in enumerate(rows, 1)]
    last = ops[-1]
    ops.append(Op(id=len(ops), kind="output", args=(last.id,), attrs={"name": "y", "part": 0}, level=last.level))
    return Circuit(
        params=PARAMS, ops=tuple(ops), arrays=ARRAYS, client_arrays={}, inputs=(), outputs=(), keys={}, relin_level=-1
    )


LINEAR = ("linear", (0,), {"weights": "w", "plan": PLAN, "bias": None}, 5)


def test_levels_degrees_and_elements_are_consistent():
    found = trace(
        circuit(LINEAR, ("mul", (1, 1), {}, 4), ("rotate_sum", (2,), {"steps": [1, 2]}, 4), ("add", (3, 1), {}, 4))
    )
    for n in found.nodes:
        args = [found.nodes[a] for a in n.args]
        assert all(a.id < n.id for a in args) and n.level >= 0
        match n.op:
            case "rescale":
                assert (args[0].degree, n.degree, n.level) == (2, 1, args[0].level - 1) and args[0].elements == 2
            case "relinearize":
                assert (args[0].elements, n.elements) == (3, 2)
            case "mul" | "square":
                assert (n.degree, n.elements) == (2, 3) and all((a.degree, a.elements) == (1, 2) for a in args)
            case "add" | "sub":
                assert len({(a.level, a.degree, a.extended) for a in args}) == 1
            case "drop":
                assert n.level < args[0].level
    assert found.nodes[found.outputs["y", 0]].level == 4


@pytest.mark.parametrize(
    "capabilities", [BOTH, frozenset({"hoisting"}), frozenset()], ids=["double", "hoisting", "none"]
)
def test_keys_are_the_rotations_at_their_highest_level(capabilities):
    found = trace(
        circuit(LINEAR, ("rotate", (1,), {"k": 9}, 3), ("rotate", (0,), {"k": 9}, 6)), capabilities=capabilities
    )
    assert found.keys == {9: 6}  # the linear map and the first rotation feed nothing: they are not there
    found = trace(circuit(LINEAR, ("rotate", (1,), {"k": 9}, 3)), capabilities=capabilities)
    assert set(found.keys) == {1, 2, 3, 4, 9} and found.keys[1] == 6 and found.keys[9] <= 6
    assert found.relin_level == -1
    used = {n.op for n in found.nodes}
    assert ("rotate_extended" in used) == ("double_hoisting" in capabilities)
    assert ("hoist" in used) == ("hoisting" in capabilities)


def test_relin_level_is_the_highest_product():
    found = trace(circuit(("mul", (0, 0), {}, 5), ("mul", (1, 1), {}, 4)))
    assert found.relin_level == 6


def test_equal_subexpressions_are_one_node():
    twice = trace(circuit(LINEAR, LINEAR, ("add", (1, 2), {}, 5)))
    once = trace(circuit(LINEAR))
    assert twice.counts()["weighted_sum", 6] == once.counts()["weighted_sum", 6]
    assert twice.counts()["hoist", 6] == once.counts()["hoist", 6]


def test_sums_of_products_are_relinearised_once():
    rows = [("mul", (0, 0), {}, 5), ("rotate", (0,), {"k": 1}, 6), ("mul", (0, 2), {}, 5), ("add", (1, 3), {}, 5)]
    ops = [n.op for n in trace(circuit(*rows)).nodes]
    assert ops.count("relinearize") == 1 and ops.count("rescale") == 1


def summed(**attrs):
    """Primitives of a sum over eight slots behind a product, at level 5."""
    found = trace(circuit(("mul", (0, 0), {}, 5), ("rotate_sum", (1,), {"steps": [1, 2, 4], **attrs}, 5)))
    return [(n.op, n.level, n.degree) for n in found.nodes], found.keys


def test_a_run_of_steps_is_decomposed_once():
    one_by_one, keys = summed()
    assert [op for op, _, _ in one_by_one].count("rotate") == 3 and set(keys) == {1, 2, 4}
    at_once, keys = summed(runs=[3])
    ops = [op for op, _, _ in at_once]
    assert (ops.count("hoist"), ops.count("rotate_extended"), ops.count("mod_down"), ops.count("rotate")) == (
        1,
        7,
        1,
        0,
    )
    assert set(keys) == set(range(1, 8))


@pytest.mark.parametrize("runs", [[], [2, 1]], ids=["one by one", "at once"])
def test_a_settled_sum_rotates_a_limb_less(runs):
    late = {(level, degree) for op, level, degree in summed(runs=runs)[0] if op.startswith("rotate")}
    early = {(level, degree) for op, level, degree in summed(runs=runs, settled=True)[0] if op.startswith("rotate")}
    assert late == {(6, 2)} and early == {(5, 1)}


def test_too_few_levels_are_said():
    with pytest.raises(LevelError):
        trace(circuit(("mul", (0, 0), {}, 0), top=0))
    with pytest.raises(LevelError):
        trace(circuit(("mul", (0, 0), {}, 6)))


def test_the_tracer_does_what_the_kernels_say():
    """Interpreting the nodes in NumPy gives the kernel's value, so the tracer changes cost and not meaning."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, SLOTS)
    c = circuit(
        LINEAR,
        ("polynomial", (1,), {"chebyshev": [0.1, 0.4, 0.0, -0.3, 0.2], "domain": [0.1, 0.0]}, 1),
        ("rotate_sum", (2,), {"steps": [1, 2, 4]}, 1),
        ("mul", (3, 3), {}, 0),
        ("rotate_sum", (4,), {"steps": [1, 2, SLOTS // 2, SLOTS // 2, 16], "runs": [4, 1]}, 0),
    )
    from he_backend.kernels import NumpySlots

    values = [x]
    for op in c.ops[1:-1]:
        values.append(apply(NumpySlots(SLOTS), op, [values[a] for a in op.args], ARRAYS))
    for capabilities in (BOTH, frozenset({"hoisting"}), frozenset()):
        found = trace(c, capabilities=capabilities)
        assert np.allclose(interpret(found, x), values[-1])


def interpret(found, x):
    def plain(p):
        return p if isinstance(p, float) else p.slots()

    values: list[np.ndarray] = []
    for n in found.nodes:
        a = [values[i] for i in n.args]
        match n.op:
            case "input":
                out = x
            case "add":
                out = a[0] + a[1]
            case "sub":
                out = a[0] - a[1]
            case "add_plain" | "add_scalar":
                out = a[0] + plain(n.plains[0])
            case "mul_plain" | "mul_scalar":
                out = a[0] * plain(n.plains[0])
            case "weighted_sum":
                out = sum(v * plain(p) for v, p in zip(a, n.plains, strict=True))
            case "mul":
                out = a[0] * a[1]
            case "square":
                out = a[0] ** 2
            case "rotate" | "rotate_hoisted" | "rotate_extended":
                out = np.roll(a[0], -n.k)
            case _:
                out = a[0]
        values.append(out)
    return values[found.outputs["y", 0]]


def test_rotation_by_zero_is_nothing():
    t = Tracer(SLOTS)
    x = t.emit("input", (), level=3)
    assert t.rotate(x, 0) == x and t.rotate(x, SLOTS) == x
