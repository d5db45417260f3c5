"""Read safetensors files: 8 bytes with the length of a header, a JSON header, raw little-endian tensors.

The format is small enough to be read here, so loading needs no further package; tensors are read one by one when they
are asked for. Format: the safetensors documentation, "Format". Nothing in a file is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes, the limit of the format


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several files, by name."""

    def __init__(self, *paths: Path) -> None:
        self.entries: dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]] = {}
        for path in paths:
            self.entries |= _entries(path)

    def __getitem__(self, name: str) -> Tensor:
        path, start, dtype, shape = self.entries[name]
        count = math.prod(shape) * dtype.itemsize
        raw = np.fromfile(path, np.uint8, count, offset=start)
        return torch.from_numpy(raw).view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _entries(path: Path) -> dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]]:
    """Return file, first byte, type and shape of each tensor; raises ValueError if the header does not fit the file."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} announces a header of {length} bytes and has {size}: not a safetensors file, or cut"
            )
        header = json.loads(f.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has type {entry['dtype']}; known: {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= end <= size - 8 - length:
            raise ValueError(
                f"{path}: {name} of shape {shape} claims bytes {start} to {end} of {size - 8 - length}; fetch it again"
            )
        found[name] = (path, 8 + length + start, dtype, shape)
    return found
