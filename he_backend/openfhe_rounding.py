"""Undo the bias of OpenFHE's mod-down: half a unit for each special prime, in every coefficient.

A key switch ends with a division by P. The library converts the remainder from P's basis without counting how often it wraps, so
that every coefficient of both elements comes out low by sum of K fractions, K/2 on average. A constant offset of all coefficients
is no small thing: multiplied by the secret it lies in a few slots, where it is the largest error of the whole circuit (measured
at N = 2^14, K = 7: 19,825 units in the worst slot, 112 the spread of the others). Adding round(K/2) to every coefficient takes it
away; for odd K, half a unit stays. The correction is public: it is the ciphertext (h, h), h = round(K/2) (1 + X + ... + X^(N-1)).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def mul_mod(a: Words, b: Words, q: int) -> Words:
    """a * b mod q for q below 2^62, elementwise.

    The quotient is estimated in extended precision (64 bits of mantissa on x86), the product and its correction wrap in 64 bits.
    """
    quotient = (a.astype(np.longdouble) * b.astype(np.longdouble) / np.longdouble(q)).astype(np.uint64)
    rest = (a * b - quotient * np.uint64(q)).astype(np.int64)
    rest += np.where(rest < 0, q, 0)
    rest -= np.where(rest >= q, q, 0)
    return rest.astype(np.uint64)


def evaluation_points(q: int, root: int, n: int) -> Words:
    """The points at which OpenFHE's transform evaluates, in its order: root^(2 bitreverse(k) + 1), [n]."""
    odd = np.array([root], dtype=np.uint64)
    step = root * root % q
    while odd.size < n:
        odd = np.concatenate([odd, mul_mod(odd, np.full(odd.size, step, dtype=np.uint64), q)])
        step = step * step % q  # root^(2 size), what leads from each point to the one `size` further
    bits = n.bit_length() - 1
    order = np.zeros(n, dtype=np.int64)
    for i in range(bits):
        order |= ((np.arange(n) >> i) & 1) << (bits - 1 - i)
    return odd[order]


def all_ones(primes: Sequence[tuple[int, int]], n: int) -> Words:
    """1 + X + ... + X^(N-1) in evaluation order, [limbs, N]; primes are (q, root of unity of order 2N).

    The product (1 + X)(1 + X^2)(1 + X^4)... is taken point by point.
    """
    rows = []
    for q, root in primes:
        power = evaluation_points(q, root, n)
        total: Words = np.ones(n, dtype=np.uint64)
        for _ in range(n.bit_length() - 1):
            total = mul_mod(total, (power + np.uint64(1)) % np.uint64(q), q)
            power = mul_mod(power, power, q)
        rows.append(total)
    return np.stack(rows)


def correction(primes: Sequence[tuple[int, int]], n: int, special: int) -> Words:
    """Residues [limbs, N] of round(K/2) in every coefficient, for K special primes."""
    half = np.uint64((special + 1) // 2)
    return np.stack([row * half % np.uint64(q) for row, (q, _) in zip(all_ones(primes, n), primes, strict=True)])
