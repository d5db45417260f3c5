"""Vision benchmarks at their smallest size, on pictures drawn for it; the data, the control and what is kept."""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry, vision
from benchmarks.registry import Settings, benchmarks
from benchmarks.worker import stamped
from polyformer.vision import ViT


@pytest.mark.parametrize(
    ("name", "runs", "seeds"), [("vision", len(vision.VISION), (0,)), ("vision-few", 2 * len(vision.FEW), (0, 1))]
)
def test_quick_run_trains_every_case_with_every_seed(name, runs, seeds):
    benchmark, kept = registry.benchmarks()[name], []
    record = benchmark.measure(Settings(seeds=seeds, quick=True, keep=kept.append))
    rows, summary, n = record["metrics"]["rows"], record["metrics"]["summary"], len(seeds)
    assert (len(rows), len(summary), len(kept)) == (n * runs, runs, n * runs)
    assert all(0 <= r["accuracy"] <= 1 for r in rows) and {e["seeds"] for e in summary} == {n}
    own = [r["accuracy"] for r in rows if (r["case"], r["shuffled"]) == (summary[0]["case"], summary[0]["shuffled"])]
    assert summary[0]["accuracy"] == pytest.approx(sum(own) / n) and len(own) == n
    table, picture = benchmark.blocks(record)
    assert len(table.rows) == runs and picture.svg.startswith("<svg")


def test_a_case_can_learn_and_is_what_it_says():
    images = vision.spots()
    budget = vision.Budget(steps=120, batch=32, width=16, hidden=16, heads=2, test=32)
    torch.manual_seed(0)
    model = ViT(vision.config(vision.VISION["PowerSoftmax, BatchNorm, stabilised"], budget, 12))
    body = model.config.body
    assert (body.mixer, body.norms[0], body.mlp_norm, body.score_norm) == ("power_softmax", "batch", True, True)
    assert vision.fit(model, images, budget, 0)["accuracy"] > 0.8  # chance: 0.1


@pytest.mark.parametrize("name", ["pointwise, stabilised, square", "Hyena 2-D, BatchNorm in MLP, square"])
def test_the_polynomial_cases_have_a_certificate(name):
    assert ViT(vision.config(vision.VISION[name], vision.QUICK, 12)).levels > 0


def test_hybrids_are_ordered_and_the_raster_is_one_axis():
    budget = vision.FEW_BUDGET
    first = vision.config(vision.FEW["hybrid, Hyena 2-D first"], budget, 28).body
    assert first.mixers == ("hyena_nd", "softmax") and first.grid == (7, 7)
    assert vision.config(vision.FEW["Hyena on the raster"], budget, 28).body.grid == (49,)


def test_few_images_are_balanced_and_shuffling_moves_pixels_alike_on_both_sides():
    images = vision.spots()
    few = images.first(20, seed=3)
    assert torch.bincount(few.train[1]).tolist() == [2] * 10
    assert not torch.equal(few.train[0], images.first(20, seed=4).train[0])
    moved = images.shuffled()
    for old, new in ((images.train[0], moved.train[0]), (images.test[0], moved.test[0])):
        assert torch.equal(old.flatten(1).sort().values, new.flatten(1).sort().values) and not torch.equal(old, new)
    probe = vision.Images(train=(images.train[0], images.train[1]), test=(images.train[0], images.train[1])).shuffled()
    assert torch.equal(probe.train[0], probe.test[0])


def test_missing_data_is_a_sentence_and_what_is_there_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYFORMER_DATA", str(tmp_path))
    held, missing = vision.load(["spots", "fashion-mnist"])
    assert list(held) == ["spots"] and "shared/fetch-data" in missing["fashion-mnist"]
    with pytest.raises(FileNotFoundError, match=r"digits: .*shared/fetch-data"):
        vision.vision_few(Settings())


def test_ctrl_c_keeps_what_was_measured(monkeypatch):
    real, calls = vision.fit, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(vision, "fit", stop_at_the_third)
    record = vision.vision(Settings(quick=True))
    assert record["status"] == "interrupted" and len(record["metrics"]["rows"]) == 2


def test_what_a_crash_leaves_does_not_say_that_somebody_stopped_it(monkeypatch):
    real, kept = vision.fit, []

    def die_at_the_second(*arguments):
        if kept:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(vision, "fit", die_at_the_second)
    with pytest.raises(MemoryError):
        vision.vision(Settings(quick=True, keep=kept.append))
    [left] = kept
    ended = stamped(left, benchmarks()["vision"], None, quick=True, status="crashed")
    assert ended["status"] == "crashed" and len(ended["metrics"]["rows"]) == 1
