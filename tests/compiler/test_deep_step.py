"""A decoding step deeper than its chain, three ways: the whole model in torch and the step in onnxruntime = the circuit in the
simulator = under encryption, where every node's error is measured beside the predicted one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks.operators import errors
from benchmarks.parties import parties
from compiler import Compiled, Target, compile_onnx
from compiler.failure import failure_log2
from compiler.samples import Sequences
from he_backend import refresh
from he_backend.circuit import Circuit
from he_backend.openfhe_backend import available
from he_backend.owner import embed_step
from he_backend.simulator import simulate
from polyformer.export_step import export_step

from .test_step import AFFINE, sane

BLOCKS, LOG_N = 6, 10
CONFIG = replace(AFFINE, blocks=BLOCKS, width=8, hidden=16, vocab=16, norms=("affine",) * (2 * BLOCKS + 1))


@dataclass(frozen=True, kw_only=True)
class Deep:
    """A compiled step, sequences of tokens, and the whole model's logits [T, V] of the first one."""

    path: Path
    compiled: Compiled
    sequences: Sequences
    logits: np.ndarray

    @property
    def circuit(self) -> Circuit:
        return self.compiled.circuit

    @property
    def tokens(self) -> np.ndarray:
        return self.sequences.tokens[0]


def deep_step(folder: Path, blocks: int = BLOCKS) -> Deep:
    """No leveled chain is tried, as if the ring were one that protects: there the model's levels do not fit."""
    config = replace(CONFIG, blocks=blocks, norms=("affine",) * (2 * blocks + 1))
    model, path = sane(config), folder / "step.onnx"
    export_step(model, path)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (8, config.length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compiler.search.choose", lambda *_: [])
        compiled = compile_onnx(path, tokens, target=Target(insecure_log_n=LOG_N))
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(tokens[:1]))[0].numpy()
    sequences = Sequences(graph=compiled.graph, tokens=tokens, embedding=compiled.embedding)
    return Deep(path=path, compiled=compiled, sequences=sequences, logits=logits)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return deep_step(tmp_path_factory.mktemp("deep"))


def test_every_step_in_the_simulator(deep: Deep) -> None:
    """As the server would run it: what a step leaves is what the next one takes."""
    circuit, spec = deep.circuit, deep.circuit.spec()
    run = onnxruntime.InferenceSession(str(deep.path))
    names = [v.name for v in run.get_inputs()[2:]]
    clear = {name: np.zeros((1, CONFIG.length, CONFIG.width), dtype=np.float32) for name in names}
    states = {s.name: np.zeros(s.shape) for s in circuit.states}
    for step, token in enumerate(deep.tokens):
        found = simulate(circuit, {**embed_step(spec, int(token), step), **states}, step=step).outputs
        states = {s.name: found[s.name] for s in circuit.states}
        np.testing.assert_allclose(found["y"][0], deep.logits[step], rtol=2e-5, atol=2e-5)
        said, *kept = run.run(None, {"token": [[token]], "step": np.array(step), **clear})
        clear = dict(zip(names, kept, strict=True))
        np.testing.assert_allclose(found["y"][0], said[0, 0], rtol=2e-5, atol=2e-5)
        for name in names:
            np.testing.assert_allclose(states[name], clear[name][0], rtol=2e-5, atol=2e-5)


def test_refreshes_are_placed_and_states_stay_where_they_are(deep: Deep) -> None:
    circuit, chosen = deep.circuit, deep.compiled.plan.chosen
    levels = [op.level for op in circuit]
    assert max(levels) <= circuit.params.refresh_output < 60, "the model has more than 60 levels"
    assert circuit.refreshes >= 2 * BLOCKS
    assert f"{circuit.refreshes} refreshes" in str(chosen) and chosen.memory_gb < Target().max_memory_gb
    ends = {kind: {op.attrs["name"]: op for op in circuit if op.kind == kind} for kind in ("input", "output")}
    assert len(circuit.states) == 2 * BLOCKS
    for s in circuit.states:
        before, after = ends["input"][s.name], ends["output"][s.name]
        assert before.level == after.level == s.level > 0
        assert before.factor == after.factor == s.factor
        assert circuit.ops[after.args[0]].kind == "add", "what is kept was never refreshed"


def test_a_sequence_fails_as_often_as_all_its_steps(deep: Deep) -> None:
    circuit = deep.circuit
    whole, step = (failure_log2(c, circuit.error_bound) for c in (circuit, replace(circuit, steps=1)))
    assert whole == pytest.approx(step + np.log2(CONFIG.length)) == circuit.predicted["failure_log2"]
    assert whole >= refresh.failure_log2(circuit.params) + np.log2(circuit.refreshes * CONFIG.length)


@pytest.mark.skipif(available() is not None, reason="OpenFHE is not installed")
def test_two_tokens_encrypted(deep: Deep) -> None:
    """Every error lies below the predicted one, and not so far that the prediction would be for nothing."""
    circuit, cases = deep.circuit, deep.sequences.cases(0)[:2]
    with parties(circuit, threads=2) as both:
        found = errors(circuit, both.client, both.server, cases, threads=2)
    (reply,) = (op for op in circuit if op.kind == "output" and op.attrs["name"] == "y")
    assert 0 < found[reply.args[0]] <= circuit.error_bound < 1e-3
    assert set(found) == set(circuit.errors)
    ratio = {i: found[i] / circuit.errors[i] for i in found}
    assert max(ratio.values()) < 1, [str(circuit.ops[i]) for i, r in ratio.items() if r >= 1]
    assert np.median(list(ratio.values())) > 0.01
    kept = {op.attrs["name"]: found[op.id] for op in circuit if op.kind == "output" and op.id in found}
    assert kept["blocks.5.mixer.k.state"] > 100 * kept["blocks.0.mixer.k.state"], "refreshes lie between"
