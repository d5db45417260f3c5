"""The harness adapter scores and continues text as its definition says, with a stand-in for lm_eval's requests."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

from polyformer.model import ModelConfig, Transformer
from training.data import train_bpe
from training.harness import Harness, harness_model, rolling_windows

TEXT = "the cat sat on the mat and the dog sat on the log. " * 20


@dataclass
class Instance:
    """What lm_eval hands over, as far as it is used: `args` of a request."""

    args: tuple


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), length=12, width=16, heads=2, hidden=32, blocks=1, norms=("rms",) * 3
    )
    return Transformer(config).eval()


def log_probability(model: Transformer, ids: list[int], asked: int) -> float:
    """Of the last `asked` ids, one token at a time, each behind as many before it as the window of all of them holds."""
    ids = ids[-model.config.length - 1 :]
    total = 0.0
    for end in range(len(ids) - asked, len(ids)):
        total += float(model(torch.tensor([ids[:end]]))[0, -1].log_softmax(-1)[ids[end]])
    return total


@torch.no_grad()
def test_loglikelihood_is_the_sum_over_the_continuation(model, tokenizer):
    requests = [
        ("the cat", " sat on"),
        ("the cat ", "sat"),
        ("", "the dog"),
        ("the dog sat on the log. the cat sat on the mat and the", " dog"),
        ("a", ""),
    ]
    found = Harness(model=model, tokenizer=tokenizer, prefix=0, batch=2).loglikelihood([Instance(r) for r in requests])
    for (context, continuation), (value, greedy) in zip(requests, found, strict=True):
        kept = context.rstrip()
        before = tokenizer.encode(kept).ids if kept else [0]
        whole = tokenizer.encode(context + continuation).ids if kept else [0, *tokenizer.encode(continuation).ids]
        asked = len(whole) - len(before)
        assert value == pytest.approx(log_probability(model, whole, asked), abs=1e-4)
        row = whole[:-1][-12:]
        best = model(torch.tensor([row]))[0, len(row) - asked :].argmax(-1).tolist() if asked else []
        assert greedy == (best == whole[len(whole) - asked :])


def test_greedy_continuation_is_called_greedy(model, tokenizer):
    harness = Harness(model=model, tokenizer=tokenizer, prefix=0)
    context = tokenizer.encode("the cat").ids
    best = int(model(torch.tensor([context]))[0, -1].argmax())
    word = tokenizer.decode([best], skip_special_tokens=False)
    assert tokenizer.encode("the cat" + word).ids == [*context, best]
    assert harness.loglikelihood([Instance(("the cat", word))])[0][1]
    assert not harness.loglikelihood([Instance(("the cat", " log" if word != " log" else " mat"))])[0][1]


def test_rolling_windows_of_the_interface():
    """The example in lm_eval's documentation of `loglikelihood_rolling`."""
    pairs = list(rolling_windows(list(range(10)), -1, 4))
    assert [(context + asked)[:-1] for context, asked in pairs] == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [asked for _, asked in pairs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(rolling_windows([], -1, 4)) == []


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rolling_predicts_every_token_once(left, model, tokenizer):
    texts = ["the cat sat on the mat and the dog sat on the log. the cat", "the", ""]
    harness = Harness(model=model, tokenizer=tokenizer, prefix=0, left=left)
    found = harness.loglikelihood_rolling([Instance((t,)) for t in texts])
    for text, value in zip(texts, found, strict=True):
        expected = 0.0
        for context, asked in rolling_windows(tokenizer.encode(text).ids, 0, 12):
            row = (context + asked)[:-1]
            padded = [0] * (12 - len(row)) + row if left else row
            logits = model(torch.tensor([padded]))[0, len(padded) - len(asked) :].log_softmax(-1)
            expected += float(logits[torch.arange(len(asked)), asked].sum())
        assert value == pytest.approx(expected, abs=1e-4)


def test_generation_is_greedy_and_ends_where_it_should(model, tokenizer):
    harness = Harness(model=model, tokenizer=tokenizer, prefix=0)
    ids = tokenizer.encode("the cat").ids
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids[-12:]]))[0, -1].argmax()))
    new = ids[len(tokenizer.encode("the cat").ids) :]
    if 0 in new:
        new = new[: new.index(0)]
    text = tokenizer.decode(new, skip_special_tokens=False)
    asked = [("the cat", {"until": [], "max_gen_toks": 8}), ("the cat", {"until": text[2:4], "max_gen_toks": 8})]
    whole, cut = harness.generate_until([Instance(a) for a in asked])
    assert whole == text
    assert len(text) > 4
    assert cut == text[: text.index(text[2:4])]
    stopping = Harness(model=model, tokenizer=tokenizer, prefix=0, stop=(new[1],))
    assert stopping.generate_until([Instance(asked[0])]) == [tokenizer.decode(new[:1], skip_special_tokens=False)]


def test_what_cannot_be_answered_is_refused(model, tokenizer):
    harness = Harness(model=model, tokenizer=tokenizer, prefix=0)
    with pytest.raises(ValueError, match=r"greedily"):
        harness.generate_until([Instance(("the", {"do_sample": True}))])
    with pytest.raises(ValueError, match=r"greedily"):
        harness.generate_until([Instance(("the", {"temperature": 0.7}))])
    encoder = Transformer(replace(model.config, causal=False))
    with pytest.raises(ValueError, match=r"causal language model"):
        Harness(model=encoder, tokenizer=tokenizer, prefix=0)


@pytest.mark.parametrize(
    "settings", [{"do_sample": False, "temperature": 1.0}, {"temperature": 0.0}, {"do_sample": None}]
)
def test_what_asks_for_no_sampling_is_decoded_greedily(model, tokenizer, settings):
    harness = Harness(model=model, tokenizer=tokenizer, prefix=0)
    plain = harness.generate_until([Instance(("the", {"max_gen_toks": 4}))])
    assert harness.generate_until([Instance(("the", {"max_gen_toks": 4, **settings}))]) == plain


@torch.no_grad()
def test_a_continuation_longer_than_the_window_loses_its_beginning_with_one_warning(model, tokenizer):
    harness = Harness(model=model, tokenizer=tokenizer, prefix=0)
    ids = tokenizer.encode("a" + TEXT).ids
    with pytest.warns(UserWarning, match=r"the window 12: .* only the last 12 are scored") as warned:
        (long, _), (short, _), _ = harness.loglikelihood([Instance(("a", text)) for text in (TEXT, " cat", TEXT)])
    assert len(warned) == 1
    # each of the last 12 tokens behind those of the window before it
    logits_TV = model(torch.tensor([ids[-13:-1]]))[0].log_softmax(-1)
    assert long == pytest.approx(float(logits_TV.gather(1, torch.tensor(ids[-12:])[:, None]).sum()), rel=1e-5)
    assert short == pytest.approx(harness.loglikelihood([Instance(("a", " cat"))])[0][0], rel=1e-5)


def test_an_absent_lm_eval_is_named_and_a_present_one_is_the_base(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install polyformer\[eval\]"):
        harness_model(model, tokenizer, prefix=0)

    class LM:
        def __init__(self) -> None:
            self.rank = 0

        def loglikelihood(self, requests):
            raise NotImplementedError

    package = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    package["lm_eval.api.model"].LM = LM
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = harness_model(model, tokenizer, prefix=0)
    assert isinstance(found, LM)
    assert found.rank == 0
    assert found.loglikelihood([Instance(("the", " cat"))])[0][0] < 0
