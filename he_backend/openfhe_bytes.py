"""The bytes of OpenFHE's objects: residues out, residues in, and nothing from outside near its deserialiser.

OpenFHE's binary form (1.6, cereal) of a ciphertext or an evaluation key is an envelope in which each limb lies as

    8 bytes    N, unsigned little-endian
    8 N bytes  residues, unsigned 64-bit little-endian
    8 bytes    the limb's prime

A `Template` is the envelope of an object that this process made and serialised itself. To import, validated residues
are put between the pieces of an envelope; bytes that came over a wire never shape what the library parses. A limb that
an object shall not have is given length 0: an evaluation key for a low level is a key without its high limbs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import CapabilityError, WireError

Residues = NDArray[np.uint64]
EMPTY = struct.pack("<Q", 0)


def blocks(data: bytes, n: int, primes: Sequence[int]) -> list[int]:
    """Byte offsets of the residues of each limb, in the order of `primes`, one prime a limb.

    Only for bytes that this process serialised.

    Raises:
        CapabilityError: the layout is not the one that this file documents (another OpenFHE version).
    """
    head, at = struct.pack("<Q", n), 0
    found: list[int] = []
    for prime in primes:
        tail = struct.pack("<Q", prime)
        while True:
            at = data.find(head, at)
            if at < 0:
                raise CapabilityError(
                    f"OpenFHE's byte layout is not the known one: limb {len(found)} of {len(primes)} (prime {prime}) not found; "
                    "install openfhe 1.6 (pip install 'openfhe>=1.6.1,<1.7')"
                )
            if data[at + 8 + 8 * n : at + 16 + 8 * n] == tail:
                break
            at += 1
        found.append(at + 8)
        at += 8 + 8 * n
    return found


def primes_of(data: bytes, n: int) -> tuple[int, ...]:
    """The primes of an object's limbs where nobody can say them beforehand: of blocks that end in a number q = 1 mod 2N above all
    their residues. Only for bytes that this process serialised.
    """
    head, at = struct.pack("<Q", n), 0
    found: list[int] = []
    while (at := data.find(head, at)) >= 0 and at + 16 + 8 * n <= len(data):
        (q,) = struct.unpack_from("<Q", data, at + 8 + 8 * n)
        if q % (2 * n) == 1 and int(np.frombuffer(data, dtype="<u8", count=n, offset=at + 8).max()) < q:
            found.append(q)
            at += 8 + 8 * n
        at += 1
    return tuple(found)


def residues(data: bytes, n: int, primes: Sequence[int]) -> Residues:
    """Copy the limbs out of an object's bytes: [len(primes), N]."""
    out = np.empty((len(primes), n), dtype=np.uint64)
    for row, start in zip(out, blocks(data, n, primes), strict=True):
        row[:] = np.frombuffer(data, dtype="<u8", count=n, offset=start)
    return out


@dataclass(frozen=True)
class Template:
    """An envelope: `pieces[i]` precedes the length field of limb i, the last piece ends the object."""

    n: int
    primes: tuple[int, ...]
    pieces: tuple[bytes, ...]

    @classmethod
    def of(cls, data: bytes, n: int, primes: Sequence[int]) -> Template:
        """Take an object's bytes apart.

        Raises:
            CapabilityError: the known layout does not give back the same bytes.
        """
        pieces, last = [], 0
        for start in blocks(data, n, primes):
            pieces.append(data[last : start - 8])
            last = start + 8 * n
        return cls(n, tuple(primes), (*pieces, data[last:]))

    def fill(self, rows: Sequence[NDArray[np.uint64] | None]) -> bytes:
        """The object's bytes with these residues; None leaves a limb out. Call `check` on anything from outside first."""
        head = struct.pack("<Q", self.n)
        parts: list[bytes | memoryview] = []
        for piece, row in zip(self.pieces[:-1], rows, strict=True):
            parts.append(piece)
            if row is None:
                parts.append(EMPTY)
            else:
                parts += [head, np.ascontiguousarray(row, dtype="<u8").data.cast("B")]
        return b"".join([*parts, self.pieces[-1]])


def check(rows: Residues, primes: Sequence[int], n: int, what: str) -> None:
    """Refuse residues [len(primes), N] that are not all below their prime.

    Raises:
        WireError: wrong shape or type, or a residue that is too large; names the first such limb and counts its residues.
    """
    if rows.dtype != np.uint64 or rows.shape != (len(primes), n):
        raise WireError(f"{what}: residues are {rows.dtype} {rows.shape}, expected uint64 {(len(primes), n)}")
    for i, (row, prime) in enumerate(zip(rows, primes, strict=True)):
        if int(row.max()) >= prime:
            bad = int(np.count_nonzero(row >= np.uint64(prime)))
            raise WireError(f"{what}: limb {i} has {bad} of {n} residues at or above its prime {prime}")
