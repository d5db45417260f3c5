"""The server's key bundle on disk: files arrive one at a time, are checked, and outlive the process.

    <folder>/keys/index.json     what the bundle consists of (`wire.KeyIndex`)
    <folder>/keys/<file>         a key that passed length, hash and parser
    <folder>/keys/<file>.part    a key that is arriving; forgotten when the server starts

A file gets its name only after every check, so whatever has a name can be trusted after a crash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import wire
from .base import ManifestError, WireError


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """Caps on a bundle, checked before anything is stored."""

    max_files: int = 512
    max_file_bytes: int = 4 << 30
    max_total_bytes: int = 64 << 30


class KeyStore:
    """One bundle of evaluation keys for one circuit. Methods are called from one event loop; none keeps a file open."""

    def __init__(self, folder: Path, circuit_sha256: str, limits: KeyLimits) -> None:
        self.folder = folder / "keys"
        self.circuit_sha256 = circuit_sha256
        self.limits = limits
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob("*.part"):
            part.unlink()
        self.index: wire.KeyIndex | None = None
        if (self.folder / "index.json").exists():
            index = self._parse(json.loads((self.folder / "index.json").read_text()))
            wire.compare(
                {"circuit_sha256": circuit_sha256},
                index.to_json(),
                f"the keys in {self.folder} belong to another circuit; remove that folder or serve the circuit they are for",
            )
            self.index = index

    def offer(self, data: Any) -> wire.KeyIndex:
        """Begin a bundle, or go on with the one that is there.

        Raises:
            WireError: malformed or above the limits.
            ManifestError: for another circuit, or another bundle is there already.
        """
        index = self._parse(data)
        wire.compare({"circuit_sha256": self.circuit_sha256}, index.to_json(), "the keys are for another circuit")
        if self.index is not None and self.index != index:
            raise ManifestError(
                "this server holds other keys; its operator, or whoever knows their id, must remove them first",
                {"key_id": (self.index.key_id[:4] + "…", index.key_id)},
            )
        part = self.folder / "index.json.part"
        part.write_text(json.dumps(index.to_json()))
        part.replace(self.folder / "index.json")
        self.index = index
        return index

    def entry(self, key_id: str, name: str) -> wire.KeyFile:
        """The index's line for a file."""
        for file in self.named(key_id).files:
            if file.name == name:
                return file
        raise WireError(f"the index has no file {name[:100]!r}")

    def missing(self) -> list[str]:
        """Files of the index that have not arrived."""
        return [] if self.index is None else [f.name for f in self.index.files if not (self.folder / f.name).exists()]

    @property
    def complete(self) -> bool:
        return self.index is not None and not self.missing()

    async def receive(self, file: wire.KeyFile, chunks: AsyncIterator[bytes]) -> Path:
        """Stream a file to disk; returns its `.part` once length and hash agree with the index.

        Raises:
            WireError: another length or hash; nothing of the file is kept.
        """
        part = self.folder / f"{file.name}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with part.open("wb") as stream:
                async for chunk in chunks:
                    size += len(chunk)
                    wire.check_length(size, file.bytes)
                    digest.update(chunk)
                    stream.write(chunk)
            if size != file.bytes or digest.hexdigest() != file.sha256:
                raise WireError(f"{file.name}: {size} bytes arrived of {file.bytes}, or their hash is not the index's")
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return part

    def accept(self, file: wire.KeyFile) -> None:
        """The parser had no objection: the file gets its name."""
        (self.folder / f"{file.name}.part").replace(self.folder / file.name)

    def reject(self, file: wire.KeyFile) -> None:
        (self.folder / f"{file.name}.part").unlink(missing_ok=True)

    def remove(self, key_id: str) -> None:
        """Forget the bundle."""
        self.named(key_id)
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.index = None

    def named(self, key_id: str) -> wire.KeyIndex:
        """The bundle, to whoever knows its id."""
        if self.index is None:
            raise ManifestError("no keys here yet: send their index first")
        if self.index.key_id != key_id:
            raise ManifestError("this server holds other keys", {"key_id": (self.index.key_id[:4] + "…", key_id[:64])})
        return self.index

    def _parse(self, data: Any) -> wire.KeyIndex:
        return wire.KeyIndex.from_json(
            data,
            max_files=self.limits.max_files,
            max_file_bytes=self.limits.max_file_bytes,
            max_total_bytes=self.limits.max_total_bytes,
        )
