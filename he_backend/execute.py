"""Run a circuit: its primitives on a few threads, values freed after their last use, weights encoded ahead in a budget.

The libraries release the interpreter lock, so that plain threads over independent primitives use all cores, better than
parallelism inside a primitive does (measured: 2.0 against 1.5 on 2 cores). Ready primitives run in the trace's order, which
keeps few values alive.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import heap, refresh
from .base import Array, HEError, LevelError, ManifestError, MissingKeyError, ScaleError
from .circuit import Circuit
from .kernels import StepRow
from .liveness import live_bytes, value_bytes
from .scales import SCALE_TOLERANCE, STATE_DRIFT, assign_scales, foretold
from .trace import Node, cost_name, trace

Progress = Callable[[int, int, str], None]
Part = tuple[str, int]  # (tensor name, ciphertext number)
SLACK = 1.5  # memory of a run over its values alive at once: what threads work in, and gaps of the heap (measured: 1.4)
ENCODED = ("mul_plain", "add_plain", "weighted_sum")


class Cancelled(HEError):  # noqa: N818, it is no error
    """The caller's event was set; the evaluation stopped between two primitives."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where a run's time went; seconds are thread-seconds but for `wall_s`.

    ops         one row a circuit op: op, kind, source, level, seconds, primitives {name: seconds}
    primitives  seconds by primitive; "encode" is the part that was not done ahead
    counts      how often each ran; weighted_sum counts its terms
    calls       one row an (op, primitive, level): op, primitive, level, count, seconds, fastest (processor seconds of one call;
                a term of a sum is one). Names as in cost tables; the level is that of the first argument, of an encoding its own
    max_live_bytes   largest total of ciphertexts alive at once, computed from limbs
    peak_rss_bytes   the process's high-water mark so far
    """

    wall_s: float
    threads: int
    ops: tuple[dict[str, Any], ...]
    primitives: Mapping[str, float]
    counts: Mapping[str, int]
    calls: tuple[dict[str, Any], ...]
    max_live_bytes: int
    peak_rss_bytes: int
    encoded_ahead: int
    encoded_during: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """Outputs by (name, part), the exact scale of each, and timing."""

    outputs: dict[Part, Any]
    scales: dict[Part, float]
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` encoded: `done` of `total` distinct plaintexts, in `bytes`; `seconds_saved` is an estimate a run."""

    done: int
    total: int
    bytes: int
    total_bytes: int
    seconds_saved: float


def scale_tolerance(circuit: Circuit, moduli: Sequence[int]) -> float:
    """Largest relative difference of the scales of a sum: where the promise knew other primes than these, one that moves an output by
    no more than the promised error.
    """
    if list(moduli) == foretold(circuit.params):
        return SCALE_TOLERANCE
    largest = max((signature.bound for signature in circuit.outputs), default=0.0)
    if not circuit.error_bound or not largest:
        return SCALE_TOLERANCE  # nothing is promised
    return min(SCALE_TOLERANCE, circuit.error_bound / largest)


class Executor:
    """One circuit on one evaluator. Several runs may follow each other; weights stay encoded between them.

    Args:
        plaintext_budget: bytes of encoded weights that `prepare` may keep.

    Raises:
        LevelError: the circuit does not fit its parameters.
        ScaleError: with the evaluator's primes, a sum breaks the promised error; see `scale_tolerance`.
    """

    def __init__(self, circuit: Circuit, evaluator: Any, *, threads: int = 2, plaintext_budget: int = 2 << 30) -> None:
        self.circuit, self.evaluator, self.threads, self.budget = circuit, evaluator, threads, plaintext_budget
        self.trace = trace(circuit, capabilities=evaluator.capabilities)
        tolerance = scale_tolerance(circuit, evaluator.moduli)
        self.scales = assign_scales(self.trace, evaluator.moduli, evaluator.scale, tolerance=tolerance)
        self.output_scales = {part: self.scales.result[n] for part, n in self.trace.outputs.items()}
        self._check_states()
        self._encoded: dict[Hashable, Any] = {}
        self._prepared = False

    def _check_states(self) -> None:
        """What a step leaves must be what the next one takes."""
        for (name, part), level in self.circuit.state_parts.items():
            n, gone = self.trace.inputs.get((name, part)), self.trace.outputs.get((name, part))
            found = [self.trace.nodes[i].level if i is not None else None for i in (n, gone)]
            if found != [level, level]:
                raise LevelError(
                    f"state {name!r} comes in at level {found[0]} and goes out at level {found[1]}; it is declared at {level}"
                )
            gap = abs(self.output_scales[name, part] / self.evaluator.scale - 1.0)
            if gap > STATE_DRIFT:
                raise ScaleError(
                    f"state {name!r} goes out at a scale that differs by {gap:.2g} from the one at which it comes in; "
                    f"{STATE_DRIFT:.0e} is rounding: compile the circuit again"
                )

    # ---- keys and plaintexts

    def check_keys(self) -> None:
        """Compare the keys that the circuit needs with those that the evaluator holds.

        Raises:
            MissingKeyError: names up to eight of the missing rotations, with both levels.
        """
        have: Mapping[int, int] | None = getattr(self.evaluator, "key_levels", None)
        if have is None:
            return  # an evaluator that needs none
        missing = {k: level for k, level in self.trace.keys.items() if have.get(k, -1) < level}
        if missing:
            some = ", ".join(
                f"{k} (needs level {level}, has {have.get(k, 'none')})" for k, level in list(missing.items())[:8]
            )
            raise MissingKeyError(
                f"{len(missing)} of {len(self.trace.keys)} rotation keys are missing or too low: {some}; run keygen for this circuit"
            )
        if self.evaluator.relin_level < self.trace.relin_level:
            raise MissingKeyError(
                f"relinearisation needs a key for level {self.trace.relin_level}, loaded is {self.evaluator.relin_level}"
                " (-1: none); run keygen for this circuit"
            )
        if any(node.op.startswith("refresh") for node in self.trace.nodes):
            self.evaluator.check_refresh_keys()

    def _key(self, node: Node, row: Any) -> Hashable:
        return (row, node.level, self.scales.plain[node.id], node.extended)

    def _limbs(self, node: Node) -> int:
        params = self.circuit.params
        return params.limbs(node.level) + (params.special_limbs if node.extended else 0)

    def prepare(self, progress: Progress | None = None) -> Prepared:
        """Encode plaintexts until the budget is full, those first that save most time a byte."""
        uses: Counter[Hashable] = Counter()
        jobs: dict[Hashable, tuple[Node, Any]] = {}
        for node in self.trace.nodes:
            if node.op in ENCODED:
                for row in node.plains:
                    if isinstance(row, StepRow):
                        continue
                    uses[self._key(node, row)] += 1
                    jobs[self._key(node, row)] = (node, row)
        limb_bytes = 8 << self.circuit.params.log_n

        def seconds(limbs: int) -> float:
            # An FFT over all slots, then a transform a limb: about 4 + 0.8 limbs milliseconds at N = 2^16 (measured).
            return (4.0 + 0.8 * limbs) * 2.0 ** (self.circuit.params.log_n - 16) / 1000

        def gain(key: Hashable) -> float:
            limbs = self._limbs(jobs[key][0])
            return -uses[key] * seconds(limbs) / limbs

        chosen, used = [], 0
        for key in sorted(jobs, key=gain):
            size = self._limbs(jobs[key][0]) * limb_bytes
            if used + size <= self.budget:
                chosen.append(key)
                used += size
        done = [0]
        lock = threading.Lock()

        def work(key: Hashable) -> None:
            if key not in self._encoded:
                self._encoded[key] = self._encode(*jobs[key])
            with lock:
                done[0] += 1
                if progress:
                    progress(done[0], len(chosen), self.circuit.ops[jobs[key][0].source].source)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, chosen))
        self.evaluator.prepare(refresh=any(node.op.startswith("refresh") for node in self.trace.nodes))
        self._prepared = True
        self.reserve()
        return Prepared(
            done=len(chosen),
            total=len(jobs),
            bytes=used,
            total_bytes=sum(self._limbs(node) for node, _ in jobs.values()) * limb_bytes,
            seconds_saved=sum(uses[k] * seconds(self._limbs(jobs[k][0])) for k in chosen),
        )

    def reserve(self) -> None:
        """Take a run's memory from the system, once weights and keys are here, which would be put there."""
        with suppress(MissingKeyError):
            self.check_keys()
            if self._prepared:
                params, size = self.circuit.params, live_bytes(self.trace, self.circuit.params)
                refreshes = any(node.op.startswith("refresh") for node in self.trace.nodes)
                heap.reserve(int(SLACK * (size + (refresh.working_bytes(params) if refreshes else 0))))

    def _encode(self, node: Node, row: Any) -> Any:
        if isinstance(row, float):
            row = _Constant(row, self.circuit.params.slots)
        return self.evaluator.encode(
            row.slots(), level=node.level, scale=self.scales.plain[node.id], extended=node.extended
        )

    # ---- running

    def run(
        self,
        inputs: Mapping[Part, Any],
        *,
        step: int = 0,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Run:
        """Evaluate the circuit.

        Args:
            inputs: ciphertexts by (tensor name, part), each at the level of the circuit's signature; states among them.
            step: number of the step, for circuits with `steps`.
            progress: called from the workers with (primitives done, primitives in all, ONNX source of the last one).
            cancel: stops the run between two primitives.

        Raises:
            MissingKeyError, ManifestError, LevelError: before anything runs.
            Cancelled: the event was set.
            HEError: a primitive failed; the message names the circuit op and its ONNX source.
        """
        self.check_keys()
        self._check_inputs(inputs)
        if not 0 <= step < max(1, self.circuit.steps):
            raise ManifestError(f"step {step}: the circuit has steps 0 to {max(1, self.circuit.steps) - 1}")
        state = _State(self, inputs, progress, cancel, step)
        start = time.perf_counter()
        workers = [threading.Thread(target=state.work, name=f"he-{i}") for i in range(self.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if state.error is not None:
            raise state.error
        outputs = {part: state.values[n] for part, n in self.trace.outputs.items()}
        return Run(
            outputs=outputs, scales=dict(self.output_scales), timing=self._timing(state, time.perf_counter() - start)
        )

    def _check_inputs(self, inputs: Mapping[Part, Any]) -> None:
        if set(inputs) != set(self.trace.inputs):
            ours, theirs = sorted(self.trace.inputs), sorted(inputs)
            raise ManifestError("the request's ciphertexts are not the circuit's inputs", {"inputs": (ours, theirs)})
        for part, n in self.trace.inputs.items():
            level, expected = self.evaluator.level(inputs[part]), self.trace.nodes[n].level
            if level != expected:
                raise LevelError(
                    f"input {part[0]!r} part {part[1]} arrives at level {level}; the circuit starts at {expected}"
                )

    def _timing(self, state: _State, wall: float) -> Timing:
        by_op: dict[int, dict[str, float]] = defaultdict(dict)
        primitives: dict[str, float] = defaultdict(float)
        for (source, name), seconds in state.seconds.items():
            by_op[source][name] = seconds
            primitives[name] += seconds
        rows = []
        for op in self.circuit.ops:
            if op.id in by_op:
                parts = by_op[op.id]
                row = {"op": op.id, "kind": op.kind, "source": op.source, "level": op.level}
                rows.append({**row, "seconds": sum(parts.values()), "primitives": parts})
        return Timing(
            wall_s=wall,
            threads=self.threads,
            ops=tuple(rows),
            primitives=dict(primitives),
            counts=dict(state.counts),
            calls=tuple(
                {"op": op, "primitive": name, "level": level, "count": count, "seconds": seconds, "fastest": fastest}
                for (op, name, level), (count, seconds, fastest) in sorted(state.calls.items())
            ),
            max_live_bytes=state.max_live,
            peak_rss_bytes=heap.peak_rss(),
            encoded_ahead=state.ahead,
            encoded_during=state.counts["encode"],
        )


@dataclass(frozen=True)
class _Constant:
    value: float
    size: int

    def slots(self) -> Array:
        return np.full(self.size, self.value)


@dataclass
class _State:
    """One run: values alive, primitives ready, and what is counted. The condition guards every change of it."""

    executor: Executor
    inputs: Mapping[Part, Any]
    progress: Progress | None
    cancel: threading.Event | None
    step: int = 0
    error: BaseException | None = None
    values: dict[int, Any] = field(default_factory=dict)
    seconds: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    calls: dict[tuple[int, str, int], tuple[int, float, float]] = field(default_factory=dict)
    ahead: int = 0
    live: int = 0
    max_live: int = 0

    def __post_init__(self) -> None:
        nodes = self.executor.trace.nodes
        self.condition = threading.Condition()
        self.waiting = [len(set(n.args)) for n in nodes]
        self.users: list[list[int]] = [[] for _ in nodes]
        for n in nodes:
            for a in set(n.args):
                self.users[a].append(n.id)
        self.uses = [len(users) for users in self.users]
        for kept in self.executor.trace.outputs.values():
            self.uses[kept] += 1  # outputs are never freed
        self.parts = {n: part for part, n in self.executor.trace.inputs.items()}
        self.ready = [n.id for n in nodes if not n.args]
        heapq.heapify(self.ready)
        self.done = 0

    def work(self) -> None:
        """One worker: take the earliest ready primitive, run it, free what it used last, release its users."""
        nodes = self.executor.trace.nodes
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.ready or self.error or self.done == len(nodes))
                if self.error or not self.ready:
                    return
                node = nodes[heapq.heappop(self.ready)]
                args = [self.values[a] for a in node.args]
            try:
                if self.cancel is not None and self.cancel.is_set():
                    raise Cancelled(f"cancelled after {self.done} of {len(nodes)} primitives")
                value = self._timed(node, args)
                del args
                self._finish(node, value)
                if self.progress:
                    self.progress(self.done, len(nodes), self.executor.circuit.ops[node.source].source)
            except BaseException as error:
                with self.condition:
                    self.error = self.error or self._named(error, node)
                    self.condition.notify_all()
                return

    def _finish(self, node: Node, value: Any) -> None:
        ex = self.executor
        with self.condition:
            self.values[node.id] = value
            self.live += value_bytes(node, ex.circuit.params)
            self.max_live = max(self.max_live, self.live)
            for a in set(node.args):
                self.uses[a] -= 1
                if self.uses[a] == 0:
                    del self.values[a]
                    self.live -= value_bytes(ex.trace.nodes[a], ex.circuit.params)
            for user in self.users[node.id]:
                self.waiting[user] -= 1
                if self.waiting[user] == 0:
                    heapq.heappush(self.ready, user)
            self.done += 1
            self.condition.notify_all()

    def _named(self, error: BaseException, node: Node) -> BaseException:
        if isinstance(error, Cancelled) or not isinstance(error, Exception):
            return error
        op = self.executor.circuit.ops[node.source]
        kind = type(error) if isinstance(error, HEError) else HEError
        named = kind(f"op {op} failed in {node.op} (primitive {node.id}, level {node.level}): {error}")
        named.__cause__ = error
        return named

    def _timed(self, node: Node, args: list[Any]) -> Any:
        encoding = [0.0, 0.0]
        start, busy = time.perf_counter(), time.thread_time()
        value = self._call(node, args, encoding)
        seconds = time.perf_counter() - start - encoding[0]
        busy = time.thread_time() - busy - encoding[1]
        with self.condition:
            if node.op != "input":
                units = len(node.args) if node.op == "weighted_sum" else 1
                self.seconds[node.source, node.op] += seconds
                self.counts[node.op] += units
                level = self.executor.trace.nodes[node.args[0]].level
                self._count(node, cost_name(node), level, units, seconds, busy)
            if encoding[0]:
                self.seconds[node.source, "encode"] += encoding[0]
        return value

    def _count(self, node: Node, name: str, level: int, units: int, seconds: float, busy: float) -> None:
        """Add one call; `busy` is the processor time of its thread, which other programs do not lengthen."""
        count, total, fastest = self.calls.get((node.source, name, level), (0, 0.0, float("inf")))
        self.calls[node.source, name, level] = (
            count + units,
            total + seconds,
            min(fastest, seconds / units, busy / units),
        )

    def _plain(self, node: Node, row: Any, encoding: list[float]) -> Any:
        row = row.at(self.step) if isinstance(row, StepRow) else row
        ready = self.executor._encoded.get(self.executor._key(node, row))
        if ready is not None:
            with self.condition:
                self.ahead += 1
            return ready
        start, busy = time.perf_counter(), time.thread_time()
        plain = self.executor._encode(node, row)
        seconds, busy = time.perf_counter() - start, time.thread_time() - busy
        encoding[0] += seconds
        encoding[1] += busy
        with self.condition:
            self.counts["encode"] += 1
            self._count(node, "encode_extended" if node.extended else "encode", node.level, 1, seconds, busy)
        return plain

    def _call(self, node: Node, args: list[Any], encoding: list[float]) -> Any:
        ev = self.executor.evaluator
        scale = self.executor.scales.plain[node.id]
        match node.op:
            case "input":
                return self.inputs[self.parts[node.id]]
            case "weighted_sum":

                def terms() -> Iterator[tuple[Any, Any]]:
                    for a, row in zip(args, node.plains, strict=True):
                        yield a, self._plain(node, row, encoding)

                return ev.weighted_sum(terms())
            case "mul_plain" | "add_plain":
                return getattr(ev, node.op)(args[0], self._plain(node, node.plains[0], encoding))
            case "mul_scalar" | "add_scalar":
                return getattr(ev, node.op)(args[0], node.plains[0], scale=scale)
            case "refresh_function":
                return ev.refresh_function(args[0], node.plains)
            case "rotate":
                return ev.rotate(args[0], node.k)
            case "rotate_hoisted" | "rotate_extended":
                return getattr(ev, node.op)(args[0], args[1], node.k)
            case "drop":
                return ev.drop(args[0], level=node.level)
        return getattr(ev, node.op)(*args)
