"""Stand-ins for the cryptography, so that network and files can be tested in seconds. They hide nothing.

A "ciphertext" carries round(value * 2^30) in its first element and noise in its second.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from he_backend.base import WireError
from he_backend.circuit import Circuit
from he_backend.jobs import CancelledError, Progress, Result
from he_backend.kernels import NumpySlots, apply
from he_backend.server import Limits, Server, serve
from he_backend.wire import Part, Residues

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

    moduli = MODULI

    def __init__(self, key_id: str = "stub-key-1") -> None:
        self.key_id = key_id

    def encrypt(self, values: np.ndarray, *, level: int) -> Residues:
        return to_residues(values, level)

    def decrypt(self, residues: Residues, *, level: int) -> np.ndarray:
        return from_residues(residues)


class StubEngine:
    """`jobs.Engine` in NumPy; POLYFORMER_STUB_SLOW gives each operator that many seconds."""

    moduli = MODULI

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit

    def prepare(self, progress: Progress) -> None:
        progress(1, 1, "weights")

    def load_keys(self, folder: Path, progress: Progress) -> None:
        progress(1, 1, "keys")

    def run(self, inputs: Mapping[Part, Residues], progress: Progress, cancel: threading.Event) -> Result:
        ops, values, outputs = NumpySlots(self.circuit.params.slots), [], {}
        for op in self.circuit.ops:
            time.sleep(float(os.environ.get("POLYFORMER_STUB_SLOW", "0")))
            if cancel.is_set():
                raise CancelledError("cancelled")
            progress(op.id, len(self.circuit.ops), op.source)
            part = (op.attrs.get("name"), op.attrs.get("part"))
            if op.kind == "input":
                values.append(from_residues(inputs[part]))
            elif op.kind == "output":
                outputs[part] = to_residues(values[op.args[0]], op.level)
            else:
                values.append(apply(ops, op, [values[a] for a in op.args], self.circuit.arrays))
        return Result(outputs=outputs, timing={"seconds": 0.0})


def check_key(path: Path) -> None:
    """A key file of the stub starts with KEY."""
    if not path.read_bytes().startswith(b"KEY"):
        raise WireError(f"{path.name.removesuffix('.part')} is not a key")


def main(circuit_file: str, folder: str, port: str) -> None:
    """python -m tests.he_backend.stub CIRCUIT FOLDER PORT"""
    circuit = Circuit.load(Path(circuit_file))
    serve(Server(circuit, StubEngine(circuit), Path(folder), check=check_key, limits=Limits()), port=int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
