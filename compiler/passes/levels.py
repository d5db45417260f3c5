"""Levels: every op runs as low as what reads its result allows, because a primitive's cost falls with the level.

need(op) = max over readers of need(reader) + depth(reader); outputs need 0. Linear maps of one value are kept at one level, the
highest of theirs, because they then share their rotations. So are the ciphertexts of one input, which are encrypted alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from he_backend.circuit import Op
from he_backend.container import Arrays
from he_backend.kernels import depth

SHARED_BABIES = 4  # linear maps with fewer baby steps have little to share


def assign_levels(ops: Sequence[Op], arrays: Arrays, slots: int) -> tuple[Op, ...]:
    """The same ops with the lowest possible levels."""
    depths = [depth(op, arrays, slots) for op in ops]
    level = [0] * len(ops)
    shared: dict[int, int] = {}  # value -> level at which its linear maps read it
    for _ in range(2):  # the second round applies the shared levels found in the first
        level = [0] * len(ops)
        for op in reversed(ops):
            if shares_rotations(op):
                level[op.id] = max(level[op.id], shared.get(op.args[0], 0) - 1)
            for a in op.args:
                level[a] = max(level[a], level[op.id] + depths[op.id])
        for op in ops:
            if shares_rotations(op):
                shared[op.args[0]] = max(shared.get(op.args[0], 0), level[op.id] + 1)
    inputs: dict[str, int] = {}
    for op in ops:
        if op.kind == "input":
            inputs[op.attrs["name"]] = max(inputs.get(op.attrs["name"], 0), level[op.id])
    for op in ops:
        if op.kind == "input":
            level[op.id] = inputs[op.attrs["name"]]
    for op in ops:
        if op.kind == "output" and op.attrs["name"] in inputs:  # a state goes out at the level at which it came in
            level[op.id] = level[op.args[0]]
    return tuple(replace(op, level=level[op.id]) for op in ops)


def top_level(ops: Sequence[Op]) -> int:
    """The highest level of an op, which is an input's: the depth of a circuit that refreshes nothing."""
    return max(op.level for op in ops)


def shares_rotations(op: Op) -> bool:
    """Whether a linear map has so many baby steps that others of the same value should be at its level."""
    return op.kind == "linear" and len({b for _, terms in op.attrs["plan"] for b, _ in terms}) > SHARED_BABIES
