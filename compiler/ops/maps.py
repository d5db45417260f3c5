"""Plaintext-linear maps as sparse matrices [size out, size in] on flattened tensors, the leading axis of length 1 included."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from he_backend.base import UnsupportedOpError

MAX_ENTRIES = 60_000_000  # 12 bytes an entry, and as much again twice while they are collected

Shape = tuple[int, ...]


def bounded(entries: int, what: str) -> None:
    """Refuse a matrix that would not fit beside the rest of the compiler.

    Raises:
        UnsupportedOpError: too many entries.
    """
    if entries > MAX_ENTRIES:
        raise UnsupportedOpError(
            f"{what} needs a matrix of {entries:,} entries; at most {MAX_ENTRIES:,} are compiled: split the layer"
        )


def selection(index: np.ndarray, size: int) -> sparse.csr_matrix:
    """out[i] = x[index[i]], or 0 where the index is -1; index of any shape into a tensor of `size` elements."""
    flat = index.reshape(-1)
    rows = np.flatnonzero(flat >= 0)
    return sparse.csr_matrix((np.ones(rows.size), (rows, flat[rows])), shape=(flat.size, size))


def windows(
    size: Shape, kernel: Shape, strides: Shape, dilations: Shape, begins: Shape, out: Shape
) -> tuple[np.ndarray, np.ndarray]:
    """Flat index of what each window reads along all spatial axes, [prod(out), prod(kernel)], and whether it lies inside."""
    index, inside = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
    for n, k, stride, dilation, begin, o in zip(size, kernel, strides, dilations, begins, out, strict=True):
        at = np.arange(o)[:, None] * stride + np.arange(k)[None, :] * dilation - begin
        ok = (at >= 0) & (at < n)
        index = (index[:, None, :, None] * n + at[None, :, None, :]).reshape(len(index) * o, -1)
        inside = (inside[:, None, :, None] & ok[None, :, None, :]).reshape(index.shape)
    return index, inside


def convolution(
    shape: Shape,
    weight: np.ndarray,
    *,
    strides: Shape,
    dilations: Shape,
    begins: Shape,
    out: Shape,
    groups: int,
    source: str = "",
) -> sparse.csr_matrix:
    """Cross-correlation as in ONNX Conv: x [N, C, *S] with weight [M, C / groups, *K] to [N, M, *out]."""
    batch, channels, *size = shape
    made, read, *kernel = weight.shape
    at, inside = windows(tuple(size), tuple(kernel), strides, dilations, begins, out)
    bounded(batch * made * read * int(inside.sum()), f"node {source!r} (a convolution)")
    outputs, taps = np.nonzero(inside)
    # One axis each: batch, output channel, input channel within the group, (window, tap) pairs inside the image.
    n = np.arange(batch)[:, None, None, None]
    m = np.arange(made)[None, :, None, None]
    c = (np.arange(made) // (made // groups))[None, :, None, None] * read + np.arange(read)[None, None, :, None]
    rows = (n * made + m) * math.prod(out) + outputs
    columns = (n * channels + c) * math.prod(size) + at[outputs, taps]
    values = weight.reshape(made, read, -1)[None][..., taps]
    full = np.broadcast_shapes(rows.shape, columns.shape, values.shape)
    entries = [np.broadcast_to(a, full).reshape(-1) for a in (values, rows, columns)]
    return sparse.csr_matrix(
        (entries[0], (entries[1], entries[2])),
        shape=(batch * made * math.prod(out), math.prod(shape)),
    )


def identity(size: int) -> sparse.csr_matrix:
    return sparse.identity(size, format="csr")


def sums(shape: Shape, axes: Sequence[int], scale: float = 1.0) -> sparse.csr_matrix:
    """scale times the sum over some axes."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    target = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), shape).reshape(-1)
    size = target.size
    return sparse.csr_matrix((np.full(size, scale), (target, np.arange(size))), shape=(math.prod(kept), size))


def running_sums(shape: Shape, axis: int, *, exclusive: bool, reverse: bool) -> sparse.csr_matrix:
    """Sums of all elements up to each one along an axis."""
    n = shape[axis]
    triangle = np.tril(np.ones((n, n)), -1 if exclusive else 0)
    triangle = triangle.T if reverse else triangle
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    bounded(before * after * n * (n + 1) // 2, f"a running sum over {n} elements")
    return sparse.kron(
        sparse.identity(before), sparse.kron(sparse.csr_matrix(triangle), sparse.identity(after)), format="csr"
    ).tocsr()


def contraction(
    x: str, constant: str, out: str, shape: Shape, values: np.ndarray, source: str = ""
) -> sparse.csr_matrix:
    """einsum of an encrypted tensor with labels `x` and a constant one, as a map of the encrypted one."""
    sizes = {**dict(zip(constant, values.shape, strict=True)), **dict(zip(x, shape, strict=True))}
    labels = list(sizes)
    full = tuple(sizes[label] for label in labels)
    bounded(math.prod(full), f"node {source!r} (an einsum)")

    def flat(chosen: str) -> np.ndarray:
        """Flat index into a tensor of these labels, over all labels."""
        index = np.zeros((1,) * len(full), dtype=np.int64)
        for label in chosen:
            axis = [1] * len(full)
            axis[labels.index(label)] = sizes[label]
            index = index * sizes[label] + np.arange(sizes[label]).reshape(axis)
        return np.broadcast_to(index, full).reshape(-1)

    entries = values.reshape(-1)[flat(constant)]
    size = math.prod(sizes[label] for label in out)
    return sparse.csr_matrix((entries, (flat(out), flat(x))), shape=(size, math.prod(shape)))
