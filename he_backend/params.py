"""CKKS parameters as plain data: ring, modulus chain, key switching. Security limits are in `security.py`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .base import ParamsError

SPECIAL_PRIME_BITS = 60  # size of each key-switching prime in OpenFHE's hybrid key switching
MIN_LOG_N, MAX_LOG_N = 10, 17  # the smallest ring of a test, the largest with a known limit
FIELD_TYPES: dict[str, type] = {
    "backend": str,
    "log_n": int,
    "levels": int,
    "scale_bits": int,
    "first_bits": int,
    "digits": int,
    "secret": str,
    "insecure": bool,
}


@dataclass(frozen=True, kw_only=True)
class Params:
    """Parameters of one circuit.

    backend      "openfhe" or "tenseal"
    log_n        ring dimension N = 2^log_n; N / 2 slots
    levels       rescales that a fresh ciphertext can take; the chain has levels + 1 primes
    scale_bits   size of each rescaling prime, and of the scale
    first_bits   size of the last prime standing; first_bits - scale_bits bits hold the integer part of an output
    digits       parts into which hybrid key switching splits the chain (dnum)
    secret       "uniform" (ternary) or "sparse192" (ternary of Hamming weight 192)
    insecure     a test-size ring that protects nothing; said in every output
    """

    backend: str = "openfhe"
    log_n: int
    levels: int
    scale_bits: int
    first_bits: int
    digits: int
    secret: str = "uniform"
    insecure: bool = False

    def __post_init__(self) -> None:
        for name, kind in FIELD_TYPES.items():
            value = getattr(self, name)
            if type(value) is not kind:  # exact: a bool is an int, and 14.0 breaks shifts later
                raise ParamsError(f"parameter {name} is {value!r}; it must be of type {kind.__name__}")
        if not MIN_LOG_N <= self.log_n <= MAX_LOG_N:
            raise ParamsError(f"log_n is {self.log_n}; rings are 2^{MIN_LOG_N} to 2^{MAX_LOG_N}")
        if self.levels < 1 or not 1 <= self.digits <= self.levels + 1:
            raise ParamsError(f"{self.levels} levels in {self.digits} digits: need 1 <= digits <= levels + 1")

    @property
    def slots(self) -> int:
        return 1 << (self.log_n - 1)

    @property
    def log_q(self) -> int:
        return self.first_bits + self.levels * self.scale_bits

    @property
    def digit_limbs(self) -> int:
        """Primes in the largest digit."""
        return math.ceil((self.levels + 1) / self.digits)

    @property
    def special_limbs(self) -> int:
        """Key-switching primes: their product covers the largest digit. SEAL has one digit a prime and one special prime."""
        if self.backend == "tenseal":
            return 1
        return math.ceil((self.first_bits + (self.digit_limbs - 1) * self.scale_bits) / SPECIAL_PRIME_BITS)

    @property
    def log_qp(self) -> int:
        """Bits of the largest modulus under which anything is published: the one that security is judged by."""
        return self.log_q + self.special_limbs * SPECIAL_PRIME_BITS

    @property
    def name(self) -> str:
        kind = "INSECURE-TEST" if self.insecure else "128-bit"
        return f"{self.backend}-{kind}-N{1 << self.log_n}-L{self.levels}-s{self.scale_bits}-d{self.digits}"

    def limbs(self, level: int) -> int:
        return level + 1

    def ciphertext_bytes(self, level: int) -> int:
        return 2 * (level + 1) * (8 << self.log_n)

    def key_bytes(self, level: int) -> int:
        """One key-switching key generated for `level`."""
        digits = math.ceil((level + 1) / self.digit_limbs)
        return 2 * digits * (level + 1 + self.special_limbs) * (8 << self.log_n)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Params:
        known = set(cls.__dataclass_fields__)
        if unknown := set(data) - known:
            raise ParamsError(f"unknown parameter fields {sorted(unknown)}; known are {sorted(known)}")
        try:
            return cls(**data)
        except TypeError as error:  # a field is missing, or a name is no string
            raise ParamsError(f"parameters {data} are incomplete or malformed: {error}") from error
