"""The benchmarks of released models run at their smallest size, on random weights, and show what they measured."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import released, released_encoder, released_show
from benchmarks.registry import Settings, benchmarks
from benchmarks.substitution import widened


def test_swap_keeps_partial_records_and_shows_every_arm():
    kept: list[dict] = []
    record = benchmarks()["smollm2-swap"].measure(
        Settings(quick=True, seeds=(0,), keep=lambda r: kept.append(copy.deepcopy(dict(r))))
    )
    arms = record["metrics"]["arms"]
    assert [a["arm"] for a in arms] == ["softmax", "copied, p = 4", "distilled, p = 4", "distilled, p = 8"]
    assert [p["tokens"] for p in arms[0]["curve"]] == [0, 10 * 2 * 16]
    assert [sum(len(a["curve"]) for a in r["metrics"]["arms"]) for r in kept] == [1, 2, 3, 4, 5, 6, 7, 8]
    control, *_, distilled = arms
    assert distilled["gap_first"] == distilled["curve"][0]["loss"] - control["curve"][0]["loss"]
    layers = record["metrics"]["layers"]
    assert list(layers) == ["distilled, p = 4", "distilled, p = 8"]
    assert all(row["matched"] < row["copied"] for rows in layers.values() for row in rows)
    for r in (record, kept[0], kept[3]):
        figure, *tables = released_show.smollm2_swap(r)
        assert "<svg" in figure.html()
        assert "| softmax |" in tables[0].markdown()


def test_distillation_of_an_encoder_judges_every_variant():
    kept: list[dict] = []
    record = benchmarks()["minilm-distil"].measure(
        Settings(quick=True, seeds=(0,), keep=lambda r: kept.append(copy.deepcopy(dict(r))))
    )
    variants = {v["variant"]: v for v in record["metrics"]["variants"]}
    swaps = [f"{how}, p = {p}" for p in (4, 8) for how in ("copied", "matched")]
    assert list(variants)[:7] == ["original", *swaps, "layers distilled", "states distilled"]
    assert len(variants) == len(kept) == 9
    assert variants["original"]["state_error"] == 0.0
    assert variants["original"]["cosine_least"] == pytest.approx(1.0)
    for p in (4, 8):
        assert variants[f"matched, p = {p}"]["state_error"] < 0.5 * variants[f"copied, p = {p}"]["state_error"]
    assert variants["matched, p = 8"]["cosine_mean"] > variants["copied, p = 8"]["cosine_mean"]
    for r in (record, kept[0]):
        figure, table, *_ = released_show.minilm_distil(r)
        assert "<svg" in figure.html()
        assert "original" in table.markdown()


def test_absent_data_are_a_sentence_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYFORMER_DATA", str(tmp_path))
    for name in ("smollm2-swap", "minilm-distil"):
        with pytest.raises(FileNotFoundError, match=f"shared/fetch-data {tmp_path} all"):
            benchmarks()[name].measure(Settings(seeds=(0,)))


def test_the_probe_finds_a_direction_and_nothing_in_noise():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 8, generator=g), torch.arange(400) % 3
    assert released_encoder.probe(x[:200], y[:200], x[200:], y[200:]) < 0.5
    x[:, 0] += 6.0 * (y == 1)
    x[:, 1] += 6.0 * (y == 2)
    assert released_encoder.probe(x[:200], y[:200], x[200:], y[200:]) > 0.95


def test_ranges_are_widened_and_losses_may_be_infinite():
    from polyformer.ranges import Range

    r = {
        "act": Range(low=-2.0, high=5.0, below=0, above=0, count=1),
        "norm": Range(low=0.5, high=4.0, below=0, above=0, count=1),
    }
    assert widened(r, 2.0) == {"act": (-10.0, 10.0), "norm": (0.25, 8.0)}
    assert released.perplexity(float("inf")) == {"loss": None, "perplexity": None}
    assert released.perplexity(0.0) == {"loss": 0.0, "perplexity": 1.0}
