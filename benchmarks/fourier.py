"""A function as the Fourier series that a functional refresh evaluates.

A function on [-1, 1] that is not periodic has no good Fourier series of period 2; one of period 4 that meets it on half of its
period has (Huybrechs 2010, doi 10.1137/090752456). Its coefficients are not unique: the smallest amplify noise least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HALF = 0.5  # a functional refresh takes slots within [-1/2, 1/2]; see `he_backend.circuit`, kind "functional"
POINTS = 2000
RIDGES = tuple(10.0**-e for e in range(6, 18))
# Sizes above it are not tried. Measured (N = 2^11, 14 terms, scale 2^54): a series of size 4804 had errors of 2^-8, 2^10 times what its
# size and the noise of a small series explain; at sizes up to 16 they were as small as foretold.
MOST_SIZE = 32.0
WORST = 4.0  # standard deviations that count as the worst of some thousand slots


@dataclass(frozen=True, kw_only=True)
class Series:
    """f(x) ~ 2 Re sum c_j exp(i pi j x / 2) on [-1, 1].

    coefficients  [(re c_j, im c_j), ...]
    error         largest difference on the points of the fit
    size          sum of 2 |c_j|, by which errors inside the refresh are amplified
    """

    coefficients: tuple[tuple[float, float], ...]
    error: float
    size: float


def fit(f: Callable[[np.ndarray], np.ndarray], terms: int, noise: float) -> Series:
    """Least squares with the ridge that leaves the least error together with the refresh's noise.

    Args:
        f: [n] -> [n] on [-1, 1].
        noise: standard deviation of a refresh whose coefficients add up to 1.
    """
    x = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    j = np.arange(terms)
    angles = np.pi * HALF * np.outer(x, j)
    rows = np.concatenate([2 * np.cos(angles), -2 * np.sin(angles[:, 1:])], axis=1)
    wanted = f(x)
    found = [_with_ridge(rows, wanted, terms, ridge) for ridge in RIDGES]
    small = [s for s in found if s.size <= MOST_SIZE] or [min(found, key=lambda s: s.size)]
    return min(small, key=lambda s: s.error + WORST * noise * s.size)


def _with_ridge(rows: np.ndarray, wanted: np.ndarray, terms: int, ridge: float) -> Series:
    small = math.sqrt(ridge * len(rows)) * np.eye(rows.shape[1])
    padded = np.concatenate([wanted, np.zeros(len(small))])
    c = np.linalg.lstsq(np.vstack([rows, small]), padded, rcond=None)[0]
    pairs = tuple((float(re), float(im)) for re, im in zip(c[:terms], [0.0, *c[terms:]], strict=True))
    size = 2.0 * sum(math.hypot(*pair) for pair in pairs)
    return Series(coefficients=pairs, error=float(np.abs(rows @ c - wanted).max()), size=size)
