"""Refreshes in a lowered circuit: prices of its ops from a cost table, a placement, and the op list with refresh ops and levels.

A refresh op takes the value and gives its copy; `kind` is plain, sparse (with `slots`) or pair. A pair is two ops, one for each
copy: the first argument of each is what it copies, the second is the other one, and one refresh serves both.

Linear maps of one value share their rotations if they stand at one level. The placement does not know this: afterwards they
are brought to the highest level of theirs, as `passes.levels` does, and what they share makes the whole circuit's trace a
little cheaper than the predicted seconds.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from he_backend.base import LevelError, ParamsError
from he_backend.circuit import Circuit, Op
from he_backend.kernels import depth
from he_backend.params import Params
from he_backend.trace import trace

from .cost import CostTable
from .lower import Lowered
from .passes.levels import SHARED_BABIES
from .placement import place
from .placement_check import check
from .placement_groups import Groups, group, reordered
from .placement_problem import Placement, Problem, RefreshTimes, Site, Step, peak_bytes, site_seconds

Counts = list[tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class Refreshing:
    """What a refresh does under some parameters, as measured.

    level  of a refreshed ciphertext
    start  lowest level at which a refresh may run (StC-first keeps the levels of its slots-to-coefficients step)
    times  seconds by kind
    loss   levels that readers of a copy spend which do not absorb its scale; only halves of pairs have another one
    """

    level: int
    start: int
    times: RefreshTimes

    @property
    def loss(self) -> int:
        return 0 if self.times.pair is None else 1


def place_refreshes(
    build: Lowered,
    params: Params,
    table: CostTable,
    refreshing: Refreshing,
    *,
    top: int | None = None,
    max_bytes: int | None = None,
    allowed: Collection[int] | None = None,
    method: str = "auto",
    seconds: float = 40.0,
) -> tuple[Lowered, Placement]:
    """The same program with refresh ops and the level of every op.

    Like values are treated alike, which makes the search a small one (`placement_groups`), unless there is a cap on memory: that
    may want them treated differently. With pairs, like values are brought together, so that the first waits for its partner.

    Args:
        params: whose ring and key switching the ops are priced for.
        top: highest level of an input; None for all that the parameters have.
        max_bytes: cap on the ciphertexts alive at once.
        allowed: ops whose values may be refreshed, those that stay within [-1, 1]; None for all.
        method, seconds: of the search, see `placement.place`.

    Returns:
        The program, and the placement that it follows; its step v is op v of `build` (with pairs: in another order).

    Raises:
        LevelError, ParamsError: see `placement.place`; also where the parameters have fewer levels than an input or a refresh is to have.
    """
    problem = as_problem(build, params, table, refreshing, top=top, max_bytes=max_bytes, allowed=allowed)
    if max_bytes is None:
        groups = grouped(build, problem)
        if refreshing.times.pair is not None:
            build = in_order(build, groups.order)
            problem = reordered(problem, groups.order)
            groups = grouped(build, problem)
        placement = groups.expand(place(groups.small, method=method, seconds=seconds))
    else:
        placement = place(problem, method=method, seconds=seconds)
    placement = _together(build, problem, placement)
    return rewrite(build, placement, refreshing), placement


def as_problem(
    build: Lowered,
    params: Params,
    table: CostTable,
    refreshing: Refreshing,
    *,
    top: int | None = None,
    max_bytes: int | None = None,
    allowed: Collection[int] | None = None,
) -> Problem:
    """The placement problem of a program: one step an op, priced at every level that the parameters have."""
    top = params.levels if top is None else top
    if max(top, refreshing.level) > params.levels:
        raise ParamsError(
            f"inputs of level {top} and refreshes to level {refreshing.level} need as many levels; {params.name} has {params.levels}"
        )
    pending = _pending(build)
    known: dict[Hashable, tuple[float, ...]] = {}
    steps = tuple(
        Step(
            id=op.id,
            args=op.args,
            depth=depth(op, build.arrays, params.slots),
            seconds=_one_higher(op_seconds(op, build, params, table, known), op, pending),
            absorbs=op.kind == "linear",
            may_refresh=op.kind not in ("input", "output") and (allowed is None or op.id in allowed),
            slots=period(build.arrays[op.layout]) if op.layout else 0,
        )
        for op in build.ops
    )
    return Problem(
        steps=steps,
        top=top,
        refresh_level=refreshing.level,
        refresh_from=refreshing.start,
        copy_loss=refreshing.loss,
        times=refreshing.times,
        max_bytes=max_bytes,
        limb_bytes=params.ciphertext_bytes(0),
    )


def grouped(build: Lowered, problem: Problem) -> Groups:
    """A program's problem with like ops as one step; see `placement_groups`."""
    return group(problem, [f"sum {op.source}" if op.kind == "add" else f"{op.kind} {op.source}" for op in build.ops])


def in_order(build: Lowered, order: Sequence[int]) -> Lowered:
    """The program with its ops in another order, renumbered."""
    place_of = {v: i for i, v in enumerate(order)}
    ops = tuple(
        replace(build.ops[v], id=i, args=tuple(place_of[a] for a in build.ops[v].args)) for i, v in enumerate(order)
    )
    return replace(build, ops=ops, tensors={place_of[v]: held for v, held in build.tensors.items()})


def op_seconds(
    op: Op, build: Lowered, params: Params, table: CostTable, known: dict[Hashable, tuple[float, ...]] | None = None
) -> tuple[float, ...]:
    """Seconds of one op by the level of its result, one thread, plaintexts encoded ahead; never falling with the level.

    Args:
        known: prices under the same parameters, by what they depend on; it grows.
    """
    if op.kind in ("input", "output"):
        return (0.0,) * (params.levels + 1)
    known = {} if known is None else known
    key = _shape(op)
    if key not in known:
        counts = _counts(op, build, params)
        row = [
            sum(times * table.seconds(name, params, at + level) for name, at, times in counts)
            for level in range(params.levels + 1)
        ]
        # More limbs are more work: where a measured table says otherwise, it is its noise.
        known[key] = tuple(float(t) * table.contention for t in np.maximum.accumulate(row))
    return known[key]


def _shape(op: Op) -> Hashable:
    """All that the primitives of an op depend on; which array a constant is does not matter."""
    attrs = {k: v for k, v in op.attrs.items() if k not in ("weights", "array")}
    if attrs.get("bias") is not None:
        attrs["bias"] = "some"
    return op.kind, len(set(op.args)), json.dumps(attrs, sort_keys=True)


def _counts(op: Op, build: Lowered, params: Params) -> Counts:
    """Primitives of an op: (name, level of its argument above that of the op's result, how often).

    The op is traced alone, once: at another level it has the same primitives, each so many levels higher.
    """
    names = {a: i for i, a in enumerate(dict.fromkeys(op.args))}
    start = depth(op, build.arrays, params.slots)
    inputs = [Op(id=i, kind="input", args=(), attrs={"name": "x", "part": i}, level=start) for i in names.values()]
    n = len(inputs)
    alone = Circuit(
        params=params,
        ops=(
            *inputs,
            replace(op, id=n, args=tuple(names[a] for a in op.args), level=0),
            Op(id=n + 1, kind="output", args=(n,), attrs={"name": "y", "part": 0}),
        ),
        arrays=build.arrays,
        client_arrays={},
        inputs=(),
        outputs=(),
        keys={},
        relin_level=-1,
    )
    traced = trace(alone)
    sums = "weighted_sum_extended" if any(m.op == "weighted_sum" and m.extended for m in traced.nodes) else "mul_plain"
    return [
        (sums if name == "weighted_sum" else name, at, times)
        for (name, at), times in traced.counts().items()
        if name != "input"
    ]


def _pending(build: Lowered) -> set[int]:
    """Ops whose result has a rescale pending, as the trace leaves it to sums and rotations."""
    pending: set[int] = set()
    for op in build.ops:
        product = op.kind in ("linear", "mul", "polynomial")
        if product or (op.kind in ("add", "sub", "add_plain", "rotate", "rotate_sum") and set(op.args) <= pending):
            pending.add(op.id)
    return pending


def _one_higher(row: tuple[float, ...], op: Op, pending: set[int]) -> tuple[float, ...]:
    """Prices of an op, those of rotations a level higher where the rescale of what they rotate is pending."""
    late = op.kind in ("rotate", "rotate_sum") and set(op.args) <= pending
    return (*row[1:], row[-1]) if late else row


def period(layout: np.ndarray) -> int:
    """Slots after which a value of this layout repeats; 0 if it does not, or if some slots hold nothing known."""
    if (layout < 0).any():
        return 0
    n = 1
    while n < layout.size:
        if np.array_equal(layout.reshape(-1, n), np.broadcast_to(layout[:n], (layout.size // n, n))):
            return n
        n *= 2
    return 0


def _together(build: Lowered, problem: Problem, placement: Placement) -> Placement:
    """The placement with the ciphertexts of an input at one level, as they are encrypted alike, and with linear maps that share
    rotations at one: all rise to the highest level of theirs, which their argument has; where that breaks the memory cap, the
    inputs alone. What a step keeps goes out at the level at which it came in, as high as the sum has that it is taken from.
    """
    inputs: dict[str, list[int]] = {}
    for op in build.ops:
        if op.kind == "input":
            inputs.setdefault(op.attrs["name"], []).append(op.id)
    outputs = [op for op in build.ops if op.kind == "output" and op.attrs["name"] in inputs]
    maps: dict[tuple[int, bool], list[int]] = {}
    for op in build.ops:
        if op.kind == "linear" and len({b for _, terms in op.attrs["plan"] for b, _ in terms}) > SHARED_BABIES:
            maps.setdefault((op.args[0], (op.id, op.args[0]) in placement.refreshed), []).append(op.id)
    for groups in ([*inputs.values(), *maps.values()], inputs.values()):
        levels = list(placement.levels)
        for together in groups:
            for v in together:
                levels[v] = max(levels[w] for w in together)
        for op in outputs:
            levels[op.id] = levels[inputs[op.attrs["name"]][op.attrs["part"]]]
            if (has := levels[op.args[0]]) < levels[op.id]:
                raise LevelError(
                    f"{op.attrs['name']!r} comes in at level {levels[op.id]} and would go out at level {has}: what is kept may be "
                    "read only through the sum that changes it"
                )
        copied = {a for _, a in placement.refreshed}
        seconds = sum(s.seconds[level] for s, level in zip(problem.steps, levels, strict=True))
        raised = replace(
            placement,
            levels=tuple(levels),
            seconds=seconds + sum(site_seconds(problem, site) for site in placement.sites),
            peak_bytes=peak_bytes(problem, levels, copied),
        )
        if problem.max_bytes is None or raised.peak_bytes <= problem.max_bytes:
            check(problem, raised)
            return raised
    raise ParamsError(
        f"inputs at one level bring the values to {raised.peak_bytes} bytes at their peak, {problem.max_bytes} are allowed; "
        "allow as many"
    )


def rewrite(build: Lowered, placement: Placement, refreshing: Refreshing) -> Lowered:
    """The program with the placement's refresh ops right behind the values, and every level set."""
    due: dict[int, list[Site]] = {}
    for site in placement.sites:
        due.setdefault(max(site.values), []).append(site)
    ops: list[Op] = []
    original: dict[int, int] = {}
    copy: dict[int, int] = {}

    def emit(op: Op, args: Sequence[int], level: int, **fields: Any) -> int:
        ops.append(replace(op, id=len(ops), args=tuple(args), level=level, **fields))
        return len(ops) - 1

    for op in build.ops:
        args = [copy[a] if (op.id, a) in placement.refreshed else original[a] for a in op.args]
        original[op.id] = emit(op, args, placement.levels[op.id])
        for site in due.get(op.id, []):
            attrs = {"kind": site.kind, **({"slots": site.slots} if site.kind == "sparse" else {})}
            for v in site.values:
                others = [original[w] for w in site.values if w != v]
                copy[v] = emit(
                    build.ops[v], [original[v], *others], refreshing.level, kind="refresh", attrs=attrs, bound=0.0
                )
    tensors = {original[op]: held for op, held in build.tensors.items()}
    return replace(build, ops=tuple(ops), tensors=tensors)
