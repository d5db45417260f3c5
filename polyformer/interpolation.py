"""Degrees of polynomials and of quotients modulo a prime, from their values at t = 0, 1, ..., N - 1.

Polynomials are int64 arrays of coefficients, lowest power first.
"""

from __future__ import annotations

import numpy as np

from polyformer.field import PRIME

MARGIN = 8  # differences that must vanish, and points that an interpolated quotient must leave over


def degree_of_values(values_N: np.ndarray) -> int | None:
    """Return the degree of a polynomial modulo PRIME from its values at t = 0, 1, ..., N - 1, by forward differences;
    None if fewer than MARGIN of the last ones vanish.
    """
    differences, degree = values_N.astype(np.int64) % PRIME, 0
    for index in range(len(values_N)):
        if differences[0]:
            degree = index
        differences = np.diff(differences) % PRIME
    return degree if degree + MARGIN < len(values_N) else None


def degrees_of_quotient(values_N: np.ndarray) -> tuple[int, int] | None:
    """Return the degrees of numerator and denominator of a rational function from its values at t = 0 .. N - 1 modulo
    PRIME; None if N is too small to tell.

    The Euclidean algorithm on prod (t - i) and the interpolating polynomial runs through all pairs (r, s) with
    r = s f at the points; the pair before the largest quotient is the function (Monagan, ISSAC 2004).
    """
    n = len(values_N)
    r0, r1 = _vanishing(n), _interpolated(values_N)
    s0, s1 = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    best: tuple[int, int, int] | None = None
    while r1.any():
        quotient, rest = _divided(r0, r1)
        size = len(quotient) - 1
        if best is None or size > best[0]:
            best = (size, len(r1) - 1, len(s1) - 1)
        r0, r1 = r1, rest
        s0, s1 = s1, _trimmed(_minus(s0, _times(quotient, s1)))
    if best is None:
        return 0, 0
    size, above, below = best
    return (above, below) if size > MARGIN else None


def _vanishing(n: int) -> np.ndarray:
    p = np.ones(1, dtype=np.int64)
    for i in range(n):
        p = _minus(np.concatenate(([0], p)), p * i % PRIME)
    return p


def _interpolated(values_N: np.ndarray) -> np.ndarray:
    """Coefficients, lowest first, by Newton's divided differences."""
    c = values_N.astype(np.int64) % PRIME
    n = len(c)
    for j in range(1, n):
        c[j:] = np.diff(c[j - 1 :]) * pow(j, -1, PRIME) % PRIME
    p = np.zeros(1, dtype=np.int64)
    for i in range(n - 1, -1, -1):
        p = _minus(np.concatenate(([0], p)), p * i % PRIME)
        p[0] = (p[0] + c[i]) % PRIME
    return _trimmed(p)


def _divided(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, lead = a.copy(), pow(int(b[-1]), -1, PRIME)
    quotient = np.zeros(max(len(a) - len(b) + 1, 1), dtype=np.int64)
    for i in range(len(a) - len(b), -1, -1):
        q = int(a[i + len(b) - 1]) * lead % PRIME
        quotient[i] = q
        a[i : i + len(b)] = (a[i : i + len(b)] - q * b) % PRIME
    return quotient, _trimmed(a[: len(b) - 1])


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros(len(a) + len(b) - 1, dtype=np.int64)
    for i, x in enumerate(a):
        out[i : i + len(b)] = (out[i : i + len(b)] + int(x) * b) % PRIME
    return out


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros(max(len(a), len(b)), dtype=np.int64)
    out[: len(a)] += a
    out[: len(b)] -= b
    return out % PRIME


def _trimmed(a: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(a)
    return a[: used[-1] + 1] if len(used) else np.zeros(1, dtype=np.int64)
