"""Refreshes on OpenFHE's ciphertexts: plain, of complex pairs, of functions. A part of `openfhe_backend.Evaluator`.

What a refresh needs and does is in `refresh.py`; the library's calls are in `openfhe_ring.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import refresh
from .base import CapabilityError, LevelError, MissingKeyError
from .openfhe_ring import KEY_MAPS, Ring
from .params import Params

C = Any  # `openfhe_backend.Ciphertext`


class Refreshing:
    """The evaluator's refreshes; the names below are those that it brings."""

    params: Params
    slots: int
    scale: float
    key_levels: dict[int, int]
    relin_level: int
    refresh_levels: dict[str, int]
    _ring: Ring
    _cc: Any
    _tag: str
    _lock: threading.Lock
    _monomials: dict[int, Any]  # level -> i as a plaintext
    _settled: Any
    _same: Any
    _unbiased: Any
    add: Any
    sub: Any

    def refresh(self, a: C) -> C:
        """Back to level `params.refresh_output`, from exactly `params.refresh_input`; slots within about [-1, 1].

        Slots to coefficients first, under an encapsulated sparse secret; see `refresh.py` for what it needs and its error. A vector
        must repeat with `params.refresh_period`.

        Raises:
            CapabilityError: the parameters have no refresh.
            LevelError: another level, or something is pending.
            MissingKeyError: a key that a refresh uses is absent or too low.
        """
        self._refreshable(a)
        with KEY_MAPS.read():
            handle = self._ring.refresh(a.handle)
        return self._refreshed(a, handle)

    def refresh_function(self, a: C, fourier: Sequence[float]) -> C:
        """The same with a function: slots x within [-1/2, 1/2], result 2 Re sum c_j exp(i pi j x); c_j = fourier[2j] + i fourier[2j + 1].

        Raises:
            CapabilityError: the parameters have no functional refresh, or not so many terms.
        """
        terms = self.params.refresh_terms
        if not 0 < len(fourier) // 2 <= terms:
            raise CapabilityError(f"a series of {len(fourier) // 2} terms; {self.params.name} has room for {terms}")
        self._refreshable(a, functional=True)
        coefficients = [complex(*pair) for pair in zip(fourier[::2], fourier[1::2], strict=True)]
        if len(coefficients) < terms:  # the number of terms decides the levels that it takes; the last must not be 0
            coefficients += [0j] * (terms - len(coefficients) - 1) + [2.0**-48 + 0j]
        with KEY_MAPS.read():
            handle = self._ring.refresh_function(a.handle, coefficients)
        return self._refreshed(a, handle)

    def _refreshable(self, a: C, *, functional: bool = False) -> None:
        p = self.params
        if not p.refreshes:
            raise CapabilityError(
                f"{p.name} has no refresh: compile with a refresh budget (refresh_encode, refresh_decode)"
            )
        if functional != (p.refresh_terms > 0):
            raise CapabilityError(f"{p.name}: plain and functional refreshes exclude each other; see refresh_terms")
        self._settled(a, "refresh")
        if a.level != p.refresh_input:
            raise LevelError(
                f"refresh at level {a.level}: budget {p.refresh_decode} wants level {p.refresh_input}; drop to it"
            )
        self.check_refresh_keys()
        self._ring.prepare_refresh()

    def _refreshed(self, a: C, handle: Any) -> C:
        p = self.params
        level = p.levels - handle.GetLevel()
        if level != p.refresh_output or handle.GetNoiseScaleDeg() != 1:
            raise CapabilityError(
                f"OpenFHE refreshed to level {level}, degree {handle.GetNoiseScaleDeg()}; {p.refresh_output} was predicted: "
                "install openfhe 1.6 (pip install 'openfhe>=1.6.1,<1.7')"
            )
        return replace(a, handle=handle, level=level)

    def check_refresh_keys(self) -> None:
        """Compare the keys that are loaded with those that a refresh uses: the library would read past their end.

        Raises:
            MissingKeyError: the first that is absent or too low.
        """
        have = {("relin", 0): self.relin_level, **{(kind, 0): level for kind, level in self.refresh_levels.items()}}
        have |= {("rotation", k): level for k, level in self.key_levels.items()}
        for kind, k, level in refresh.keys(self.params):
            if have.get((kind, k), -1) < level:
                raise MissingKeyError(
                    f"a refresh needs the {kind} key k={k} for level {level}, loaded is {have.get((kind, k), -1)} (-1: none): "
                    "run keygen for this circuit"
                )

    def _times_i(self, a: Any, level: int) -> Any:
        """A handle times i: the monomial X^(N/2), exact and without a level."""
        with self._lock:
            if level not in self._monomials:
                values = np.full(self.slots, 1j / self.scale)  # encoded, that is X^(N/2) and nothing else
                self._monomials[level] = self._ring.plaintext(values, level=level)
        product = self._cc.EvalMult(a, self._monomials[level])
        product.SetNoiseScaleDeg(1)
        product.SetScalingFactor(a.GetScalingFactor())
        return product

    def join(self, a: C, b: C) -> C:
        """a + i b; parameters must have `refresh_complex`."""
        if not self.params.refresh_complex:
            raise CapabilityError(f"{self.params.name} has no complex slots: set refresh_complex")
        self._same(a, b, "pair")
        self._settled(a, "pair")
        self._settled(b, "pair")
        return replace(a, handle=self._cc.EvalAdd(a.handle, self._times_i(b.handle, b.level)))

    def conjugate(self, a: C) -> C:
        self._settled(a, "conjugation")
        have = self.refresh_levels.get("conjugation", -1)
        if have < a.level:
            raise MissingKeyError(
                f"conjugation at level {a.level}: its key is for level {have} (-1: none); run keygen for this circuit"
            )
        with KEY_MAPS.read():
            found = self._cc.GetEvalAutomorphismKeyMap(self._tag)
            handle = self._cc.EvalAutomorphism(a.handle, 4 * self.slots - 1, found)
        return self._unbiased(replace(a, handle=handle))

    def twice_real(self, a: C, mirrored: C) -> C:
        return self.add(a, mirrored)

    def twice_imaginary(self, a: C, mirrored: C) -> C:
        turned = self.sub(mirrored, a)
        return replace(turned, handle=self._times_i(turned.handle, a.level))
