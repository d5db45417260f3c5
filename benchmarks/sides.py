"""Circuits beside each other in one process: the keys and weights of all at once, requests in turns A B A B."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compiler import Compiled, Target, compile_onnx
from he_backend.execute import Timing
from he_backend.simulator import Case

from . import memory, operators, requests
from .parties import Parties, parties

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Side:
    """One circuit of several: its request, its parties, and what their runs gave, by threads.

    x     input tensor of the request
    peak  memory while keys and weights were made and the first request ran, which counts for nothing else
    """

    compiled: Compiled
    compile_s: float
    target: Target
    x: np.ndarray
    both: Parties | None = None
    peak: memory.Peak = field(default_factory=memory.Peak)
    timings: dict[int, list[Timing]] = field(default_factory=dict)
    totals: dict[int, list[float]] = field(default_factory=dict)
    results: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, samples: np.ndarray, target: Target) -> Side:
        """Compile an ONNX file for inputs [n, ...], the last of which is the request."""
        start = time.perf_counter()
        compiled = compile_onnx(path, samples[:-1], target=target)
        seconds = time.perf_counter() - start
        return cls(compiled=compiled, compile_s=seconds, target=target, x=requests.request_of(compiled, samples))

    def ask(self, threads: int, *, keep: bool = True) -> None:
        """One request on so many threads."""
        assert self.both is not None
        self.both.executor.threads = threads
        start = time.perf_counter()
        result, timing = self.both.ask({self.compiled.circuit.inputs[0].name: self.x})
        if keep:
            self.totals.setdefault(threads, []).append(time.perf_counter() - start)
            self.timings.setdefault(threads, []).append(timing)
            self.results.append(result)

    def errors(self, threads: int) -> dict[int, float]:
        """Largest error after every node, in one request more; see `operators.errors`."""
        assert self.both is not None
        circuit = self.compiled.circuit
        request = [Case(tensors={circuit.inputs[0].name: self.x})]
        return operators.errors(circuit, self.both.client, self.both.server, request, threads=threads)

    def figures(self, threads: int, errors: Mapping[int, float] | None = None) -> dict[str, Any]:
        """What its runs on so many threads say: `requests.figures`, with parameters, keys, traffic and memory."""
        both, circuit = self.both, self.compiled.circuit
        assert both is not None
        clear = requests.clear(self.compiled, self.x)
        worst = max(self.results, key=lambda result: float(np.max(np.abs(result - clear))))
        params, times = circuit.params, (self.timings[threads], self.totals[threads])
        return {
            **requests.figures(self.compiled, *times, worst, clear, target=self.target, errors=errors),
            "levels": params.levels,
            "log_n": params.log_n,
            "scale_bits": params.scale_bits,
            "digits": params.digits,
            "rotation_keys": len(circuit.keys),
            "key_bytes": both.key_bytes,
            "request_bytes": both.traffic(circuit.inputs),
            "memory_gb": self.peak.grown_gb,
            "compile_s": self.compile_s,
            "keygen_s": both.keygen_s,
            "prepare_s": both.prepare_s,
            "costs": self.compiled.plan.costs,
            "onnx_sha256": circuit.model["onnx_sha256"],
            "params": params.to_json(),
        }


@contextmanager
def opened(sides: Mapping[str, Side], threads: int, say: Say) -> Iterator[None]:
    """Make the keys and weights of all sides, one after the other, each with a request to warm up."""
    with ExitStack() as stack:
        for name, side in sides.items():
            say(f"keys and weights of {name}")
            with memory.watch() as side.peak:
                side.both = stack.enter_context(parties(side.compiled.circuit, threads=threads))
                side.ask(threads, keep=False)
        yield


def turn(sides: Mapping[str, Side], threads: Sequence[int], say: Say) -> None:
    """A request of every side, one after the other, for each number of threads."""
    for n in threads:
        for name, side in sides.items():
            say(f"{name}, {n} thread{'s' * (n > 1)}")
            side.ask(n)


def peak_gb(*peaks: memory.Peak) -> float | None:
    """The largest peak of the process; None where the system does not say."""
    known = [peak.peak_gb for peak in peaks if peak.peak_gb is not None]
    return max(known) if known else None


def ratio(over: Side, under: Side, threads: int) -> dict[str, float]:
    """Seconds of one side over those of another, of neighbouring requests: median, least, most."""
    pairs = [a.wall_s / b.wall_s for a, b in zip(over.timings[threads], under.timings[threads], strict=True)]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}
