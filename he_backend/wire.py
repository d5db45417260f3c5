"""What crosses the network: frames of ciphertexts, checked before a crypto library sees them. (Keys: `keys.py`, `keystore.py`.)

A frame is a container (`container.py`) with the header

    format          "request" or "reply"
    version         1
    circuit_sha256  of the circuit that both sides mean
    key_id          of the keys that the ciphertexts are under
    log_n           ring dimension N = 2^log_n
    ciphertexts     [{name, part, level, elements, scale}, ...]

and one uint8 array "c<i>" for each ciphertext: element by element, limb by limb, N residues of ceil(bits(q) / 8) bytes
each, little-endian. A 40-bit prime so costs 5 bytes a residue and not the 8 of a machine word.

Whoever reads a frame says what it must be (`Expected`), and `loads` holds the bytes against that in an order in which
nothing large is made of anything unchecked: total length, length of the header, fields, array lengths, residues below
their prime, and an `a` part that is not zero in any limb (a "ciphertext" without one shows its plaintext, and decrypting
it for someone gives the key away).

Malformed bytes raise WireError; well-formed bytes that mean another circuit, key or ring raise ManifestError.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import container
from .base import ManifestError, WireError
from .circuit import Signature

VERSION = 1
ELEMENTS = 2
MAX_HEADER = 64 << 10
MAX_DRIFT = 2.0  # a scale may differ from the nominal one by this factor: the primes of a chain are only near it

Residues = NDArray[np.uint64]  # [elements, limbs, N]
Part = tuple[str, int]  # tensor name, number of the ciphertext within it


@dataclass(frozen=True)
class Sealed:
    """One ciphertext as plain numbers: residues uint64 [2, level + 1, N], and its exact scale."""

    residues: Residues
    scale: float


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a frame must be: the reader's own view of circuit, keys and ring.

    parts   the ciphertexts that must be there, each with its level
    moduli  primes of the chain; a ciphertext at level l has residues modulo moduli[0..l]
    scale   the nominal one
    """

    format: str
    circuit_sha256: str
    key_id: str
    log_n: int
    moduli: tuple[int, ...]
    scale: float
    parts: Mapping[Part, int]

    @property
    def max_bytes(self) -> int:
        """No honest frame is longer."""
        bodies = sum(_padded(ciphertext_bytes(self.moduli, level, self.log_n)) for level in self.parts.values())
        return 16 + MAX_HEADER + bodies


def parts(signatures: Iterable[Signature], layouts: Mapping[str, NDArray[Any]]) -> dict[Part, int]:
    """Every ciphertext of some tensors -> its level."""
    return {(s.name, i): s.level for s in signatures for i in range(len(layouts[s.layout]))}


def ciphertext_bytes(moduli: Sequence[int], level: int, log_n: int) -> int:
    """Bytes of one packed ciphertext, without its share of the header."""
    return ELEMENTS * sum(_width(q) for q in moduli[: level + 1]) << log_n


def dumps(expected: Expected, ciphertexts: Mapping[Part, Sealed]) -> bytes:
    """A frame of exactly the ciphertexts that `expected` names.

    Raises:
        WireError: a ciphertext is missing, too many, or of another shape; a fault of the caller, found before sending.
    """
    rows, arrays = [], {}
    if set(ciphertexts) != set(expected.parts):
        raise WireError(f"frame needs the ciphertexts {sorted(expected.parts)}, got {sorted(ciphertexts)}")
    for i, ((name, part), level) in enumerate(sorted(expected.parts.items())):
        residues, scale = ciphertexts[name, part].residues, ciphertexts[name, part].scale
        shape = (ELEMENTS, level + 1, 1 << expected.log_n)
        if residues.shape != shape:
            raise WireError(f"ciphertext {name!r} part {part} has residues {residues.shape}; level {level} has {shape}")
        rows.append({"name": name, "part": part, "level": level, "elements": ELEMENTS, "scale": scale})
        arrays[f"c{i}"] = _pack(residues, expected.moduli)
    header = {
        "format": expected.format,
        "version": VERSION,
        "circuit_sha256": expected.circuit_sha256,
        "key_id": expected.key_id,
        "log_n": expected.log_n,
        "ciphertexts": rows,
    }
    return container.dumps(header, arrays)


def loads(data: bytes, expected: Expected) -> dict[Part, Sealed]:
    """The ciphertexts of a frame, checked; see the module's first lines for what is checked in which order.

    Raises:
        WireError: the bytes are malformed.
        ManifestError: they are a frame for another circuit, key or ring.
    """
    check_length(len(data), expected.max_bytes)
    header, arrays = _container(data)
    if header.get("format") != expected.format or header.get("version") != VERSION:
        raise WireError(
            f"holds a {header.get('format')!r} of version {header.get('version')!r}; "
            f"expected a {expected.format!r} of version {VERSION}"
        )
    compare(
        {"circuit_sha256": expected.circuit_sha256, "key_id": expected.key_id, "log_n": expected.log_n},
        header,
        f"this {expected.format} is for something else",
        hidden=("key_id",),
    )
    rows = header.get("ciphertexts")
    if not isinstance(rows, list) or len(rows) != len(expected.parts) or len(arrays) != len(rows):
        raise WireError(f"frame must hold {len(expected.parts)} ciphertexts")
    result: dict[Part, Sealed] = {}
    for i, row in enumerate(rows):
        part, level, scale = _row(row, expected)
        if part in result:
            raise WireError(f"ciphertext {part} comes twice")
        if f"c{i}" not in arrays:
            raise WireError(f"array 'c{i}' is missing")
        residues = _unpack(arrays[f"c{i}"], expected.moduli[: level + 1], expected.log_n, part)
        result[part] = Sealed(residues, scale)
    return result


def parse_json(data: bytes) -> Any:
    """JSON from outside, without the NaN and Infinity that Python reads but no JSON has: they compare and print badly.

    Raises:
        WireError: it is none.
    """
    try:
        return container.strict_json(data)
    except (ValueError, RecursionError) as error:
        raise WireError("the body is not JSON") from error


def check_length(length: int, most: int) -> None:
    """Refuse a length before its bytes are read or parsed."""
    if not 0 <= length <= most:
        raise WireError(f"{length} bytes; at most {most} are allowed here")


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], message: str, *, hidden: Collection[str] = ()) -> None:
    """ManifestError that lists every field of `ours` on which `theirs` disagrees.

    Args:
        hidden: fields of which only our first characters are told: who knows a key's id may remove the keys.
    """
    different = {
        name: (hint(value) if name in hidden else value, theirs.get(name))
        for name, value in ours.items()
        if theirs.get(name) != value
    }
    if different:
        raise ManifestError(message, different)


def hint(secret: str) -> str:
    """So much of an id as tells two of one's own apart."""
    return secret[:4] + "…"


def _container(data: bytes) -> tuple[dict[str, Any], container.Arrays]:
    """A container with a short header; every way of being malformed is a WireError."""
    if len(data) >= 16 and data[:8] == container.MAGIC:
        check_length(struct.unpack_from("<Q", data, 8)[0], MAX_HEADER)
    try:
        header, arrays = container.loads(data)
    except (ArithmeticError, MemoryError) as error:  # sizes beyond what an array can have
        raise WireError(f"header is not what a container needs: {error!r}") from error
    if not isinstance(header, dict):
        raise WireError("the header is not an object")
    return header, arrays


def _row(row: Any, expected: Expected) -> tuple[Part, int, float]:
    """One entry of `ciphertexts`, equal to what is expected of that part."""
    if not isinstance(row, dict) or set(row) != {"name", "part", "level", "elements", "scale"}:
        raise WireError(f"a ciphertext's entry has the fields name, part, level, elements, scale; got {_short(row)}")
    name, part, level, elements, scale = (row[f] for f in ("name", "part", "level", "elements", "scale"))
    whole = all(type(n) is int for n in (part, level, elements))
    if not isinstance(name, str) or not whole or type(scale) is not float:
        raise WireError(f"a ciphertext's entry has wrong types: {_short(row)}")
    if (name, part) not in expected.parts:
        raise WireError(f"there is no ciphertext {_short(name)} part {_short(part)} here")
    if level != expected.parts[name, part] or elements != ELEMENTS:
        raise WireError(
            f"ciphertext {name!r} part {part} has {elements} elements at level {level}; "
            f"expected {ELEMENTS} at level {expected.parts[name, part]}"
        )
    if not (math.isfinite(scale) and 1 / MAX_DRIFT <= scale / expected.scale <= MAX_DRIFT):
        raise WireError(
            f"ciphertext {name!r} part {part} claims scale {scale:.6g}; the nominal one is {expected.scale:.6g}"
        )
    return (name, part), level, scale


def _pack(residues: Residues, moduli: Sequence[int]) -> NDArray[np.uint8]:
    """[elements, limbs, N] -> bytes."""
    pieces = []
    for element in residues:
        for limb, q in zip(element, moduli, strict=False):
            octets = np.ascontiguousarray(limb, dtype="<u8").view(np.uint8).reshape(-1, 8)
            pieces.append(octets[:, : _width(q)].reshape(-1))
    return np.concatenate(pieces)


def _unpack(raw: NDArray[Any], moduli: Sequence[int], log_n: int, part: Part) -> Residues:
    """Bytes -> [elements, limbs, N], every residue below its prime, no limb of the `a` part zero."""
    n = 1 << log_n
    size = ciphertext_bytes(moduli, len(moduli) - 1, log_n)
    if raw.dtype != np.uint8 or raw.shape != (size,):
        raise WireError(f"ciphertext {part} has {raw.dtype} {raw.shape}; expected {size} bytes")
    octets = np.zeros((ELEMENTS, len(moduli), n, 8), dtype=np.uint8)
    at = 0
    for element in range(ELEMENTS):
        for limb, q in enumerate(moduli):
            width = _width(q)
            octets[element, limb, :, :width] = raw[at : at + n * width].reshape(n, width)
            at += n * width
    residues: Residues = octets.view("<u8")[..., 0].astype(np.uint64, copy=False)
    primes = np.array(moduli, dtype=np.uint64)[None, :, None]
    if bool((residues >= primes).any()):
        raise WireError(f"ciphertext {part} holds a residue that is not below its modulus")
    if not bool((residues[1] != 0).any(axis=-1).all()):
        raise WireError(f"ciphertext {part} has a zero `a` part: it would not be encrypted")
    return residues


def _width(q: int) -> int:
    return (q.bit_length() + 7) // 8


def _padded(size: int) -> int:
    return -(-size // container.ALIGN) * container.ALIGN


def _short(value: Any) -> str:
    """A foreign value for an error message: its first characters only."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
