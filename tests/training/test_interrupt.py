"""Ctrl-C in training costs no step, and the run that goes on ends bit for bit where another does."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch

from polyformer import cli
from polyformer.model import ModelConfig, Transformer
from training.data import Mix, Sampler
from training.interrupt import held_interrupt
from training.loop import Schedule, run_stage

CONFIG = ModelConfig(vocab=13, length=8, width=16, heads=2, hidden=16, blocks=1, norms=("affine",) * 3)
STEPS = 14


class Pressed(Sampler):
    """Somebody presses Ctrl-C while this batch is drawn."""

    at: int | None = None
    drawn = 0

    def batch(self):
        self.drawn += 1
        if self.drawn == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().batch()


def go(place: Path, *, at: int | None = None, until=None) -> tuple[Transformer, int, int]:
    """The model, the number of steps done, and how many of them were taken here."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    g = torch.Generator().manual_seed(0)
    docs = [torch.randint(1, 13, (30,), generator=g) for _ in range(4)]
    sampler = Pressed(docs, length=8, vocab=13, mix=Mix(batch=4), seed=0)
    sampler.at = at
    schedule = Schedule(steps=STEPS, lr=1e-2, warmup=2, weight_decay=0.1, clip=1.0, checkpoint_every=100)
    place.mkdir(exist_ok=True)
    done = run_stage(
        model, sampler, stage="softmax", schedule=schedule, folder=place, log=place / "train.jsonl", until=until
    )
    return model, done, sampler.drawn


@pytest.mark.parametrize(("at", "left"), [(1, STEPS - 1), (7, STEPS - 7), (STEPS, 0)])
def test_an_interrupted_stage_keeps_every_step_and_ends_where_the_other_does(at, left, tmp_path):
    expected, _, _ = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match=f"softmax stopped after {at} of {STEPS} steps, all of them kept"):
        go(tmp_path / "cut", at=at)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(999)
    found, done, taken = go(tmp_path / "cut")
    assert (done, taken) == (STEPS, left)
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in expected.state_dict().items())
    assert (tmp_path / "cut" / "train.jsonl").read_text() == (tmp_path / "whole" / "train.jsonl").read_text()


def test_a_stage_interrupted_in_the_step_that_ends_it_trains_no_further(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, at=5, until=lambda done: done == 5)
    assert go(tmp_path, until=lambda done: done == 5)[1:] == (5, 0)


def test_the_second_interrupt_stops_at_once_and_other_threads_hold_nothing(tmp_path):
    with held_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    found = []
    thread = threading.Thread(target=lambda: found.append(go(tmp_path)[1]))
    thread.start()
    thread.join()
    assert found == [STEPS]


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    batch, drawn = Sampler.batch, []

    def pressed(self):
        drawn.append(self)
        if len(drawn) == 4:  # one batch is drawn to see that there is one
            signal.raise_signal(signal.SIGINT)
        return batch(self)

    monkeypatch.setattr(Sampler, "batch", pressed)
    (tmp_path / "mine.txt").write_text("All work and no play makes Jack a dull boy. " * 400)
    arguments = ["train", str(tmp_path / "out"), "--quick", "--set", "vocab=270", "--text", str(tmp_path / "mine.txt")]
    assert cli.run(arguments) == cli.INTERRUPTED
    assert "softmax stopped after 3 of 30 steps, all of them kept; the same command goes on from there" in " ".join(
        capsys.readouterr().err.split()
    )
    assert (tmp_path / "out" / "checkpoints" / "softmax.safetensors").exists()
