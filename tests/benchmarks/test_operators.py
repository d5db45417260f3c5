"""Errors after every node, measured and predicted, and the tables that a record and the demo's report share."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks import norms, records, registry, report
from benchmarks.operators import errors, probed, shortened
from benchmarks.two_tables import of_record, two_tables
from compiler.errors import simulated_noise, with_errors
from compiler.samples import requests
from he_backend import efficiency, keys
from he_backend.execute import Executor
from he_backend.openfhe_backend import available
from he_backend.trace import trace
from tests.he_backend.small_circuit import TEST_PARAMS, WIDTH, mlp

openfhe = pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")


def test_probes_are_outputs_of_the_last_op_of_each_node():
    circuit = mlp(TEST_PARAMS)
    more = probed(circuit)
    assert more.ops[: len(circuit.ops)] == circuit.ops
    assert [op.args for op in more.ops[len(circuit.ops) :]] == [(1,), (2,), (3,)]
    assert all(op.kind == "output" and op.level == circuit.ops[op.args[0]].level for op in more.ops[len(circuit.ops) :])


def test_errors_and_efficiency_of_a_request():
    circuit = mlp(replace(TEST_PARAMS, log_n=11))
    module = keys.backend("openfhe")
    client = module.Client(circuit.params, allow_insecure=True)
    server = module.Evaluator(circuit.params, key_id=client.key_id, allow_insecure=True)
    try:
        for kind, k, level in keys.wanted(circuit.spec()):
            server.load_key(kind, k, level, client.make_key(kind, k, level))
        x = np.linspace(-1, 1, WIDTH)
        found = errors(circuit, client, server, *requests([x]), threads=2)
        assert set(found) == {1, 2, 3} and all(0 < e < 1e-5 for e in found.values())
        t = trace(circuit)
        foretold = with_errors(circuit, simulated_noise(circuit, t, requests([x, -x]))).errors
        assert set(foretold) == set(found)
        assert all(found[i] <= foretold[i] <= 30 * found[i] for i in found)
        slots = np.repeat(x, server.slots // WIDTH)
        sent = server.import_ciphertext(client.export_ciphertext(client.encrypt(slots, level=3)), level=3)
        runs = [asdict(Executor(circuit, server).run({("x", 0): sent}).timing) for _ in range(2)]
    finally:
        server.close()
    ops = [{"id": op.id, "kind": op.kind, "source": op.source, "level": op.level} for op in circuit.ops]
    tables = efficiency.tables(ops, runs, errors=found, predicted_errors=foretold)
    assert 0 < tables["efficiency"] <= 1.0
    assert {row["name"] for row in tables["operators"]} == {"FFN", "activation"}
    for rows in (tables["operators"], tables["primitives"]):
        assert all(0 < row["efficiency"] <= 1.0 + 1e-9 for row in rows)
    assert {row["name"]: row["error"] for row in tables["operators"]} == {
        "FFN": max(found[1], found[3]),
        "activation": found[2],
    }
    assert {row["name"] for row in tables["primitives"]} >= {"encode", "rotate", "ct-ct", "ct-pt", "rescale"}
    by_node, by_primitive = two_tables(tables, 2)
    assert by_node.columns[-2:] == ("predicted error", "largest error")
    assert by_node.rows[1][0] == "activation" and by_node.rows[1][-2:] == (foretold[2], found[2])
    assert len(by_primitive.rows[0]) == len(by_primitive.columns)
    unmeasured = two_tables(efficiency.tables(ops, runs, predicted_errors=foretold), 2)[0]
    assert unmeasured.columns[-1] == "predicted error" and len(unmeasured.rows[0]) == len(unmeasured.columns)
    record = {"metrics": {**tables, "weights": "random"}, "machine": {"threads": 2}}
    assert "weights: random" in of_record(record)[0].markdown()
    page = report.render({"tables": tables})
    assert "Against the bound" in page and "By CKKS primitive" in page


def test_the_demo_is_trained_for_an_eighth_of_its_steps():
    from training import Recipe

    whole = Recipe.demo()
    short = shortened(whole)
    assert (short.softmax_steps, short.tune_steps) == (whole.softmax_steps // 8, whole.tune_steps // 8)
    assert short.width == whole.width


@openfhe
def test_a_norm_that_is_a_polynomial_has_a_row_and_one_that_folds_has_none() -> None:
    """One encrypted block each, at test size: the two tables hold every node of a block."""
    kept: list[registry.Record] = []
    (benchmark,) = registry.select(["norm-1x128x32"])
    record = benchmark.measure(registry.Settings(repeats=1, quick=True, keep=kept.append))
    assert records.check(record, "norm") is record and record["params"]["insecure"] and len(kept) == 1
    sides = record["metrics"]["sides"]
    nodes = {name: {row["name"]: row for row in side["operators"]} for name, side in sides.items()}
    common = {
        "QKV",
        "scores",
        "power",
        "denominator",
        "division",
        "weighted sum",
        "projection",
        "FFN",
        "activation",
        "head",
    }
    assert set(nodes["RMSNorm"]) == common | {"norm"} and set(nodes["BatchNorm"]) == common
    assert sides["RMSNorm"]["levels"] > sides["BatchNorm"]["levels"]
    for side in sides.values():
        assert 0 < side["max_abs_error"] <= side["promised_error"] and 0 < side["efficiency"] <= 1
        assert all(row["error"] is not None for row in side["operators"])
    assert record["metrics"]["ratio"]["median"] == pytest.approx(
        sides["RMSNorm"]["evaluate_s"] / sides["BatchNorm"]["evaluate_s"]
    )
    compared, *tables = norms.show(record)
    assert [t.caption.rpartition("; ")[2] for t in tables if t.columns[-1] == "efficiency"] == ["BatchNorm", "RMSNorm"]
    assert "| norm |" in tables[2].markdown() and "| norm |" not in tables[0].markdown()
    assert "| levels |" in compared.markdown() and compared.columns == ("figure", "BatchNorm", "RMSNorm", "ratio")
    assert norms.show(kept[0])
