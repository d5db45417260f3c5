"""The server's key bundle on disk: files arrive one at a time, are checked, and outlive the process.

    <folder>/keys/manifest.json   what the bundle consists of (`keys.Manifest`)
    <folder>/keys/<file>          a key that passed length, hash, header and loader
    <folder>/keys/<file>.part     a key that is arriving; forgotten when the server starts

A file gets its name only after every check, so whatever has a name can be trusted after a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

from . import keys, wire
from .base import ManifestError, WireError
from .circuit import ClientSpec
from .keys import KeyFile, Manifest

LIBRARY_OVERHEAD = 1 << 20  # bytes by which a library's own format may exceed the residues


class KeyStore:
    """One bundle of evaluation keys for one circuit. Used from one event loop; keeps no file open between calls."""

    def __init__(self, folder: Path, spec: ClientSpec) -> None:
        self.folder = folder / "keys"
        self.spec = spec
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob("*.part"):
            part.unlink()
        self.manifest: Manifest | None = None
        if (self.folder / "manifest.json").exists():
            self.manifest = keys.read_manifest(self.folder)
            self._check(self.manifest)

    def offer(self, data: Any) -> Manifest:
        """Begin a bundle, or go on with the one that is there.

        Raises:
            WireError: malformed, or files that no circuit's bundle has.
            ManifestError: for another circuit, or another bundle is there already.
        """
        manifest = Manifest.from_json(data)
        self._check(manifest)
        if self.manifest is not None and self.manifest != manifest:
            raise ManifestError(
                "this server holds other keys; its operator, or whoever knows their id, must remove them first",
                {"key_id": (manifest.key_id, wire.hint(self.manifest.key_id))},
            )
        part = self.folder / "manifest.json.part"
        with part.open("w") as stream:
            json.dump(manifest.to_json(), stream)
            _to_disk(stream)
        part.replace(self.folder / "manifest.json")
        self.manifest = manifest
        return manifest

    def named(self, key_id: str) -> Manifest:
        """The bundle, to whoever knows its id."""
        if self.manifest is None:
            raise ManifestError("no keys here yet: send their manifest first")
        if self.manifest.key_id != key_id:
            raise ManifestError(
                "this server holds other keys", {"key_id": (key_id[:64], wire.hint(self.manifest.key_id))}
            )
        return self.manifest

    def entry(self, key_id: str, name: str) -> KeyFile:
        """The manifest's line for a file."""
        for file in self.named(key_id).files:
            if file.name == name:
                return file
        raise WireError(f"the manifest has no file {name[:100]!r}")

    def present(self) -> list[KeyFile]:
        """Files that have arrived."""
        return [] if self.manifest is None else [f for f in self.manifest.files if (self.folder / f.name).exists()]

    def missing(self) -> list[str]:
        """Names of files that have not."""
        return (
            []
            if self.manifest is None
            else [f.name for f in self.manifest.files if not (self.folder / f.name).exists()]
        )

    @property
    def complete(self) -> bool:
        return self.manifest is not None and not self.missing()

    async def receive(self, file: KeyFile, chunks: AsyncIterator[bytes]) -> Path:
        """Stream a file to disk; returns its `.part` once length and hash agree with the manifest.

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
                _to_disk(stream)
            if size != file.bytes or digest.hexdigest() != file.sha256:
                raise WireError(
                    f"{file.name}: {size} bytes arrived of {file.bytes}, or their hash is not the manifest's"
                )
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return part

    def accept(self, file: KeyFile) -> None:
        """The loader had no objection: the file gets its name."""
        (self.folder / f"{file.name}.part").replace(self.folder / file.name)

    def reject(self, file: KeyFile) -> None:
        """The file is as if it had never come."""
        for path in (self.folder / f"{file.name}.part", self.folder / file.name):
            path.unlink(missing_ok=True)

    def remove(self, key_id: str) -> None:
        """Forget the bundle."""
        self.named(key_id)
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.manifest = None

    def _check(self, manifest: Manifest) -> None:
        """For our circuit, and no more or larger files than it needs."""
        manifest.check(self.spec)
        params = self.spec.params
        most = (
            keys.HEADER + params.key_bytes(params.levels, "encapsulation") + LIBRARY_OVERHEAD
        )  # SEAL's keys are for the whole chain
        wanted = {(kind, k): level for kind, k, level in keys.wanted(self.spec)}
        for f in manifest.files:
            if wanted.get((f.kind, f.k)) != f.level:
                raise WireError(f"{f.name} for level {f.level} is not a key that this circuit asks for")
            wire.check_length(f.bytes, most)


def _to_disk(stream: IO[Any]) -> None:
    """Before the file gets its name: a name must not outlive a power cut that the contents did not."""
    stream.flush()
    os.fsync(stream.fileno())
