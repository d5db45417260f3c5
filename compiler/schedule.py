"""How long a trace takes: list scheduling of its nodes on the threads of the executor, with measured costs."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass

from he_backend.kernels import Row, StepRow
from he_backend.params import Params
from he_backend.trace import Node, Trace

from .cost import CostTable, plaintext_bytes

Plaintext = tuple[Row | StepRow, int, bool]  # weights, level, whether modulo P·Q


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
        plaintext_budget: bytes for plaintexts encoded ahead; those that save most seconds a byte are kept, as the executor does.
    """
    uses: Counter[Plaintext] = Counter()
    cost: dict[Plaintext, tuple[float, int]] = {}  # seconds to encode, bytes to keep
    for n in trace.nodes:
        if n.plains:
            each = table.seconds("encode_extended" if n.extended else "encode", params, n.level)
            for plain in _plaintexts(n):
                uses[plain] += 1
                cost[plain] = each, plaintext_bytes(n, params)
    kept: set[Plaintext] = set()
    kept_bytes, prepare = 0, 0.0
    for plain in sorted(cost, key=lambda p: -uses[p] * cost[p][0] / cost[p][1]):
        if kept_bytes + cost[plain][1] <= plaintext_budget:
            kept.add(plain)
            kept_bytes += cost[plain][1]
            prepare += cost[plain][0]
    encode = {n.id: sum(cost[p][0] for p in _plaintexts(n) if p not in kept) for n in trace.nodes if n.plains}
    seconds = [(table.node(n, trace, params) + encode.get(n.id, 0.0)) * table.contention for n in trace.nodes]
    by_op: dict[int, float] = defaultdict(float)
    for n in trace.nodes:
        by_op[n.source] += seconds[n.id]
    return Forecast(
        evaluate=_makespan(trace, seconds, threads),
        work=sum(seconds),
        encode=sum(encode.values()) * table.contention,
        prepare=prepare * table.contention,
        kept=kept_bytes,
        by_op=dict(by_op),
    )


def _plaintexts(node: Node) -> list[Plaintext]:
    """What a node multiplies by or adds, numbers apart; equal ones are encoded once where they are kept."""
    return [(plain, node.level, node.extended) for plain in node.plains if not isinstance(plain, float)]


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
