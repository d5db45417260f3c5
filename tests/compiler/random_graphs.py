"""Random polynomial ONNX graphs: a hypothesis strategy over programs of small tensors.

A program is a pool of tensors that grows by one op a step; the last one is the output. Sizes, axes, permutations and operands are
drawn, weights come from a seed, so that an example that fails shrinks to few ops and small shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import helper

from .models import Builder

MAX_DEGREE = 8  # of the output in the input: three levels of products

Draw = Callable[[Any], Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Value:
    """One tensor of the program."""

    name: str
    shape: Shape
    degree: int


@dataclass(frozen=True, kw_only=True)
class Program:
    """A graph, ready to be written; `ops` names its steps in order."""

    builder: Builder
    output: Value
    ops: tuple[str, ...]

    def save(self, path: Path) -> Path:
        return self.builder.save(path, self.output.name, self.output.shape)

    def __repr__(self) -> str:
        return f"{self.builder.shape} -> {', '.join(self.ops)} -> {self.output.shape}"


class Writer:
    """The pool and what the steps share: draws, weights, emitted nodes."""

    def __init__(self, shape: Shape, seed: int, draw: Draw, max_size: int) -> None:
        self.b, self.draw, self.max_size = Builder(shape, seed), draw, max_size
        self.pool = [Value(name="x", shape=shape, degree=1)]

    def op(
        self, kind: str, x: Value, *others: Any, shape: Shape, degree: int | None = None, **attributes: Any
    ) -> Value:
        name = self.b.op(kind, x.name, *others, name=f"{kind.lower()}{len(self.b.nodes)}", **attributes)
        return Value(name=name, shape=shape, degree=degree or x.degree)

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def one_of(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def weights(self, *shape: int, fan_in: int = 1) -> np.ndarray:
        return self.b.rng.normal(0, fan_in**-0.5, shape)

    def axis(self, x: Value) -> int:
        """An axis behind the leading one, which is the request."""
        return self.integer(1, len(x.shape) - 1)

    def other(self, fits: Callable[[Value], bool]) -> Value | None:
        """A second operand out of the pool, or nothing that fits."""
        found = [v for v in self.pool if fits(v)]
        return self.one_of(found[::-1]) if found else None


def _broadcastable(a: Shape, b: Shape, max_size: int) -> bool:
    try:
        return math.prod(np.broadcast_shapes(a, b)) <= max_size
    except ValueError:
        return False


def _constant(w: Writer, x: Value) -> np.ndarray:
    """A constant that broadcasts to the tensor: a number, or some of the trailing axes kept."""
    kept = w.integer(0, len(x.shape))
    shape = [n if w.draw(st.booleans()) else 1 for n in x.shape[len(x.shape) - kept :]]
    return w.b.rng.uniform(0.5, 1.5, shape) * w.one_of((1.0, -1.0))


def _with_constant(kind: str) -> Callable[[Writer, Value], Value]:
    def step(w: Writer, x: Value) -> Value:
        constant = _constant(w, x)
        if kind in ("Sub", "Add", "Mul") and w.draw(st.booleans()):
            name = w.b.constant(constant)
            y = w.b.op(kind, name, x.name)
            return Value(name=y, shape=x.shape, degree=x.degree)
        return w.op(kind, x, constant, shape=x.shape)

    return step


def _two(kind: str) -> Callable[[Writer, Value], Value | None]:
    """An elementwise op of two tensors of the pool, broadcast against each other."""

    def step(w: Writer, x: Value) -> Value | None:
        def fits(v: Value) -> bool:
            return kind != "Mul" or x.degree + v.degree <= MAX_DEGREE

        y = w.other(lambda v: fits(v) and _broadcastable(x.shape, v.shape, w.max_size))
        if y is None:
            return None
        degree = x.degree + y.degree if kind == "Mul" else max(x.degree, y.degree)
        return w.op(kind, x, y.name, shape=np.broadcast_shapes(x.shape, y.shape), degree=degree)

    return step


def _neg(w: Writer, x: Value) -> Value:
    return w.op("Neg", x, shape=x.shape)


def _square(w: Writer, x: Value) -> Value | None:
    return w.op("Mul", x, x.name, shape=x.shape, degree=2 * x.degree) if 2 * x.degree <= MAX_DEGREE else None


def _pow(w: Writer, x: Value) -> Value | None:
    if x.degree > MAX_DEGREE:
        return None
    n = w.integer(1, min(5, MAX_DEGREE // x.degree))
    return w.op("Pow", x, np.array(float(n)), shape=x.shape, degree=n * x.degree)


def _polynomial(w: Writer, x: Value) -> Value | None:
    """a x^2 + b x + c, as an exporter would spell it out."""
    if 2 * x.degree > MAX_DEGREE:
        return None
    square = _square(w, x)
    assert square is not None
    terms = w.op("Mul", square, np.array(0.3), shape=x.shape), w.op("Mul", x, np.array(0.7), shape=x.shape)
    total = w.op("Add", terms[0], terms[1].name, shape=x.shape)
    return w.op("Add", total, np.array(-0.2), shape=x.shape)


def _matmul_constant(w: Writer, x: Value) -> Value | None:
    """x W on the last axis or, for tensors of three axes and more, W x on the one before."""
    n = w.integer(1, 6)
    if len(x.shape) > 2 and w.draw(st.booleans()):
        constant = w.b.constant(w.weights(n, x.shape[-2], fan_in=x.shape[-2]))
        name = w.b.op("MatMul", constant, x.name)
        return Value(name=name, shape=(*x.shape[:-2], n, x.shape[-1]), degree=x.degree)
    batch = x.shape[1:-2] if w.draw(st.booleans()) else ()
    weight = w.weights(*batch, x.shape[-1], n, fan_in=x.shape[-1])
    return w.op("MatMul", x, weight, shape=(*x.shape[:-1], n))


def _gemm(w: Writer, x: Value) -> Value | None:
    if len(x.shape) != 2:
        return None
    n, turned = w.integer(1, 6), w.integer(0, 1)
    weight = w.weights(x.shape[1], n, fan_in=x.shape[1])
    bias = w.weights(*w.one_of(((n,), (1, n), (1,))))
    attributes = {"alpha": w.one_of((1.0, 0.5)), "beta": w.one_of((1.0, 2.0))}
    return w.op("Gemm", x, weight.T if turned else weight, bias, shape=(x.shape[0], n), transB=turned, **attributes)


def _matmul(w: Writer, x: Value) -> Value | None:
    """A product of two matrices of the pool, the second one transposed where that makes it fit."""
    if len(x.shape) < 3:
        return None

    def fits(v: Value) -> bool:
        return len(v.shape) == len(x.shape) and v.shape[:-2] == x.shape[:-2] and x.shape[-1] in v.shape[-2:]

    y = w.other(lambda v: fits(v) and x.degree + v.degree <= MAX_DEGREE)
    if y is None:
        return None
    if y.shape[-2] != x.shape[-1]:
        perm = [*range(len(y.shape) - 2), len(y.shape) - 1, len(y.shape) - 2]
        y = w.op("Transpose", y, shape=tuple(y.shape[p] for p in perm), perm=perm)
    return w.op("MatMul", x, y.name, shape=(*x.shape[:-1], y.shape[-1]), degree=x.degree + y.degree)


def _einsum(w: Writer, x: Value) -> Value | None:
    """A contraction with a constant, or of two tensors that share their first axes."""
    labels = "abcd"[: len(x.shape)]
    if w.draw(st.booleans()):
        n, label = w.integer(1, 5), w.one_of(labels[1:])
        size = x.shape[labels.index(label)]
        out = "".join(w.draw(st.permutations(labels[1:].replace(label, "z"))))
        sizes = {**dict(zip(labels, x.shape, strict=True)), "z": n}
        pair = w.one_of((f"{label}z", f"z{label}"))
        weight = w.weights(*(sizes[c] for c in pair), fan_in=size)
        shape = (x.shape[0], *(sizes[c] for c in out))
        return w.op("Einsum", x, weight, shape=shape, equation=f"{labels},{pair}->a{out}")
    y = w.other(lambda v: v.shape[:-1] == x.shape[:-1] and x.degree + v.degree <= MAX_DEGREE)
    if y is None or len(x.shape) < 3:
        return None
    second = labels[:-1] + "z"
    out = f"{labels[:-2]}{w.one_of((labels[-1] + 'z', 'z' + labels[-1]))}"
    sizes = {**dict(zip(labels, x.shape, strict=True)), "z": y.shape[-1]}
    shape = tuple(sizes[c] for c in out)
    return w.op("Einsum", x, y.name, shape=shape, degree=x.degree + y.degree, equation=f"{labels},{second}->{out}")


def _reduce(kind: str) -> Callable[[Writer, Value], Value | None]:
    def step(w: Writer, x: Value) -> Value | None:
        if len(x.shape) < 3:
            axes, keep = [len(x.shape) - 1], 1
        else:
            axes = sorted(w.draw(st.sets(st.integers(1, len(x.shape) - 1), min_size=1, max_size=2)))
            keep = 1 if len(x.shape) - len(axes) < 2 else w.integer(0, 1)
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes)
        if kind == "ReduceSum":  # axes are an input since opset 13; of a mean since opset 18, and these files have 17
            return w.op(kind, x, np.array(axes), shape=shape, keepdims=keep)
        return w.op(kind, x, shape=shape, axes=axes, keepdims=keep)

    return step


def _transpose(w: Writer, x: Value) -> Value | None:
    perm = [0, *w.draw(st.permutations(range(1, len(x.shape))))]
    return w.op("Transpose", x, shape=tuple(x.shape[p] for p in perm), perm=perm)


def _reshape(w: Writer, x: Value) -> Value:
    """Two to four axes; a divisor at a time is split off."""
    rest, shape = math.prod(x.shape), [1]
    for _ in range(w.integer(0, 2)):
        shape.append(w.one_of([n for n in range(1, rest + 1) if rest % n == 0 and n <= 8]))
        rest //= shape[-1]
    shape.append(rest)
    return w.op("Reshape", x, np.array(shape), shape=tuple(shape))


def _slice(w: Writer, x: Value) -> Value | None:
    axis = w.axis(x)
    n = x.shape[axis]
    start = w.integer(0, n - 1)
    end, step = w.integer(start + 1, n), w.integer(1, 2)
    length = len(range(start, end, step))
    bounds = (np.array([start]), np.array([end]), np.array([axis]), np.array([step]))
    return w.op("Slice", x, *bounds, shape=(*x.shape[:axis], length, *x.shape[axis + 1 :]))


def _gather(w: Writer, x: Value) -> Value:
    axis = w.axis(x)
    index = w.draw(st.lists(st.integers(0, x.shape[axis] - 1), min_size=1, max_size=4))
    return w.op("Gather", x, np.array(index), shape=(*x.shape[:axis], len(index), *x.shape[axis + 1 :]), axis=axis)


def _concat(w: Writer, x: Value) -> Value | None:
    axis = w.axis(x)

    def rest(shape: Shape) -> Shape:
        return (*shape[:axis], *shape[axis + 1 :])

    y = w.other(lambda v: len(v.shape) == len(x.shape) and rest(v.shape) == rest(x.shape))
    if y is None:
        return None
    shape = (*x.shape[:axis], x.shape[axis] + y.shape[axis], *x.shape[axis + 1 :])
    return w.op("Concat", x, y.name, shape=shape, degree=max(x.degree, y.degree), axis=axis)


def _expand(w: Writer, x: Value) -> Value:
    shape = tuple(w.integer(2, 4) if n == 1 and i else n for i, n in enumerate(x.shape))
    return w.op("Expand", x, np.array(shape), shape=shape)


def _cumsum(w: Writer, x: Value) -> Value:
    axis, flags = np.array(w.axis(x)), {"exclusive": w.integer(0, 1), "reverse": w.integer(0, 1)}
    return w.op("CumSum", x, axis, shape=x.shape, **flags)


def _conv(w: Writer, x: Value) -> Value | None:
    """1-D or 2-D, strided, padded, grouped."""
    if len(x.shape) < 3:
        return None
    channels, size = x.shape[1], x.shape[2:]
    groups = w.one_of([g for g in range(1, channels + 1) if channels % g == 0])
    made = groups * w.integer(1, 2)
    kernel = [w.integer(1, min(3, n)) for n in size]
    pad, stride = w.integer(0, 1), w.integer(1, 2)
    out = [(n + 2 * pad - k) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    weight = w.weights(made, channels // groups, *kernel, fan_in=channels // groups * math.prod(kernel))
    bias = [w.weights(made)] if w.draw(st.booleans()) else []
    attributes = {"group": groups, "pads": [pad] * (2 * len(size)), "strides": [stride] * len(size)}
    return w.op("Conv", x, weight, *bias, shape=(1, made, *out), **attributes)


def _average_pool(w: Writer, x: Value) -> Value | None:
    """1-D or 2-D, strided, padded; the padding counted or not."""
    if len(x.shape) < 3:
        return None
    size = x.shape[2:]
    kernel = [w.integer(1, min(3, n)) for n in size]
    pads = [w.integer(0, k - 1) for k in 2 * kernel]
    stride = w.integer(1, 2)
    padded = [n + pads[i] + pads[i + len(size)] for i, n in enumerate(size)]
    out = [(n - k) // stride + 1 for n, k in zip(padded, kernel, strict=True)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "pads": pads, "strides": [stride] * len(size)}
    attributes["count_include_pad"] = w.integer(0, 1)
    return w.op("AveragePool", x, shape=(*x.shape[:2], *out), **attributes)


def _batch_normalization(w: Writer, x: Value) -> Value:
    channels = x.shape[1]
    scale, bias, mean = (w.weights(channels) for _ in range(3))
    variance = w.b.rng.uniform(0.5, 2, channels)
    return w.op("BatchNormalization", x, scale, bias, mean, variance, shape=x.shape, epsilon=w.one_of((1e-5, 0.1)))


def _split(w: Writer, x: Value) -> Value | None:
    """Two or three parts, of which one goes on and the others wait in the pool."""
    axis = w.axis(x)
    n = x.shape[axis]
    if n < 2:
        return None
    cuts = sorted(w.draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=2)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    parts = [
        Value(name=name, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]), degree=x.degree)
        for name, size in zip(w.b.split(x.name, sizes, axis), sizes, strict=True)
    ]
    chosen = w.integer(0, len(parts) - 1)
    w.pool += [part for i, part in enumerate(parts) if i != chosen]
    return parts[chosen]


def _pad(w: Writer, x: Value) -> Value:
    """One axis padded or cropped by each end, by a number, the edge or a reflection."""
    axis = w.axis(x)
    n = x.shape[axis]
    mode = w.one_of(("constant", "edge", "reflect"))
    most = n - 1 if mode == "reflect" else 2
    ends = [w.integer(-((n - 1) // 2) if mode == "constant" else 0, most) for _ in range(2)]
    pads = np.zeros((2, len(x.shape)), dtype=np.int64)
    pads[:, axis] = ends
    shape = (*x.shape[:axis], n + sum(ends), *x.shape[axis + 1 :])
    fill = [np.array(w.one_of((0.0, 0.75)))] if mode == "constant" else []
    return w.op("Pad", x, pads.reshape(-1), *fill, shape=shape, mode=mode)


def _where(w: Writer, x: Value) -> Value | None:
    """A constant mask that chooses between a tensor and a number, either way round, or another tensor."""
    kept = w.integer(0, len(x.shape))
    mask = w.b.rng.uniform(size=x.shape[len(x.shape) - kept :]) < 0.5
    condition = w.b.constant(mask)
    if w.draw(st.booleans()):
        constant = w.b.constant(_constant(w, x))
        pair = w.draw(st.permutations((x.name, constant)))
        return Value(name=w.b.op("Where", condition, *pair), shape=x.shape, degree=x.degree)
    y = w.other(lambda v: _broadcastable(x.shape, v.shape, w.max_size))
    if y is None:
        return None
    shape = np.broadcast_shapes(x.shape, y.shape)
    return Value(name=w.b.op("Where", condition, x.name, y.name), shape=shape, degree=max(x.degree, y.degree))


def _local_function(w: Writer, x: Value) -> Value | None:
    """Functions that the file brings along: a polynomial, kept whole, or a gate, written out; its body calls the polynomial."""
    if 2 * x.degree > MAX_DEGREE:
        return None
    own, public = helper.make_opsetid("polyformer", 1), helper.make_opsetid("", 17)
    body = [
        helper.make_node("Mul", ["a", "x"], ["ax"]),
        helper.make_node("Add", ["ax", "b"], ["u"]),
        helper.make_node("Mul", ["u", "c2"], ["p1"]),
        helper.make_node("Add", ["p1", "c1"], ["h1"]),
        helper.make_node("Mul", ["u", "h1"], ["p0"]),
        helper.make_node("Add", ["p0", "c0"], ["y"]),
    ]
    names = ["x", "a", "b", "c0", "c1", "c2"]
    kind = "Polynomial_power_2"
    w.b.functions[kind] = helper.make_function("polyformer", kind, names, ["y"], body, [public])
    numbers = [np.array(w.b.rng.uniform(0.3, 0.8)) for _ in names[1:]]
    if w.draw(st.booleans()):
        return w.op(kind, x, *numbers, shape=x.shape, degree=2 * x.degree, domain="polyformer")
    gate = [
        helper.make_node("Mul", ["x", "g"], ["gx"]),
        helper.make_node(kind, ["gx", *names[1:]], ["y"], domain="polyformer"),
    ]
    w.b.functions["Gate"] = helper.make_function(
        "polyformer", "Gate", ["x", "g", *names[1:]], ["y"], gate, [public, own]
    )
    return w.op("Gate", x, _constant(w, x), *numbers, shape=x.shape, degree=2 * x.degree, domain="polyformer")


STEPS: dict[str, Callable[[Writer, Value], Value | None]] = {
    "Add": _two("Add"),
    "Sub": _two("Sub"),
    "Mul": _two("Mul"),
    "Add constant": _with_constant("Add"),
    "Sub constant": _with_constant("Sub"),
    "Mul constant": _with_constant("Mul"),
    "Div constant": _with_constant("Div"),
    "Neg": _neg,
    "square": _square,
    "Pow": _pow,
    "polynomial": _polynomial,
    "MatMul constant": _matmul_constant,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "ReduceSum": _reduce("ReduceSum"),
    "ReduceMean": _reduce("ReduceMean"),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "Expand": _expand,
    "CumSum": _cumsum,
    "Conv": _conv,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Split": _split,
    "Pad": _pad,
    "Where": _where,
    "local function": _local_function,
}


@st.composite
def programs(draw: Draw, *, max_steps: int = 6, max_size: int = 96, steps: Collection[str] = STEPS) -> Program:
    """A program of one to `max_steps` ops; steps that do not fit the tensor that they drew are left out.

    Args:
        max_size: elements of any tensor; the input has half as many at most.
        steps: names of those that are drawn.
    """
    rank = draw(st.integers(2, 4))
    side = int((max_size / 2) ** (1 / (rank - 1)))
    shape = (1, *(draw(st.integers(1, side)) for _ in range(rank - 1)))
    w = Writer(shape, draw(st.integers(0, 2**16)), draw, max_size)
    ops = []
    for name in draw(st.lists(st.sampled_from(sorted(steps)), min_size=1, max_size=max_steps)):
        # Mostly the newest tensor, so that programs get deep; sometimes an older one, so that they branch and join.
        x = w.pool[-1] if draw(st.integers(0, 3)) else w.one_of(w.pool)
        made = STEPS[name](w, x)
        if made is not None and math.prod(made.shape) <= max_size:
            w.pool.append(made)
            ops.append(name)
    if not ops:
        w.pool.append(_neg(w, w.pool[-1]))
        ops.append("Neg")
    return Program(builder=w.b, output=w.pool[-1], ops=tuple(ops))
