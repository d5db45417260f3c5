"""Refreshes in lowered models: the circuit computes the same, no op has too few levels, prices are those of a trace."""

from dataclasses import replace

import numpy as np
import pytest

from compiler.calibrate import calibrate
from compiler.cost import CostTable
from compiler.lower import lower
from compiler.passes.levels import assign_levels
from compiler.pipeline import import_graph, simplify
from compiler.placed import Lowered
from compiler.placement_problem import RefreshTimes
from compiler.plan import as_circuit
from compiler.refreshes import Refreshing, as_problem, op_seconds, period, place_refreshes
from compiler.search import plan_cost
from he_backend.base import LevelError, ParamsError
from he_backend.circuit import Op
from he_backend.kernels import depth
from he_backend.params import Params
from he_backend.simulator import simulate
from he_backend.trace import trace

from .models import Builder, attention, mlp, norm_mlp

LOG_N = 11
PARAMS = Params(log_n=LOG_N, levels=12, scale_bits=40, first_bits=46, digits=3, insecure=True)
PLAIN = Refreshing(level=7, start=2, times=RefreshTimes(plain=0.5))


def deep_mlp(path, layers: int = 8, width: int = 16):
    """Squares and linear maps with residuals, scaled so that nothing grows."""
    b = Builder((1, width))
    x = "x"
    for i in range(layers):
        h = b.linear(x, width, width, name=f"{i}.up")
        h = b.op("Mul", h, h, name=f"{i}.square")
        h = b.op("Mul", h, np.array(0.1), name=f"{i}.scaled")
        x = b.op("Add", x, b.linear(h, width, width, name=f"{i}.down"), name=f"{i}.residual")
        x = b.op("Mul", x, np.array(0.5), name=f"{i}.half")
    return b.save(path, x, (1, width))


def transformer(path, blocks: int = 2, tokens: int = 8, heads: int = 2, channels: int = 4):
    """Residual blocks of square attention without a denominator, and of an MLP."""
    width = heads * channels
    b = Builder((1, tokens, width))
    x = "x"
    for i in range(blocks):
        parts = []
        for name in "qkv":
            h = b.op("Reshape", b.linear(x, width, width, name=f"{i}.{name}"), np.array([1, tokens, heads, channels]))
            parts.append(b.op("Transpose", h, perm=[0, 2, 1, 3]))
            if name == "k":
                parts[-1] = b.op("Transpose", parts[-1], perm=[0, 1, 3, 2])
        mask = np.tril(np.ones((tokens, tokens)))[None, None] / (2 * np.arange(1, tokens + 1))[None, None, :, None]
        s = b.op("Mul", b.op("MatMul", parts[0], parts[1]), mask)
        y = b.op("MatMul", b.op("Mul", s, s), parts[2])
        y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([1, tokens, width]))
        x = b.op("Add", x, b.linear(y, width, width, name=f"{i}.o"), name=f"{i}.attended")
        h = b.linear(x, width, 2 * width, name=f"{i}.up")
        h = b.linear(b.op("Mul", h, h), 2 * width, width, name=f"{i}.down")
        x = b.op("Mul", b.op("Add", x, h), np.array(0.2), name=f"{i}.residual")
    return b.save(path, x, (1, tokens, width))


MODELS = {
    "transformer": (transformer, (8, 8)),
    "deep mlp": (deep_mlp, (16,)),
    "norms": (lambda p: norm_mlp(p, layer_norm=True), (4, 16)),
    "attention": (attention, (8, 8)),
}


def lowered(path, shape, table):
    """A lowered model, still without levels, and one input."""
    x = np.random.default_rng(1).uniform(-1, 1, (6, *(shape if len(shape) == 2 else (1, *shape))))
    x = x[:, 0] if len(shape) == 1 else x
    graph, _ = simplify(import_graph(path), x[:1])
    samples = list(x)
    ranges = calibrate(graph, [s[None] for s in samples])
    return lower(graph, ranges, 1 << (LOG_N - 1), plan_cost(table, LOG_N)), x[0]


def assert_levels(circuit) -> None:
    """Every operand has what its reader takes; refreshes start and end where they may."""
    for op in circuit.ops:
        for a in op.args:
            have = circuit.ops[a].level
            if op.kind == "refresh":
                assert have >= PLAIN.start
                assert op.level == PLAIN.level
            else:
                assert have >= op.level + depth(op, circuit.arrays, circuit.params.slots)


@pytest.fixture(scope="module")
def table():
    return CostTable.load()


@pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("times", [RefreshTimes(plain=0.5), RefreshTimes(plain=0.5, pair=0.55)], ids=["plain", "pairs"])
def test_a_deep_model_computes_the_same_with_refreshes(tmp_path, table, model, shape, times):
    build, x = lowered(model(tmp_path / "m.onnx"), shape, table)
    leveled = replace(build, ops=assign_levels(build.ops, build.arrays, PARAMS.slots))
    needed = leveled.ops[0].level
    top = min(PARAMS.levels, needed - 1)
    done, placement = place_refreshes(build, PARAMS, table, replace(PLAIN, times=times), top=top)
    circuit = as_circuit(done, PARAMS)
    assert placement.sites
    assert sum(op.kind == "refresh" for op in circuit.ops) == sum(len(s.values) for s in placement.sites)
    assert circuit.inputs[0].level <= top
    assert_levels(circuit)
    wanted = simulate(as_circuit(leveled, replace(PARAMS, levels=needed)), {"x": x})
    got = simulate(circuit, {"x": x})
    np.testing.assert_allclose(got.outputs["y"], wanted.outputs["y"], rtol=1e-12, atol=1e-12)
    for op, held in done.tensors.items():  # tensors follow their ops
        old = next(i for i, h in build.tensors.items() if h == held)
        np.testing.assert_allclose(got.values[op], wanted.values[old], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS.keys())
def test_what_fits_is_leveled_like_the_pass(tmp_path, table, model, shape):
    build, _ = lowered(model(tmp_path / "m.onnx"), shape, table)
    wanted = [op.level for op in assign_levels(build.ops, build.arrays, PARAMS.slots)]
    done, placement = place_refreshes(build, replace(PARAMS, levels=max(wanted)), table, PLAIN)
    assert [op.level for op in done.ops] == wanted
    assert placement.sites == ()


def test_a_leveled_program_is_priced_like_its_trace(tmp_path, table):
    build, _ = lowered(mlp(tmp_path / "m.onnx"), (64,), table)
    done, placement = place_refreshes(build, PARAMS, table, PLAIN)
    t = trace(as_circuit(done, PARAMS))
    whole = sum(table.node(n, t, PARAMS) for n in t.nodes) * table.contention
    assert placement.seconds == pytest.approx(whole, rel=0.05)


def test_pairs_are_two_ops_that_name_each_other(tmp_path, table):
    build, _ = lowered(attention(tmp_path / "m.onnx"), (8, 8), table)
    times = RefreshTimes(plain=0.5, pair=0.501)
    done, placement = place_refreshes(build, PARAMS, table, Refreshing(level=5, start=1, times=times), top=3)
    pairs = [op for op in done.ops if op.kind == "refresh" and op.attrs["kind"] == "pair"]
    assert pairs
    assert len(pairs) == 2 * sum(s.kind == "pair" for s in placement.sites)
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.args == second.args[::-1]
        assert second.id == first.id + 1


def test_op_prices_rise_with_the_level(tmp_path, table):
    build, _ = lowered(mlp(tmp_path / "m.onnx"), (64,), table)
    for op in build.ops:
        row = op_seconds(op, build, PARAMS, table)
        assert list(row) == sorted(row)
        assert (row[-1] > row[0] > 0) == (op.kind not in ("input", "output"))


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [([0, 1, 0, 1], 2), ([0, 0, 0, 0], 1), ([0, 1, 2, 3], 0), ([0, -1, 0, -1], 0), ([0, 1, 1, 0], 0)],
    ids=str,
)
def test_period_of_a_layout(layout, wanted):
    assert period(np.array(layout)) == wanted


def test_more_levels_than_the_parameters_have_are_refused(tmp_path, table):
    build, _ = lowered(mlp(tmp_path / "m.onnx"), (64,), table)
    with pytest.raises(ParamsError, match=r"inputs of level 13 .* has 12"):
        as_problem(build, PARAMS, table, PLAIN, top=13)


def test_a_step_deeper_than_a_refresh_gains_is_named(tmp_path, table):
    build, _ = lowered(norm_mlp(tmp_path / "m.onnx", layer_norm=False), (4, 16), table)
    with pytest.raises(LevelError, match="no placement of"):
        place_refreshes(build, PARAMS, table, replace(PLAIN, level=1, start=1), top=1)


def test_a_memory_cap_holds_with_maps_together_or_apart(tmp_path, table):
    build, _ = lowered(transformer(tmp_path / "m.onnx"), (8, 8), table)
    _, free = place_refreshes(build, PARAMS, table, PLAIN)
    with pytest.raises(
        ParamsError, match=r"within 1 bytes; the smallest cap that can be met is (at most )?\d+ bytes"
    ) as error:
        place_refreshes(build, PARAMS, table, PLAIN, max_bytes=1)
    smallest = int(str(error.value).split()[-2])
    assert smallest < free.peak_bytes
    for cap in (free.peak_bytes - 1, (smallest + free.peak_bytes) // 2):
        _, capped = place_refreshes(build, PARAMS, table, PLAIN, max_bytes=cap)
        assert capped.peak_bytes <= cap
        assert capped.seconds >= free.bound


def kept(how: str) -> Lowered:
    """A step whose kept value is changed by a sum; also read before it, by so much that the sum has fewer levels, or not."""
    number = {"weights": "one", "plan": [[0, [[0, 0]]]], "bias": None}
    ops = [
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}),
        Op(id=1, kind="input", args=(), attrs={"name": "kept", "part": 0}),
        Op(id=2, kind="linear", args=(0,), attrs=number, source="row"),
        Op(id=3, kind="add", args=(1, 2), source="next"),
        Op(id=4, kind="linear", args=(1 if how == "read before" else 3,), attrs=number, source="first"),
        Op(id=5, kind="mul", args=(4, 4), source="second"),
        Op(id=6, kind="add", args=(3, 5), source="sum"),
        Op(id=7, kind="output", args=(6,), attrs={"name": "y", "part": 0}),
        Op(id=8, kind="output", args=(3,), attrs={"name": "kept", "part": 0}),
    ]
    empty = Lowered(ops=(), arrays={"one": np.ones((1, 1))}, client_arrays={}, inputs=(), outputs=(), tensors={})
    return replace(empty, ops=tuple(ops), steps=4)


def test_what_is_kept_goes_out_as_it_came_in() -> None:
    """Where a sum needs no level of its own, the value goes out below the level at which it is read."""
    table = CostTable.load()
    program, _ = place_refreshes(kept("through the sum"), PARAMS, table, PLAIN)
    levels = {(op.kind, op.attrs["name"]): op.level for op in program.ops if "name" in op.attrs}
    assert levels["input", "kept"] == levels["output", "kept"] == 2
    assert levels["input", "x"] == 3, "inputs of different names need not be at one level"
    with pytest.raises(LevelError, match="'kept' comes in at level 2 and would go out at level 0"):
        place_refreshes(kept("read before"), PARAMS, table, PLAIN)
