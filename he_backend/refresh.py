"""What a refresh needs, from parameters alone: rotations and the levels of their keys; what it does to a value: its error.

The refresh is OpenFHE's `EvalBootstrapStCFirst` with an encapsulated sparse secret (Bossuat et al., eprint 2022/024): slots to
coefficients at the lowest levels, modulus raised under a secret of weight 32, coefficients to slots, sine. Each linear
transform is an FFT of log2(slots) butterfly layers collapsed into as many matrices as its level budget (Chen, Chillotti and Song,
eprint 2018/1043); a matrix of l layers has 2^(l + 1) - 1 diagonals at equal distances, summed baby-step giant-step.

A key lies at the highest level at which its rotation occurs here. What slots to coefficients alone uses is small, because it
works at the bottom; at N = 2^16, 23 levels and all slots that takes 8 % off with budget (3, 3), 26 % with (2, 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .base import Array, ParamsError
from .params import Params

ENCAPSULATED_WEIGHT = 32  # of the secret under which the modulus is raised
RANGE = 16  # K: multiples of q_0 that OpenFHE's sine covers with that secret
# log2 of the standard deviation of the error, less log_n + correction factor - scale_bits; measured, see `error_std`.
ERROR_BITS = 11.5
FUNCTION_BITS = 12.5  # the same of a functional refresh, less log_n - scale_bits; see `function_std`


def correction_factor(params: Params) -> int:
    """Bits by which messages are made small against q_0 in the sine, log2(q_0 / largest |message|).

    OpenFHE's choice for StC-first and fixed scaling; fixed here, because the library keeps it once a context and changes it with
    every setup.
    """
    fit = 13.855 - 0.0645 * (2 * params.log_n + math.log2(params.refresh_period))
    return min(13, max(6, round(fit)))


def collapse(layers: int, budget: int) -> list[int]:
    """Butterfly layers of each of `budget` matrices: equal numbers, and the remainder in one that is last in this list."""
    each = math.ceil(layers / budget)
    full, rest = divmod(layers, each)
    if full + (rest > 0) < budget:
        each -= 1
        full = min(layers // each, budget - 1 if layers > budget * each or layers % each else budget)
        rest = layers - full * each
    return [each] * full + ([rest] if rest else [])


def _steps(layers: int, distance: int) -> tuple[list[int], list[int]]:
    """Baby and giant steps of a matrix with 2^(layers + 1) - 1 diagonals `distance` slots apart, the first at 0."""
    babies = 1 << (layers // 2 + 1 + (layers > 2))
    giants = range(0, 1 << (layers + 1), babies)
    return [j * distance for j in range(babies)], [g * distance for g in giants]


def _uses(params: Params) -> Iterator[tuple[int, int]]:
    """(rotation, level) of every rotation inside a refresh, rotations not yet reduced; 0 stands for no rotation."""
    period, layers = params.refresh_period, params.refresh_period.bit_length() - 1
    block = period
    while block < params.slots:  # the raised polynomial becomes periodic again: sums over all blocks, four at a time
        for k in range(1, min(4, params.slots // block)):
            yield k * block, params.levels
        block *= 4
    if (
        period < params.slots
    ):  # one sum and the matrices' offset in one; how far up the library does it is not documented
        yield period + 1, params.levels
    decode = collapse(layers, params.refresh_decode)
    distance = 1
    for i, part in enumerate(decode):
        babies, giants = _steps(part, distance)
        for k in babies + giants:
            yield k, params.refresh_input - i
        distance <<= part
    distance = period
    for i, part in enumerate(collapse(layers, params.refresh_encode)):
        distance >>= part
        babies, giants = _steps(part, distance)
        for k in [b % period for b in babies] + giants:
            yield k, params.levels - 1 - i


def rotations(params: Params) -> dict[int, int]:
    """Rotation k in 1 .. slots - 1 -> highest level at which a refresh uses it.

    Raises:
        ParamsError: these parameters have no refresh.
    """
    if not params.refreshes:
        raise ParamsError(f"{params.name} has no refresh: give it a level budget (refresh_encode, refresh_decode)")
    found: dict[int, int] = {}
    for k, level in _uses(params):
        if k % params.slots:
            found[k % params.slots] = max(found.get(k % params.slots, 0), level)
    return found


def relin_level(params: Params) -> int:
    """Level of the first product of a refresh: that of the sine's Chebyshev series."""
    return params.levels - 1 - params.refresh_encode


def own_keys(params: Params) -> dict[str, int]:
    """Kind -> level of the keys that nothing but a refresh uses.

    conjugation    behind coefficients to slots, before its last rescale
    encapsulation  two in one: to the secret of weight 32 modulo q_0, and back modulo all of Q
    """
    return {"conjugation": params.levels - params.refresh_encode, "encapsulation": params.levels}


def keys(params: Params) -> Iterator[tuple[str, int, int]]:
    """(kind, k, level) of every key that a refresh uses."""
    yield "relin", 0, relin_level(params)
    for kind, level in own_keys(params).items():
        yield kind, 0, level
    for k, level in sorted(rotations(params).items()):
        yield "rotation", k, level


def matrix_bytes(params: Params) -> int:
    """Memory of the encoded matrices of both transforms, which every refresh of a context shares.

    A matrix of l layers has 2^(l + 1) - 1 diagonals, each modulo the primes of its level and P. What the library took was 5 to 9 %
    more (openfhe 1.6.1, N = 2^13, five budgets, the difference in resident memory).
    """
    layers = params.refresh_period.bit_length() - 1
    limbs = 0
    for top, budget in ((params.levels - 1, params.refresh_encode), (params.refresh_input, params.refresh_decode)):
        for i, part in enumerate(collapse(layers, budget)):
            limbs += ((2 << part) - 1) * (top - i + 1 + params.special_limbs)
    return round(1.09 * limbs * (8 << params.log_n))


def working_bytes(params: Params) -> int:
    """Memory that one refresh works in: rotated copies of the first transform, then powers of the sine's argument.

    Beside keys and matrices, a process that refreshed at N = 2^16, 23 levels, 6 digits, held less than this (benchmarks/NOTES.md).
    """
    layers = max(collapse(params.refresh_period.bit_length() - 1, params.refresh_encode))
    babies = len(_steps(layers, 1)[0])
    powers = 24 * (1 + params.refresh_complex)
    return 2 * (babies * (params.levels + 1 + params.special_limbs) + powers * params.levels) * (8 << params.log_n)


def apply_error(params: Params, values: Array, ratio: float, rng: np.random.Generator) -> Array:
    """A refreshed slot vector: the sine for the identity, and noise. Values repeat with `refresh_period`, and so does the noise.

    Args:
        ratio: nominal scale over the exact scale of the values.
    """
    if np.iscomplexobj(values):  # as coefficients, real and imaginary parts are neighbours: a sine each
        parts = [apply_error(params, part, ratio, rng) for part in (np.real(values), np.imag(values))]
        return parts[0] + 1j * parts[1]
    angle = 2.0 * math.pi * 2.0 ** -correction_factor(params) / ratio
    noise = rng.normal(0.0, error_std(params) * ratio, params.refresh_period)
    refreshed: Array = np.sin(angle * values) / angle + np.tile(noise, params.slots // params.refresh_period)
    return refreshed


def error_std(params: Params) -> float:
    """Standard deviation of a refresh's noise in a slot, values at the nominal scale.

    The modulus is raised with messages divided by N and 2^correction factor, and every later error is multiplied by that at the
    end; the factor beside is measured: mean |error| 2^-18.8 to 2^-19.0 at N = 2^12, scale 2^54, and 2^-15.9 at N = 2^16.
    """
    return 2.0 ** (params.log_n + correction_factor(params) + ERROR_BITS - params.scale_bits)


def series(values: Array, fourier: Sequence[float]) -> Array:
    """2 Re sum c_j exp(i pi j x): what a functional refresh evaluates, from re c_0, im c_0, re c_1, ..."""
    c = np.array(fourier[::2]) + 1j * np.array(fourier[1::2])
    z = np.exp(1j * np.pi * values)
    return np.asarray(2.0 * np.polynomial.polynomial.polyval(z, c).real)


def apply_function(params: Params, values: Array, fourier: Sequence[float], rng: np.random.Generator) -> Array:
    """A slot vector after a functional refresh: its series, and noise that repeats like the values."""
    noise = rng.normal(0.0, function_std(params), params.refresh_period)
    return series(values, fourier) + np.tile(noise, params.slots // params.refresh_period)


def function_std(params: Params) -> float:
    """Standard deviation of a functional refresh's noise in a slot, for a series whose coefficients add up to about 1.

    Measured (openfhe 1.6.1, logistic function, 17 terms, scale 2^54): 2^-32.1, 2^-32.1, 2^-30.8, 2^-28.5, 2^-28.2 at N = 2^10 to 2^14;
    2^-28.4 at N = 2^10, scale 2^50. N = 2^16 is beyond what was measured.
    """
    return 2.0 ** (params.log_n + FUNCTION_BITS - params.scale_bits)


def failure_log2(params: Params) -> float:
    """log2 of the chance that one refresh is wrong: some coefficient of the raised message wraps more than K times.

    A coefficient wraps as often as a sum of h + 1 terms, uniform in [-1/2, 1/2], rounds to. For h = 32 that is 16.5 at most, so that
    its tail beyond K = 16 is a simplex's volume, (h/2 + 1/2 - K)^(h + 1) / (h + 1)! on each side (the normal approximation
    2N Q(K / sqrt((h + 1) / 12)) of Bossuat et al., eprint 2022/024, gives 2^-55 where this gives 2^-138); union bound over 2N.
    """
    terms = ENCAPSULATED_WEIGHT + 1
    tail = terms * math.log2(terms / 2 - RANGE) - math.lgamma(terms + 1) / math.log(2)
    return params.log_n + 1 + 1 + tail
