"""How long a trace takes: list scheduling of its nodes on the threads of the executor, with measured costs."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

from he_backend.params import Params
from he_backend.trace import Trace

from .cost import CostTable, plaintext_bytes


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted seconds.

    evaluate   wall time of one evaluation; work is its thread-seconds, encode the part of them spent on plaintexts not kept ready
    prepare    thread-seconds to encode the plaintexts that are kept
    kept       bytes of the plaintexts that are kept
    by_op      thread-seconds by circuit op
    """

    evaluate: float
    work: float
    encode: float
    prepare: float
    kept: int
    by_op: dict[int, float]


def forecast(trace: Trace, params: Params, table: CostTable, *, threads: int, plaintext_budget: int) -> Forecast:
    """Predict one evaluation.

    Args:
        plaintext_budget: bytes for plaintexts encoded ahead; those that save most seconds a byte are kept.
    """
    encode = {n.id: table.encodings(n, params) for n in trace.nodes if n.plains}
    sizes = {
        n.id: plaintext_bytes(n, params) * sum(not isinstance(p, float) for p in n.plains)
        for n in trace.nodes
        if n.plains
    }
    kept_seconds = kept_bytes = 0.0
    for node in sorted((i for i in encode if sizes[i]), key=lambda i: -encode[i] / sizes[i]):
        if kept_bytes + sizes[node] <= plaintext_budget:
            kept_bytes += sizes[node]
            kept_seconds += encode[node]
            encode[node] = 0.0
    seconds = [(table.node(n, trace, params) + encode.get(n.id, 0.0)) * table.contention for n in trace.nodes]
    by_op: dict[int, float] = defaultdict(float)
    for n in trace.nodes:
        by_op[n.source] += seconds[n.id]
    return Forecast(
        evaluate=_makespan(trace, seconds, threads),
        work=sum(seconds),
        encode=sum(encode.values()) * table.contention,
        prepare=kept_seconds * table.contention,
        kept=int(kept_bytes),
        by_op=dict(by_op),
    )


def _makespan(trace: Trace, seconds: list[float], threads: int) -> float:
    """The executor's policy: a free thread takes the ready node of lowest id."""
    waiting = [len(set(n.args)) for n in trace.nodes]
    readers: dict[int, list[int]] = defaultdict(list)
    for n in trace.nodes:
        for a in set(n.args):
            readers[a].append(n.id)
    ready = [n.id for n in trace.nodes if not n.args]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < threads:
            node = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[node], node))
        now, done = heapq.heappop(running)
        for reader in readers[done]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return now
