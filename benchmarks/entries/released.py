"""Released models whose attention is swapped."""

from __future__ import annotations

from benchmarks.registry import Benchmark

BENCHMARKS = (
    Benchmark(
        name="smollm2-swap",
        group="train",
        measures="held-out perplexity against tokens seen after softmax became PowerSoftmax, beside the model trained on as it is",
        conditions="SmolLM2-135M (30 layers), all layers, p = 4 and 8, windows of 128 tokens of State of the Union, 2 threads",
        minutes=20,
        memory_gb=5,
        run="benchmarks.released:smollm2_swap",
        show="benchmarks.released_show:smollm2_swap",
    ),
    Benchmark(
        name="minilm-distil",
        version=3,
        group="train",
        measures="embedding cosine and probe accuracy after each step: swap, layers, states, polynomials everywhere",
        conditions="all-MiniLM-L6-v2 (6 layers), p = 4 and 8, 600 + 400 BBC documents of 128 tokens, one thread",
        minutes=35,
        memory_gb=3,
        run="benchmarks.released_encoder:minilm_distil",
        show="benchmarks.released_show:minilm_distil",
    ),
)
