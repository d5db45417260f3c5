"""Vision models: from softmax to polynomials, and few images."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="vision",
        group="train",
        measures="test accuracy of small ViTs from softmax to polynomials, LayerNorm against BatchNorm and its stabilisers",
        conditions="5,000 digits and Fashion-MNIST (POLYFORMER_DATA), 49 tokens, 300 steps of 64, one thread",
        minutes=12,
        memory_gb=2,
        run="benchmarks.vision:vision",
        show="benchmarks.vision:show_vision",
    ),
    Benchmark(
        name="vision-few",
        group="train",
        measures="test accuracy of attention, Hyena and hybrids on 100, 300 and 1000 images, pixels in order and shuffled",
        conditions="5,000 digits (POLYFORMER_DATA), 49 tokens, 150 steps of 64, one thread",
        minutes=12,
        memory_gb=2,
        run="benchmarks.vision:vision_few",
        show="benchmarks.vision:show_few",
    ),
)
