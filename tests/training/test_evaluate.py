"""Quality figures against sums done by hand, and recall tasks whose answers are found by reading the window."""

import math

import pytest
import torch
from torch import nn

from polyformer.model import ModelConfig, Transformer
from training.data import IGNORE, train_bpe
from training.evaluate import (
    accuracy,
    answers,
    bytes_per_token,
    language,
    unigram_loss,
)
from training.recall import RecallSampler, RecallTask

TASKS = {
    "induction": RecallTask(kind="induction", symbols=12, shown=8, asked=4),
    "key_value": RecallTask(kind="key_value", symbols=9, shown=5, asked=3, answers=4),
    "few_shot": RecallTask(kind="few_shot", symbols=3, shown=10, answers=4),
}


class Reader(nn.Module):
    """Answers by looking the question up in the window: the token after the last earlier one of the same kind."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab

    def forward(self, tokens_BT):
        logits = torch.zeros(*tokens_BT.shape, self.vocab)
        for b, row in enumerate(tokens_BT.tolist()):
            for i, token in enumerate(row):
                if token in row[:i]:
                    logits[b, i, row[i - 1 - row[:i][::-1].index(token) + 1]] = 1
        return logits


def tiny() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(vocab=16, length=6, width=8, heads=2, hidden=16, blocks=1, mixer="softmax", norms=("layer",) * 3)
    )


def test_language_is_the_mean_over_all_targets_in_three_units():
    model, windows = tiny(), torch.randint(0, 16, (5, 7), generator=torch.Generator().manual_seed(1))
    log_p = model(windows[:, :-1]).detach().log_softmax(-1)
    by_hand = [-float(log_p[n, t, windows[n, t + 1]]) for n in range(5) for t in range(6)]
    found = language(model, windows, bytes_per_token=2.5, batch=2)
    assert found.loss == pytest.approx(sum(by_hand) / 30, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss * 30 / math.log(2) / (30 * 2.5))


def test_a_diverged_model_has_figures_that_say_so():
    model, windows = tiny(), torch.zeros(2, 7, dtype=torch.int64)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    assert math.isnan(language(model, windows, bytes_per_token=1.0).perplexity)


def test_training_mode_is_given_back():
    model = tiny().train()
    language(model, torch.zeros(1, 7, dtype=torch.int64), bytes_per_token=1.0)
    assert model.training


def test_bytes_per_token_counts_bytes_and_not_characters():
    docs = ["é" * 10, "abc"]
    tokenizer = train_bpe(["abc"], 257)  # the 256 bytes and the end mark: no merges
    assert bytes_per_token(tokenizer, docs) == 1.0
    with pytest.raises(ValueError, match="hold no token"):
        bytes_per_token(tokenizer, [""])


def test_unigram_loss_of_known_frequencies():
    train = [torch.tensor([0, 0, 0, 1])]  # add-one: 4/6 and 2/6
    windows = torch.tensor([[1, 0, 1]])
    assert unigram_loss(train, windows, vocab=2) == pytest.approx(-(math.log(4 / 6) + math.log(2 / 6)) / 2)


@pytest.mark.parametrize("name", TASKS)
def test_answers_stand_in_the_window(name):
    task = TASKS[name]
    tokens, targets = task.draw(200, torch.Generator().manual_seed(3))
    assert tokens.shape == targets.shape == (200, task.length)
    assert int(tokens.min()) > 0 and int(tokens.max()) < task.vocab
    curve = answers(Reader(task.vocab), tokens, targets).double().mean(0).tolist()
    ceiling = task.ceiling()
    assert len(curve) == len(ceiling)
    if name == "few_shot":  # Reader has no guess for an item that it has not seen
        seen = [1 - (1 - 1 / task.symbols) ** s for s in range(task.shown)]
        assert curve == pytest.approx(seen, abs=0.12) and curve[0] == 0.0
        assert ceiling[0] == pytest.approx(task.chance) and ceiling[-1] > 0.97
    else:
        assert curve == ceiling == [1.0] * task.asked


def test_induction_starts_anywhere_and_its_symbols_are_distinct():
    task = TASKS["induction"]
    tokens, _ = task.draw(300, torch.Generator().manual_seed(0))
    assert all(len(set(row[: task.shown])) == task.shown for row in tokens.tolist())
    starts = {row[: task.shown].index(row[task.shown]) for row in tokens.tolist()}
    assert starts == set(range(task.shown - task.asked))


def test_sampler_repeats_itself_from_its_generator():
    sampler = RecallSampler(TASKS["key_value"], batch=4, seed=5)
    state = sampler.generator.get_state()
    first = sampler.batch()
    assert not torch.equal(first[0], sampler.batch()[0])
    sampler.generator.set_state(state)
    assert torch.equal(first[0], sampler.batch()[0])


def test_accuracy_counts_only_what_is_asked():
    tokens = torch.tensor([[1, 2, 1], [2, 1, 2]])
    targets = torch.tensor([[IGNORE, IGNORE, 2], [IGNORE, IGNORE, 2]])
    assert answers(Reader(3), tokens, targets).tolist() == [[True], [False]]
    assert accuracy(Reader(3), tokens, targets) == 0.5


def test_rows_that_ask_at_different_places_are_refused():
    targets = torch.tensor([[IGNORE, 1], [1, IGNORE]])
    with pytest.raises(ValueError, match="different places"):
        answers(Reader(3), torch.tensor([[1, 2], [1, 2]]), targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "copy"}, "unknown recall task"),
        ({"shown": 20}, "only 9 symbols"),
        ({"answers": 1}, "needs at least 2"),
        ({"asked": 6}, "asked is 6, shown is 5"),
    ],
    ids=["kind", "shown", "answers", "asked"],
)
def test_impossible_tasks_are_refused(changes, message):
    fields = {"kind": "key_value", "symbols": 9, "shown": 5, "asked": 3, "answers": 4}
    with pytest.raises(ValueError, match=message):
        RecallTask(**(fields | changes))
