"""Text from an encrypted prompt: one more token at 128 bits, and whether encryption changes any prediction."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Record, Settings


def _generate(settings: Settings) -> Record:
    from benchmarks import generation

    return generation.measure("generate-2x128", settings)


def _agreement(settings: Settings) -> Record:
    from benchmarks import agreement

    return agreement.measure("agreement-100", settings)


BENCHMARKS = (
    Benchmark(
        name="generate-2x128",
        version=2,
        group="encrypted",
        measures="one more token with keys and values kept encrypted: evaluate, total, error, traffic, by operator",
        conditions="2 blocks, d = 128, 4 heads, window of 32 tokens, the demo's trained model, 128 bits",
        minutes=6,
        memory_gb=8,
        run=_generate,
        show="benchmarks.request_show:request",
    ),
    Benchmark(
        name="agreement-100",
        group="encrypted",
        measures="agreement of the likeliest token and MSE of the logits, encrypted against clear",
        conditions="the demo's trained model and circuit, every position of at least 4 held-out prompts, 128 bits",
        minutes=4,
        memory_gb=20,
        run=_agreement,
        show="benchmarks.request_show:request",
    ),
)
