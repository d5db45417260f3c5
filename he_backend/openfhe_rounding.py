"""Undo the bias of OpenFHE's mod-down: half a unit for each special prime, in every coefficient.

A key switch ends with a division by P. The library converts the remainder from P's basis without counting how often it wraps, so
that every coefficient of both elements comes out low by sum of K fractions, K/2 on average. A constant offset of all coefficients
is no small thing: multiplied by the secret it lies in a few slots, where it is the largest error of the whole circuit (measured
at N = 2^14, K = 7: 19,825 units in the worst slot, 112 the spread of the others). Adding K/2 to every coefficient takes it away.
For odd K that is no integer, and half a unit in all coefficients would still be the largest error of a small ring: so half of them
get (K + 1)/2, the others (K - 1)/2, with signs that no slot adds up: those of the Rudin-Shapiro polynomial, which is at most
sqrt(2N) at every root of unity (Rudin, Some theorems on Fourier coefficients, 1959). The correction is public: it is the ciphertext
(h, h), h = K/2 (1 + X + ... + X^(N-1)), plus half that polynomial where K is odd.
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


def rudin_shapiro(primes: Sequence[tuple[int, int]], n: int) -> Words:
    """The Rudin-Shapiro polynomial of n coefficients +1 and -1 in evaluation order, [limbs, N]; primes as in `all_ones`.

    P, Q = P + X^(2^k) Q, P - X^(2^k) Q, from P = Q = 1, point by point.
    """
    rows = []
    for q, root in primes:
        modulus, power = np.uint64(q), evaluation_points(q, root, n)
        p: Words = np.ones(n, dtype=np.uint64)
        other = p
        for _ in range(n.bit_length() - 1):
            shifted = mul_mod(power, other, q)
            p, other = (p + shifted) % modulus, (p + modulus - shifted) % modulus
            power = mul_mod(power, power, q)
        rows.append(p)
    return np.stack(rows)


def correction(primes: Sequence[tuple[int, int]], n: int, special: int) -> Words:
    """Residues [limbs, N] of K/2 in every coefficient, for K special primes; for odd K, half a unit more or less."""
    rows = []
    signs = rudin_shapiro(primes, n) if special % 2 else [None] * len(primes)
    for ones, sign, (q, _) in zip(all_ones(primes, n), signs, primes, strict=True):
        twice = mul_mod(ones, np.full(n, special, dtype=np.uint64), q)
        if sign is not None:
            twice = (twice + sign) % np.uint64(q)
        rows.append(mul_mod(twice, np.full(n, (q + 1) // 2, dtype=np.uint64), q))
    return np.stack(rows)
