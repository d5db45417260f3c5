"""One training step of a large model on this machine."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Record, Settings

RECIPES = {"full": ("1.4b", 256), "quick": ("tiny_cpu", 32)}  # and tokens of the window


def _measure(settings: Settings) -> Record:
    from dataclasses import asdict

    from benchmarks import records
    from training import recipes
    from training.one_step import one_step

    name, tokens = RECIPES["quick" if settings.quick else "full"]
    settings.progress(0, 1, name)
    found = asdict(one_step(recipes.load(name), tokens=tokens))
    params = {key: found.pop(key) for key in ("recipe", "batch", "tokens", "optimiser", "lr")}
    seed, threads = found.pop("seed"), found.pop("threads")
    for key in ("machine", "torch_version", "load_average"):  # the record has its own
        del found[key]
    found["peak_gb"] = found.pop("peak_bytes") / 1e9
    return records.record("one-step-1.4b", metrics=found, params=params, threads=threads, seed=seed)


BENCHMARKS = (
    Benchmark(
        name="one-step-1.4b",
        group="train",
        measures="seconds of forward, backward and update, losses before and after, peak memory of one optimiser step",
        conditions="1.4 B parameters, polynomial, bfloat16, factored optimiser, checkpointing, one window of 256 tokens, random weights",
        minutes=10,
        memory_gb=20,
        run=_measure,
    ),
)
