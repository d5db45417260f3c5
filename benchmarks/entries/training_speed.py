"""How fast training is: PowerSoftmax beside fused softmax attention, our loop beside a plain one."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="training-speed",
        group="train",
        measures="tokens/s of training: PowerSoftmax against fused softmax attention, our loop against a plain one",
        conditions="width 256, 4 blocks, 4096 tokens a step in windows of 128, 512 and 1024; one thread, float32",
        minutes=8,
        memory_gb=2,
        run="benchmarks.training_speed:measure",
        show="benchmarks.training_speed:show",
    ),
)
