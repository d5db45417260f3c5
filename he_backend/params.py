"""CKKS parameters as plain data: ring, modulus chain, key switching. Security limits are in `security.py`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .base import ParamsError

SPECIAL_PRIME_BITS = 60  # size of each key-switching prime in OpenFHE's hybrid key switching
FREE_BITS = 4  # by which the special primes' product exceeds the largest digit, at least
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
    "refresh_encode": int,
    "refresh_decode": int,
    "refresh_slots": int,
    "refresh_complex": bool,
    "refresh_terms": int,
}
# Levels that a refresh (StC-first, encapsulated secret) spends beside its two linear transforms: one on a normalisation, the
# rest on the sine. OpenFHE 1.6.1: GetBootstrapDepth([e, d], SPARSE_ENCAPSULATED) = e + d + 10.
SINE_LEVELS = 10
# The same of a functional one, by the most terms of its series: GetFEFBTDepth([e, d], ...) - e - d.
FOURIER_LEVELS = ((14, 14), (28, 15), (60, 16), (120, 17))
SPARSE_KEY_LIMBS = 6  # of the key to the encapsulated secret: two polynomials modulo q_0 and two more primes


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
    refresh_encode, refresh_decode
                 level budget of a refresh: levels of its coefficients-to-slots and slots-to-coefficients transforms; 0: the
                 circuit refreshes nothing. More levels are cheaper levels. A refresh wants secret "sparse192".
    refresh_slots
                 period of the slot vectors that are refreshed, 0: all slots. A shorter one is cheaper; a vector of
                 another period is not refreshed but spoilt
    refresh_complex
                 a refresh handles complex slots, so that it may serve two real vectors at once (kind "pair"); it takes 1.4
                 times as long
    refresh_terms
                 if above 0, every refresh evaluates a function by a Fourier series of so many terms (kind "functional"): a
                 context of the library holds either plain or functional refreshes of one period
    """

    backend: str = "openfhe"
    log_n: int
    levels: int
    scale_bits: int
    first_bits: int
    digits: int
    secret: str = "uniform"
    insecure: bool = False
    refresh_encode: int = 0
    refresh_decode: int = 0
    refresh_slots: int = 0
    refresh_complex: bool = False
    refresh_terms: int = 0

    def __post_init__(self) -> None:
        for name, kind in FIELD_TYPES.items():
            value = getattr(self, name)
            if type(value) is not kind:  # exact: a bool is an int, and 14.0 breaks shifts later
                raise ParamsError(f"parameter {name} is {value!r}; it must be of type {kind.__name__}")
        if not MIN_LOG_N <= self.log_n <= MAX_LOG_N:
            raise ParamsError(f"log_n is {self.log_n}; rings are 2^{MIN_LOG_N} to 2^{MAX_LOG_N}")
        if self.levels < 1 or not 1 <= self.digits <= self.levels + 1:
            raise ParamsError(f"{self.levels} levels in {self.digits} digits: need 1 <= digits <= levels + 1")
        if (
            self.refresh_encode
            or self.refresh_decode
            or self.refresh_slots
            or self.refresh_complex
            or self.refresh_terms
        ):
            self._check_refresh()

    def _check_refresh(self) -> None:
        encode, decode, period = self.refresh_encode, self.refresh_decode, self.refresh_period
        if not (8 <= period <= self.slots and period & (period - 1) == 0):
            raise ParamsError(
                f"refresh_slots is {self.refresh_slots}; it must be a power of two from 8 to {self.slots}"
            )
        most = period.bit_length() - 1
        if not (1 <= encode <= most and 1 <= decode <= most and encode + decode > 2):
            raise ParamsError(
                f"refresh budget ({encode}, {decode}): each must be 1 to {most} levels for {period} slots, one of them 2 or more"
            )
        if self.secret != "sparse192":
            raise ParamsError(
                f"a refresh with a {self.secret} secret fails too often or too deep: use secret 'sparse192'"
            )
        if not 1 <= self.first_bits - self.scale_bits <= 6:
            raise ParamsError(
                f"first modulus of {self.first_bits} bits at scale 2^{self.scale_bits}: a refresh wants it 1 to 6 bits larger"
            )
        if self.refresh_terms:
            if not 7 <= self.refresh_terms <= max(terms for terms, _ in FOURIER_LEVELS):
                raise ParamsError(
                    f"refresh_terms is {self.refresh_terms}; it must be 0 or 7 to {FOURIER_LEVELS[-1][0]}"
                )
            if self.first_bits != self.scale_bits + 1 or self.refresh_complex:
                raise ParamsError(
                    f"a functional refresh wants real slots and a first modulus of {self.scale_bits + 1} bits at scale "
                    f"2^{self.scale_bits}, it has {self.first_bits} bits"
                )
        if self.refresh_output <= self.refresh_input:
            need = self.levels + self.refresh_input + 1 - self.refresh_output
            raise ParamsError(
                f"a refresh would bring level {self.refresh_input} back to {self.refresh_output}: with budget "
                f"({encode}, {decode}) it pays from {need} levels on, these parameters have {self.levels}"
            )

    @property
    def refreshes(self) -> bool:
        """Whether circuits with these parameters may refresh."""
        return self.refresh_encode > 0

    @property
    def refresh_period(self) -> int:
        return self.refresh_slots or self.slots

    @property
    def refresh_input(self) -> int:
        """Level that a ciphertext must have left to be refreshed: slots-to-coefficients comes first and spends it."""
        return self.refresh_decode + 1

    @property
    def refresh_output(self) -> int:
        """Level of a refreshed ciphertext."""
        inner = next((n for terms, n in FOURIER_LEVELS if self.refresh_terms <= terms), 0)
        return self.levels - (inner if self.refresh_terms else SINE_LEVELS) - self.refresh_encode

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
        """Key-switching primes: their product covers the largest digit. SEAL has one digit a prime and one special prime.

        OpenFHE 1.6.1 keeps four bits free, and primes of the size of the scale may lie above it (measured: digits of 56.00 and
        114.0 bits take 1 and 2 primes, of 56.02 and 117.0 bits 2 and 3).
        """
        if self.backend == "tenseal":
            return 1
        bits = self.first_bits + (self.digit_limbs - 1) * self.scale_bits + (self.digit_limbs > 1)
        return math.ceil((bits + FREE_BITS) / SPECIAL_PRIME_BITS)

    @property
    def log_qp(self) -> int:
        """Bits of the largest modulus under which anything is published: the one that security is judged by."""
        return self.log_q + self.special_limbs * SPECIAL_PRIME_BITS

    @property
    def name(self) -> str:
        kind = "INSECURE-TEST" if self.insecure else "128-bit"
        pairs = "c" * self.refresh_complex + (f"f{self.refresh_terms}" if self.refresh_terms else "")
        refresh = (
            f"-r{self.refresh_encode}.{self.refresh_decode}x{self.refresh_period}{pairs}" if self.refreshes else ""
        )
        return f"{self.backend}-{kind}-N{1 << self.log_n}-L{self.levels}-s{self.scale_bits}-d{self.digits}{refresh}"

    def limbs(self, level: int) -> int:
        return level + 1

    def ciphertext_bytes(self, level: int) -> int:
        return 2 * (level + 1) * (8 << self.log_n)

    def key_bytes(self, level: int, kind: str = "rotation") -> int:
        """One key-switching key generated for `level`; an "encapsulation" is two, one of them with few limbs."""
        digits = math.ceil((level + 1) / self.digit_limbs)
        limbs = 2 * digits * (level + 1 + self.special_limbs) + (SPARSE_KEY_LIMBS if kind == "encapsulation" else 0)
        return limbs * (8 << self.log_n)

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
