"""Ops that move elements: reshapes and transposes as they are, everything else as a sparse selection.

What an op moves is found by running it once on the flat indices of its input: Slice, Split, Pad and their like need no
arithmetic of their own here.
"""

from __future__ import annotations

import math

import numpy as np

from . import maps
from .arithmetic import with_constant
from .reading import Call, Handler, Reading
from .refuse import refusal

FLOATS = (1, 10, 11, 16)  # TensorProto.FLOAT, FLOAT16, DOUBLE, BFLOAT16


def _transpose(g: Reading, call: Call) -> None:
    shape = g.shapes[call.inputs[0]]
    perm = list(call.ints("perm", tuple(reversed(range(len(shape))))))
    g.emit(call, "transpose", (call.inputs[0],), [shape[p] for p in perm], attrs={"perm": perm})


def _reshape(g: Reading, call: Call) -> None:
    a = call.inputs[0]
    target = list(g.ints(call, 1, "shape", ()))
    if not call.attrs.get("allowzero"):
        target = [g.shapes[a][i] if n == 0 else n for i, n in enumerate(target)]
    size = math.prod(g.shapes[a])
    if -1 in target:
        target[target.index(-1)] = size // -math.prod(target)
    if math.prod(target) != size:
        raise call.fail(f"reshapes {list(g.shapes[a])}, {size} elements, to {target}")
    g.emit(call, "reshape", (a,), target)


def _flatten(g: Reading, call: Call) -> None:
    shape = g.shapes[call.inputs[0]]
    axis = int(call.attrs.get("axis", 1))
    axis += len(shape) if axis < 0 else 0
    g.emit(call, "reshape", (call.inputs[0],), (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _squeeze(g: Reading, call: Call) -> None:
    shape = g.shapes[call.inputs[0]]
    axes = [a % len(shape) for a in g.ints(call, 1, "axes", [i for i, n in enumerate(shape) if n == 1])]
    g.emit(call, "reshape", (call.inputs[0],), [n for i, n in enumerate(shape) if i not in axes])


def _unsqueeze(g: Reading, call: Call) -> None:
    shape, axes = g.shapes[call.inputs[0]], g.ints(call, 1, "axes", ())
    rank = len(shape) + len(axes)
    new, rest = {a % rank for a in axes}, iter(shape)
    g.emit(call, "reshape", (call.inputs[0],), [1 if i in new else next(rest) for i in range(rank)])


def _identity(g: Reading, call: Call) -> None:
    g.emit(call, "reshape", (call.inputs[0],), g.shapes[call.inputs[0]])


def _dropout(g: Reading, call: Call) -> None:
    training = g.constant(call, 2, "training_mode")
    if training is not None and bool(training):
        raise call.fail("is a Dropout in training mode; export the model in evaluation mode")
    _identity(g, call)


def _cast(g: Reading, call: Call) -> None:
    to = call.attrs.get("to", 1)
    ids = g.integer and call.inputs[0] == g.input
    if not ids and to not in FLOATS:
        raise call.fail("casts encrypted numbers to integers, which rounds; polynomials cannot round")
    if ids:
        g.same[call.outputs[0]] = g.input
    else:
        _identity(g, call)


def _move(g: Reading, call: Call) -> None:
    """Sum over the encrypted inputs of a selection of each, and what the op makes of constants alone."""
    moved = [i for i, name in enumerate(call.inputs) if name in g.shapes]

    def run(chosen: int | None) -> list[np.ndarray]:
        """Outputs with input `chosen` replaced by its flat indices, counted from 1, and all other numbers by 0."""
        values: list[np.ndarray | None] = []
        for i, name in enumerate(call.inputs):
            if not name:
                values.append(None)
            elif name in g.shapes:
                size = math.prod(g.shapes[name])
                flat = np.arange(1.0, size + 1) if i == chosen else np.zeros(size)
                values.append(flat.reshape(g.shapes[name]))
            else:
                value = g.constants[name]
                if value.dtype.kind == "f":
                    value = np.zeros(value.shape) if chosen is not None else value.astype(np.float64)
                values.append(value)
        return g.reference(call, values)

    constants = run(None)
    chosen = [run(i) for i in moved]
    for k, name in enumerate(call.outputs):
        if not name:
            continue
        bias = np.asarray(constants[k], dtype=np.float64)
        if not np.all(np.isfinite(bias)):
            raise call.fail(
                "puts infinite numbers beside encrypted ones; masks multiply by 0 instead, or compile with --approximate, which "
                "reads minus infinity in front of a softmax as a mask"
            )
        total = None
        for term, (i, outputs) in enumerate(zip(moved, chosen, strict=True)):
            matrix = maps.selection(outputs[k].astype(np.int64) - 1, math.prod(g.shapes[call.inputs[i]]))
            own = g.emit(
                call,
                "sparse",
                (call.inputs[i],),
                bias.shape,
                name=name if len(moved) == 1 else f"{name}.{term}",
                attrs={"matrix": matrix},
                bias=bias.reshape(-1) if term == 0 and np.any(bias) else None,
            )
            last = term + 1 == len(moved)
            total = (
                own
                if total is None
                else g.emit(call, "add", (total, own), bias.shape, name=name if last else f"{name}.sum{term}")
            )


def _gather(g: Reading, call: Call) -> None:
    table, ids = call.inputs
    if table in g.shapes and ids in g.constants:
        _move(g, call)
        return
    if table not in g.constants or ids != g.input or call.attrs.get("axis", 0) or g.constants[table].ndim != 2:
        raise call.fail("gathers with an encrypted index; only the embedding of the input is compiled")
    const = g.constants[table].astype(np.float64)
    g.emit(call, "gather", (ids,), (*g.shapes[ids], const.shape[1]), const=const)


def _pad(g: Reading, call: Call) -> None:
    """Padding by a constant, a reflection, the edge or a repetition; negative pads crop."""
    x, shape = call.inputs[0], g.shapes[call.inputs[0]]
    pads = g.ints(call, 1, "pads", ())
    value = g.constant(call, 2, "constant value")
    fill = float(call.attrs.get("value", 0.0) if value is None else value.reshape(-1)[0])
    axes = g.ints(call, 3, "axes", range(len(shape)))
    widths = [(0, 0)] * len(shape)
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = (before, after)
    index = np.arange(math.prod(shape)).reshape(shape)
    index = index[tuple(slice(max(0, -b), n - max(0, -a)) for n, (b, a) in zip(shape, widths, strict=True))]
    widths = [(max(0, b), max(0, a)) for b, a in widths]
    mode = call.attrs.get("mode", "constant")
    if mode == "constant":
        index = np.pad(index, widths, constant_values=-1)
    else:
        index = np.pad(index, widths, mode=mode)
    bias = np.where(index < 0, fill, 0.0).reshape(-1) if fill else None
    matrix = maps.selection(index, math.prod(shape))
    g.emit(call, "sparse", (x,), index.shape, attrs={"matrix": matrix}, bias=bias)


def _where(g: Reading, call: Call) -> None:
    """A selection; of a tensor and a constant, a mask and what is added to it, which a softmax is read with (passes/softmax.py)."""
    condition, yes, no = call.inputs
    if condition not in g.constants:
        raise refusal(call)
    if not g.approximate or (g.encrypted(yes) and g.encrypted(no)):
        _move(g, call)
        return
    x, other, kept = (yes, no, g.constants[condition]) if g.encrypted(yes) else (no, yes, ~g.constants[condition])
    masked = f"{call.outputs[0]}.masked"
    with_constant(g, call, "mul_const", x, kept.astype(np.float64), name=masked)
    with_constant(g, call, "add_const", masked, np.where(kept, 0.0, g.constants[other].astype(np.float64)))


TABLE: dict[str, Handler] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Gather": _gather,
    "Pad": _pad,
    "Where": _where,
    **dict.fromkeys(
        ("Slice", "Split", "Concat", "Expand", "Tile", "Trilu", "DepthToSpace", "SpaceToDepth", "GatherElements"),
        _move,
    ),
}
