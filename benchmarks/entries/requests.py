"""One encrypted request of a model at 128 bits, measured whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.registry import Benchmark, Record, Settings


def _request(name: str, build: Callable[[Path], Any], repeats: int, settings: Settings) -> Record:
    """Build a model in a temporary folder and measure one request of it."""
    import tempfile

    from benchmarks import requests
    from compiler import Target

    with tempfile.TemporaryDirectory() as place:
        path, samples = build(Path(place))
        return requests.measure(
            name,
            path,
            samples,
            target=Target(max_memory_gb=21.0),
            repeats=1 if settings.quick else repeats,
            progress=settings.progress,
            weights="random, seed 0",
        )


def _mlp_784(settings: Settings) -> Record:
    from benchmarks import models

    return _request("mlp-784", models.mlp_784, 21, settings)


def _cnn_28(settings: Settings) -> Record:
    from benchmarks import models

    return _request("cnn-28", models.cnn_28, 5, settings)


def _encoder(settings: Settings, *, name: str, blocks: int, width: int, heads: int, tokens: int) -> Record:
    from benchmarks import models

    if settings.quick:
        blocks, width, heads, tokens = 1, 16, 2, 8
    build = partial(models.encoder, blocks=blocks, width=width, heads=heads, hidden=4 * width, tokens=tokens)
    return _request(name, build, 1, settings)


BENCHMARKS = (
    Benchmark(
        name="mlp-784",
        version=2,
        group="encrypted",
        measures="one input through an MLP: evaluate, total, error, efficiency",
        conditions="784-128-10 with x^2, random weights, 128 bits",
        minutes=0.3,
        memory_gb=1,
        run=_mlp_784,
        show="benchmarks.two_tables:of_record",
    ),
    Benchmark(
        name="cnn-28",
        version=2,
        group="encrypted",
        measures="one image of 28 x 28 through a LeNet-like CNN: evaluate, total, error, efficiency",
        conditions="two convolutions, two poolings, two dense layers, x^2, random weights, 128 bits",
        minutes=2.5,
        memory_gb=3,
        run=_cnn_28,
        show="benchmarks.two_tables:of_record",
    ),
    Benchmark(
        name="request-2x128x128",
        version=2,
        group="encrypted",
        measures="one request of an encoder: evaluate, total, error, efficiency, by operator",
        conditions="2 blocks, d = 128, 4 heads, 128 tokens (BERT-Tiny's shape), random weights, 128 bits",
        minutes=7,
        memory_gb=16,
        run=partial(_encoder, name="request-2x128x128", blocks=2, width=128, heads=4, tokens=128),
        show="benchmarks.two_tables:of_record",
    ),
)
