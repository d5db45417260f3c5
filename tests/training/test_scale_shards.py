"""Token shards: what is written is read, every window once an epoch, and a position resumes exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from training import prepare
from training.data import EOT_ID, read_documents, train_bpe
from training.shards import Position, ShardReader, permuted, write_byte_shards, write_shards

DOCS = [np.arange(1, 60), np.arange(100, 140), np.arange(200, 205)]
STREAM = np.concatenate([np.append(d, EOT_ID) for d in DOCS])


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, DOCS, vocab=300, shard_tokens=60)
    return tmp_path


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1025])
def test_order_is_a_permutation(n):
    orders = [[permuted(i, n, key=key) for i in range(n)] for key in (0, 1, 1 << 70)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 7 or len({tuple(order) for order in orders}) == 3
    if n == 1025:  # shuffled well: neighbours lie about n / 3 apart, and no place correlates with its image
        apart = np.abs(np.diff(orders[0])).mean()
        assert 0.28 * n < apart < 0.39 * n
        assert abs(np.corrcoef(np.arange(n), orders[0])[0, 1]) < 0.1


@pytest.mark.parametrize(("vocab", "name"), [(300, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_windows_tile_the_text_in_the_smallest_type(tmp_path, vocab, name):
    docs = [*DOCS, np.array([vocab - 1])]
    write_shards(tmp_path, docs, vocab=vocab)
    assert json.loads((tmp_path / "shards.json").read_text())["dtype"] == name
    reader = ShardReader(tmp_path, length=4, seed=0)
    stream = np.concatenate([np.append(d, EOT_ID) for d in docs])
    assert reader.count == (len(stream) - 1) // 4
    for i in range(reader.count):
        assert np.array_equal(reader.window(i), stream[4 * i : 4 * i + 5])


def test_shards_hold_all_tokens_and_are_mapped(folder):
    reader = ShardReader(folder, length=4, seed=0)
    assert [len(s) for s in reader.shards] == [60, 47]
    assert all(isinstance(s, np.memmap) for s in reader.shards)
    assert np.array_equal(np.concatenate(reader.shards), STREAM)


def test_an_epoch_holds_every_window_once_and_the_next_is_in_another_order(folder):
    reader = ShardReader(folder, length=4, seed=3)
    windows = sorted(reader.window(i).tolist() for i in range(reader.count))
    epochs = [[torch.cat([x, y[:, -1:]], 1).tolist()[0] for x, y in (reader.batch(1) for _ in windows)] for _ in "ab"]
    assert sorted(epochs[0]) == sorted(epochs[1]) == windows
    assert epochs[0] != epochs[1]


def test_a_position_resumes_exactly_across_an_epoch(folder):
    first, second = (ShardReader(folder, length=4, seed=1) for _ in "ab")
    for _ in range(3):
        first.batch(4)
    assert first.position == Position(windows=12, seed=1, digest=first.digest)
    second.seek(first.position)
    for _ in range(2 * first.count // 4):
        for a, b in zip(first.batch(4), second.batch(4), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one(folder, world):
    one = ShardReader(folder, length=4, seed=1)
    many = [ShardReader(folder, length=4, seed=1) for _ in range(world)]
    for _ in range(5):
        whole = one.batch(8)
        parts = [reader.batch(8, rank=rank, world=world) for rank, reader in enumerate(many)]
        for i in (0, 1):
            assert torch.equal(whole[i], torch.cat([p[i] for p in parts]))
    with pytest.raises(ValueError, match="8 windows does not divide over 3"):
        one.batch(8, world=3)


def test_other_data_and_other_orders_are_refused(folder, tmp_path):
    write_shards(tmp_path / "other", [d[::-1] for d in DOCS], vocab=300)
    position = ShardReader(folder, length=4, seed=1).position
    with pytest.raises(ValueError, match="digest"):
        ShardReader(tmp_path / "other", length=4, seed=1).seek(position)
    with pytest.raises(ValueError, match="seed 1, this run has 2"):
        ShardReader(folder, length=4, seed=2).seek(position)


def test_negative_seeds_are_refused_and_the_order_of_others_stays(folder):
    with pytest.raises(ValueError, match="seed is -1; it must be at least 0"):
        ShardReader(folder, length=4, seed=-1)
    with pytest.raises(ValueError, match="key is -4294967296"):
        permuted(0, 7, key=-1 << 32)
    assert [permuted(i, 7, key=3 << 32) for i in range(7)] == [1, 0, 2, 3, 5, 4, 6]


def test_damaged_and_absent_shards_name_the_next_step(folder, tmp_path):
    (folder / "shard-00001.bin").write_bytes(b"\0" * 92)
    with pytest.raises(ValueError, match=r"has 92 bytes, shards\.json says 94"):
        ShardReader(folder, length=4, seed=0)
    with pytest.raises(FileNotFoundError, match="write_shards"):
        ShardReader(tmp_path / "none", length=4, seed=0)
    with pytest.raises(ValueError, match=r"holds ids 0\.\.59; the vocabulary has 10"):
        write_shards(tmp_path / "small", DOCS, vocab=10)
    write_shards(tmp_path / "short", DOCS, vocab=300)
    with pytest.raises(ValueError, match="107 tokens, a window 201"):
        ShardReader(tmp_path / "short", length=200, seed=0)


def test_byte_shards_hold_the_text(tmp_path):
    (tmp_path / "text.txt").write_text("naïve\fsecond document")
    write_byte_shards(tmp_path / "out", tmp_path / "text.txt")
    ids = np.concatenate(ShardReader(tmp_path / "out", length=4, seed=0).shards)
    assert bytes((ids[ids > 0] - 1).astype(np.uint8)).decode() == "naïvesecond document"
    assert (ids == 0).sum() == 2


def test_prepare_writes_a_text_with_a_tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("We hold these truths to be self-evident.\fFour score and seven years ago.")
    tokenizer = train_bpe(read_documents(text), 270)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = ["--text", str(text), "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "out")]
    prepare.main(arguments)
    reader = ShardReader(tmp_path / "out", length=4, seed=0)
    ids = np.concatenate(reader.shards).tolist()
    parts = [tokenizer.decode(ids[: ids.index(0)]), tokenizer.decode(ids[ids.index(0) + 1 : -1])]
    assert parts == read_documents(text) and ids[-1] == EOT_ID and reader.vocab == 270


@pytest.mark.parametrize(("mark", "end"), [("<|endoftext|>", 8), ("</s>", 8), (None, 3)])
def test_prepare_ends_documents_as_the_tokenizer_does(tmp_path, mark, end):
    """Released tokenizers have the mark at the end of the vocabulary (GPT-2) or somewhere (Llama); 0 is text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if mark is not None:
        tokenizer.add_special_tokens([mark])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w0 w2 w0\fw5 w6 w7 w0")
    options = [] if mark is not None else ["--end", "w3"]
    given = tmp_path if mark == "</s>" else tmp_path / "tokenizer.json"
    text, out = tmp_path / "text.txt", tmp_path / "out"
    prepare.main(["--text", str(text), "--tokenizer", str(given), "--out", str(out), *options])
    reader = ShardReader(out, length=4, seed=0)
    assert np.concatenate(reader.shards).tolist() == [0, 2, 0, end, 5, 6, 7, 0, end]
    assert json.loads((out / "shards.json").read_text())["end"] == end and reader.vocab == (8 if mark is None else 9)


def test_prepare_refuses_in_a_sentence(tmp_path, capsys):
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "none.json").write_text("{}")
    out = ["--out", str(tmp_path / "out")]
    for options, sentence in (
        (["--tokenizer", str(tmp_path / "tokenizer.json")], "name one with --end"),
        (["--tokenizer", str(tmp_path / "none.json")], "is no tokenizer that the tokenizers library reads"),
        (["--tokenizer", str(tmp_path / "absent.json")], "no file"),
        (["--text", str(tmp_path / "absent")], "no text at"),
        (["--end", "3"], "bytes end a document with id 0"),
        (["--shard-tokens", "0"], "shard_tokens is 0; it must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=sentence) as refusal:
            prepare.main([*out, *options])
        assert isinstance(refusal.value.code, str)  # which Python prints, with exit status 1
