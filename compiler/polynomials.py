"""From coefficients to the form that a circuit evaluates: monic factors whose scale is folded elsewhere, or a Chebyshev series.

A real polynomial is its leading coefficient times monic quadratics (x + alpha)^2 + beta and, if its degree is odd, one x + alpha.
In that form no product by a constant is left: degree n costs ceil(log2 n) levels, one less than any form with coefficients,
and the leading coefficient goes into the next weights. (Knuth, The Art of Computer Programming, vol. 2, section 4.6.4, on
preparing coefficients; here depth is saved instead of products.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from he_backend.base import UnsupportedOpError

MAX_FACTORED_DEGREE = 8  # beyond it the spread of the factors costs digits
TOLERANCE = 1e-9  # relative to the largest value on the interval
# A monic product has no factor of its own: its largest value is what the interval makes of it. Beyond these it drowns in the noise,
# or wraps the modulus, and the series, whose size is 1, is worth its level.
LEAST_PEAK, MOST_PEAK = 1e-5, 1e3
MOST_EXCESS = 4.0  # of a series on its interval over the largest value that calibration saw, or the other way round


def prepare(
    coefficients: Sequence[float], factor: float, interval: tuple[float, float], peak: float, most: float = MOST_PEAK
) -> tuple[dict[str, Any], float]:
    """Attributes of a `polynomial` op and the factor of its result.

    Args:
        coefficients: power basis, in the model's variable x = factor * stored.
        factor: of the stored argument.
        interval: of the stored argument, where the result must be right.
        most: largest stored result of a monic form; an output has less room than a value that a product follows.
        peak: largest value that is expected under the result's factor; on the interval, which is wider, it may be far larger.

    Returns:
        attributes (see `he_backend.kernels.polynomial`), and f with p(x) = f * stored result.
    """
    if max(map(abs, interval)) < 1e-9:  # calibration saw zeros only: any interval will do
        interval = (-1.0, 1.0)
    powers = np.arange(len(coefficients))
    c = np.asarray(coefficients, dtype=np.float64) * factor**powers
    weight = np.abs(c) * max(map(abs, interval)) ** powers  # what each term can contribute
    highest = int(np.flatnonzero(weight > 1e-12 * weight.max())[-1])
    if highest < 1:
        raise UnsupportedOpError(
            f"a polynomial with coefficients {list(coefficients)} does not vary over its calibrated range, {factor:.3g} times "
            f"{interval}: put its value in its place, or calibrate on other samples"
        )
    p = Polynomial(c[: highest + 1])
    if p.degree() <= MAX_FACTORED_DEGREE:
        lead = float(c[highest])
        monic = Polynomial(c[: highest + 1] / lead)
        factors = monic_factors(monic)
        stored = float(np.max(np.abs(monic(np.linspace(*interval, 257)))))
        if (
            stored > LEAST_PEAK
            and max(stored, peak / abs(lead)) < most
            and error_of(factors, monic, interval) < TOLERANCE
        ):
            return {"factors": factors}, lead
    lo, hi = interval
    series = np.asarray(p.convert(kind=Chebyshev, domain=[lo, hi]).coef, dtype=np.float64)
    size = float(np.max(np.abs(series)))
    if (
        not peak / MOST_EXCESS <= size <= MOST_EXCESS * peak
    ):  # else stored values would wrap, or their powers drown in noise
        size = peak
    domain = [2.0 / (hi - lo), -(hi + lo) / (hi - lo)]
    return {"chebyshev": [float(c) for c in series / size], "domain": domain}, size


def monic_factors(p: Polynomial) -> list[list[float | None]]:
    """[[alpha, beta], ...] with product (x + alpha)^2 + beta, and [alpha, None] for x + alpha, which comes first."""
    roots = [complex(r) for r in p.roots()]
    size = max(map(abs, roots), default=0.0)

    def shift(alpha: float) -> float:
        """Without what rounding leaves of 0: it is too small to be encoded."""
        return alpha if abs(alpha) > 1e-13 * size else 0.0

    pairs = sorted((r for r in roots if r.imag > 1e-12 * max(1.0, abs(r))), key=lambda r: r.real)
    real = sorted(r.real for r in roots if abs(r.imag) <= 1e-12 * max(1.0, abs(r)))
    factors: list[list[float | None]] = []
    if len(real) % 2:
        factors.append([shift(-real.pop(len(real) // 2)), None])
    factors += [[shift(-float(r.real)), float(r.imag) ** 2] for r in pairs]
    # Pairing the outermost with the innermost keeps the quadratics alike in size.
    while real:
        a, b = real.pop(0), real.pop(-1)
        factors.append([shift(-(a + b) / 2.0), -(((a - b) / 2.0) ** 2)])
    return factors


def error_of(factors: list[list[float | None]], p: Polynomial, interval: tuple[float, float]) -> float:
    """Largest difference on the interval, relative to the largest value there."""
    x = np.linspace(*interval, 257)
    y = np.ones_like(x)
    for alpha, beta in factors:
        assert alpha is not None
        y = y * (x + alpha if beta is None else (x + alpha) ** 2 + beta)
    return float(np.max(np.abs(y - p(x))) / np.max(np.abs(p(x))))
