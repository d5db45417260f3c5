"""Sparse maps between layouts: a plan, carried out slot by slot in NumPy, against the matrix."""

import numpy as np
import pytest
import scipy.sparse as sp

from compiler.sparse import Place, SparseMap, baby_giant, input_layouts, places, plan_sparse
from he_backend.base import UnsupportedOpError


def cost(diagonals: int, babies: int, giants: int, folds: int) -> float:
    """A rotation costs five products, a giant step ten."""
    return diagonals + 5.0 * babies + 10.0 * (giants - 1) + 8.0 * folds


def carried_out(found: SparseMap, packed: np.ndarray) -> np.ndarray:
    """[D, slots] result of a plan on slot vectors [C, slots]."""
    result = np.zeros(found.layout.shape)
    for part, terms in enumerate(found.targets):
        for term in terms:
            for giant, rows in term.plan:
                for baby, row in rows:
                    result[part] += term.weights[row] * np.roll(packed[term.source], -(giant + baby))
        for step in found.folds:
            result[part] = result[part] + np.roll(result[part], -step)
    return result


def convolution(channels: int, size: int, out: int, window: int, stride: int) -> sp.csr_matrix:
    """[out, y, x] from [channels, size, size], no padding, random weights."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(out, channels, window, window))
    side = (size - window) // stride + 1
    m = np.zeros((out * side * side, channels * size * size))
    for o in range(out):
        for y in range(side):
            for x in range(side):
                image = np.zeros((channels, size, size))
                image[:, y * stride : y * stride + window, x * stride : x * stride + window] = w[o]
                m[(o * side + y) * side + x] = image.reshape(-1)
    return sp.csr_matrix(m)


def dense(outputs: int, inputs: int) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).normal(size=(outputs, inputs)))


MAPS = {
    "dense, narrowing": dense(10, 100),
    "dense, widening": dense(100, 12),
    "square": dense(64, 64),
    "wider than a ciphertext": dense(300, 20),
    "reads more than a ciphertext": dense(20, 700),
    "one output": dense(1, 50),
    "convolution": convolution(1, 12, 3, 3, 1),
    "strided convolution of channels": convolution(2, 8, 4, 2, 2),
    "permutation": sp.csr_matrix(np.eye(40)[np.random.default_rng(2).permutation(40)]),
}


@pytest.mark.parametrize("repeated", [False, True], ids=["any layout", "repeated"])
@pytest.mark.parametrize("name", MAPS)
def test_every_input_layout_gives_the_matrix(name, repeated):
    matrix = MAPS[name]
    outputs, inputs = matrix.shape
    x = np.random.default_rng(3).normal(size=inputs)
    for source in input_layouts(inputs, outputs, 256):
        packed = np.where(source >= 0, x[np.maximum(source, 0)], 0.0)
        found = plan_sparse(matrix, source, places(outputs, source, matrix, repeated=repeated), cost)
        y = carried_out(found, packed)
        used = found.layout >= 0
        assert set(found.layout[used]) == set(range(outputs))
        np.testing.assert_allclose(y[used], (matrix @ x)[found.layout[used]], atol=1e-10)
        if found.clean:
            assert not y[~used].any()


def test_a_given_layout_is_met():
    matrix, source = dense(30, 40), input_layouts(40, 30, 64)[0]
    target = np.full((1, 64), -1)
    target[0, 5:35] = np.random.default_rng(4).permutation(30)
    found = plan_sparse(matrix, source, [Place(slots=target)], cost)
    x = np.arange(40.0)
    y = carried_out(found, np.where(source >= 0, x[np.maximum(source, 0)], 0.0))
    np.testing.assert_allclose(y[0, 5:35], (matrix @ x)[target[0, 5:35]])


def test_the_copies_of_a_packed_vector_are_put_to_work():
    """784 -> 128 in 4,096 slots: 32 diagonals where one copy would need 128, and 5 folds."""
    matrix = dense(128, 784)
    plans = [
        plan_sparse(matrix, s, places(128, s, matrix, repeated=False), cost) for s in input_layouts(784, 128, 4096)
    ]
    best = min(plans, key=lambda p: p.seconds)
    assert sum(len(t.weights) for t in best.targets[0]) == 32
    assert len(best.folds) == 5


def test_windows_of_a_convolution_share_their_rotations():
    matrix = convolution(1, 12, 3, 3, 1)
    source = input_layouts(144, 300, 1024)[0]
    found = plan_sparse(matrix, source, places(300, source, matrix, repeated=False), cost)
    assert sum(len(t.weights) for t in found.targets[0]) == 9


def test_missing_elements_are_an_error():
    source = np.full((1, 16), -1)
    with pytest.raises(UnsupportedOpError, match="no slot"):
        plan_sparse(dense(4, 8), source, [Place(slots=np.arange(16)[None] % 4)], cost)


def test_baby_giant_covers_every_rotation_once():
    rotations = np.array([0, 1, 2, 28, 29, 30, 56, 57, 58, 1024, 1025])
    plan = baby_giant(rotations, cost)
    assert sorted(g + b for g, rows in plan for b, _ in rows) == rotations.tolist()
    assert all(rotations[row] == g + b for g, rows in plan for b, row in rows)
