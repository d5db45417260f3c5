"""One encrypted request of a small model at 128 bits, measured whole."""

from __future__ import annotations

from functools import partial

from benchmarks.registry import Benchmark, Record, Settings


def _model(settings: Settings, *, name: str, repeats: int) -> Record:
    """Build a model of `benchmarks.models` in a temporary folder and measure one request of it."""
    import tempfile
    from pathlib import Path

    from benchmarks import models, requests
    from compiler import Target

    with tempfile.TemporaryDirectory() as place:
        path, samples = getattr(models, name.replace("-", "_"))(Path(place))
        return requests.measure(
            name,
            path,
            samples,
            target=Target(max_memory_gb=21.0),
            repeats=1 if settings.quick else repeats,
            progress=settings.progress,
            weights="random, seed 0",
            keep=settings.keep,
        )


BENCHMARKS = (
    Benchmark(
        name="mlp-784",
        version=2,
        group="encrypted",
        measures="one input through an MLP: evaluate, total, error, efficiency",
        conditions="784-128-10 with x^2, random weights, 128 bits",
        minutes=0.3,
        memory_gb=1,
        run=partial(_model, name="mlp-784", repeats=21),
        show="benchmarks.request_show:request",
    ),
    Benchmark(
        name="cnn-28",
        version=2,
        group="encrypted",
        measures="one image of 28 x 28 through a LeNet-like CNN: evaluate, total, error, efficiency",
        conditions="two convolutions, two poolings, two dense layers, x^2, random weights, 128 bits",
        minutes=2.5,
        memory_gb=3,
        run=partial(_model, name="cnn-28", repeats=5),
        show="benchmarks.request_show:request",
    ),
)
