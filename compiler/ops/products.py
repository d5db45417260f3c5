"""Matrix products: by constants on either side, of two encrypted tensors, and einsums of both kinds."""

from __future__ import annotations

import math

import numpy as np

from he_backend.base import Array

from . import maps
from .reading import Call, Handler, Reading

BATCH = "ABCDEFGH"


def _labels(rank: int, matrix: str, vector: str) -> str:
    """Einsum labels of an operand of a matrix product: batch axes are named from the right."""
    return vector if rank == 1 else BATCH[: rank - 2][::-1] + matrix


def _without_ones(labels: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Drop batch axes of length 1: they repeat along the other operand's, and do not move flat indices."""
    kept = [(label, n) for label, n in zip(labels, shape, strict=True) if n > 1 or label not in BATCH]
    return "".join(label for label, _ in kept), tuple(n for _, n in kept)


def _matmul(g: Reading, call: Call) -> None:
    a, b = call.inputs
    shapes = [g.shapes[n] if n in g.shapes else g.constants[n].shape for n in (a, b)]
    left, right = shapes
    if min(map(len, shapes)) == 0 or left[-1] != right[0 if len(right) == 1 else -2]:
        raise call.fail(f"multiplies shapes {left} and {right}")
    shape = (*np.broadcast_shapes(left[:-2], right[:-2]), *left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    if a in g.shapes and b in g.shapes:
        if min(map(len, shapes)) == 1:
            raise call.fail(f"multiplies encrypted shapes {left} and {right}; two matrices are compiled: unsqueeze one")
        g.emit(call, "matmul", (a, b), shape, attrs={"mask": None})
        return
    name, const = (a, g.constants[b]) if a in g.shapes else (b, g.constants[a])
    const = const.astype(np.float64)
    if name == a and 2 <= const.ndim <= len(left) and math.prod(const.shape[:-2]) == 1:
        g.emit(call, "linear", (a,), shape, const=const.reshape(const.shape[-2:]))
        return
    pair = [_labels(len(left), "ij", "j"), _labels(len(right), "jk", "j")]
    known, other = pair if name == a else pair[::-1]
    known, size = _without_ones(known, g.shapes[name])
    other, sides = _without_ones(other, const.shape)
    batch = sorted({label for label in known + other if label in BATCH}, reverse=True)
    out = "".join(batch) + "".join(label for label in "ik" if label in known + other)
    matrix = maps.contraction(known, other, out, size, const.reshape(sides), call.source)
    g.emit(call, "sparse", (name,), shape, attrs={"matrix": matrix})


def _gemm(g: Reading, call: Call) -> None:
    """alpha A B + beta C with A and B transposed first on demand."""
    a, b = call.inputs[:2]
    alpha, beta = call.attrs.get("alpha", 1.0), call.attrs.get("beta", 1.0)
    name = call.outputs[0]
    c = call.inputs[2] if len(call.inputs) > 2 and beta else ""  # 0 C is nothing, whatever C is

    def turned(x: str, flag: str) -> str:
        if not call.attrs.get(flag):
            return x
        return g.emit(call, "transpose", (x,), g.shapes[x][::-1], attrs={"perm": [1, 0]}, name=f"{name}.{flag.lower()}")

    def weight(x: str, flag: str) -> Array:
        const = g.constants[x].astype(np.float64) * alpha
        return const.T if call.attrs.get(flag) else const

    bias = g.constants[c].astype(np.float64) * beta if c in g.constants else None
    if a in g.shapes and b in g.constants:
        const, x = weight(b, "transB"), turned(a, "transA")
        shape = (g.shapes[x][0], const.shape[1])
        if c not in g.shapes and (bias is None or (bias.size in (1, shape[1]) and bias.shape[:-1] in ((), (1,)))):
            flat = None if bias is None else np.broadcast_to(bias.reshape(-1), shape[1:])
            g.emit(call, "linear", (x,), shape, const=const, bias=flat)
            return
        product = g.emit(call, "linear", (x,), shape, const=const, name=f"{name}.product")
    elif a in g.constants:
        const = weight(a, "transA")
        labels = "kj" if call.attrs.get("transB") else "jk"
        known = g.shapes[b]
        shape = (const.shape[0], known[labels.index("k")])
        matrix = maps.contraction(labels, "ij", "ik", known, const, call.source)
        product = g.emit(call, "sparse", (b,), shape, attrs={"matrix": matrix}, name=f"{name}.product")
    else:
        x, y = turned(a, "transA"), turned(b, "transB")
        shape = (g.shapes[x][0], g.shapes[y][1])
        mask = np.full(shape, alpha) if alpha != 1.0 else None
        product = g.emit(call, "matmul", (x, y), shape, attrs={"mask": mask}, name=f"{name}.product")
    if bias is not None:
        g.emit(call, "add_const", (product,), shape, const=bias)
    elif c:
        if beta != 1.0:
            c = g.emit(call, "mul_const", (c,), g.shapes[c], const=np.array(beta), name=f"{name}.beta")
        g.emit(call, "add", (product, c), shape)
    else:
        g.emit(call, "reshape", (product,), shape)


def _equation(g: Reading, call: Call) -> tuple[list[str], str]:
    """Labels of the operands and of the result, ellipses spelled out."""
    text = call.attrs["equation"].replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(call.inputs) or len(terms) > 2:
        raise call.fail(f"is an einsum {text!r} of {len(terms)} tensors; one or two are compiled: split it")
    ranks = [len(g.shapes[n]) if n in g.shapes else g.constants[n].ndim for n in call.inputs]
    free = [c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in text]
    widest = max((r - len(t) + 3 for r, t in zip(ranks, terms, strict=True) if "..." in t), default=0)
    dots = "".join(free[:widest])
    terms = [
        t.replace("...", dots[widest - (r - len(t) + 3) :] if "..." in t else "")
        for r, t in zip(ranks, terms, strict=True)
    ]
    if not arrow:
        joined = "".join(terms)
        out = ("..." if widest else "") + "".join(sorted(c for c in set(joined) - set(dots) if joined.count(c) == 1))
    out = out.replace("...", dots)
    if any(len(set(t)) < len(t) for t in terms):
        raise call.fail(f"is an einsum {text!r} that takes a diagonal; gather it with constant indices instead")
    return terms, out


def _einsum(g: Reading, call: Call) -> None:
    terms, out = _equation(g, call)
    sizes: dict[str, int] = {}
    for name, term in zip(call.inputs, terms, strict=True):
        shape = g.shapes[name] if name in g.shapes else g.constants[name].shape
        for label, n in zip(term, shape, strict=True):
            if sizes.setdefault(label, n) != n:
                raise call.fail(f"is an einsum whose label {label!r} is {sizes[label]} here and {n} there")
    shape = tuple(sizes[label] for label in out)
    if len(terms) == 2 and all(n in g.shapes for n in call.inputs):
        _einsum_encrypted(g, call, terms, out, sizes)
        return
    known = next(i for i, n in enumerate(call.inputs) if n in g.shapes)
    x, labels = call.inputs[known], terms[known]
    other = terms[1 - known] if len(terms) == 2 else ""
    const = g.constants[call.inputs[1 - known]].astype(np.float64) if len(terms) == 2 else np.array(1.0)
    made = "".join(c for c in other if c not in labels)
    if len(other) == 2 and len(made) == 1 and labels[-1:] in other and out == labels[:-1] + made:
        g.emit(call, "linear", (x,), shape, const=const if other[1] == made else const.T)
        return
    matrix = maps.contraction(labels, other, out, g.shapes[x], const, call.source)
    g.emit(call, "sparse", (x,), shape, attrs={"matrix": matrix})


def _einsum_encrypted(g: Reading, call: Call, terms: list[str], out: str, sizes: dict[str, int]) -> None:
    """A batched matrix product, operands and result transposed and reshaped as needed."""
    left, right = terms
    batch = [c for c in out if c in left and c in right]
    rows = [c for c in out if c in left and c not in right]
    columns = [c for c in out if c in right and c not in left]
    inner = [c for c in left if c in right and c not in out]
    if len(batch + rows + inner) < len(left) or len(batch + columns + inner) < len(right):
        raise call.fail(
            f"is an einsum {','.join(terms)}->{out} of two encrypted tensors that sums an axis of one alone; sum it first"
        )

    def arranged(x: str, labels: str, groups: tuple[list[str], list[str], list[str]], side: str) -> str:
        """The operand as [*batch, first group, second group]."""
        order = [*groups[0], *groups[1], *groups[2]]
        name = f"{call.outputs[0]}.{side}"
        if order != list(labels):
            perm = [labels.index(c) for c in order]
            x = g.emit(call, "transpose", (x,), [sizes[c] for c in order], attrs={"perm": perm}, name=f"{name}.order")
        target = (*(sizes[c] for c in groups[0]), *(math.prod(sizes[c] for c in group) for group in groups[1:]))
        return x if g.shapes[x] == target else g.emit(call, "reshape", (x,), target, name=f"{name}.matrix")

    a = arranged(call.inputs[0], left, (batch, rows, inner), "left")
    b = arranged(call.inputs[1], right, (batch, inner, columns), "right")
    made, name = [*batch, *rows, *columns], call.outputs[0]
    product_shape = (*g.shapes[a][:-1], g.shapes[b][-1])
    natural = tuple(sizes[c] for c in made)
    turn, reshape = made != list(out), product_shape != natural
    x = g.emit(
        call, "matmul", (a, b), product_shape, attrs={"mask": None}, name=f"{name}.product" if turn or reshape else None
    )
    if reshape:
        x = g.emit(call, "reshape", (x,), natural, name=f"{name}.axes" if turn else None)
    if turn:
        perm = [made.index(c) for c in out]
        g.emit(call, "transpose", (x,), [sizes[c] for c in out], attrs={"perm": perm})


TABLE: dict[str, Handler] = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum}
