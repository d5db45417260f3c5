"""SEAL's CKKS behind the `Evaluator` protocol, through TenSEAL's binding of SEAL's own explicit API (`tenseal.sealapi`).

`tenseal.CKKSVector` has no rotation and rescales on its own, so nothing of it is used. What SEAL lacks: hoisting, the
extended basis, bootstrapping, rings above N = 2^15. The binding keeps the interpreter lock: threads do not help.
Keys are always for the whole chain (SEAL makes no others), and travel in SEAL's own format, whose `load` checks
structure and every residue against the parameters. Ciphertexts travel as residues like those of the other backend.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import secrets
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import security
from .base import BACKENDS, Array, CapabilityError, HEError, LevelError, MissingKeyError, ParamsError, WireError
from .params import SPECIAL_PRIME_BITS, Params

NAME = "tenseal"
CAPABILITIES = BACKENDS[NAME]
MAX_LOG_N = 15
INSTALL = "pip install 'tenseal>=0.3.16,<0.4'"
HEADER = struct.Struct("<HBBBBHQ")  # SEAL 4.1: magic, header size, version (2), compression, reserved, bytes in all
MAGIC = 0xA15E
Residues = NDArray[np.uint64]


@functools.cache
def library() -> Any:
    """The sealapi module.

    Raises:
        CapabilityError: TenSEAL is not installed or does not load.
    """
    if importlib.util.find_spec("tenseal") is None:
        raise CapabilityError(f"tenseal is not installed: {INSTALL}")
    try:
        import tenseal.sealapi as seal
    except ImportError as error:
        raise CapabilityError(f"tenseal is installed but does not load ({error}): {INSTALL}") from error
    return seal


def available() -> str | None:
    """None where the backend works, else a sentence that says what is missing."""
    try:
        library()
    except CapabilityError as error:
        return str(error)
    return None


def check_fit(params: Params) -> None:
    """Whether SEAL can run these parameters at all.

    Raises:
        ParamsError: says by how many levels the circuit is too deep for SEAL's largest ring.
    """
    if params.refreshes:
        raise CapabilityError(
            f"{params.name}: SEAL has no refresh; use the openfhe backend, or compile a leveled circuit"
        )
    if params.secret != "uniform":
        raise ParamsError(f"SEAL has uniform ternary secrets only, not {params.secret!r}")
    room = security.LIMITS["uniform"][MAX_LOG_N] - SPECIAL_PRIME_BITS - params.first_bits
    most = room // params.scale_bits
    if not params.insecure and (params.log_n > MAX_LOG_N or params.levels > most):
        over = f"{params.levels - most} too many" if params.levels > most else "compile for that ring"
        raise ParamsError(
            f"{params.name}: SEAL's rings end at N=2^{MAX_LOG_N}, where 128 bits leave {most} levels of {params.scale_bits} bits; "
            f"this circuit wants {params.levels} levels at N=2^{params.log_n}: {over} (the openfhe backend goes to N=2^16)"
        )
    if params.log_n > MAX_LOG_N:
        raise ParamsError(f"{params.name}: SEAL's rings end at N=2^{MAX_LOG_N}")


@dataclass(frozen=True, slots=True)
class Ciphertext:
    """A SEAL ciphertext with what this room knows of it; no method changes a handle that it was given."""

    handle: Any
    level: int
    degree: int = 1
    elements: int = 2


@dataclass(frozen=True, slots=True)
class Plaintext:
    handle: Any
    level: int
    degree: int


class Ring:
    """A SEAL context: primes, the parameter id of each level, encoder and evaluator."""

    def __init__(self, params: Params, *, allow_insecure: bool = False) -> None:
        check_fit(params)
        security.check(params, allow_insecure=allow_insecure)
        seal = library()
        self.params, self.n = params, 1 << params.log_n
        p = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        p.set_poly_modulus_degree(self.n)
        sizes = [params.first_bits] + [params.scale_bits] * params.levels + [SPECIAL_PRIME_BITS]
        try:
            p.set_coeff_modulus(seal.CoeffModulus.Create(self.n, sizes))
        except (ValueError, RuntimeError) as error:
            raise ParamsError(f"SEAL has no primes for {params.name} (bits {sizes}): {error}") from error
        # security.check enforces the limit on the actual primes
        self.context = seal.SEALContext(p, True, seal.SEC_LEVEL_TYPE.NONE)
        if not self.context.parameters_set():
            raise ParamsError(f"SEAL refuses {params.name}: {self.context.parameters_error_message()}")
        primes = tuple(int(m.value()) for m in p.coeff_modulus())
        self.moduli, self.special = primes[:-1], primes[-1:]
        self.log_qp = security.check(params, allow_insecure=allow_insecure, moduli=primes)
        self.ids: list[Any] = []
        data = self.context.first_context_data()
        while data is not None:
            self.ids.append(data.parms_id())
            data = data.next_context_data()
        self.ids.reverse()  # ids[level]
        self.encoder = seal.CKKSEncoder(self.context)
        self.evaluator = seal.Evaluator(self.context)

    def encode(self, values: Any, level: int, scale: float) -> Any:
        plain = library().Plaintext()
        try:
            self.encoder.encode(values, self.ids[level], scale, plain)
        except (ValueError, RuntimeError) as error:
            raise HEError(f"SEAL cannot encode at scale 2^{math.log2(scale):.1f}, level {level}: {error}") from error
        return plain

    def stream(self, residues: Residues, level: int, scale: float) -> bytes:
        """An uncompressed SEAL stream of a ciphertext with these residues [2, limbs, N]."""
        raw = np.ascontiguousarray(residues, dtype="<u8").tobytes()
        array = struct.pack("<Q", residues.size) + raw
        array = HEADER.pack(MAGIC, 16, 4, 1, 0, 0, 16 + len(array)) + array
        body = struct.pack("<4QBQQQdQ", *self.ids[level], 1, 2, self.n, level + 1, scale, 1) + array
        return HEADER.pack(MAGIC, 16, 4, 1, 0, 0, 16 + len(body)) + body


@functools.lru_cache(maxsize=8)
def ring(params: Params, *, allow_insecure: bool = False) -> Ring:
    """The context of these parameters, made once a process; it holds no keys."""
    return Ring(params, allow_insecure=allow_insecure)


def _to_bytes(thing: Any) -> bytes:
    """What SEAL's `save` writes; it writes to paths only."""
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:
        thing.save(file.name)
        return Path(file.name).read_bytes()


def _from_bytes(thing: Any, context: Any, data: bytes | memoryview, what: str) -> Any:
    """SEAL's checked `load`, after a check that the stream is as long as it says (SEAL ignores what follows it)."""
    size = memoryview(data).nbytes
    magic, head, *_, claimed = HEADER.unpack_from(data) if size >= HEADER.size else (0, 0, 0)
    if (magic, head, claimed) != (MAGIC, HEADER.size, size):
        raise WireError(f"{what}: {size} bytes that are not one SEAL stream (its header says {claimed} bytes)")
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:
        file.write(data)
        file.flush()
        try:
            thing.load(context, file.name)
        except (ValueError, RuntimeError) as error:
            raise WireError(f"{what}: SEAL refuses the bytes: {error}") from error
    return thing


def _memory() -> str | None:
    """A folder in memory where there is one: secret keys pass through it."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Party:
    """What client and server share."""

    def __init__(self, params: Params, allow_insecure: bool) -> None:
        self.params, self.slots, self.scale = params, params.slots, 2.0**params.scale_bits
        self._ring = ring(params, allow_insecure=allow_insecure)
        self.moduli, self.log_qp = self._ring.moduli, self._ring.log_qp

    def level(self, a: Ciphertext) -> int:
        return a.level

    def export_ciphertext(self, a: Ciphertext) -> Residues:
        """uint64 residues [elements, limbs, N], limb i modulo moduli[i], in evaluation (NTT) order."""
        if a.degree != 1:
            raise WireError(f"a ciphertext of degree {a.degree} is not for export: rescale it first")
        shape = (a.elements, a.level + 1, self._ring.n)
        count = math.prod(shape)
        data = a.handle.dyn_array()
        return np.fromiter(map(data.at, range(count)), dtype=np.uint64, count=count).reshape(shape)

    def import_ciphertext(self, residues: Residues, *, level: int) -> Ciphertext:
        """The reverse of `export_ciphertext` for two elements; residues may come from an enemy.

        Raises:
            WireError: another shape than [2, level + 1, N], or residues that are not below their prime.
        """
        if not 0 <= level <= self.params.levels:
            raise WireError(f"ciphertext at level {level}; parameters have levels 0 to {self.params.levels}")
        shape = (2, level + 1, self._ring.n)
        if np.shape(residues) != shape or residues.dtype != np.uint64:
            raise WireError(f"ciphertext at level {level} has shape {np.shape(residues)}, expected {shape} of uint64")
        for i, prime in enumerate(self.moduli[: level + 1]):
            if bad := int(np.count_nonzero(residues[:, i] >= np.uint64(prime))):
                raise WireError(
                    f"ciphertext at level {level}: limb {i} has {bad} residues at or above its prime {prime}"
                )
        data = self._ring.stream(residues, level, self.scale)
        return Ciphertext(_from_bytes(library().Ciphertext(), self._ring.context, data, "ciphertext"), level)

    def ciphertext_bytes(self, a: Ciphertext) -> int:
        return a.elements * (a.level + 1) * 16 * self.slots


class Evaluator(_Party):
    """The server's half. Keys come one at a time through `load_key`; `close` forgets them."""

    capabilities = CAPABILITIES

    def __init__(self, params: Params, *, key_id: str = "", allow_insecure: bool = False) -> None:
        super().__init__(params, allow_insecure)
        self.key_id = key_id
        self.key_levels: dict[int, int] = {}
        self.relin_level = -1
        self._rotation: dict[int, Any] = {}
        self._relin: Any = None
        self._ev = self._ring.evaluator

    def prepare(self, *, refresh: bool) -> None:
        """Nothing: SEAL computes all that it keeps when its context is made."""

    def load_key(self, kind: str, k: int, level: int, body: Any) -> None:
        """One evaluation key from the bytes that `Client.make_key` gave; it serves every level.

        Raises:
            WireError: SEAL refuses it, or it is a key for another rotation.
        """
        seal = library()
        if kind == "relin":
            self._relin = _from_bytes(seal.RelinKeys(), self._ring.context, memoryview(body), "relinearisation key")
            self.relin_level = self.params.levels
            return
        if kind != "rotation":
            raise WireError(f"a {kind!r} key: known are relin and rotation")
        key = _from_bytes(seal.GaloisKeys(), self._ring.context, memoryview(body), f"rotation key k={k}")
        if not key.has_key(pow(3, k, 4 * self.slots)):
            raise WireError(f"rotation key k={k} is a key for another rotation")
        self._rotation[k % self.slots] = key
        self.key_levels[k % self.slots] = self.params.levels

    def close(self) -> None:
        self._rotation, self._relin, self.key_levels, self.relin_level = {}, None, {}, -1

    def _make(self, op: str, *operands: Any, level: int, degree: int, elements: int) -> Ciphertext:
        """Run one SEAL operation into a fresh ciphertext; its scale is set to the nominal power, ours are exact elsewhere."""
        out = library().Ciphertext()
        try:
            getattr(self._ev, op)(*operands, out)
        except (ValueError, RuntimeError) as error:
            raise HEError(f"SEAL refuses {op} at level {level}: {error}") from error
        out.scale = self.scale**degree
        return Ciphertext(out, level, degree, elements)

    # ---- plaintexts

    def encode(self, values: Array, *, level: int, scale: float, extended: bool = False) -> Plaintext:
        """A slot vector [slots] at an exact scale."""
        if extended:
            raise CapabilityError("SEAL has no extended basis; trace with the evaluator's capabilities")
        degree = max(1, round(math.log2(scale) / self.params.scale_bits))
        corrected = np.asarray(values, dtype=np.float64) * (scale / self.scale**degree)
        if not np.any(np.abs(corrected) * self.scale**degree >= 1.0):
            corrected = np.full(self.slots, 1.0 / self.scale**degree)  # SEAL refuses products by zero as transparent
        return Plaintext(self._ring.encode(corrected, level, self.scale**degree), level, degree)

    def plaintext_bytes(self, level: int, *, extended: bool = False) -> int:
        return (level + 1) * 16 * self.slots

    # ---- sums

    def _same(self, a: Ciphertext, b: Ciphertext | Plaintext, what: str) -> None:
        if a.level != b.level or a.degree != b.degree:
            raise LevelError(
                f"{what} of operands at levels {a.level} and {b.level}, degrees {a.degree} and {b.degree}: bring them together first"
            )

    def add(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._same(a, b, "sum")
        elements = max(a.elements, b.elements)
        return self._make("add", a.handle, b.handle, level=a.level, degree=a.degree, elements=elements)

    def sub(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._same(a, b, "difference")
        elements = max(a.elements, b.elements)
        return self._make("sub", a.handle, b.handle, level=a.level, degree=a.degree, elements=elements)

    def add_plain(self, a: Ciphertext, plain: Plaintext) -> Ciphertext:
        self._same(a, plain, "sum")
        return self._make("add_plain", a.handle, plain.handle, level=a.level, degree=a.degree, elements=a.elements)

    def add_scalar(self, a: Ciphertext, value: float, *, scale: float) -> Ciphertext:
        nominal = self.scale**a.degree
        plain = self._ring.encode(float(value * (scale / nominal)), a.level, nominal)
        return self.add_plain(a, Plaintext(plain, a.level, a.degree))

    # ---- products

    def _settled(self, a: Ciphertext, what: str) -> None:
        if a.degree != 1 or a.elements != 2:
            raise LevelError(
                f"{what} of a ciphertext of degree {a.degree}, {a.elements} elements: relinearise and rescale it first"
            )

    def mul_plain(self, a: Ciphertext, plain: Plaintext) -> Ciphertext:
        self._settled(a, "product")
        self._same(a, plain, "product")
        return self._make("multiply_plain", a.handle, plain.handle, level=a.level, degree=2, elements=2)

    def mul_scalar(self, a: Ciphertext, value: float, *, scale: float) -> Ciphertext:
        corrected = float(value * (scale / self.scale))
        if abs(corrected) * self.scale < 1.0:
            corrected = 1.0 / self.scale  # as in `encode`
        return self.mul_plain(a, Plaintext(self._ring.encode(corrected, a.level, self.scale), a.level, 1))

    def weighted_sum(self, terms: Iterable[tuple[Ciphertext, Plaintext]]) -> Ciphertext:
        """Sum of products, accumulated in place; terms are read one at a time."""
        rest = iter(terms)
        total = self.mul_plain(*next(rest))
        for a, plain in rest:
            term = self.mul_plain(a, plain)
            self._same(total, term, "sum")
            self._ev.add_inplace(total.handle, term.handle)  # `total` is ours: nobody else has seen it yet
        return total

    def mul(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._settled(a, "product")
        self._settled(b, "product")
        self._same(a, b, "product")
        if a is b:
            return self.square(a)
        return self._make("multiply", a.handle, b.handle, level=a.level, degree=2, elements=3)

    def square(self, a: Ciphertext) -> Ciphertext:
        self._settled(a, "square")
        return self._make("square", a.handle, level=a.level, degree=2, elements=3)

    # ---- levels

    def relinearize(self, a: Ciphertext) -> Ciphertext:
        if a.elements != 3:
            raise LevelError(f"relinearisation of {a.elements} elements: only a product has 3")
        if self._relin is None:
            raise MissingKeyError(f"relinearisation at level {a.level}: its key is absent; run keygen for this circuit")
        return self._make("relinearize", a.handle, self._relin, level=a.level, degree=a.degree, elements=2)

    def rescale(self, a: Ciphertext) -> Ciphertext:
        if a.degree != 2 or a.level < 1:
            raise LevelError(f"rescale at level {a.level}, degree {a.degree}: needs a level to spend and degree 2")
        return self._make("rescale_to_next", a.handle, level=a.level - 1, degree=1, elements=a.elements)

    def drop(self, a: Ciphertext, *, level: int) -> Ciphertext:
        if not 0 <= level <= a.level:
            raise LevelError(f"drop from level {a.level} to {level}: levels only go down, to 0")
        if level == a.level:
            return a
        target = self._ring.ids[level]
        return self._make("mod_switch_to", a.handle, target, level=level, degree=a.degree, elements=a.elements)

    # ---- rotations

    def rotate(self, a: Ciphertext, k: int) -> Ciphertext:
        if a.elements != 2:
            raise LevelError(f"rotation of {a.elements} elements: relinearise first")
        if k not in self._rotation:
            raise MissingKeyError(f"rotation by {k} at level {a.level}: its key is absent; run keygen for this circuit")
        return self._make("rotate_vector", a.handle, k, self._rotation[k], level=a.level, degree=a.degree, elements=2)

    def _lacks(self, *_: Any) -> Any:
        raise CapabilityError(
            "SEAL has neither hoisted rotations nor the extended basis; trace with the evaluator's capabilities"
        )

    def refresh(self, a: Ciphertext) -> Ciphertext:
        raise CapabilityError("SEAL has no refresh; use the openfhe backend, or compile a leveled circuit")

    hoist = rotate_hoisted = rotate_extended = extend = mod_down = _lacks


class Client(_Party):
    """The owner's half; the interface of `openfhe_backend.Client`."""

    def __init__(
        self, params: Params, *, secret: bytes | None = None, key_id: str = "", allow_insecure: bool = False
    ) -> None:
        super().__init__(params, allow_insecure)
        seal = library()
        context = self._ring.context
        self.key_id = key_id or secrets.token_hex(16)
        if secret is None:
            self._keys = seal.KeyGenerator(context)
            self._secret = self._keys.secret_key()
        else:
            self._secret = _from_bytes(seal.SecretKey(), context, secret, "secret key")
            self._keys = seal.KeyGenerator(context, self._secret)
        self._encryptor = seal.Encryptor(context, self._secret)
        self._decryptor = seal.Decryptor(context, self._secret)

    def secret_bytes(self) -> bytes:
        """The secret key, for the owner's disk and nowhere else."""
        return _to_bytes(self._secret)

    def encrypt(self, values: Array, *, level: int) -> Ciphertext:
        """Slot vector [slots] -> ciphertext at `level`, at the nominal scale."""
        if np.shape(values) != (self.slots,):
            raise HEError(f"encrypting an array of shape {np.shape(values)}; a slot vector has shape {(self.slots,)}")
        out = library().Ciphertext()
        plain = self._ring.encode(np.asarray(values, dtype=np.float64), level, self.scale)
        self._encryptor.encrypt_symmetric(plain, out)
        return Ciphertext(out, level)

    def decrypt(self, a: Ciphertext, *, scale: float | None = None) -> Array:
        """Ciphertext -> slot vector [slots]; `scale` is the exact scale of the ciphertext, nominal without it."""
        plain = library().Plaintext()
        self._decryptor.decrypt(a.handle, plain)
        values = np.asarray(self._ring.encoder.decode_double(plain), dtype=np.float64)
        return values * (self.scale**a.degree / scale) if scale else values

    def make_key(self, kind: str, k: int, level: int) -> NDArray[np.uint8]:
        """One evaluation key in SEAL's own format; `level` changes nothing: SEAL's keys are for the whole chain."""
        if kind == "relin":
            key = self._keys.create_relin_keys()
        else:
            key = self._keys.create_galois_keys(
                [pow(3, k, 4 * self.slots)]
            )  # SEAL's generator is 3; the list holds elements
        return np.frombuffer(_to_bytes(key), dtype=np.uint8)
