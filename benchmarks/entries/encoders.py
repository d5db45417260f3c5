"""Encoders from BERT-Tiny's size to six wide blocks with refreshes: compile time, one block multiplied, whole requests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from benchmarks.registry import Benchmark, Record, Settings


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of an encoder; its feed-forward part is four times as wide."""

    blocks: int
    width: int
    heads: int
    tokens: int


def _encoder(settings: Settings, *, what: str, name: str, shape: Shape) -> Record:
    """Build an encoder in a temporary folder, then measure its compilation ("compile"), one block ("block") or a request of it."""
    import tempfile
    from pathlib import Path

    from benchmarks import compile_time, models, one_block, requests
    from compiler import Target

    target = Target(max_memory_gb=22.0)
    if settings.quick:  # a test ring where the stream takes two ciphertexts
        shape = Shape(blocks=2, width=32, heads=2, tokens=32)
        target = Target(insecure_log_n=10, max_memory_gb=22.0)
    with tempfile.TemporaryDirectory() as place:
        path, x = models.encoder(
            Path(place),
            blocks=shape.blocks,
            width=shape.width,
            heads=shape.heads,
            hidden=4 * shape.width,
            tokens=shape.tokens,
        )
        if what == "compile":
            return compile_time.measure(name, path, x[:-1], target=target, progress=settings.progress)
        if what == "block":
            return one_block.measure(
                name, path, x, blocks=shape.blocks, target=target, progress=settings.progress, keep=settings.keep
            )
        return requests.measure(
            name,
            path,
            x,
            target=target,
            repeats=1,
            progress=settings.progress,
            weights="random, seed 0",
            keep=settings.keep,
        )


def _benchmark(
    what: str, shape: Shape, minutes: float, memory_gb: float, version: int = 1, suite: bool = True
) -> Benchmark:
    measures = {
        "compile": "compile time by stage, memory, size and predicted time of the circuit",
        "block": "the middle block at true shape and levels, encrypted; all blocks as projected_* figures",
        "request": "one request of an encoder: evaluate, total, error, efficiency, by operator",
    }
    name = f"{what}-{shape.blocks}x{shape.width}x{shape.tokens}"
    return Benchmark(
        name=name,
        version=version,
        group="encrypted",
        measures=measures[what],
        conditions=f"{shape.blocks} blocks, d = {shape.width}, {shape.heads} heads, {shape.tokens} tokens, ff = {4 * shape.width}, "
        "random weights, 128 bits",
        minutes=minutes,
        memory_gb=memory_gb,
        run=partial(_encoder, what=what, name=name, shape=shape),
        show=None if what == "compile" else "benchmarks.request_show:request",
        suite=suite,
    )


SMALL = Shape(blocks=2, width=128, heads=4, tokens=32)
LONG = Shape(blocks=2, width=128, heads=4, tokens=128)  # BERT-Tiny's
MIDDLE = Shape(blocks=4, width=256, heads=8, tokens=64)
LARGE = Shape(blocks=6, width=512, heads=8, tokens=128)

BENCHMARKS = (
    _benchmark("request", SMALL, 4, 16),
    _benchmark("request", LONG, 5, 16, version=2),
    _benchmark("request", MIDDLE, 25, 22),
    _benchmark("compile", LARGE, 6, 8),
    _benchmark("block", LARGE, 30, 22, version=2),
    _benchmark("request", LARGE, 90, 22, suite=False),  # there by one block
)
