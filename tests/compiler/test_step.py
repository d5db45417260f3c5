"""A decoding step three ways: the whole model in torch = the circuit in the simulator = the circuit under encryption, with the
keys and values of every step before.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from compiler import Compiled, Target, compile_onnx
from compiler.cost import CostTable
from compiler.deepen import Deepened
from compiler.errors import Noise
from compiler.failure import largest_output
from compiler.placed import Lowered
from compiler.plan import judge, output_peak
from compiler.rings import fewest_levels
from compiler.samples import Sequences
from compiler.step_layout import Blocks, Cache, Tiled, inner, outer
from he_backend import keys
from he_backend.base import ParamsError, UnsupportedOpError
from he_backend.circuit import Circuit, pack, unpack
from he_backend.execute import Executor
from he_backend.owner import embed_step
from he_backend.simulator import simulate
from polyformer.export_step import export_step
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import ModelConfig, Transformer
from tests.polyformer.test_export import POLYNOMIAL, make

AFFINE = replace(POLYNOMIAL, norms=("affine",) * 5, hidden=32)
CASES: dict[str, tuple[ModelConfig, int]] = {
    "affine norms": (AFFINE, 11),
    "no spare copies": (replace(AFFINE, blocks=1, norms=("affine",) * 3), 10),
    "LaS decay, 4 heads": (replace(AFFINE, blocks=1, norms=("affine",) * 3, las_decay=1.0, heads=4), 10),
    "polynomial norms": (replace(POLYNOMIAL, blocks=1, norms=("affine", "rms_poly", "rms_poly")), 11),
    "Llama": (
        replace(
            AFFINE,
            blocks=1,
            norms=("affine",) * 3,
            heads=4,
            kv_heads=2,
            rotary=4,
            positions="none",
            biases=False,
            gated=True,
            head="tied",
            head_bias=False,
        ),
        10,
    ),
    "parallel, p = 4, mean": (
        replace(AFFINE, blocks=1, parallel=True, norms=("affine",) * 2, power=4, form="mean", hidden=48),
        11,
    ),
}


def sane(config: ModelConfig) -> Transformer:
    """A random model whose denominators stay where their reciprocal was fitted."""
    model = make(config)
    for module in model.modules():
        if isinstance(module, PowerSoftmax):
            module.q.weight.data.mul_(0.2)
            if module.q.bias is not None:
                module.q.bias.data.mul_(0.2)
    return model


def compiled_step(folder: Path, config: ModelConfig, log_n: int) -> tuple[Compiled, np.ndarray, np.ndarray]:
    """The compiled step, one sequence of tokens, and the whole model's logits at its places."""
    model = sane(config)
    export_step(model, folder / "step.onnx")
    tokens = np.random.default_rng(0).integers(0, config.vocab, (8, config.length))
    compiled = compile_onnx(folder / "step.onnx", tokens, target=Target(insecure_log_n=log_n))
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(tokens[:1]))[0].numpy()
    return compiled, tokens[0], logits


@pytest.mark.parametrize("name", CASES)
def test_every_step_in_the_simulator(tmp_path: Path, name: str) -> None:
    compiled, tokens, logits = compiled_step(tmp_path, *CASES[name])
    circuit = compiled.circuit
    spec, states = circuit.spec(), {s.name: np.zeros(s.shape) for s in circuit.states}
    for step, token in enumerate(tokens):
        found = simulate(circuit, {**embed_step(spec, int(token), step), **states}, step=step).outputs
        np.testing.assert_allclose(found["y"][0], logits[step], rtol=2e-5, atol=2e-5)
        states = {s.name: found[s.name] for s in circuit.states}
    assert compiled.verified < 1e-7
    assert circuit.steps == len(tokens)


def encrypted_steps(circuit: Circuit, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits of each step under real encryption; client and server share bytes only, and the server keeps the states."""
    module = keys.backend(circuit.params.backend)
    client = module.Client(circuit.params, allow_insecure=True)
    server = module.Evaluator(circuit.params, key_id=client.key_id, allow_insecure=True)
    (x,), (y,) = circuit.inputs, circuit.outputs
    found = []
    try:
        for kind, k, level in keys.wanted(circuit.spec()):
            server.load_key(kind, k, level, client.make_key(kind, k, level))
        executor = Executor(circuit, server)
        n = 1 << circuit.params.log_n
        kept = {
            part: server.import_ciphertext(np.zeros((2, level + 1, n), dtype=np.uint64), level=level)
            for part, level in circuit.state_parts.items()
        }
        for step, token in enumerate(tokens):
            tensor = embed_step(circuit.spec(), int(token), step)[x.name]
            (slots,) = pack(tensor, x, circuit.client_arrays[x.layout])
            bytes_ = client.export_ciphertext(client.encrypt(slots, level=x.level))
            sent = {(x.name, 0): server.import_ciphertext(bytes_, level=x.level)}
            run = executor.run({**sent, **kept}, step=step)
            kept = {part: run.outputs[part] for part in kept}
            reply = server.export_ciphertext(run.outputs[y.name, 0])
            back = client.import_ciphertext(reply, level=y.level)
            values = client.decrypt(back, scale=run.scales[y.name, 0])
            found.append(unpack(values[None], y, circuit.client_arrays[y.layout])[0])
    finally:
        server.close()
    return found


@pytest.mark.parametrize("name", ["no spare copies", "LaS decay, 4 heads"])
def test_every_step_encrypted(tmp_path: Path, name: str) -> None:
    compiled, tokens, logits = compiled_step(tmp_path, *CASES[name])
    assert compiled.circuit.error_bound < 1e-2
    for step, found in enumerate(encrypted_steps(compiled.circuit, tokens)):
        error = float(np.abs(found - logits[step]).max())
        assert error <= compiled.circuit.error_bound, (
            f"step {step}: {error:.2e} above the promised {compiled.circuit.error_bound:.2e}"
        )


def test_every_step_is_one_circuit_and_states_stay_where_they_are(tmp_path: Path) -> None:
    compiled = compiled_step(tmp_path, *CASES["affine norms"])[0]
    circuit = compiled.circuit
    assert 10 < fewest_levels(compiled.graph) <= circuit.inputs[0].level
    ins = {op.attrs["name"]: op.level for op in circuit if op.kind == "input"}
    outs = {op.attrs["name"]: op.level for op in circuit if op.kind == "output"}
    assert [s.name for s in circuit.states] == [f"blocks.{i}.mixer.{p}.state" for i in (0, 1) for p in "kv"]
    for s in circuit.states:
        assert ins[s.name] == outs[s.name] == s.level
        assert s.shape == (AFFINE.length, AFFINE.width)
    assert not {s.layout for s in circuit.states} & set(circuit.client_arrays)


def test_decay_costs_no_level_and_no_op(tmp_path: Path) -> None:
    config, log_n = CASES["LaS decay, 4 heads"]
    with_decay, without = (
        compiled_step(tmp_path, replace(config, las_decay=decay), log_n)[0].circuit for decay in (1.0, 0.0)
    )
    assert [(op.kind, op.args, op.level) for op in with_decay] == [(op.kind, op.args, op.level) for op in without]
    rows = with_decay.arrays["blocks.0.mixer.scores.scaled.table"]
    assert rows.shape == (config.length, with_decay.params.slots)
    assert without.arrays["blocks.0.mixer.scores.scaled.table"].shape == (config.length, 1)


def test_a_reply_must_fit_the_first_modulus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, log_n = CASES["no spare copies"]
    compiled, _, _ = compiled_step(tmp_path, config, log_n)
    circuit, tokens = compiled.circuit, np.random.default_rng(0).integers(0, config.vocab, (8, config.length))
    (bound,) = (op.bound for op in circuit if op.kind == "output" and op.attrs["name"] == "y")
    sequences = Sequences(graph=compiled.graph, tokens=tokens, embedding=compiled.embedding).few(8)
    assert output_peak(circuit, sequences, (-1e-9, 1e-9)) == pytest.approx(bound, rel=1e-6)
    wide = (-100.0 * abs(circuit.outputs[0].factor), 0.0)
    assert output_peak(circuit, sequences, wide) == pytest.approx(100.0)
    most = largest_output(circuit.params)
    monkeypatch.setattr("compiler.search.deepen", lambda *_: Deepened())
    monkeypatch.setattr("compiler.promise.simulated_noise", lambda *_: Noise(outputs={0: 1e-7}, slots={}))
    monkeypatch.setattr("compiler.search.output_peak", lambda circuit, *_: 1.2 * most)
    with pytest.raises(ParamsError, match=r"outputs fill 1\.2 of the first modulus"):
        compiled_step(tmp_path, *CASES["no spare copies"])


def test_a_step_that_fails_too_often_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiler.promise.simulated_noise", lambda *_: Noise(outputs={0: 1e-7}, slots={}))
    monkeypatch.setattr("compiler.failure.failure_log2", lambda *_: -39.0)
    monkeypatch.setattr("compiler.search.deepen", lambda *_: Deepened())
    with pytest.raises(
        ParamsError, match=r"a sequence of 8 steps fails with probability 2\^-39\.0, the budget is 2\^-40"
    ):
        compiled_step(tmp_path, *CASES["no spare copies"])


def test_a_step_names_the_memory_that_would_be_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiler.promise.simulated_noise", lambda *_: Noise(outputs={0: 1e-7}, slots={}))
    config, log_n = CASES["no spare copies"]
    export_step(sane(config), tmp_path / "step.onnx")
    tokens = np.random.default_rng(0).integers(0, config.vocab, (4, config.length))
    with pytest.raises(ParamsError, match=r"needs .* GB of 2.0") as caught:
        compile_onnx(tmp_path / "step.onnx", tokens, target=Target(insecure_log_n=log_n, max_memory_gb=2.0))
    (cap,) = re.findall(r"--max-memory-gb ([\d.]+)", str(caught.value))
    enough = Target(insecure_log_n=log_n, max_memory_gb=float(cap))
    assert compile_onnx(tmp_path / "step.onnx", tokens, target=enough).plan.chosen.memory_gb <= float(cap)


def test_the_plan_has_room_for_a_state_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps what a step started from until the step is done."""
    compiled = compiled_step(tmp_path, *CASES["no spare copies"])[0]
    circuit = compiled.circuit
    fields = ("ops", "arrays", "client_arrays", "inputs", "outputs", "states", "steps")
    form = Lowered(**{name: getattr(circuit, name) for name in fields}, tensors={})
    known = compiled.plan.chosen.trace
    with_state = judge(form, circuit.params, Target(insecure_log_n=10), CostTable.load(), known)
    monkeypatch.setattr(Circuit, "state_bytes", 0)
    without = judge(form, circuit.params, Target(insecure_log_n=10), CostTable.load(), known)
    monkeypatch.undo()
    assert with_state is not None and without is not None
    assert with_state.memory_gb - without.memory_gb == pytest.approx(circuit.state_bytes / 1e9, rel=1e-3)


# --- The two products -------------------------------------------------------------------------------------------------

SLOTS = 256
COSTS = {"folds are cheap": (9.0, 5.0, 5.0, 1.0), "rotations are cheap": (0.1, 0.1, 0.1, 9.0)}


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 32), (5, 12), (16, 3)])
def test_products_alternate_between_layouts(inputs: int, outputs: int, costs: tuple[float, ...]) -> None:
    def cost(*counts: int) -> float:
        return float(np.dot(costs, counts))

    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(inputs, outputs)), rng.normal(size=(outputs, inputs))
    x = rng.normal(size=inputs)
    blocks = 1 << (inputs - 1).bit_length()
    feature = np.where(np.arange(blocks) < inputs, np.arange(blocks), -1)
    for valid in (SLOTS // blocks, SLOTS // blocks // 2):
        form = Blocks(feature=feature, valid=valid)
        slots = rng.normal(size=SLOTS)  # what means nothing may be anything
        layout = form.layout(SLOTS)
        slots[layout >= 0] = x[layout[layout >= 0]]
        tile = np.arange(1 << (outputs - 1).bit_length())
        there = outer(up, form, np.where(tile < outputs, tile, -1), SLOTS, cost)
        middle = run(there.weights, there.plan, there.folds, slots)
        layout = there.form.layout(SLOTS)
        np.testing.assert_allclose(middle[layout >= 0], (x @ up)[layout[layout >= 0]], atol=1e-12)
        assert isinstance(there.form, Tiled)
        back = inner(down, there.form, SLOTS, cost)
        end, layout = run(back.weights, back.plan, back.folds, middle), back.form.layout(SLOTS)
        np.testing.assert_allclose(end[layout >= 0], (x @ up @ down)[layout[layout >= 0]], atol=1e-12)
        assert np.unique(layout[layout >= 0]).size == inputs


def run(weights: np.ndarray, plan: object, folds: tuple[int, ...], x: np.ndarray) -> np.ndarray:
    """A product from its definition."""
    y: np.ndarray = np.zeros(x.size)
    for giant, terms in plan:  # type: ignore[attr-defined]
        for baby, row in terms:
            y += weights[row] * np.roll(x, -(giant + baby))
    for k in folds:
        y = y + np.roll(y, -k)
    return y


# --- What is refused --------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        UnsupportedOpError, match="keys of 64 tokens and width 16 need 2048 slots, a ciphertext has 1024"
    ):
        Cache(slots=1024, tokens=64, heads=2, channels=8)
    with pytest.raises(UnsupportedOpError, match="3 heads: the layout wants a power of two; pad to 4"):
        Cache(slots=1024, tokens=8, heads=3, channels=8)


def test_a_vocabulary_that_does_not_fit_is_named(tmp_path: Path) -> None:
    config = replace(AFFINE, blocks=1, norms=("affine",) * 3, vocab=1500)
    export_step(sane(config), tmp_path / "step.onnx")
    tokens = np.zeros((2, config.length), dtype=np.int64)
    with pytest.raises(UnsupportedOpError, match="1500 outputs needs 2048 slots, a ciphertext has 512"):
        compile_onnx(tmp_path / "step.onnx", tokens, target=Target(insecure_log_n=10))


def test_calibration_of_another_length(tmp_path: Path) -> None:
    export_step(sane(AFFINE), tmp_path / "step.onnx")
    with pytest.raises(ParamsError, match=rf"calibrated on token ids \[n, {AFFINE.length}\]"):
        compile_onnx(tmp_path / "step.onnx", np.zeros((2, 3), dtype=np.int64), target=Target(insecure_log_n=11))


def refused(tmp_path: Path, change: str) -> None:
    """Compile a step's file after a change that makes it none."""
    export_step(sane(AFFINE), tmp_path / "step.onnx")
    proto = onnx.load(str(tmp_path / "step.onnx"))
    graph = proto.graph
    if change == "a state less":
        del graph.output[-1]
    if change == "step as a number":
        graph.node.append(helper.make_node("Cast", ["step"], ["as_float"], name="cast", to=1))
    if change == "a public product":
        node = next(n for n in graph.node if n.name == "blocks.0.mixer.scores.scaled")
        node.op_type = "Sub"
    if change == "a state replaced":
        node = next(n for n in graph.node if n.name == "blocks.0.mixer.k.next")
        node.input[0] = "blocks.0.mixer.k.placed"
    onnx.save(proto, str(tmp_path / "step.onnx"))
    tokens = np.zeros((2, AFFINE.length), dtype=np.int64)
    compile_onnx(tmp_path / "step.onnx", tokens, target=Target(insecure_log_n=11))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("a state less", "are no step"),
        ("step as a number", "only rows of tables"),
        ("a public product", "may be added to or multiplied"),
        ("a state replaced", "only attention keeps tensors"),
    ],
)
def test_what_is_no_step_is_refused(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(UnsupportedOpError, match=says):
        refused(tmp_path, change)
