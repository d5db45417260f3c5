"""Convolutions and average pools in any number of dimensions."""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse

from . import maps
from .maps import Shape
from .reading import Call, Handler, Reading


def _geometry(call: Call, size: Shape, kernel: Shape) -> tuple[Shape, Shape, Shape, Shape, Shape]:
    """Strides, dilations, pads before and after, and the size of the result, one number each spatial axis."""
    rank = len(size)
    strides, dilations = call.ints("strides", [1] * rank), call.ints("dilations", [1] * rank)
    pads = call.ints("pads", [0] * (2 * rank))
    begins, ends = list(pads[:rank]), list(pads[rank:])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = call.attrs.get("auto_pad", "NOTSET")
    if auto == "VALID":
        begins, ends = [0] * rank, [0] * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        for i, n in enumerate(size):
            total = max(0, (-(-n // strides[i]) - 1) * strides[i] + reach[i] - n)
            small, large = total // 2, total - total // 2
            begins[i], ends[i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    out = []
    for i, n in enumerate(size):
        room = n + begins[i] + ends[i] - reach[i]
        if room < 0:
            raise call.fail(f"has a window of {reach[i]} on {n + begins[i] + ends[i]} elements of axis {i + 2}")
        steps = -(-room // strides[i]) if call.attrs.get("ceil_mode") else room // strides[i]
        # Rounded up, a window that starts in the padding behind does not count. Rounded down it does: a kernel of 1 in a
        # padded, strided convolution reads nothing there but the bias.
        if call.attrs.get("ceil_mode") and steps * strides[i] >= n + begins[i]:
            steps -= 1
        out.append(steps + 1)
    return strides, dilations, tuple(begins), tuple(ends), tuple(out)


def _conv(g: Reading, call: Call) -> None:
    x, shape = call.inputs[0], g.shapes[call.inputs[0]]
    weight, bias = g.constant(call, 1, "weight"), g.constant(call, 2, "bias")
    assert weight is not None
    groups = int(call.attrs.get("group", 1))
    if weight.ndim != len(shape) or weight.shape[1] * groups != shape[1] or len(weight) % groups:
        raise call.fail(f"has a weight of shape {weight.shape} in {groups} groups on an input of shape {shape}")
    strides, dilations, begins, _, out = _geometry(call, shape[2:], weight.shape[2:])
    matrix = maps.convolution(
        shape,
        weight,
        strides=strides,
        dilations=dilations,
        begins=begins,
        out=out,
        groups=groups,
        source=call.source,
    )
    flat = None if bias is None else np.tile(np.repeat(bias, math.prod(out)), shape[0])
    g.emit(call, "sparse", (x,), (shape[0], len(weight), *out), attrs={"matrix": matrix}, bias=flat)


def _average_pool(g: Reading, call: Call) -> None:
    """The mean of each window, of what lies inside the image or, with count_include_pad, inside the padding too."""
    x, shape = call.inputs[0], g.shapes[call.inputs[0]]
    size, kernel = shape[2:], call.ints("kernel_shape", ())
    strides, dilations, begins, ends, out = _geometry(call, size, kernel)
    at, inside = maps.windows(size, kernel, strides, dilations, begins, out)
    counted = inside
    if call.attrs.get("count_include_pad"):
        padded = tuple(n + b + e for n, b, e in zip(size, begins, ends, strict=True))
        _, counted = maps.windows(padded, kernel, strides, dilations, (0,) * len(size), out)
    rows, taps = np.nonzero(inside)
    values = (1.0 / counted.sum(1))[rows]
    one = sparse.csr_matrix((values, (rows, at[rows, taps])), shape=(len(inside), math.prod(size)))
    matrix = sparse.kron(sparse.identity(shape[0] * shape[1]), one, format="csr")
    g.emit(call, "sparse", (x,), (*shape[:2], *out), attrs={"matrix": matrix})


TABLE: dict[str, Handler] = {"Conv": _conv, "AveragePool": _average_pool}
