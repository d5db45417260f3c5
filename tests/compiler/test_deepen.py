"""A model deeper than its chain: refreshes placed by the search, three ways."""

from dataclasses import replace

import numpy as np
import pytest

from compiler import Target, verify
from compiler import deepen as deepening
from compiler.calibrate import calibrate
from compiler.cost import CostTable
from compiler.deepen import chains, deepen, refresh_failure
from compiler.ir import evaluate
from compiler.lower import lower
from compiler.passes.levels import assign_levels
from compiler.pipeline import finish, import_graph, simplify
from compiler.plan import judge
from compiler.promise import promise
from compiler.samples import Requests, requests
from compiler.search import plan_cost
from he_backend.simulator import simulate

from .test_refreshes import deep_mlp, transformer
from .test_three_ways import encrypted

LOG_N = 11


def deepened(path, samples, log_n=LOG_N):
    """(graph, what the search for refreshes found, the circuit) of a model, though a leveled chain would do on a test ring."""
    graph, _ = simplify(import_graph(path), samples[0][None])
    table = CostTable.load()
    lowered = lower(graph, calibrate(graph, [x[None] for x in samples]), 1 << (log_n - 1), plan_cost(table, log_n))
    lowered = replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, 1 << (log_n - 1)))
    target = Target(insecure_log_n=log_n)
    rows = Requests(graph=graph, inputs=samples)
    found = deepen(lowered, log_n, rows, target, table, lambda stage, done, total: None).found
    assert found is not None
    return graph, found, finish(found, rows, None, path)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(graph, samples, what the search found, circuit) of a deep MLP whose leveled circuit needs 24 levels."""
    path = deep_mlp(tmp_path_factory.mktemp("deep") / "m.onnx", layers=6)
    rng = np.random.default_rng(1)
    samples = [rng.uniform(-0.5, 0.5, 16) for _ in range(6)]
    graph, found, circuit = deepened(path, samples)
    return graph, samples, found, circuit


def test_the_circuit_refreshes_and_is_shorter_than_the_model(deep):
    _, _, found, circuit = deep
    refreshes = [op for op in circuit.ops if op.kind == "refresh"]
    assert refreshes
    assert circuit.ops[0].level <= circuit.params.refresh_output < 24
    assert all(circuit.ops[op.args[0]].bound <= 1.0 for op in refreshes)
    assert f"{len(refreshes)} refreshes" in str(found.candidate)
    verify.levels(circuit)
    assert refresh_failure(circuit) < -100


def test_what_fails_too_often_is_not_chosen(deep, monkeypatch):
    """Here by its reply, whose bound the placed program carries; not by its refreshes alone."""
    graph, samples, _found, circuit = deep
    table = CostTable.load()
    seen = []

    def over(placed, error, bounds=None):
        seen.append([op.bound for op in placed.ops if op.kind == "output"])
        return "too often"

    monkeypatch.setattr("compiler.promise.over_budget", over)
    lowered = lower(graph, calibrate(graph, [x[None] for x in samples]), 1 << (LOG_N - 1), plan_cost(table, LOG_N))
    lowered = replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, 1 << (LOG_N - 1)))
    rows = Requests(graph=graph, inputs=samples)
    again = deepen(lowered, LOG_N, rows, Target(insecure_log_n=LOG_N), table, lambda stage, done, total: None)
    assert again.found is None
    assert any("too often" in row.why for row in again.rows)
    assert seen and seen[0] == pytest.approx([op.bound for op in circuit.ops if op.kind == "output"], rel=1e-6)


def test_three_ways(deep):
    graph, samples, found, circuit = deep
    x = samples[2]
    clear = evaluate(graph, x[None])[graph.output][0]
    np.testing.assert_allclose(simulate(circuit, {"x": x}).outputs["y"], clear, rtol=1e-9, atol=1e-12)
    assert verify.against_graph(circuit, found.lowered, graph, requests(samples[:1])) < 1e-7
    error = np.max(np.abs(encrypted(circuit, x) - clear))
    assert error <= circuit.error_bound < 0.05


def test_pairs_three_ways(tmp_path):
    """A block of a transformer, placed for complex slots."""
    path = transformer(tmp_path / "m.onnx", blocks=1)
    samples = list(np.random.default_rng(1).uniform(-1, 1, (4, 8, 8)))
    graph, _ = simplify(import_graph(path), samples[0][None])
    table, slots = CostTable.load(), 1 << (LOG_N - 1)
    lowered = lower(graph, calibrate(graph, [x[None] for x in samples]), slots, plan_cost(table, LOG_N))
    lowered = replace(lowered, ops=assign_levels(lowered.ops, lowered.arrays, slots))
    params = replace(next(chains(LOG_N, True)), refresh_complex=True)
    rows = Requests(graph=graph, inputs=samples)
    folded, allowed = deepening._bounded(lowered, params, rows)
    assert len(allowed) == len(folded.ops)
    placed = deepening._place(folded, params, table, allowed)
    target = Target(insecure_log_n=LOG_N)
    candidate = judge(placed.program, params, target, table)
    assert candidate is not None and candidate.trace is not None
    found = promise(candidate, placed.program, rows, target)
    assert not isinstance(found, str)
    circuit = finish(found, rows, None, path)
    halves = [op for op in circuit.ops if op.attrs.get("kind") == "pair"]
    refreshes = sum(n.op == "refresh" for n in candidate.trace.nodes)
    assert halves and refreshes == len(placed.placement.sites) < sum(op.kind == "refresh" for op in circuit.ops)
    verify.levels(circuit)
    assert verify.against_graph(circuit, placed.program, graph, requests(samples[:1])) < 1e-7
    clear = evaluate(graph, samples[3][None])[graph.output][0]
    got = np.max(np.abs(encrypted(circuit, samples[3]) - clear))
    assert got <= circuit.error_bound < 0.05
    broken = replace(circuit, ops=tuple(replace(op, level=op.level + (op.id == halves[0].id)) for op in circuit.ops))
    with pytest.raises(verify.VerificationError, match="a refresh reaches level"):
        verify.levels(broken)
