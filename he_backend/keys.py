"""Key bundles on disk: made one key at a time, resumable, and loaded one key at a time.

    FOLDER/secret/key.bin              16 bytes of magic, then the library's bytes; folder mode 0700; it never leaves the client
    FOLDER/secret/key.json             which circuit, parameters and key set it belongs to
    FOLDER/evaluation/manifest.json    format, version, circuit_sha256, params, key_id, files
    FOLDER/evaluation/relin.key        one file a key: a 64-byte header, then the body that the backend made
    FOLDER/evaluation/rotation-K.key
    FOLDER/evaluation/conjugation.key, encapsulation.key     where the parameters refresh

    header of a key file: 16 bytes magic, then little-endian u32 kind (its place in KINDS), k, level, 0; then key_id (32 ASCII)

The evaluation folder is what a server gets. Files are complete or absent: written as .part and renamed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import refresh
from .base import BACKENDS, CapabilityError, ManifestError, WireError
from .circuit import ClientSpec
from .container import strict_json
from .params import Params

FORMAT, VERSION = "polyformer-keys", 1
SECRET_MAGIC = b"POLYFHE-SECRET1\n"
KEY_MAGIC = b"POLYFHE-EVALKEY1"
HEADER = 64
KINDS = ("relin", "rotation", "conjugation", "encapsulation")
MAX_MANIFEST = 4 << 20

Progress = Callable[[int, int, str], None]


def backend(name: str) -> Any:
    """The module of a backend, imported when asked for; it has NAME, CAPABILITIES, available(), Evaluator and Client.

    Raises:
        CapabilityError: an unknown name, or a library that is not there.
    """
    if name not in BACKENDS:
        raise CapabilityError(f"backend {name!r} is unknown; known are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{name}_backend", __package__)
    if missing := module.available():
        raise CapabilityError(missing)
    return module


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """One row of a manifest."""

    name: str
    kind: str
    k: int
    level: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle of evaluation keys is for and which files it has."""

    circuit_sha256: str
    params: Params
    key_id: str
    files: tuple[KeyFile, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "circuit_sha256": self.circuit_sha256,
            "params": self.params.to_json(),
            "key_id": self.key_id,
            "files": [asdict(f) for f in self.files],
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Parse a manifest from outside.

        Raises:
            WireError: not a manifest of this version, or a file name that could leave the folder.
        """
        try:
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise WireError(f"holds {data['format']!r} {data['version']!r}; expected {FORMAT!r} version {VERSION}")
            files = tuple(_row(row) for row in data["files"])
            key_id = str(data["key_id"])
            if len(key_id) != 32 or set(key_id) - set("0123456789abcdef"):
                raise WireError(f"key_id {key_id[:40]!r} is not 32 hexadecimal digits")
            if len({f.name for f in files}) != len(files):
                raise WireError("two files of the manifest have one name")
            params = Params.from_json(data["params"])
            return cls(circuit_sha256=str(data["circuit_sha256"]), params=params, key_id=key_id, files=files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WireError(f"malformed key manifest: {error!r}") from error

    def check(self, spec: ClientSpec) -> None:
        """Compare with what a circuit needs.

        Raises:
            ManifestError: field by field, the circuit's value first.
        """
        have = {(f.kind, f.k): f.level for f in self.files}
        differences: dict[str, tuple[Any, Any]] = {}
        if self.circuit_sha256 != spec.circuit_sha256:
            differences["circuit_sha256"] = (spec.circuit_sha256, self.circuit_sha256)
        ours, theirs = spec.params.to_json(), self.params.to_json()
        differences |= {f"params.{name}": (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        for kind, k, level in wanted(spec):
            if have.get((kind, k), -1) < level:
                differences[f"{kind} {k} level"] = (level, have.get((kind, k), "no key"))
        if differences:
            raise ManifestError(
                "these keys are not for this circuit; run keygen with this circuit's client file", differences
            )


def _row(row: Any) -> KeyFile:
    kind, k, level = row["kind"], row["k"], row["level"]
    numbers = (k, level, row["bytes"])
    if kind not in KINDS or not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers):
        raise WireError(f"key file row {str(row)[:120]}: need kind {' or '.join(KINDS)} and whole k, level, bytes")
    if row["name"] != file_name(kind, k):
        raise WireError(f"key file {str(row['name'])[:60]!r} should be called {file_name(kind, k)!r}")
    return KeyFile(name=row["name"], kind=kind, k=k, level=level, bytes=row["bytes"], sha256=str(row["sha256"]))


def file_name(kind: str, k: int) -> str:
    return f"rotation-{k}.key" if kind == "rotation" else f"{kind}.key"


def wanted(spec: ClientSpec) -> Iterator[tuple[str, int, int]]:
    """(kind, k, level) of every key that a circuit needs, in the order in which they are best made and loaded.

    Making an encapsulation key, or its envelope where it is loaded, takes the memory of some twenty other keys for a moment: it
    comes first, while there are none.
    """
    if spec.params.refreshes:
        for kind, level in sorted(refresh.own_keys(spec.params).items(), reverse=True):
            yield kind, 0, level
    if spec.relin_level >= 0:
        yield "relin", 0, spec.relin_level
    for k, level in sorted(spec.keys.items()):
        yield "rotation", int(k), int(level)


def evaluation_bytes(spec: ClientSpec) -> int:
    """Predicted bytes of the evaluation folder."""
    return sum(HEADER + spec.params.key_bytes(level, kind) for kind, _, level in wanted(spec))


# ---- the client's side


def generate(
    spec: ClientSpec, folder: Path, *, progress: Progress | None = None, allow_insecure: bool = False
) -> Manifest:
    """Make the secret key and every evaluation key of a circuit, each at the highest level where it is used.

    One key is in memory at a time, while the one before it is written. Interrupted, it goes on where it stopped, under the
    same secret.

    Raises:
        ManifestError: the folder holds keys for another circuit.
    """
    client = _open_or_make_client(spec, folder, allow_insecure)
    target = folder / "evaluation"
    target.mkdir(parents=True, exist_ok=True)
    jobs = list(wanted(spec))
    rows: list[KeyFile] = []

    def write(kind: str, k: int, level: int, body: Any) -> KeyFile:
        name = file_name(kind, k)
        head = _header(kind, k, level, client.key_id)
        digest = hashlib.sha256(head)
        raw = memoryview(body).cast("B")
        digest.update(raw)
        part = target / (name + ".part")
        with part.open("wb") as out:
            out.write(head)
            out.write(raw)
        part.replace(target / name)
        return KeyFile(name=name, kind=kind, k=k, level=level, bytes=HEADER + raw.nbytes, sha256=digest.hexdigest())

    with ThreadPoolExecutor(1) as writer:
        pending: Future[KeyFile] | None = None
        for i, (kind, k, level) in enumerate(jobs):
            done = _existing(target, kind, k, level, client.key_id)
            if done is None:
                body = client.make_key(kind, k, level)
                if pending is not None:
                    rows.append(pending.result())
                pending = writer.submit(write, kind, k, level, body)
                del body
            else:
                rows.append(done)
            if progress:
                progress(i + 1, len(jobs), file_name(kind, k))
        if pending is not None:
            rows.append(pending.result())
    order = {file_name(kind, k): i for i, (kind, k, _) in enumerate(jobs)}
    rows.sort(key=lambda row: order[row.name])
    manifest = Manifest(circuit_sha256=spec.circuit_sha256, params=spec.params, key_id=client.key_id, files=tuple(rows))
    _write(target / "manifest.json", json.dumps(manifest.to_json(), indent=1).encode())
    return manifest


def open_client(spec: ClientSpec, folder: Path, *, allow_insecure: bool = False) -> Any:
    """The client that owns a folder's secret key.

    Raises:
        ManifestError: there is none, or it was made for another circuit.
    """
    path = folder / "secret" / "key.bin"
    if not path.exists():
        raise ManifestError(f"{folder} holds no secret key; run keygen first")
    meta = strict_json((folder / "secret" / "key.json").read_bytes())
    ours = {"circuit_sha256": spec.circuit_sha256, "params": spec.params.to_json()}
    if differences := {name: (value, meta.get(name)) for name, value in ours.items() if meta.get(name) != value}:
        raise ManifestError(f"{folder} holds keys for another circuit; use another folder, or delete it", differences)
    data = path.read_bytes()
    if data[: len(SECRET_MAGIC)] != SECRET_MAGIC:
        raise WireError(f"{path} is not a secret key: it starts with {data[:16]!r}")
    module = backend(spec.params.backend)
    body = data[len(SECRET_MAGIC) :]
    return module.Client(spec.params, secret=body, key_id=meta["key_id"], allow_insecure=allow_insecure)


def _open_or_make_client(spec: ClientSpec, folder: Path, allow_insecure: bool) -> Any:
    place = folder / "secret"
    if (place / "key.bin").exists():
        return open_client(spec, folder, allow_insecure=allow_insecure)
    module = backend(spec.params.backend)
    client = module.Client(spec.params, key_id=secrets.token_hex(16), allow_insecure=allow_insecure)
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o700)
    meta = {"circuit_sha256": spec.circuit_sha256, "params": spec.params.to_json(), "key_id": client.key_id}
    _write(place / "key.json", json.dumps(meta, indent=1).encode(), mode=0o600)
    _write(place / "key.bin", SECRET_MAGIC + client.secret_bytes(), mode=0o600)
    return client


def _existing(target: Path, kind: str, k: int, level: int, key_id: str) -> KeyFile | None:
    """The row of a file that an earlier, interrupted run finished."""
    path = target / file_name(kind, k)
    if not path.exists():
        return None
    with path.open("rb") as source:
        if source.read(HEADER) != _header(kind, k, level, key_id):
            return None
    return KeyFile(name=path.name, kind=kind, k=k, level=level, bytes=path.stat().st_size, sha256=_sha256(path))


def _header(kind: str, k: int, level: int, key_id: str) -> bytes:
    return KEY_MAGIC + struct.pack("<IIII", KINDS.index(kind), k, level, 0) + key_id.encode("ascii")


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "wb", opener=lambda p, flags: os.open(p, flags, mode)) as out:
        out.write(data)
    part.replace(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ---- the server's side


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an evaluation folder (or of the bundle that holds one).

    Raises:
        WireError: absent, too large or malformed.
    """
    path = _evaluation(folder) / "manifest.json"
    if not path.exists():
        raise WireError(f"{path} is missing: the key upload is incomplete, or keygen was interrupted (run it again)")
    if path.stat().st_size > MAX_MANIFEST:
        raise WireError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST}")
    try:
        return Manifest.from_json(strict_json(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise WireError(f"{path} is not JSON: {error}") from error


def check_file(path: Path, row: KeyFile, manifest: Manifest) -> None:
    """Size and header of one key file, before anything reads its body.

    Raises:
        WireError: it is not the file that the manifest names, or has another size than the parameters demand.
    """
    size = path.stat().st_size if path.exists() else -1
    if manifest.params.backend == "openfhe":
        expected = HEADER + manifest.params.key_bytes(row.level, row.kind)
        if row.bytes != expected:
            raise WireError(
                f"{row.name}: the manifest says {row.bytes} bytes, a key for level {row.level} has {expected}"
            )
    if size != row.bytes:
        raise WireError(f"{row.name}: {size} bytes on disk, {row.bytes} in the manifest (-1: no file)")
    with path.open("rb") as source:
        if source.read(HEADER) != _header(row.kind, row.k, row.level, manifest.key_id):
            raise WireError(
                f"{row.name}: its header is not that of {row.kind} k={row.k} level={row.level} of these keys"
            )


def load(evaluator: Any, folder: Path, *, progress: Progress | None = None) -> Manifest:
    """Load every key of an evaluation folder, one at a time.

    Raises:
        WireError: a file is not what the manifest says, or not a key.
        ManifestError: the keys are for other parameters than the evaluator's.
    """
    manifest = read_manifest(folder)
    if manifest.params != evaluator.params:
        ours, theirs = evaluator.params.to_json(), manifest.params.to_json()
        different = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        raise ManifestError("the keys were made for other parameters", different)
    for i, row in enumerate(manifest.files):
        path = _evaluation(folder) / row.name
        check_file(path, row, manifest)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != row.sha256:
            raise WireError(f"{row.name}: SHA-256 differs from the manifest's: damaged on the way, upload it again")
        evaluator.load_key(row.kind, row.k, row.level, memoryview(data)[HEADER:])
        del data
        if progress:
            progress(i + 1, len(manifest.files), row.name)
    return manifest


def _evaluation(folder: Path) -> Path:
    return folder / "evaluation" if (folder / "evaluation").is_dir() else folder


def find_secret(folder: Path) -> Path | None:
    """The first secret key below a folder, links to folders followed: a file of ours under any name, by its magic, or
    whatever is called secret or lies below a folder of that name.

    A bare key of OpenFHE or SEAL elsewhere is not recognised: its bytes begin like those of any other of their objects.
    """
    seen: set[tuple[int, int]] = set()  # folders by device and inode: a link may lead back up
    for place, below, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below.sort()
        for path in (Path(place, name) for name in sorted(files)):
            if "secret" in path.relative_to(folder).parts:
                return path
            if not path.is_file():  # a pipe or a broken link
                continue
            with path.open("rb") as source:
                if source.read(len(SECRET_MAGIC)) == SECRET_MAGIC:
                    return path
    return None
