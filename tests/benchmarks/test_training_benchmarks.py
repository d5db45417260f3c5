"""Every training benchmark at its smallest size: the rows that it promises, and what it shows of them."""

from dataclasses import replace

import pytest
import torch

from benchmarks import depth_stress, equal_budget, las, length_scaling, recall, registry, swap_ablation
from benchmarks.blocks import Picture, Table
from benchmarks.entries import language as entries
from benchmarks.substitution import Degrees, intervals, outside, substituted
from benchmarks.train_runs import Budget, language_config
from polyformer.model import Transformer
from training.data import IGNORE
from training.substitution import with_config, with_rows

TOPICS = {
    "equal-budget": equal_budget,
    "depth-stress": depth_stress,
    "swap-ablation": swap_ablation,
    "recall": recall,
    "length-scaling": length_scaling,
    "las-ablation": las,
}
SEEDS = {"equal-budget": (0, 1)}  # the others need one


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = "union state people government nation america world peace freedom law year work congress great new".split()
    g = torch.Generator().manual_seed(0)
    for i in range(4):
        order = torch.randint(0, len(words), (700,), generator=g).tolist()
        (folder / f"{i}.txt").write_text(" ".join(words[w] for w in order))
    return folder


@pytest.fixture(scope="module")
def records(text):
    """Each benchmark's quick record, made once, after what it would have left if it had ended after its first run."""
    made = {}

    def record(name):
        if name not in made:
            module, kept = TOPICS[name], []
            given = {} if name == "recall" else {"text": text}
            made[name] = module.measure(seeds=SEEDS.get(name, (0,)), setup=module.QUICK, keep=kept.append, **given)
            made[name, "interrupted"] = kept[0]
        return made[name]

    record.interrupted = lambda name: record(name) and made[name, "interrupted"]
    return record


def body(mixer="power_softmax", **changes):
    torch.manual_seed(0)
    budget = Budget(steps=1, batch=1, length=8)
    return Transformer(language_config(budget, 16, width=8, blocks=1, heads=2, mixer=mixer, **changes)).eval()


def tokens(n=64, t=8):
    return torch.randint(0, 16, (n, t), generator=torch.Generator().manual_seed(1))


def test_every_topic_is_in_the_registry():
    assert {b.name for b in entries.BENCHMARKS} == set(TOPICS)
    assert all(registry.benchmarks()[name].group == "train" for name in TOPICS)


@pytest.mark.parametrize("name", TOPICS)
def test_quick_record_and_what_it_shows(name, records):
    record = records(name)
    assert record["name"] == name and record["status"] == "complete"
    rows = record["metrics"]["rows"]
    assert {row["case"] for row in rows} == set(record["params"]["cases"])
    assert {row["seed"] for row in rows} == set(record["params"]["seeds"])
    blocks = registry.benchmarks()[name].blocks(record)
    assert any(isinstance(b, Picture) and "<svg" in b.html() for b in blocks)
    shown = [b for b in blocks if isinstance(b, Table)]
    assert all(len(row) == len(b.columns) for b in shown for row in b.rows)
    cells = [str(cell) for b in shown for row in b.rows for cell in row]
    assert cells and any("±" in cell for cell in cells) == (name in SEEDS)


@pytest.mark.parametrize("name", TOPICS)
def test_what_was_measured_before_an_interruption_can_be_shown(name, records):
    record = records.interrupted(name)
    assert {row["case"] for row in record["metrics"]["rows"]} == {record["params"]["cases"][0]}
    assert all(block.markdown() for block in registry.benchmarks()[name].blocks(record))


@pytest.mark.parametrize("case", equal_budget.CASES)
def test_every_case_of_equal_budget_is_a_model(case):
    fields = equal_budget.CASES[case]
    model = body(**fields)
    loss = model(tokens(2)).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert model.config.mixer == fields["mixer"]


def test_stable_and_unstable_power_are_one_map():
    stable = body(**equal_budget.CASES["power 12"])
    exact = with_config(stable, replace(stable.config, form=equal_budget.CASES["power 12 unstable"]["form"]))
    assert torch.allclose(stable(tokens()), exact(tokens()), atol=1e-5)


def test_depths_are_those_asked_for(records):
    rows = records("depth-stress")["metrics"]["rows"]
    assert {row["rate"] for row in rows} == set(depth_stress.QUICK.rates)
    assert {row["layers"] for row in rows} == set(depth_stress.QUICK.layers)


def test_swap_changes_the_loss_and_keeps_the_parameters(records):
    first = next(r for r in records("swap-ablation")["metrics"]["rows"] if r.get("share") == 0.0)
    assert first["swapped"] != first["softmax"]
    softmax = body("softmax")
    swapped = with_config(softmax, replace(softmax.config, mixer="power_softmax", power=2))
    assert torch.equal(swapped.blocks[0].mixer.q.weight, softmax.blocks[0].mixer.q.weight)
    with pytest.raises(ValueError, match="no place for"):
        with_config(softmax, replace(softmax.config, mixer="hyena"))


def test_both_arms_replace_each_function_alone_and_all(records):
    rows = [r for r in records("swap-ablation")["metrics"]["rows"] if r["case"] == "substitution" and r["seed"] == 0]
    for arm in ("without range training", "with range training"):
        replaced = [r["replaced"] for r in rows if r["arm"] == arm]
        assert replaced == ["nothing", "division", "activation", "norm", "all", "all, tuned"]


def test_substitution_of_high_degree_is_the_model():
    model = with_rows(body(power=2), tokens())
    degrees = Degrees(division=30, activation=14, norm=30)
    fitted = intervals(model, tokens(), degrees)
    polynomial = substituted(model, fitted, degrees)
    assert polynomial.levels > 0  # raises where a part is not polynomial
    assert torch.allclose(polynomial(tokens()), model(tokens()), atol=2e-2)
    coarse = substituted(model, fitted, Degrees())
    error = (coarse(tokens()) - model(tokens())).abs().max()
    assert error > 3 * (polynomial(tokens()) - model(tokens())).abs().max()


def test_rows_is_an_exact_change_of_form():
    model = body(power=4)
    assert torch.allclose(with_rows(model, tokens())(tokens()), model(tokens()), atol=1e-5)


def test_nothing_of_what_was_measured_is_outside_and_more_is():
    model = with_rows(body(power=2), tokens())
    fitted = intervals(model, tokens(), Degrees())
    assert outside(model, tokens(), fitted) == 0.0
    narrow = {name: (lo + 0.4 * (hi - lo), hi - 0.4 * (hi - lo)) for name, (lo, hi) in fitted.items()}
    assert outside(model, tokens(), narrow) > 0.2


def test_the_polynomial_of_recall_has_levels(records):
    rows = [r for r in records("recall")["metrics"]["rows"] if r["model"] == "polynomial" and "accuracy" in r]
    assert len(rows) == len(recall.QUICK.tasks)
    assert all(r["levels"] > 0 for r in rows)


def test_cut_windows_score_the_same_targets():
    windows = torch.arange(2 * 13).view(2, 13)
    short = length_scaling.cut(windows, 4)
    assert short.shape == (6, 5)
    assert torch.equal(short[:, 1:].reshape(2, -1), windows[:, 1:])
    assert torch.equal(short[1], windows[0, 4:9])


def test_a_longer_window_with_the_trained_constant_starts_as_the_shorter_one_did():
    model = body("pointwise", positions="none", rotary=4)
    long = tokens(3, 16)
    kept = length_scaling.at_length(model, 16, keep_scale=True)(long)[:, :8]
    own = length_scaling.at_length(model, 16, keep_scale=False)(long)[:, :8]
    assert torch.allclose(kept, model(long[:, :8]), atol=1e-5)
    assert not torch.allclose(own, kept, atol=1e-3)


def test_listops_lite_asks_for_the_value_at_the_end():
    task = las.listops_lite(24, train=60, test=20)
    for x, y in (task.train, task.test):
        assert x.shape[1] == 24 and bool((y[:, :-1] == IGNORE).all())
        assert bool((y[:, -1] >= 1).all()) and bool((y[:, -1] <= 10).all())
        assert bool((x[:, -1] == 10 + len(las.SYMBOLS)).all())  # the closing bracket
    seen = {tuple(row) for row in task.train[0].tolist()}
    assert not seen & {tuple(row) for row in task.test[0].tolist()}
    values = {"[MIN": min, "[MAX": max, "[SM": lambda v: sum(v) % 10}
    flat = 0
    for row, label in zip(task.train[0].tolist(), task.train[1][:, -1].tolist(), strict=True):
        inner = [t for t in row if t]
        operator = las.SYMBOLS[inner[0] - 11]
        if operator in values and all(t <= 10 for t in inner[1:-1]):
            assert values[operator]([t - 1 for t in inner[1:-1]]) == label - 1
            flat += 1
    assert 0.05 < task.majority < 0.6


def test_digits_that_are_not_there_are_named(text, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYFORMER_DATA", str(tmp_path / "nowhere"))
    setup = replace(las.QUICK, digits=True, variants=("plain",), budget=Budget(steps=1, batch=1, length=24))
    record = las.measure(seeds=(0,), setup=setup, text=text)
    assert "nowhere" in record["params"]["missing"] and "fetch" in record["params"]["missing"]
    assert {row["task"] for row in record["metrics"]["rows"]} == {"listops", "language"}
    assert "nowhere" in las.show(record)[0].caption


def test_sequential_digits_are_raster_order_and_disjoint():
    images = torch.zeros(30, 28, 28).numpy().astype("uint8")
    images[:, :4, 4:8] = 255  # the second token of each
    task = las.sequential_digits(images, torch.arange(30).numpy() % 10, test=10)
    assert len(task.train[0]) == 20 and len(task.test[0]) == 10
    assert bool((task.train[0][:, 1] == las.LEVELS).all()) and bool((task.train[0][:, 2:] == 1).all())
    assert set(task.train[1][:, -1].tolist()) <= set(range(1 + las.LEVELS, 11 + las.LEVELS))
