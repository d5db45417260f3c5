"""The primes of a modulus, known before a context exists: those that OpenFHE takes, in its order.

Each is 1 modulo 2N. The rescaling primes lie around 2^scale_bits, nearest first and from the top level down, one above and one
below in turn; the first modulus is the largest prime below 2^first_bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from .params import Params

_WITNESSES = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
)  # decide every number below 3.3e24 (Sorenson and Webster, 2015)


def is_prime(n: int) -> bool:
    """Miller-Rabin, exact for n < 3.3e24."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd = (n - 1) >> (twos := ((n - 1) & (1 - n)).bit_length() - 1)
    return all(_passes(n, odd, twos, base) for base in _WITNESSES)


def _passes(n: int, odd: int, twos: int, base: int) -> bool:
    x = pow(base, odd, n)
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False


def _walk(start: int, step: int) -> Iterator[int]:
    while start > 1:
        if is_prime(start):
            yield start
        start += step


def moduli(params: Params) -> list[int]:
    """Primes [levels + 1], the first modulus first; level l of a chain holds the first l + 1."""
    step = 2 << params.log_n
    centre = (1 << params.scale_bits) + 1
    above, below = _walk(centre, step), _walk(centre - step, -step)
    chain = [next(below if i % 2 else above) for i in range(params.levels)]
    first = next(p for p in _walk((1 << params.first_bits) + 1 - step, -step) if p not in chain)
    return [first, *reversed(chain)]
