"""Pooling as sums over slots: found where it is, refused where it is not, and right three ways."""

import numpy as np
import pytest
import scipy.sparse as sp

from compiler import Target
from compiler.pooling import LARGEST, _steps, find_pool
from tests.compiler.models import Builder
from tests.compiler.test_three_ways import three_ways


def pooling(channels: int, size: int, window: int, stride: int, weight: float) -> sp.csr_matrix:
    """[channels, side, side] from [channels, size, size]."""
    side = (size - window) // stride + 1
    m = np.zeros((channels * side * side, channels * size * size))
    for c in range(channels):
        for y in range(side):
            for x in range(side):
                image = np.zeros((channels, size, size))
                image[c, y * stride : y * stride + window, x * stride : x * stride + window] = weight
                m[(c * side + y) * side + x] = image.reshape(-1)
    return sp.csr_matrix(m)


def carried_out(pool, slots):
    for step in pool.steps:
        slots = slots + np.roll(slots, -step)
    return slots * pool.weight


FOUND = {
    "2 x 2": pooling(1, 8, 2, 2, 0.25),
    "2 x 2 of channels": pooling(3, 4, 2, 2, 0.25),
    "4 x 4": pooling(2, 8, 4, 4, 1.0),
    "overlapping": pooling(1, 6, 2, 1, 0.5),
}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", FOUND)
def test_a_pool_is_what_the_matrix_says(name, copies):
    matrix = FOUND[name]
    inputs = matrix.shape[1]
    source = np.full(512, -1)
    for copy in range(copies):
        source[copy * 200 : copy * 200 + inputs] = np.arange(inputs)
    pool = find_pool(matrix, source)
    assert pool is not None and (1 << len(pool.steps)) == matrix.nnz // matrix.shape[0]
    x = np.random.default_rng(0).normal(size=inputs)
    y = carried_out(pool, np.where(source >= 0, x[np.maximum(source, 0)], 0.0))
    used = pool.layout >= 0
    assert np.count_nonzero(used) == copies * matrix.shape[0]
    np.testing.assert_allclose(y[used], (matrix @ x)[pool.layout[used]])


def scattered() -> np.ndarray:
    return np.concatenate([np.random.default_rng(0).permutation(64), np.full(64, -1)])


REFUSED = {
    "other weights": (sp.csr_matrix(FOUND["2 x 2"] @ np.diag(np.arange(1.0, 65.0))), np.arange(64)),
    "a permutation": (sp.csr_matrix(np.eye(8)), np.arange(8)),
    "3 x 3": (pooling(1, 6, 3, 3, 1.0), np.arange(36)),
    "scattered inputs": (FOUND["2 x 2"], scattered()),
    "an input that is nowhere": (FOUND["2 x 2"], np.arange(1, 65)),
    "negative": (sp.csr_matrix(-FOUND["2 x 2"]), np.arange(64)),
    "too large": (sp.csr_matrix(np.ones((1, 2 * LARGEST))), np.arange(64)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pool_is_left_alone(name):
    matrix, source = REFUSED[name]
    assert find_pool(matrix, np.where(source < matrix.shape[1], source, -1)) is None


@pytest.mark.parametrize(
    ("distances", "steps"),
    [([0, 3], [3]), ([0, 1, 28, 29], [1, 28]), ([0, 1, 2, 3], [1, 2]), ([0, 1, 3, 7], None), ([0, 1, 2], None)],
    ids=str,
)
def test_steps_are_those_whose_sums_are_the_distances(distances, steps):
    assert _steps(distances) == steps


def pooled_net(path):
    """A convolution, a square, a mean over 2 x 2 and over the halves, a square, a linear map."""
    b = Builder((1, 1, 10, 10))
    h = b.op("Conv", "x", b.rng.normal(0, 0.3, (2, 1, 3, 3)), b.rng.normal(0, 0.1, 2), name="conv")
    h = b.op("AveragePool", b.op("Mul", h, h, name="square"), kernel_shape=[2, 2], strides=[2, 2], name="pool")
    h = b.op("Mul", h, h, name="square2")
    h = b.op("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2], name="pool2")
    y = b.linear(b.op("Reshape", h, np.array([1, 8]), name="flat"), 8, 3, name="head")
    return b.save(path, y, (1, 3))


def test_three_ways_and_no_level_spent(tmp_path):
    circuit = three_ways(pooled_net(tmp_path / "m.onnx"), Target(insecure_log_n=11))
    sums = [op.source for op in circuit.ops if op.kind == "rotate_sum"]
    assert "pool" in sums and circuit.params.levels == 4  # convolution, two squares, the map behind
