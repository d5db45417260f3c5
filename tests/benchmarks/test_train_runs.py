"""The harness of training benchmarks: what a sweep keeps, what a mean over seeds says, and that seeds decide a run."""

import math

import pytest
import torch

from benchmarks.train_figures import spread
from benchmarks.train_runs import (
    Budget,
    Summary,
    Training,
    fit,
    language_config,
    load_text,
    one_thread,
    outcome,
    plain,
    sweep,
    table,
)
from polyformer.model import Transformer
from training.evaluate import heldout_loss

BUDGET = Budget(steps=12, batch=2, length=8)


@pytest.fixture
def text(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("the state of the union is strong, and the union is free. " * (12 + i))
    return tmp_path


def model(vocab: int) -> Transformer:
    return Transformer(language_config(BUDGET, vocab, width=8, blocks=1, heads=2, mixer="softmax"))


def test_sweep_compares_all_cases_before_it_repeats_one():
    seen, kept, steps = [], [], []
    record = sweep(
        "x",
        ("a", "b"),
        (0, 1),
        lambda case, seed: seen.append((case, seed)) or {"loss": float(seed)},
        params={"width": 8},
        figures=("loss",),
        keep=kept.append,
        progress=lambda done, total, what: steps.append((done, total, what)),
    )
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [len(k["metrics"]["rows"]) for k in kept] == [1, 2, 3, 4]
    assert steps[0] == (0, 4, "a, seed 0") and steps[-1] == (4, 4, "done")
    assert record["status"] == "complete" and record["params"]["seeds"] == [0, 1]
    assert record["metrics"]["summary"][0]["loss"] == {"mean": 0.5, "deviation": pytest.approx(0.5**0.5), "runs": 2}


def test_ctrl_c_keeps_what_was_measured():
    def run(case, seed):
        if case == "b":
            raise KeyboardInterrupt
        return {"loss": 1.0}

    record = sweep("x", ("a", "b", "c"), (0,), run, params={}, figures=("loss",))
    assert record["status"] == "interrupted"
    assert [row["case"] for row in record["metrics"]["rows"]] == ["a"]
    assert record["params"]["cases"] == ["a", "b", "c"]


def test_a_run_that_is_not_finite_leaves_no_mean():
    rows = [{"case": "a", "loss": 1.0}, {"case": "a", "loss": plain(math.nan)}, {"case": "b", "loss": 2.0}]
    a, b = table(rows, ("loss", "speed"))
    assert a == {"case": "a", "loss": {"mean": None, "deviation": None, "runs": 2}}
    assert b["loss"] == {"mean": 2.0, "deviation": None, "runs": 1}
    assert plain({"x": (1.0, math.inf)}) == {"x": [1.0, None]}


@pytest.mark.parametrize(
    ("mean", "deviation", "shown"),
    [
        (3.69579, 0.0123, "3.696 ± 0.012"),
        (8567.6, 411.0, "8,568 ± 411"),
        (0.5, None, "0.5"),
        (12345.6, None, "12,346"),
        (1.0, 0.0, "1"),
        (None, None, None),
    ],
    ids=["loss", "speed", "one run", "large", "no spread", "not finite"],
)
def test_digits_follow_the_spread(mean, deviation, shown):
    assert spread({"mean": mean, "deviation": deviation, "runs": 3}) == shown


def test_summary_is_the_sample_deviation():
    assert Summary.of([1.0, 2.0, 3.0]) == Summary(mean=2.0, deviation=1.0, runs=3)


@pytest.mark.parametrize(
    ("finite", "loss", "became"),
    [
        (True, 4.0, "trained"),
        (True, 5.5, "stuck"),
        (True, 6.5, "diverged"),
        (True, math.nan, "diverged"),
        (False, 4.0, "diverged"),
    ],
    ids=["below", "above", "far above", "nan", "gradient"],
)
def test_what_became_of_a_run(finite, loss, became):
    training = Training(seconds=1.0, tokens_per_second=1.0, finite=finite, curve=((10, 1.0),))
    assert outcome(training, loss, 5.0) == became


def test_the_same_seed_gives_the_same_run(text):
    corpus = load_text(text, vocab=270, holdout=2)
    windows = corpus.windows(BUDGET.length, 16)
    assert len(windows) <= 16

    def loss(weights: int, batches: int) -> float:
        torch.manual_seed(weights)
        made = model(corpus.vocab)
        with one_thread():
            training = fit(made, corpus.sampler(BUDGET, batches), BUDGET)
        assert training.finite and [step for step, _ in training.curve] == [10, 12]
        return heldout_loss(made, windows)

    first = loss(0, 0)
    assert first == loss(0, 0)
    assert first != loss(1, 0) and first != loss(0, 1)
    assert first < heldout_loss(model(corpus.vocab), windows)  # it has learnt something


def test_a_loss_that_is_not_finite_is_seen(text):
    corpus = load_text(text, vocab=270, holdout=2)
    made = model(corpus.vocab)
    with torch.no_grad():
        made.head.bias.fill_(math.nan)
    assert not fit(made, corpus.sampler(BUDGET, 0), BUDGET).finite


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_thinned_curve_keeps_its_end():
    curve = tuple((10 * i, 1 / (i + 3)) for i in range(50))
    thin = Training(seconds=1.0, tokens_per_second=1.0, finite=True, curve=curve).thinned(12)
    assert len(thin) <= 12 and thin[-1] == (490, round(1 / 52, 4))
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)
