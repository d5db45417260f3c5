"""Vision models: from softmax to polynomials, and few images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.registry import Benchmark, Record, Settings

if TYPE_CHECKING:
    from benchmarks.blocks import Block


def _vision(settings: Settings) -> Record:
    from benchmarks import vision

    return vision.vision(settings)


def _few(settings: Settings) -> Record:
    from benchmarks import vision

    return vision.vision_few(settings)


def _show_vision(record: Record) -> Sequence[Block]:
    from benchmarks import vision

    return vision.show_vision(record)


def _show_few(record: Record) -> Sequence[Block]:
    from benchmarks import vision

    return vision.show_few(record)


BENCHMARKS = (
    Benchmark(
        name="vision",
        group="train",
        measures="test accuracy of small ViTs from softmax to polynomials, LayerNorm against BatchNorm and its stabilisers",
        conditions="5,000 digits and Fashion-MNIST (POLYFORMER_DATA), 49 tokens, 300 steps of 64, one thread",
        minutes=12,
        memory_gb=2,
        run=_vision,
        show=_show_vision,
    ),
    Benchmark(
        name="vision-few",
        group="train",
        measures="test accuracy of attention, Hyena and hybrids on 100, 300 and 1000 images, pixels in order and shuffled",
        conditions="5,000 digits (POLYFORMER_DATA), 49 tokens, 150 steps of 64, one thread",
        minutes=12,
        memory_gb=2,
        run=_few,
        show=_show_few,
    ),
)
