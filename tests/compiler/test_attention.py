"""Attention over several ciphertexts: heads in groups, channels in ranges, scores folded or merged."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compiler import Target, attention, verify
from compiler.calibrate import calibrate
from compiler.cost import CostTable
from compiler.layout import Heads
from compiler.lower import lower
from compiler.passes.levels import assign_levels
from compiler.pipeline import import_graph, simplify
from compiler.placed import Lowered
from compiler.plan import as_circuit
from compiler.samples import requests
from compiler.search import plan_cost
from he_backend.params import Params
from he_backend.trace import trace

from . import models
from .test_three_ways import three_ways

# tokens, heads, channels; positions of a ciphertext of 512 slots in the comment
SHAPES = {
    "one ciphertext": (16, 4, 8),  # 32 positions of 32 channels
    "shift copies": (16, 2, 4),  # 4 copies
    "shift copies and spare ones": (8, 2, 4),  # 64 positions, 8 copies, merged scores use 2
    "two groups of heads": (16, 8, 8),
    "one head a ciphertext": (16, 2, 16),
    "two ranges of channels": (32, 1, 32),
    "two groups of two ranges": (32, 2, 32),
    "a head of two channels": (16, 2, 2),
    "three heads of six channels": (16, 3, 6),  # padded to 4 of 8
}


def lowered(path: Path, slots: int, *, merge: bool | None, samples: int = 2) -> tuple[Lowered, Counter[str], int]:
    """Lower an ONNX file, compare every tensor with the graph; the program, its primitives, and the rotations that need a key."""
    graph = import_graph(path)
    x = np.random.default_rng(1).normal(0, 0.5, (samples, *graph.input_shape[1:]))
    graph, _ = simplify(graph, x[:1])
    ranges = calibrate(graph, [row[None] for row in x])
    build = lower(graph, ranges, slots, plan_cost(CostTable.load(), 16), merge=merge)
    build = replace(build, ops=assign_levels(build.ops, build.arrays, slots))
    levels = build.ops[0].level
    params = Params(log_n=slots.bit_length(), levels=levels, scale_bits=40, first_bits=46, digits=3, insecure=True)
    circuit = as_circuit(build, params)
    verify.levels(circuit)
    assert verify.against_graph(circuit, build, graph, requests(x[:1])) < 1e-9
    traced = trace(circuit)
    return build, Counter(node.op for node in traced.nodes), len(traced.keys)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_is_right_folded_and_merged(tmp_path, shape, causal):
    tokens, heads, channels = SHAPES[shape]
    path = models.attention(tmp_path / "m.onnx", tokens=tokens, heads=heads, channels=channels, causal=causal)
    folded, _, _ = lowered(path, 512, merge=False)
    merged, _, _ = lowered(path, 512, merge=True)
    assert merged.ops[0].level <= folded.ops[0].level + 1  # the skew of the keys
    assert merged.ops != folded.ops


@pytest.mark.parametrize(
    ("causal", "merge"),
    [(True, True), (False, True), (True, False)],
    ids=["causal, merged", "bidirectional, merged", "causal, folded"],
)
def test_heads_over_two_ciphertexts_three_ways(tmp_path, monkeypatch, causal, merge):
    monkeypatch.setattr(attention, "WORTH", np.inf if merge else 0.0)
    path = models.attention(tmp_path / "m.onnx", tokens=16, heads=4, channels=16, causal=causal)
    circuit = three_ways(path, Target(insecure_log_n=10), scale=0.3)
    assert sum(op.kind == "input" for op in circuit.ops) == 2
    assert any(name.startswith("skew") for name in circuit.arrays) == merge


def test_padded_heads_cost_less_than_the_general_product(tmp_path, monkeypatch):
    path = models.attention(tmp_path / "m.onnx", tokens=8, heads=3, channels=6)
    _, padded, _ = lowered(path, 512, merge=None)
    monkeypatch.setattr("compiler.pipeline.pad_heads", lambda graph: graph)
    _, general, _ = lowered(path, 512, merge=None)
    switches = [c["rotate"] + c["relinearize"] for c in (padded, general)]
    assert switches[0] < switches[1]


def test_nine_heads_of_64_channels_have_the_layout_of_sixteen(tmp_path):
    """SmolLM2's geometry on few tokens."""
    path = models.attention(tmp_path / "m.onnx", tokens=16, heads=9, channels=64)
    build, _, _ = lowered(path, 1 << 14, merge=None, samples=1)
    sixteen = Heads(tokens=16, heads=16, channels=64, positions=1024)
    assert sixteen.groups == 1 and build.ops[0].level <= 10


def test_merged_scores_save_key_switches_and_are_taken(tmp_path):
    path = models.attention(tmp_path / "m.onnx", tokens=64, heads=4, channels=16, causal=False)
    _, folded, _ = lowered(path, 1 << 12, merge=False)
    _, merged, _ = lowered(path, 1 << 12, merge=True)
    _, chosen, _ = lowered(path, 1 << 12, merge=None)
    switches = [c["rotate"] + c["relinearize"] + c["mod_down"] for c in (folded, merged)]
    assert switches[1] < 0.5 * switches[0]
    assert chosen == merged


def test_few_tokens_in_many_copies_stay_folded(tmp_path):
    path = models.attention(tmp_path / "m.onnx", tokens=8, heads=2, channels=4)
    _, folded, _ = lowered(path, 1 << 12, merge=False)
    _, chosen, _ = lowered(path, 1 << 12, merge=None)
    assert chosen == folded


def test_eight_heads_of_64_channels_and_128_tokens_at_true_size(tmp_path):
    """d = 512, T = 128 at N = 2^16: two ciphertexts of four heads; counts only."""
    path = models.attention(tmp_path / "m.onnx", tokens=128, heads=8, channels=64)
    build, counts, keys = lowered(path, 1 << 15, merge=None, samples=1)
    heads = Heads(tokens=128, heads=8, channels=64, positions=256, merged=True)
    assert (heads.groups, heads.group, heads.scores) == (2, 4, 2)
    # Two groups; folded, 256 ciphertexts of scores would take 7 key switches each.
    assert counts["rotate"] + counts["relinearize"] < 900
    assert keys < 120
    assert build.ops[0].level <= 10
    # Weights are kept as they are, and masks once: 4 projections of 512 x 512, and 0/1 rows.
    assert sum(a.nbytes for a in build.arrays.values()) < 300e6
