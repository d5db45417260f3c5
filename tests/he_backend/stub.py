"""Stand-ins for the cryptography, so that network and files can be tested in seconds. They hide nothing.

A "ciphertext" carries round(value * 2^30) in its first element and noise in its second.
"""

import hashlib
import os
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from he_backend.base import WireError
from he_backend.circuit import Circuit, ClientSpec
from he_backend.execute import Cancelled
from he_backend.jobs import Progress, Result
from he_backend.kernels import NumpySlots, apply
from he_backend.keys import HEADER, KEY_MAGIC, KeyFile, Manifest, check_file, file_name, wanted
from he_backend.server import Limits, Server, serve
from he_backend.wire import Part, Residues, Sealed

MODULI = ((1 << 50) - 27, (1 << 40) - 87, (1 << 40) - 167, (1 << 40) - 195)
SCALE = 2.0**30


def to_residues(values: np.ndarray, level: int) -> Residues:
    whole = np.zeros(2 * len(values), dtype=np.int64)
    whole[: len(values)] = np.round(values * SCALE)
    noise = np.random.default_rng().integers(1, min(MODULI), size=len(whole))
    return np.stack([np.stack([part % q for q in MODULI[: level + 1]]) for part in (whole, noise)]).astype(np.uint64)


def from_residues(residues: Residues) -> np.ndarray:
    first = residues[0, 0].astype(np.int64)
    return np.where(first > MODULI[0] // 2, first - MODULI[0], first)[: len(first) // 2] / SCALE


class StubOwner:
    """`owner.Owner` without a key."""

    moduli: tuple[int, ...] = MODULI

    def __init__(self, key_id: str = "5" * 32) -> None:
        self.key_id = key_id

    def encrypt(self, values: np.ndarray, *, level: int) -> Sealed:
        return Sealed(to_residues(values, level), 2.0**40)

    def decrypt(self, sealed: Sealed, *, level: int) -> np.ndarray:
        return from_residues(sealed.residues)


def make_keys(spec: ClientSpec, folder: Path, key_id: str, *, bad: str = "") -> Manifest:
    """Key files with the right names, sizes and headers; the one called `bad` holds what the stub refuses."""
    files = []
    folder.mkdir(exist_ok=True)
    for kind, k, level in wanted(spec):
        name = file_name(kind, k)
        body = (b"BAD" if name == bad else b"KEY").ljust(spec.params.key_bytes(level), b".")
        head = KEY_MAGIC + struct.pack("<IIII", ("relin", "rotation").index(kind), k, level, 0) + key_id.encode()
        (folder / name).write_bytes(head + body)
        digest = hashlib.sha256(head + body).hexdigest()
        files.append(KeyFile(name=name, kind=kind, k=k, level=level, bytes=len(head + body), sha256=digest))
    return Manifest(circuit_sha256=spec.circuit_sha256, params=spec.params, key_id=key_id, files=tuple(files))


class StubEngine:
    """`jobs.Engine` in NumPy; POLYFORMER_STUB_SLOW gives each operator that many seconds."""

    moduli: tuple[int, ...] = MODULI

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit

    def prepare(self, progress: Progress) -> None:
        progress(1, 1, "weights")

    def load_key(self, path: Path, file: KeyFile, manifest: Manifest) -> None:
        check_file(path, file, manifest)
        if path.read_bytes()[HEADER:].startswith(b"BAD"):
            raise WireError(f"{file.name} is not a key")

    def forget_keys(self) -> None:
        pass

    def run(self, inputs: Mapping[Part, Sealed], progress: Progress, cancel: threading.Event) -> Result:
        return self._run(inputs, {}, 0, progress, cancel)

    def run_step(
        self, inputs: Mapping[Part, Sealed], state: Any, step: int, progress: Progress, cancel: threading.Event
    ) -> Result:
        empty = {part: np.zeros(self.circuit.params.slots) for part in self.circuit.state_parts}
        return self._run(inputs, empty if state is None else state, step, progress, cancel)

    def _run(
        self,
        inputs: Mapping[Part, Sealed],
        state: Mapping[Part, np.ndarray],
        step: int,
        progress: Progress,
        cancel: threading.Event,
    ) -> Result:
        ops, values, outputs = NumpySlots(self.circuit.params.slots, step), [], {}
        kept = {}
        for op in self.circuit.ops:
            time.sleep(float(os.environ.get("POLYFORMER_STUB_SLOW", "0")))
            if cancel.is_set():
                raise Cancelled("cancelled")
            progress(op.id, len(self.circuit.ops), op.source)
            part = (str(op.attrs.get("name")), int(op.attrs.get("part", 0)))
            if op.kind == "input":
                values.append(state[part] if part in state else from_residues(inputs[part].residues))
            elif op.kind == "output" and part in state:
                kept[part] = values[op.args[0]]
            elif op.kind == "output":
                outputs[part] = Sealed(to_residues(values[op.args[0]], op.level), 2.0**40)
            else:
                values.append(apply(ops, op, [values[a] for a in op.args], self.circuit.arrays))
        return Result(outputs=outputs, timing={"wall_s": 0.0}, state=kept or None)


def main(circuit_file: str, folder: str, port: str) -> None:
    """python -m tests.he_backend.stub CIRCUIT FOLDER PORT"""
    circuit = Circuit.load(Path(circuit_file))
    serve(Server(circuit, StubEngine(circuit), Path(folder), limits=Limits()), port=int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
