"""One file format for circuits and client specifications: a JSON header, then raw arrays.

    bytes 0..7     magic, b"POLYFHE1"
    bytes 8..15    length of the header, unsigned 64-bit little-endian
    then           the header: UTF-8 JSON, an object; its field "arrays" lists {name, dtype, shape, offset}
    then           the arrays, C order, little-endian; each offset is counted from the end of the header, a multiple of 64

Reading never runs code: dtypes are of a closed list, sizes are checked against the file before anything is made.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import WireError

MAGIC = b"POLYFHE1"
MAX_HEADER = 64 << 20
DTYPES = {"float64", "float32", "int64", "int32", "uint8"}
ALIGN = 64

Arrays = dict[str, NDArray[Any]]


def dumps(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialise; the same header and arrays give the same bytes."""
    table, chunks, offset = [], [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")  # ascontiguousarray would make a scalar an array
        if array.dtype.name not in DTYPES:
            raise WireError(f"array {name!r} has dtype {array.dtype.name}; a container holds {sorted(DTYPES)}")
        raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        table.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": offset})
        padding = -len(raw) % ALIGN
        chunks.append(raw + b"\0" * padding)
        offset += len(raw) + padding
    text = json.dumps({**header, "arrays": table}, sort_keys=True, separators=(",", ":")).encode()
    return MAGIC + struct.pack("<Q", len(text)) + text + b"".join(chunks)


def loads(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """The header (without its array table) and the arrays of a container.

    Raises:
        WireError: the bytes are not a container; the message says where they stop being one.
    """
    if data[:8] != MAGIC:
        raise WireError(f"starts with {data[:8]!r}, not with {MAGIC!r}: this is not a polyformer file")
    if len(data) < 16:
        raise WireError(f"{len(data)} bytes end inside the 16-byte preamble")
    (length,) = struct.unpack_from("<Q", data, 8)
    if length > MAX_HEADER or 16 + length > len(data):
        raise WireError(f"header of {length} bytes in a file of {len(data)} (at most {MAX_HEADER} are allowed)")
    try:
        header = strict_json(data[16 : 16 + length])
        table = header.pop("arrays")
        arrays = {row["name"]: _array(data, 16 + length, row) for row in table}
    except WireError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(f"header is not what a container needs: {error!r}") from error
    return header, arrays


def strict_json(data: bytes) -> Any:
    """Parse JSON without Python's NaN and Infinity: a bound that is no number would pass every comparison.

    Raises:
        ValueError: not JSON, or a number that is none.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    return json.loads(data, parse_constant=refuse)


def _array(data: bytes, start: int, row: Mapping[str, Any]) -> NDArray[Any]:
    name, dtype, shape, offset = row["name"], row["dtype"], row["shape"], row["offset"]
    if dtype not in DTYPES:
        raise WireError(f"array {name!r} has dtype {dtype!r}; a container holds {sorted(DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in [*shape, offset]):
        raise WireError(f"array {name!r} has shape {shape!r} at offset {offset!r}: need whole numbers")
    count = 1
    for n in shape:
        count *= n
    kind = np.dtype(dtype).newbyteorder("<")
    if start + offset + count * kind.itemsize > len(data):
        raise WireError(
            f"array {name!r} ends at byte {start + offset + count * kind.itemsize} of {len(data)}: truncated"
        )
    return np.frombuffer(data, dtype=kind, count=count, offset=start + offset).reshape(shape).astype(dtype, copy=False)


def digest(data: bytes) -> str:
    """SHA-256 of a container's bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of what a container says, hexadecimal: of the header's JSON, then of each array's name, dtype, shape and elements."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        total.update(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Write atomically; returns the digest."""
    data = dumps(header, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
    return digest(data)


def read(path: Path) -> tuple[dict[str, Any], Arrays, str]:
    """Header, arrays and digest of a file; a WireError names the file."""
    data = path.read_bytes()
    try:
        header, arrays = loads(data)
    except WireError as error:
        raise WireError(f"{path}: {error}") from error
    return header, arrays, digest(data)
