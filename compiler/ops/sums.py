"""Sums and means over axes, running sums."""

from __future__ import annotations

import math

import numpy as np

from . import maps
from .reading import Call, Handler, Reading


def _sum_over(g: Reading, call: Call, x: str, axes: tuple[int, ...], *, mean: bool, keep: bool) -> None:
    """The last axis alone is `reduce_sum`, which norms and attention are recognised by; other sums are sparse maps."""
    shape = g.shapes[x]
    rank, count = len(shape), math.prod(shape[a] for a in axes)
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    final = kept if keep else tuple(n for i, n in enumerate(shape) if i not in axes)
    name = call.outputs[0]
    if axes != (rank - 1,):
        matrix = maps.sums(shape, axes, 1.0 / count if mean else 1.0)
        g.emit(call, "sparse", (x,), final, attrs={"matrix": matrix})
        return
    whole = None if keep else f"{name}.kept"
    if mean:
        total = g.emit(call, "reduce_sum", (x,), kept, name=f"{name}.sum")
        x = g.emit(call, "mul_const", (total,), kept, const=np.array(1.0 / count), name=whole)
    else:
        x = g.emit(call, "reduce_sum", (x,), kept, name=whole)
    if not keep:
        g.emit(call, "reshape", (x,), final)


def _reduce(mean: bool, square: bool = False) -> Handler:
    def handle(g: Reading, call: Call) -> None:
        x = call.inputs[0]
        rank, keep = len(g.shapes[x]), bool(call.attrs.get("keepdims", 1))
        axes = tuple(sorted(a % rank for a in g.ints(call, 1, "axes", ())))
        if square:
            attrs = {"coefficients": np.array([0.0, 0.0, 1.0]), "interval": None}
            x = g.emit(call, "polynomial", (x,), g.shapes[x], attrs=attrs, name=f"{call.outputs[0]}.square")
        if not axes and call.attrs.get("noop_with_empty_axes"):
            g.emit(call, "reshape", (x,), g.shapes[x])
            return
        _sum_over(g, call, x, axes or tuple(range(rank)), mean=mean, keep=keep)

    return handle


def _global_average_pool(g: Reading, call: Call) -> None:
    x = call.inputs[0]
    matrix = maps.sums(g.shapes[x], range(2, len(g.shapes[x])), 1.0 / math.prod(g.shapes[x][2:]))
    shape = (*g.shapes[x][:2], *(1 for _ in g.shapes[x][2:]))
    g.emit(call, "sparse", (x,), shape, attrs={"matrix": matrix})


def _cumsum(g: Reading, call: Call) -> None:
    x = call.inputs[0]
    (axis,) = g.ints(call, 1, "axis", (0,))
    matrix = maps.running_sums(
        g.shapes[x],
        axis % len(g.shapes[x]),
        exclusive=bool(call.attrs.get("exclusive")),
        reverse=bool(call.attrs.get("reverse")),
    )
    g.emit(call, "sparse", (x,), g.shapes[x], attrs={"matrix": matrix})


TABLE: dict[str, Handler] = {
    "ReduceSum": _reduce(mean=False),
    "ReduceMean": _reduce(mean=True),
    "ReduceSumSquare": _reduce(mean=False, square=True),
    "GlobalAveragePool": _global_average_pool,
    "CumSum": _cumsum,
}
