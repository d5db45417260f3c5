"""OpenFHE's CKKS behind the `Evaluator` protocol, and the client's half: keys, encryption, decryption.

Fixed manual scaling: nothing is rescaled, relinearised or dropped behind the caller's back. A scale is exact here: the
library multiplies by its nominal 2^scale_bits, so values are corrected by scale / nominal before it sees them.
"""

from __future__ import annotations

import itertools
import math
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .base import BACKENDS, Array, CapabilityError, HEError, LevelError, MissingKeyError, WireError
from .openfhe_bytes import Residues
from .openfhe_refresh import Refreshing
from .openfhe_ring import KEY_MAPS, Ring, drop_keys, library, ring
from .params import Params

NAME = "openfhe"
CAPABILITIES = BACKENDS[NAME]
KINDS = ("relin", "rotation", "conjugation", "encapsulation")
_serial = itertools.count(1)  # tags in the library's static maps: one an evaluator, even under the same key


def available() -> str | None:
    """None where the backend works, else a sentence that says what is missing."""
    try:
        library()
    except CapabilityError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Ciphertext:
    """An OpenFHE handle with what this room knows of it; immutable by convention: no method changes a handle it was given.

    degree    power of the nominal scale: 2 while a rescale is pending
    elements  3 while a relinearisation is pending
    extended  modulo P·Q
    """

    handle: Any
    level: int
    degree: int = 1
    elements: int = 2
    extended: bool = False


@dataclass(frozen=True, slots=True)
class Plaintext:
    handle: Any
    level: int
    degree: int
    extended: bool


class _Party:
    """What client and server share: parameters, primes, ciphertexts as residues."""

    def __init__(self, params: Params, tag: str, allow_insecure: bool) -> None:
        self.params = params
        self.slots = params.slots
        self.scale = 2.0**params.scale_bits
        self._ring: Ring = ring(params, allow_insecure=allow_insecure)
        self._cc = self._ring.cc
        self._tag = tag
        self.moduli = self._ring.moduli
        self.log_qp = self._ring.log_qp

    def level(self, a: Ciphertext) -> int:
        return a.level

    def export_ciphertext(self, a: Ciphertext) -> Residues:
        """uint64 residues [elements, limbs, N], limb i modulo moduli[i], in evaluation (NTT) order."""
        if a.extended or a.degree != 1:
            raise WireError(
                f"a ciphertext of degree {a.degree}{', extended,' * a.extended} is not for export: rescale it first"
            )
        return self._ring.export(a.handle, a.level, a.elements)

    def import_ciphertext(self, residues: Residues, *, level: int) -> Ciphertext:
        """The reverse of `export_ciphertext` for two elements; residues may come from an enemy.

        Raises:
            WireError: another shape than [2, level + 1, N], or residues that are not below their prime.
        """
        if not 0 <= level <= self.params.levels:
            raise WireError(f"ciphertext at level {level}; parameters have levels 0 to {self.params.levels}")
        shape = (2, level + 1, 2 * self.slots)
        if np.shape(residues) != shape:
            raise WireError(f"ciphertext at level {level} has shape {np.shape(residues)}, expected {shape}")
        return Ciphertext(self._ring.load(residues, level=level, tag=self._tag), level)

    def ciphertext_bytes(self, a: Ciphertext) -> int:
        """Bytes of memory that a value holds, for accounting."""
        limbs = a.level + 1 + (len(self._ring.special) if a.extended else 0)
        return a.elements * limbs * 16 * self.slots


class Evaluator(_Party, Refreshing):
    """The server's half. Evaluation keys come one at a time through `load_key`; `close` forgets them.

    key_levels      rotation -> level that its key was made for; relin_level likewise, -1 without one
    refresh_levels  the same for the keys that only a refresh uses, by kind: conjugation, encapsulation
    """

    capabilities = CAPABILITIES

    def __init__(self, params: Params, *, key_id: str = "", allow_insecure: bool = False) -> None:
        super().__init__(params, f"{key_id}/{next(_serial)}", allow_insecure)
        self.key_id = key_id
        self.key_levels: dict[int, int] = {}
        self.relin_level = -1
        self.refresh_levels: dict[str, int] = {}
        self._lock = threading.Lock()
        self._monomials = {}
        self._bias: dict[int, Any] = {}  # level -> ciphertext that undoes the bias of a key switch

    def prepare(self, *, refresh: bool) -> None:
        """Do ahead what the first request would wait for: 4 s of 41 s (2 blocks, d = 128, N = 2^16) and a refresh's matrices."""
        self._bias_at(self.params.levels)
        if refresh:
            self._ring.prepare_refresh()

    # ---- keys

    def load_key(self, kind: str, k: int, level: int, body: Any) -> None:
        """One evaluation key of `KINDS`, a rotation's by k, from the bytes (any buffer) that `Client.make_key` gave.

        Raises:
            WireError: it is malformed, or was loaded before; keys loaded before stay as they were.
        """
        have = self.relin_level >= 0 if kind == "relin" else kind in self.refresh_levels
        if have or (kind == "rotation" and k % self.slots in self.key_levels):
            raise WireError(
                f"the {kind} key k={k} is loaded already: new keys need a new evaluator"
            )  # the library keeps the old one
        known = KINDS if self.params.refreshes else KINDS[:2]
        if kind not in known or not 0 <= level <= self.params.levels:
            raise WireError(
                f"a {kind!r} key at level {level}: known are {', '.join(known)}, levels 0 to {self.params.levels}"
            )
        raw = memoryview(body).cast("B")
        rows = len(self._ring.key_primes(level, kind))
        if raw.nbytes != rows * 16 * self.slots:
            raise WireError(f"{kind} key for level {level} has {raw.nbytes} bytes, expected {rows * 16 * self.slots}")
        residues = np.frombuffer(raw, dtype="<u8").reshape(rows, 2 * self.slots)
        self._ring.insert_key(kind, k, level, residues, self._tag)
        if kind == "relin":
            self.relin_level = level
        elif kind == "rotation":
            self.key_levels[k % self.slots] = level
        else:
            self.refresh_levels[kind] = level

    def close(self) -> None:
        """Forget the keys; those of other evaluators stay."""
        with KEY_MAPS.write():
            drop_keys(self._tag)
        self.key_levels, self.relin_level, self.refresh_levels = {}, -1, {}

    def _need(self, k: int, level: int) -> None:
        have = self.key_levels.get(k, -1)
        if have < level:
            found = f"made for level {have}" if have >= 0 else "absent"
            raise MissingKeyError(
                f"rotation by {k} at level {level}: its key is {found}; generate it for level {level}"
            )

    # ---- plaintexts

    def encode(self, values: Array, *, level: int, scale: float, extended: bool = False) -> Plaintext:
        """A slot vector [slots] at an exact scale; nominal-scale powers 1 and 2 (for sums with a pending rescale) exist."""
        degree = max(1, round(math.log2(scale) / self.params.scale_bits))
        corrected = np.asarray(values, dtype=np.float64) * (scale / self.scale**degree)
        try:
            handle = self._ring.plaintext(corrected, level=level, degree=degree, extended=extended)
        except RuntimeError as error:
            most = float(np.abs(values).max())
            raise HEError(
                f"encoding values up to {most:.3g} at scale 2^{math.log2(scale):.1f}, level {level}: {error}"
            ) from error
        return Plaintext(handle, level, degree, extended)

    def plaintext_bytes(self, level: int, *, extended: bool = False) -> int:
        return (level + 1 + (len(self._ring.special) if extended else 0)) * 16 * self.slots

    # ---- sums

    def _same(self, a: Ciphertext, b: Ciphertext | Plaintext, what: str) -> None:
        if a.level != b.level or a.degree != b.degree or a.extended != b.extended:
            raise LevelError(
                f"{what} of operands at levels {a.level} and {b.level}, degrees {a.degree} and {b.degree}"
                f"{', one of them extended' * (a.extended != b.extended)}: bring them together first"
            )

    def add(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._same(a, b, "sum")
        return replace(a, handle=self._cc.EvalAdd(a.handle, b.handle), elements=max(a.elements, b.elements))

    def sub(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._same(a, b, "difference")
        return replace(a, handle=self._cc.EvalSub(a.handle, b.handle), elements=max(a.elements, b.elements))

    def add_plain(self, a: Ciphertext, plain: Plaintext) -> Ciphertext:
        self._same(a, plain, "sum")
        return replace(a, handle=self._cc.EvalAdd(a.handle, plain.handle))

    def add_scalar(self, a: Ciphertext, value: float, *, scale: float) -> Ciphertext:
        # Not EvalAdd(ciphertext, number): at degree 2 that multiplies by the nominal scale times a prime, 2^-22 away.
        corrected = np.array([value * (scale / self.scale**a.degree)])
        plain = self._ring.plaintext(corrected, level=a.level, degree=a.degree, slots=1)
        return replace(a, handle=self._cc.EvalAdd(a.handle, plain))

    # ---- products

    def mul_plain(self, a: Ciphertext, plain: Plaintext) -> Ciphertext:
        if a.level != plain.level or a.extended != plain.extended or a.degree != 1 or plain.degree != 1:
            raise LevelError(
                f"product of a ciphertext at level {a.level}, degree {a.degree} and a plaintext at level {plain.level}, "
                f"degree {plain.degree}: levels must be equal, degrees 1"
            )
        return replace(a, handle=self._cc.EvalMult(a.handle, plain.handle), degree=2)

    def mul_scalar(self, a: Ciphertext, value: float, *, scale: float) -> Ciphertext:
        self._settled(a, "product by a number")
        return replace(a, handle=self._cc.EvalMult(a.handle, float(value * (scale / self.scale))), degree=2)

    def weighted_sum(self, terms: Iterable[tuple[Ciphertext, Plaintext]]) -> Ciphertext:
        """Sum of products, accumulated in place: one fresh ciphertext a term instead of two. Terms are read one at a time."""
        rest = iter(terms)
        total = self.mul_plain(*next(rest))
        for a, plain in rest:
            term = self.mul_plain(a, plain)
            self._same(total, term, "sum")
            self._cc.EvalAddInPlace(total.handle, term.handle)  # `total` is ours: nobody else has seen it yet
        return total

    def mul(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._same(a, b, "product")
        self._settled(a, "product")
        self._settled(b, "product")
        return replace(a, handle=self._cc.EvalMultNoRelin(a.handle, b.handle), degree=2, elements=3)

    def square(self, a: Ciphertext) -> Ciphertext:
        return self.mul(a, a)

    # ---- levels

    def _settled(self, a: Ciphertext, what: str) -> None:
        if a.degree != 1 or a.elements != 2 or a.extended:
            raise LevelError(
                f"{what} of a ciphertext of degree {a.degree}, {a.elements} elements{', extended' * a.extended}: "
                "relinearise and rescale it first"
            )

    def relinearize(self, a: Ciphertext) -> Ciphertext:
        if a.elements != 3:
            raise LevelError(f"relinearisation of {a.elements} elements: only a product has 3")
        if self.relin_level < a.level:
            have = f"made for level {self.relin_level}" if self.relin_level >= 0 else "absent"
            raise MissingKeyError(
                f"relinearisation at level {a.level}: its key is {have}; generate it for level {a.level}"
            )
        with KEY_MAPS.read():
            return replace(a, handle=self._cc.Relinearize(a.handle), elements=2)

    def rescale(self, a: Ciphertext) -> Ciphertext:
        if a.degree != 2 or a.level < 1 or a.extended:
            raise LevelError(f"rescale at level {a.level}, degree {a.degree}: needs a level to spend and degree 2")
        return replace(a, handle=self._cc.Rescale(a.handle), degree=1, level=a.level - 1)

    def drop(self, a: Ciphertext, *, level: int) -> Ciphertext:
        if not 0 <= level <= a.level or a.extended:
            raise LevelError(f"drop from level {a.level} to {level}: levels only go down, to 0")
        return (
            a
            if level == a.level
            else replace(a, handle=self._cc.LevelReduce(a.handle, None, a.level - level), level=level)
        )

    # ---- rotations

    def _rotatable(self, a: Ciphertext, k: int) -> None:
        if a.elements != 2 or a.extended:
            raise LevelError(
                f"rotation of {a.elements} elements{', extended' * a.extended}: relinearise or mod_down first"
            )
        self._need(k, a.level)

    def _unbiased(self, a: Ciphertext) -> Ciphertext:
        """Take the bias of a key switch off a fresh result; while a rescale is pending it would be divided away anyway.

        Not under KEY_MAPS: it takes the ring's lock, under which a loading client waits for the readers of KEY_MAPS to go.
        """
        if a.degree == 1:
            self._cc.EvalAddInPlace(a.handle, self._bias_at(a.level))
        return a

    def _bias_at(self, level: int) -> Any:
        """The ciphertext that undoes the bias, cut from the one of the highest level: that takes seconds to make."""
        top = self.params.levels
        with self._lock:
            if top not in self._bias:
                rows = self._ring.mod_down_bias
                self._bias[top] = self._ring.load(np.stack([rows, rows]), level=top, tag=self._tag)
            if level not in self._bias:
                self._bias[level] = self._cc.LevelReduce(self._bias[top], None, top - level)
            return self._bias[level]

    def rotate(self, a: Ciphertext, k: int) -> Ciphertext:
        self._rotatable(a, k)
        with KEY_MAPS.read():
            handle = self._cc.EvalRotate(a.handle, k)
        return self._unbiased(replace(a, handle=handle))

    def hoist(self, a: Ciphertext) -> Any:
        """Digits of the second element, shared by all rotations of `a`."""
        return self._cc.EvalFastRotationPrecompute(a.handle)

    def rotate_hoisted(self, a: Ciphertext, digits: Any, k: int) -> Ciphertext:
        self._rotatable(a, k)
        with KEY_MAPS.read():
            handle = self._cc.EvalFastRotation(a.handle, k, 4 * self.slots, digits)
        return self._unbiased(replace(a, handle=handle))

    def rotate_extended(self, a: Ciphertext, digits: Any, k: int) -> Ciphertext:
        self._rotatable(a, k)
        with KEY_MAPS.read():
            return replace(a, handle=self._cc.EvalFastRotationExt(a.handle, k, digits, True), extended=True)

    def extend(self, a: Ciphertext) -> Ciphertext:
        return replace(a, handle=self._cc.KeySwitchExt(a.handle, True), extended=True)

    def mod_down(self, a: Ciphertext) -> Ciphertext:
        return self._unbiased(replace(a, handle=self._cc.KeySwitchDown(a.handle), extended=False))


class Client(_Party):
    """The owner's half: holds the secret key, encrypts under it (symmetrically: less noise), decrypts, makes keys.

    secret  the bytes that `secret_bytes` gave; a new key is made without them.
    """

    def __init__(
        self, params: Params, *, secret: bytes | None = None, key_id: str = "", allow_insecure: bool = False
    ) -> None:
        self.key_id = key_id or secrets.token_hex(16)
        super().__init__(params, self.key_id, allow_insecure)
        o = library()
        if secret is None:
            self._secret = self._cc.KeyGen().secretKey
        else:
            self._secret = o.DeserializePrivateKeyString(secret, o.BINARY)
        self._secret.SetKeyTag(self.key_id)

    def secret_bytes(self) -> bytes:
        """The secret key, for the owner's disk and nowhere else."""
        o = library()
        return bytes(o.Serialize(self._secret, o.BINARY))

    def encrypt(self, values: Array, *, level: int) -> Ciphertext:
        """Slot vector [slots] -> ciphertext at `level`, at the nominal scale."""
        if np.shape(values) != (self.slots,):
            raise HEError(f"encrypting an array of shape {np.shape(values)}; a slot vector has shape {(self.slots,)}")
        plain = self._ring.plaintext(np.asarray(values, dtype=np.float64), level=level)
        return Ciphertext(self._cc.Encrypt(self._secret, plain), level)

    def decrypt(self, a: Ciphertext, *, scale: float | None = None) -> Array:
        """Ciphertext -> slot vector [slots]; `scale` is the exact scale of the ciphertext, nominal without it.

        Raises:
            HEError: the noise has swallowed the message.
        """
        try:
            plain = self._cc.Decrypt(self._secret, a.handle)
            plain.SetLength(self.slots)
            values = np.asarray(plain.GetRealPackedValueArray(), dtype=np.float64)
        except RuntimeError as error:
            raise HEError(
                f"decryption at level {a.level} found more noise than message ({str(error).splitlines()[0]}): wrong key, values "
                f"above 2^{self.params.first_bits - self.params.scale_bits - 1}, or a circuit whose error bound is broken"
            ) from error
        return values * (self.scale**a.degree / scale) if scale else values

    def make_key(self, kind: str, k: int, level: int) -> Residues:
        """One evaluation key for `level`: residues [2 · digits · limbs, N], in the form that `Evaluator.load_key` takes."""
        if kind == "encapsulation":
            return self._ring.encapsulation_residues(self._ring.make_encapsulation(self._secret), level)
        return self._ring.key_residues(self._ring.make_key(kind, k, self._secret), level)
