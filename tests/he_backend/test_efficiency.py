"""The bound and the two tables: figures that one can add up by hand."""

import pytest

from he_backend.efficiency import PRIMITIVES, fastest, largest, node_of, tables

SOURCES = {
    "blocks.0.mixer_norm.scale": "norm",
    "blocks.0.mixer.q.matmul": "QKV",
    "0.kt": "QKV",
    "blocks.1.mixer.scores": "scores",
    "0.products": "scores",
    "blocks.0.mixer.power": "power",
    "0.powers": "power",
    "blocks.0.mixer.sum": "denominator",
    "blocks.0.mixer.denominator": "denominator",
    "blocks.0.mixer.reciprocal": "division",
    "blocks.0.mixer.out": "division",
    "blocks.0.mixer.numerator": "weighted sum",
    "blocks.0.mixer.o.matmul": "projection",
    "blocks.0.mixer.residual": "projection",
    "/blocks.0/mlp/up.matmul": "FFN",
    "blocks.0.mlp.residual": "FFN",
    "1.out": "FFN",
    "blocks.0.mlp.act": "activation",
    "square2": "activation",
    "head.matmul": "head",
}


@pytest.mark.parametrize(("source", "row"), SOURCES.items())
def test_nodes_are_known_by_their_names(source, row):
    assert node_of(source, "linear") == row


def test_what_has_no_such_name_goes_by_its_kind():
    assert node_of("conv1", "linear") == "linear map" and node_of("curve", "polynomial") == "activation"
    assert node_of("blocks.0.mlp.up", "refresh") == "refresh" and node_of("conv1", "mul") == "other"


def call(op, primitive, level, count, seconds, fastest):
    return {"op": op, "primitive": primitive, "level": level, "count": count, "seconds": seconds, "fastest": fastest}


OPS = [
    {"id": 0, "kind": "linear", "source": "blocks.0.mixer.q", "level": 4},
    {"id": 1, "kind": "mul", "source": "blocks.0.mixer.scores", "level": 3},
]
RUN = {
    "wall_s": 4.0,
    "threads": 2,
    "calls": [call(0, "rotate", 5, 2, 4.0, 1.0), call(1, "rotate", 4, 1, 1.5, 1.5), call(1, "mul", 4, 1, 0.5, 0.5)],
}


def test_a_lower_level_costs_at_most_what_a_higher_one_does():
    assert fastest([RUN]) == {("rotate", 5): 1.0, ("rotate", 4): 1.0, ("mul", 4): 0.5}
    quicker = {**RUN, "calls": [call(0, "rotate", 5, 2, 3.0, 0.75)]}
    assert fastest([RUN, quicker], {("mul", 4): 0.25}) == {("rotate", 5): 0.75, ("rotate", 4): 0.75, ("mul", 4): 0.25}


def test_both_tables_add_up():
    found = tables(OPS, [RUN], errors={1: 0.25}, predicted_errors={0: 0.5, 1: 0.75})
    assert found["bound_s"] == pytest.approx((2 * 1.0 + 1.0 + 0.5) / 2)
    assert found["efficiency"] == pytest.approx(1.75 / 4.0)
    q, scores = found["operators"]
    assert (q["name"], q["count"], q["levels"], q["error"], q["predicted_error"]) == ("QKV", 2, [5, 5], None, 0.5)
    assert (q["seconds"], q["bound_s"], q["efficiency"]) == (4.0, 2.0, 0.5)
    assert (scores["name"], scores["error"], scores["bound_s"]) == ("scores", 0.25, 1.5)
    assert scores["predicted_error"] == 0.75
    assert [row["name"] for row in found["primitives"]] == ["rotate", "ct-ct"]
    for rows in (found["operators"], found["primitives"]):
        assert sum(row["share"] for row in rows) == pytest.approx(1.0)
        assert sum(row["bound_s"] for row in rows) == pytest.approx(2 * found["bound_s"])


def test_the_largest_error_of_a_node_stands_for_it():
    ops = [
        {"id": i, "kind": kind, "source": source}
        for i, (source, kind) in enumerate(
            (
                ("head.matmul", "linear"),
                ("0.mixer.q", "linear"),
                ("0.mixer.k", "linear"),
                ("0.mixer.k", "refresh"),
                ("x", "input"),
            )
        )
    ]
    found = largest(ops, {0: 0.5, 1: 0.25, 2: 0.125, 3: 1.0})
    assert list(found.items()) == [("QKV", 0.25), ("head", 0.5), ("refresh", 1.0)]


def test_a_new_primitive_is_counted_too():
    found = tables(OPS, [{**RUN, "calls": [*RUN["calls"], call(1, "something new", 4, 1, 2.0, 2.0)]}])
    assert found["primitives"][-1]["name"] == "other" and found["bound_s"] == pytest.approx(1.75 + 1.0)


def test_the_median_run_is_shown():
    runs = [{**RUN, "wall_s": wall} for wall in (9.0, 4.0, 5.0)]
    assert tables(OPS, runs)["evaluate_s"] == 5.0


def test_every_primitive_has_one_group():
    names = [name for group in PRIMITIVES.values() for name in group]
    assert len(names) == len(set(names))
