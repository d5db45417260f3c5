"""Evidence from training small models of text and of synthetic tasks, in the clear."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.registry import Benchmark, Record, Settings

TEXT = "State of the Union 1993-2019 (CC0, in this repository), every 9th address held out, BPE of 512 tokens"


def _run(topic: str) -> Callable[[Settings], Record]:
    """Return what runs a module of this package: its `measure`, at the size QUICK or its own."""

    def run(settings: Settings) -> Record:
        from importlib import import_module

        module = import_module(f"benchmarks.{topic}")
        setup = module.QUICK if settings.quick else None
        return module.measure(seeds=settings.seeds, setup=setup, keep=settings.keep, progress=settings.progress)

    return run


BENCHMARKS = (
    Benchmark(
        name="equal-budget",
        group="train",
        measures="held-out loss, bits a byte, training tokens a second and failed runs of every mixer",
        conditions=f"{TEXT}; 2 blocks, d = 64, 500 steps of 8 x 64 tokens, one thread",
        minutes=12,
        memory_gb=2,
        run=_run("equal_budget"),
        show="benchmarks.equal_budget:show",
    ),
    Benchmark(
        name="depth-stress",
        group="train",
        measures="held-out loss and failed runs against depth, with and without a normaliser",
        conditions=f"{TEXT}; 4 to 32 blocks, d = 32, three learning rates, 130 steps of 8 x 32 tokens, one thread",
        minutes=12,
        memory_gb=2,
        run=_run("depth_stress"),
        show="benchmarks.depth_stress:show",
    ),
    Benchmark(
        name="swap-ablation",
        group="train",
        measures="loss after softmax is swapped for PowerSoftmax, and after each function becomes a polynomial",
        conditions=f"{TEXT}; 2 blocks, d = 64, 2000 steps of 16 x 32 tokens, one thread",
        minutes=10,
        memory_gb=2,
        run=_run("swap_ablation"),
        show="benchmarks.swap_ablation:show",
    ),
    Benchmark(
        name="recall",
        group="train",
        measures="accuracy of in-context recall, also against shots: softmax, PowerSoftmax, polynomial",
        conditions="induction, key-value and few-shot windows; 2 blocks, d = 64, 1200 steps of 32 windows, one thread",
        minutes=12,
        memory_gb=2,
        run=_run("recall"),
        show="benchmarks.recall:show",
    ),
    Benchmark(
        name="length-scaling",
        group="train",
        measures="held-out loss by length scaling of pointwise attention, at windows up to 4 times the trained",
        conditions=f"{TEXT}; 2 blocks, d = 64, rotary positions, 1500 steps of 8 x 64 tokens, one thread",
        minutes=8,
        memory_gb=2,
        run=_run("length_scaling"),
        show="benchmarks.length_scaling:show",
    ),
    Benchmark(
        name="las-ablation",
        group="train",
        measures="accuracy on ListOps-lite and sequential digits and, as a control, language loss: local, smooth, both, neither",
        conditions=f"ListOps of 8 to 48 tokens; MNIST-5k at 7 x 7, if fetched; {TEXT}; 2 blocks, d = 32, "
        "600 steps of 16 windows, one thread",
        minutes=10,
        memory_gb=2,
        run=_run("las"),
        show="benchmarks.las:show",
    ),
)
