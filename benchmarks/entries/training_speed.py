"""How fast training is: PowerSoftmax beside fused softmax attention, our loop beside a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.registry import Benchmark, Record, Settings

if TYPE_CHECKING:
    from benchmarks.blocks import Block


def _speed(settings: Settings) -> Record:
    from benchmarks import training_speed

    return training_speed.measure(settings)


def _show(record: Record) -> Sequence[Block]:
    from benchmarks import training_speed

    return training_speed.show(record)


BENCHMARKS = (
    Benchmark(
        name="training-speed",
        group="train",
        measures="tokens/s of training: PowerSoftmax against fused softmax attention, our loop against a plain one",
        conditions="width 256, 4 blocks, 4096 tokens a step in windows of 128, 512 and 1024; one thread, float32",
        minutes=8,
        memory_gb=2,
        run=_speed,
        show=_show,
    ),
)
