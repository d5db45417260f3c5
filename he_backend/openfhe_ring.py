"""One OpenFHE context with its exact primes, and the library's process-wide state behind one gate.

OpenFHE keeps evaluation keys in static maps keyed by a tag. Readers (anything that looks a key up) and writers (loading,
dropping) share `KEY_MAPS`, so that a client who uploads keys does not disturb the evaluation of another one.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from . import openfhe_bytes, openfhe_rounding, refresh, security
from .base import CapabilityError, HEError, ParamsError
from .openfhe_bytes import Residues, Template
from .params import SPARSE_KEY_LIMBS, Params

INSTALL = "pip install 'openfhe>=1.6.1,<1.7' (wheels load on CPython 3.10 with glibc >= 2.35 and CPython 3.12 with glibc >= 2.39)"


@functools.cache
def library() -> Any:
    """The openfhe module, imported once, with OpenMP off: the executor runs independent primitives on its own threads.

    Raises:
        CapabilityError: it is not installed or does not load; the message says what to install.
    """
    if importlib.util.find_spec("openfhe") is None:
        raise CapabilityError(f"openfhe is not installed: {INSTALL}")
    try:
        with ThreadPoolExecutor(1, initializer=_one_openmp_thread) as fresh:
            openfhe = fresh.submit(importlib.import_module, "openfhe").result()
    except ImportError as error:
        raise CapabilityError(f"openfhe is installed but does not load ({error}): {INSTALL}") from error
    # Nothing from outside is ever deserialised; our own objects find their context, so its tables exist already.
    openfhe.DisablePrecomputeCRTTablesAfterDeserializaton()
    return openfhe


def _one_openmp_thread() -> None:
    """Turn OpenMP off for what this thread loads.

    The library asks once, when it is loaded, how many threads its caller may use. The environment answers that, unless torch came first and
    brought the runtime along: its `set_num_threads(2)` made every primitive of two workers a pair of threads.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with suppress(OSError):  # there may be none before the library brings its own
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)


class Gate:
    """Many readers or one writer; a waiting writer goes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writers = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._writers == 0)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._writers == 0)
            self._writers = 1
            self._condition.wait_for(lambda: self._readers == 0)
        try:
            yield
        finally:
            with self._condition:
                self._writers = 0
                self._condition.notify_all()


KEY_MAPS = Gate()  # the library's static maps are one per process, and so is this


def drop_keys(tag: str) -> None:
    """Forget all evaluation keys under a tag and leave the others; caller holds KEY_MAPS for writing."""
    o = library()
    rotations = o.CryptoContext.GetAllEvalAutomorphismKeys()
    if tag in rotations:
        o.CryptoContext.ClearEvalAutomorphismKeys()
        for other, keys in rotations.items():  # shared pointers: nothing is copied
            if other != tag:
                o.CryptoContext.InsertEvalAutomorphismKey(keys, other)
    products = o.CryptoContext.GetAllEvalMultKeys()
    if tag in products:
        o.ClearEvalMultKeys()
        for other, keys in products.items():
            if other != tag:
                o.CryptoContext.InsertEvalMultKey(keys, other)


class Ring:
    """A context: exact primes, encodings in the ordinary and the extended basis, byte templates.

    Our levels count down, OpenFHE's count up: its level is `params.levels - level`.

    moduli   primes of Q; moduli[i] is the one that a rescale at level i divides by
    special  primes of P
    """

    def __init__(self, params: Params, *, allow_insecure: bool = False) -> None:
        security.check(params, allow_insecure=allow_insecure)
        if params.refreshes:
            _claim(params)
        self.params = params
        self.n = 1 << params.log_n
        self.cc = self._context(params)
        self._lock = threading.RLock()
        self._extended: dict[int, Any] = {}
        self._templates: dict[tuple[str, int], Template] = {}
        self._shells: dict[int, Any] = {}
        self._refresh_ready = False
        # A key pair that encrypts nothing of anyone: ciphertexts and keys made under it lend their envelopes.
        self._throwaway = self.cc.KeyGen()
        self.context_json = json.loads(library().Serialize(self.cc, library().JSON))
        self._q = [_prime(entry) for entry in _element_params(self.context_json)["p"]]
        self._p = self._special_primes()
        self.moduli = tuple(q for q, _ in self._q)
        self.special = tuple(p for p, _ in self._p)
        self.log_qp = security.check(params, allow_insecure=allow_insecure, moduli=self.moduli + self.special)
        if len(self.special) != params.special_limbs or len(self.moduli) != params.levels + 1:
            raise ParamsError(
                f"OpenFHE made {len(self.moduli)} + {len(self.special)} primes for {params.name}; "
                f"{params.levels + 1} + {params.special_limbs} were predicted"
            )
        self.ciphertext_template(0)  # the byte layout is tried before anyone relies on it

    @staticmethod
    def _context(params: Params) -> Any:
        o = library()
        towers = params.levels + 1
        if math.ceil(towers / params.digit_limbs) != params.digits:
            good = sorted({math.ceil(towers / math.ceil(towers / d)) for d in range(1, towers + 1)})
            raise ParamsError(f"{towers} primes cannot be split into {params.digits} digits; possible: {good}")
        p = o.CCParamsCKKSRNS()
        # Encapsulated: the secret is the sparse one of weight 192, and a refresh raises the modulus under one of weight 32.
        sparse = o.SPARSE_ENCAPSULATED if params.refreshes else o.SPARSE_TERNARY
        p.SetSecretKeyDist({"uniform": o.UNIFORM_TERNARY, "sparse192": sparse}[params.secret])
        p.SetSecurityLevel(o.HEStd_NotSet)  # security.check enforces the limit on the actual primes, weight-aware
        p.SetRingDim(1 << params.log_n)
        p.SetMultiplicativeDepth(params.levels)
        p.SetScalingModSize(params.scale_bits)
        p.SetFirstModSize(params.first_bits)
        p.SetScalingTechnique(o.FIXEDMANUAL)  # no automatic rescale or level change: levels are the compiler's
        p.SetKeySwitchTechnique(o.HYBRID)
        p.SetNumLargeDigits(params.digits)
        p.SetBatchSize(params.slots)
        # As real data, the library refreshes half of the coefficients only, and encodes no imaginary part.
        p.SetCKKSDataType(o.COMPLEX if params.refresh_complex else o.REAL)
        try:
            cc = o.GenCryptoContext(p)
        except RuntimeError as error:
            raise ParamsError(f"OpenFHE refuses {params.name}: {error}") from error
        for feature in (o.PKE, o.KEYSWITCH, o.LEVELEDSHE, o.ADVANCEDSHE, *[o.FHE] * params.refreshes):
            cc.Enable(feature)
        return cc

    def _special_primes(self) -> list[tuple[int, int]]:
        """P and its roots of unity, read off the JSON of an extended ciphertext of one limb (13 MB at N = 2^16)."""
        o = library()
        ct = self.cc.Encrypt(self._throwaway.secretKey, self.plaintext(np.zeros(1), level=0, slots=1))
        data = json.loads(o.Serialize(self.cc.KeySwitchExt(ct, False), o.JSON))
        limbs = data["value0"]["ptr_wrapper"]["data"]["v"][0]["v"]
        return [_prime(limb["p"]) for limb in limbs[1:]]

    # ---- plaintexts

    def plaintext(self, values: Any, *, level: int, degree: int = 1, extended: bool = False, slots: int = 0) -> Any:
        """Encode at the nominal scale to the power `degree`."""
        # Complex as the library wants it: it converts real ones one by one, a tenth of the time of an encoding.
        values = np.asarray(values, dtype=np.complex128)
        basis = self._extended_basis(level) if extended else None
        at = self.params.levels - level
        return self.cc.MakeCKKSPackedPlaintext(values, degree, at, basis, slots or self.params.slots)

    def _extended_basis(self, level: int) -> Any:
        """OpenFHE's description of the basis Q_level · P, in which plaintexts for extended ciphertexts are encoded.

        The binding makes no such object, but it reads contexts from JSON: the list of primes of one is replaced.
        """
        with self._lock:
            if level not in self._extended:
                o = library()
                data = copy.deepcopy(self.context_json)
                params = _element_params(data)
                example, primes, product = params["p"][1], [], 1
                for i, (q, root) in enumerate(self._q[: level + 1] + self._p):
                    entry = copy.deepcopy(params["p"][0] if i == 0 else example)
                    entry["ptr_wrapper"]["id"] = 0x80000000 + 100 + i  # new objects: high bit and an unused number
                    inner = entry["ptr_wrapper"]["data"]["value0"]
                    inner["cm"]["v"], inner["ru"]["v"] = q, root
                    primes.append(entry)
                    product *= q
                words = [(product >> shift) & (2**64 - 1) for shift in range(0, product.bit_length(), 64)]
                params["p"] = primes
                params["value0"]["cm"] = {"cereal_class_version": 0, "v": words, "m": product.bit_length()}
                holder = o.DeserializeCryptoContextString(json.dumps(data), o.JSON)
                self._extended[level] = (holder, holder.GetElementParams())
            return self._extended[level][1]

    # ---- bytes

    def ciphertext_primes(self, level: int, elements: int = 2) -> tuple[int, ...]:
        return self.moduli[: level + 1] * elements

    def export(self, handle: Any, level: int, elements: int = 2) -> Residues:
        """Residues [elements, limbs, N] of an ordinary (not extended) ciphertext."""
        o = library()
        rows = openfhe_bytes.residues(o.Serialize(handle, o.BINARY), self.n, self.ciphertext_primes(level, elements))
        return rows.reshape(elements, level + 1, self.n)

    def ciphertext_template(self, level: int) -> Template:
        """The envelope of a ciphertext of degree 1 at `level`, tried once on its own bytes."""
        with self._lock:
            if ("ciphertext", level) not in self._templates:
                o = library()
                plain = self.plaintext(np.zeros(self.params.slots), level=level)
                handle = self.cc.Encrypt(self._throwaway.secretKey, plain)
                data = o.Serialize(handle, o.BINARY)
                primes = self.ciphertext_primes(level)
                template = Template.of(data, self.n, primes)
                if template.fill(list(openfhe_bytes.residues(data, self.n, primes))) != data:
                    raise CapabilityError(f"OpenFHE's byte layout of ciphertexts is not the known one; {INSTALL}")
                self._shells[level] = handle.CloneEmpty()
                self._templates["ciphertext", level] = template
            return self._templates["ciphertext", level]

    def load(self, residues: Residues, *, level: int, tag: str) -> Any:
        """A ciphertext handle from residues [2, limbs, N] that nobody has checked yet.

        Raises:
            WireError: wrong shape, or residues at or above their prime.
        """
        rows = (
            np.asarray(residues).reshape(-1, self.n)
            if np.asarray(residues).size % self.n == 0
            else np.asarray(residues)
        )
        template = self.ciphertext_template(level)
        openfhe_bytes.check(rows, template.primes, self.n, f"ciphertext at level {level}")
        o = library()
        loaded = o.DeserializeCiphertextString(template.fill(list(rows)), o.BINARY)
        # Copies of a deserialised object, and of all that is computed from it, are 17 times slower than those of a made one
        # (measured, openfhe 1.6.1: 40 ms a sum at N = 2^16); so its polynomials move into a made one.
        handle = self._shells[level].CloneEmpty()
        handle.SetElements(loaded.GetElements())
        handle.SetKeyTag(tag)
        return handle

    @functools.cached_property
    def mod_down_bias(self) -> Residues:
        """Residues [limbs, N] that undo the bias of a key switch, see `openfhe_rounding`."""
        return openfhe_rounding.correction(self._q, self.n, len(self.special))

    # ---- key-switching keys

    def key_primes(self, level: int, kind: str = "rotation") -> tuple[int, ...]:
        """The primes of a key file's limbs: for each of 2 · digits polynomials, q_0..q_level, then P.

        An "encapsulation" begins with a key of two polynomials modulo q_0 and two primes that occur nowhere else.
        """
        sparse = self._key_template("to sparse").primes if kind == "encapsulation" else ()
        return sparse + (self.moduli[: level + 1] + self.special) * (2 * self.key_digits(level))

    def key_digits(self, level: int) -> int:
        return math.ceil((level + 1) / self.params.digit_limbs)

    def _kept(self, level: int) -> list[bool]:
        """Which limbs of a full key [2, digits, Q + P] a key for `level` needs."""
        limbs = [i <= level or i > self.params.levels for i in range(self.params.levels + 1 + len(self.special))]
        digits = [d < self.key_digits(level) for d in range(self.params.digits)]
        return [d and limb for _ in range(2) for d in digits for limb in limbs]

    @property
    def _full_key_primes(self) -> tuple[int, ...]:
        return (self.moduli + self.special) * (2 * self.params.digits)

    def _sparse_key_primes(self, data: bytes) -> tuple[int, ...]:
        """Those of a key to the secret of weight 32, read off one: OpenFHE 1.6.1 takes two of 33 bits beside q_0."""
        primes = openfhe_bytes.primes_of(data, self.n)
        if len(primes) != SPARSE_KEY_LIMBS or primes[:3] != primes[3:] or primes[0] != self.moduli[0]:
            raise CapabilityError(f"OpenFHE's encapsulation key has limbs {primes}, not the known ones; {INSTALL}")
        return primes

    def _automorphism(self, kind: str, k: int) -> int:
        """Index of a key in the library's map; the two of an encapsulation have even ones, which no automorphism has."""
        if kind == "rotation":
            return int(self.cc.FindAutomorphismIndex(k))
        return {"conjugation": 2 * self.n - 1, "to dense": 2 * self.n - 2, "to sparse": 2 * self.n - 4}[kind]

    def key_residues(self, data: bytes, level: int) -> Residues:
        """Residues [2 · digits · limbs, N] that a key for `level` needs, out of a full key's bytes."""
        starts = openfhe_bytes.blocks(data, self.n, self._full_key_primes)
        wanted = [at for at, keep in zip(starts, self._kept(level), strict=True) if keep]
        out = np.empty((len(wanted), self.n), dtype=np.uint64)
        for row, at in zip(out, wanted, strict=True):
            row[:] = np.frombuffer(data, dtype="<u8", count=self.n, offset=at)
        return out

    def insert_key(self, kind: str, k: int, level: int, rows: Residues, tag: str) -> None:
        """Put one key from outside into the static maps under `tag`; limbs above `level` stay empty.

        Raises:
            WireError: wrong shape, or residues at or above their prime.
        """
        o = library()
        openfhe_bytes.check(rows, self.key_primes(level, kind), self.n, f"{kind} key k={k} at level {level}")
        if kind == "encapsulation":
            sparse, rows = rows[:SPARSE_KEY_LIMBS], rows[SPARSE_KEY_LIMBS:]
            self._insert("to sparse", self._key_template("to sparse"), 0, list(sparse), tag)
        template, source = self._key_template("relin" if kind == "relin" else "rotation"), iter(rows)
        full = [next(source) if keep else None for keep in self._kept(level)]
        if kind == "relin":
            key = o.DeserializeEvalKeyString(template.fill(full), o.BINARY)
            key.SetKeyTag(tag)
            with KEY_MAPS.write():
                self.cc.InsertEvalMultKey([key], tag)
            return
        self._insert("to dense" if kind == "encapsulation" else kind, template, k, full, tag)

    def _insert(self, kind: str, template: Template, k: int, limbs: list[Residues | None], tag: str) -> None:
        o, first = library(), template.pieces[0]
        index = struct.pack("<I", self._automorphism(kind, k))
        patched = Template(template.n, template.primes, (first[:13] + index + first[17:], *template.pieces[1:]))
        keys = o.DeserializeEvalKeyMapString(patched.fill(limbs), o.BINARY)
        with KEY_MAPS.write():
            self.cc.InsertEvalAutomorphismKey(keys, tag)  # merges into the tag's map

    def _key_template(self, kind: str) -> Template:
        """The envelope of a full relinearisation key, or of a map that holds one rotation key (its index at bytes 13..16)."""
        with self._lock:
            if (kind, 0) not in self._templates:
                if kind == "to sparse":
                    data, _ = self.make_encapsulation(self._throwaway.secretKey)
                    template = Template.of(data, self.n, self._sparse_key_primes(data))
                else:
                    data = self.make_key(kind, 1, self._throwaway.secretKey)
                    template = Template.of(data, self.n, self._full_key_primes)
                if kind != "relin":
                    index = struct.pack("<QI", 1, self._automorphism(kind, 1))
                    if template.pieces[0][5:17] != index:
                        raise CapabilityError(f"OpenFHE's byte layout of key maps is not the known one; {INSTALL}")
                self._templates[kind, 0] = template
            return self._templates[kind, 0]

    def make_key(self, kind: str, k: int, secret: Any) -> bytes:
        """Generate one full key under `secret`, serialise it and drop it from the static maps."""
        o = library()
        tag = secret.GetKeyTag()
        with KEY_MAPS.write():
            try:
                if kind == "relin":
                    self.cc.EvalMultKeyGen(secret)
                    return bytes(o.Serialize(self.cc.GetEvalMultKeyVector(tag)[0], o.BINARY))
                keys = self.cc.EvalAutomorphismKeyGen(secret, [self._automorphism(kind, k)])
                return bytes(o.Serialize(keys, o.BINARY))
            except RuntimeError as error:
                raise HEError(f"OpenFHE made no {kind} key for k={k}: {error}") from error
            finally:
                drop_keys(tag)

    # ---- refresh

    def make_encapsulation(self, secret: Any) -> tuple[bytes, bytes]:
        """Two full keys as maps of one entry: from `secret` to a new secret of weight 32, and back.

        The library makes both in one call and only together with the rotations of a refresh. Those are fewest with one level a
        butterfly layer (log2 of the slots), so that is what it is asked for, of a period that is not the parameters' own, and they
        are dropped. Its maps have no call for one entry, but its files have: the detour is a file of public keys, deleted at once.
        """
        o, tag = library(), secret.GetKeyTag()
        found: list[bytes] = []
        period = self.params.slots // (2 if self.params.refresh_period == self.params.slots else 1)
        layers = period.bit_length() - 1
        with self._lock, tempfile.TemporaryDirectory() as folder, KEY_MAPS.write():
            path = os.path.join(folder, "keys")
            try:
                factor = refresh.correction_factor(self.params)
                self.cc.EvalBootstrapSetup([layers, layers], [0, 0], period, factor, False, True)
                self.cc.EvalBootstrapKeyGen(secret, period)
                written = o.SerializeEvalBootstrapKey(path, o.BINARY, self.cc, tag, period)
                for kind in ("to sparse", "to dense"):
                    drop_keys(tag)
                    index = self._automorphism(kind, 0)
                    if not (written and o.DeserializeEvalBootstrapKey(path, o.BINARY, tag, [index])):
                        raise HEError(f"OpenFHE could not write or read its keys in {folder}: is the disk full?")
                    found.append(bytes(o.Serialize(o.CryptoContext.GetAllEvalAutomorphismKeys()[tag], o.BINARY)))
            except RuntimeError as error:
                raise HEError(f"OpenFHE made no encapsulation keys: {error}") from error
            finally:
                drop_keys(tag)
        return found[0], found[1]

    def encapsulation_residues(self, data: tuple[bytes, bytes], level: int) -> Residues:
        """Residues of both keys for `level`, in the order of `key_primes`."""
        sparse = openfhe_bytes.residues(data[0], self.n, self._sparse_key_primes(data[0]))
        return np.concatenate([sparse, self.key_residues(data[1], level)])

    def prepare_refresh(self) -> None:
        """Encode the matrices of a refresh, once a context: 5 GB and half a minute at N = 2^16."""
        with self._lock:
            if not self._refresh_ready:
                p = self.params
                if p.refresh_terms:
                    self.cc.EvalFEFuncBootstrapSetup([p.refresh_encode, p.refresh_decode], [0, 0], p.refresh_period)
                    self._refresh_ready = True
                    return
                budget, factor = [p.refresh_encode, p.refresh_decode], refresh.correction_factor(p)
                self.cc.EvalBootstrapSetup(budget, [0, 0], p.refresh_period, factor, True, True)
                self._refresh_ready = True

    def refresh(self, handle: Any) -> Any:
        """A ciphertext at level `refresh_input` -> one at `refresh_output`; caller holds KEY_MAPS for reading."""
        period, before = self.params.refresh_period, handle.Clone()
        before.SetSlots(period)
        after = self.cc.EvalBootstrapStCFirst(before)
        after.SetSlots(self.params.slots)
        return after

    def refresh_function(self, handle: Any, coefficients: list[complex]) -> Any:
        """The same, and a function of the slots; see `refresh.series`."""
        before = handle.Clone()
        before.SetSlots(self.params.refresh_period)
        after = self.cc.EvalFEFuncBootstrap(before, coefficients)
        after.SetSlots(self.params.slots)
        return after


def _element_params(context: dict[str, Any]) -> dict[str, Any]:
    inner = context["value0"]["ptr_wrapper"]["data"]["cc"]["ptr_wrapper"]["data"]
    found: dict[str, Any] = inner["value0"]["value0"]["value0"]["elp"]["ptr_wrapper"]["data"]
    return found


def _prime(entry: dict[str, Any]) -> tuple[int, int]:
    """(prime, root of unity) of one limb's description."""
    inner = entry["ptr_wrapper"]["data"]["value0"]
    return int(inner["cm"]["v"]), int(inner["ru"]["v"])


# The library's contexts, which are one a process too (real and complex ones are two) -> whose refresh they have.
_claimed: dict[tuple[Params, bool], Params] = {}


def _claim(params: Params) -> None:
    """Contexts that differ in the refresh only are one in the library, and that has one correction factor and one budget a
    period. Whoever changed them under a loaded key set would make it read past the end of keys.

    Raises:
        CapabilityError: this process refreshes otherwise already.
    """
    bare = dataclasses.replace(
        params, refresh_encode=0, refresh_decode=0, refresh_slots=0, refresh_complex=False, refresh_terms=0
    )
    if (other := _claimed.setdefault((bare, params.refresh_complex), params)) != params:
        raise CapabilityError(
            f"this process has keys or an evaluator for {other.name} already; OpenFHE cannot hold {params.name} beside it: "
            "use another process"
        )


@functools.lru_cache(maxsize=8)
def ring(params: Params, *, allow_insecure: bool = False) -> Ring:
    """The context of these parameters, made once a process: it holds no keys, so that clients may share it."""
    return Ring(params, allow_insecure=allow_insecure)
