"""Which ring and which parameters are taken: the fastest that keep their promises, not the smallest."""

from dataclasses import replace

import numpy as np
import pytest

from compiler import Target, compile_onnx, plan, search
from compiler.cost import CostTable
from compiler.failure import largest_output
from compiler.plan import candidates, output_peak, refuse
from compiler.samples import requests
from compiler.search import plan_cost
from he_backend.base import ParamsError
from he_backend.openfhe_ring import ring
from he_backend.params import Params
from he_backend.simulator import simulate
from tests.compiler.models import Builder, mlp


def compiled(tmp_path, **limits):
    x = np.random.default_rng(0).normal(0, 0.3, (6, 64)).astype(np.float32)
    return compile_onnx(mlp(tmp_path / "m.onnx"), x, target=Target(**limits)), x


def test_a_larger_ring_is_taken_where_it_is_faster(tmp_path, monkeypatch):
    """With costs that make small rings slow; the search then goes one ring further than it must."""
    seconds = CostTable.seconds

    def slow(self, op, params, level):
        return seconds(self, op, params, level) * (100.0 if params.log_n == 13 else 1.0)

    small, _ = compiled(tmp_path)
    monkeypatch.setattr(CostTable, "seconds", slow)
    large, _ = compiled(tmp_path)
    assert (small.circuit.params.log_n, large.circuit.params.log_n) == (13, 14)
    assert large.plan.chosen.evaluate_s < min(
        c.evaluate_s for c in large.plan.others if c.params.log_n == 13 and c.forecast
    )
    assert {c.params.log_n for c in small.plan.others} == {13}  # half of the primitives at twice the price: not tried


def test_of_equal_seconds_the_more_precise_is_taken(tmp_path):
    found, _ = compiled(tmp_path, insecure_log_n=11)
    alike = [c for c in found.plan.others if c.evaluate_s == found.plan.chosen.evaluate_s and not c.why]
    assert alike and all(c.params.scale_bits < found.circuit.params.scale_bits for c in alike)


def test_outputs_must_fit_the_first_modulus(tmp_path):
    found, x = compiled(tmp_path, insecure_log_n=11)
    circuit = found.circuit
    top = max(
        np.abs(v).max()
        for op, v in zip(circuit.ops, simulate(circuit, {"x": x[0]}).values, strict=True)
        if op.kind == "output"
    )
    assert output_peak(circuit, requests(x[:1]), (0.0, 0.0), margin=1.0) == pytest.approx(top)
    wide = (-3.0 * abs(circuit.outputs[0].factor), 0.0)
    assert output_peak(circuit, requests(x[:1]), wide) == pytest.approx(3.0)


def test_what_does_not_fit_the_first_modulus_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(
        search, "largest_output", lambda params: 1e-9 if params.scale_bits == 26 else largest_output(params)
    )
    found, _ = compiled(tmp_path, insecure_log_n=11)
    assert found.circuit.params.scale_bits != 26
    why = [c.why for c in found.plan.others if c.params.scale_bits == 26]
    assert any("of the first modulus" in w for w in why)


@pytest.mark.parametrize("first", [0, 590], ids=["part 0 is deeper", "part 1 is deeper"])
def test_all_parts_of_an_input_are_at_one_level(tmp_path, first):
    """600 numbers in two ciphertexts, one of which alone is read."""
    b = Builder((1, 600))
    h = b.op("Slice", "x", np.array([first]), np.array([first + 10]), np.array([1]))
    path = b.save(tmp_path / "m.onnx", b.op("Mul", h, h), (1, 10))
    x = np.random.default_rng(0).normal(0, 0.3, (6, 600)).astype(np.float32)
    circuit = compile_onnx(path, x, target=Target(insecure_log_n=10)).circuit
    assert [op.level for op in circuit.ops if op.kind == "input"] == [circuit.inputs[0].level] * 2
    found = simulate(circuit, {"x": x[0]}).outputs[circuit.outputs[0].name]
    np.testing.assert_allclose(found, x[0, first : first + 10] ** 2, atol=1e-9)


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_error": 1e-30}, "predicted error"),
        ({"max_latency_s": 1e-6}, "slower than 1e-06 s"),
    ],
)
def test_a_refusal_names_the_limit_that_was_missed(tmp_path, limits, why):
    with pytest.raises(ParamsError, match=why) as caught:
        compiled(tmp_path, backend="tenseal", insecure_log_n=12, **limits)
    assert "too many" not in str(caught.value)
    assert "too many" not in str(refuse([], 3, Target(backend="tenseal")))
    assert "TenSEAL has at most 19 at 128 bits: 11 too many" in str(refuse([], 30, Target(backend="tenseal")))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({(3, 5): np.nan}, r"calibration sample 3 of 6 holds nan at \[5\]: "),
        ({(1, 0): np.inf, (4, 2): np.nan}, r"calibration sample 1 of 6 holds inf at \[0\] and 1 others"),
    ],
)
def test_calibration_that_is_not_finite_is_refused_at_the_door(tmp_path, bad, says):
    x = np.zeros((6, 64), dtype=np.float32)
    for at, value in bad.items():
        x[at] = value
    with pytest.raises(ParamsError, match=says):
        compile_onnx(mlp(tmp_path / "m.onnx"), x, target=Target(insecure_log_n=11))
    with pytest.raises(ParamsError, match="has no sample"):
        compile_onnx(mlp(tmp_path / "m.onnx"), x[:0], target=Target(insecure_log_n=11))


def test_tenseal_sums_one_by_one(tmp_path):
    found, _ = compiled(tmp_path, insecure_log_n=12, backend="tenseal")
    sums = [op for op in found.circuit.ops if op.kind == "rotate_sum"]
    assert sums and all(set(op.attrs) == {"steps"} for op in sums)


@pytest.mark.parametrize(
    ("scale", "first", "levels", "digits"),
    [(25, 30, 3, 2), (25, 31, 3, 2), (36, 42, 5, 2), (37, 43, 5, 2), (50, 56, 3, 4), (54, 60, 3, 4)],
    ids=["55 bits", "56 bits", "114 bits", "117 bits", "one prime of 56", "one prime of 60"],
)
def test_special_primes_are_as_many_as_openfhe_makes(scale, first, levels, digits):
    params = Params(log_n=10, levels=levels, scale_bits=scale, first_bits=first, digits=digits, insecure=True)
    assert len(ring(params, allow_insecure=True).special) == params.special_limbs


def test_small_rings_try_digits_of_two_primes_with_one_special_prime():
    found = candidates("openfhe", 13, 3, False)
    assert any(p.digit_limbs == 2 and p.special_limbs == 1 for p in found)
    assert {p.scale_bits for p in candidates("openfhe", 15, 3, False)} == set(plan.SCALES)


def test_without_hoisting_a_baby_step_costs_a_rotation():
    table = CostTable.load()
    plain, hoisted = plan_cost(table, 14, "tenseal"), plan_cost(table, 14)
    assert plain(9, 9, 1, 0) == plain(9, 1, 9, 0) > plain(9, 3, 3, 0)
    assert hoisted(9, 9, 1, 0) < hoisted(9, 1, 9, 0)
    assert plain(0, 1, 1, 1) == table.seconds("rotate", replace(table.params, log_n=14), table.params.levels // 2)
