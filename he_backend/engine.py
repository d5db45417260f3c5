"""A circuit on a real backend: the `jobs.Engine` of the product, and the `owner.Owner` that fits it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import keycheck, keys
from .base import Array, WireError
from .circuit import Circuit, ClientSpec
from .execute import Executor, Timing
from .jobs import Progress, Result
from .keys import KeyFile, Manifest
from .wire import ELEMENTS, Part, Sealed


class CircuitEngine:
    """Evaluator, executor and keys of one circuit; holds no secret."""

    def __init__(self, circuit: Circuit, *, threads: int, plaintext_budget: int, allow_insecure: bool = False) -> None:
        module = keys.backend(circuit.params.backend)
        self.evaluator = module.Evaluator(circuit.params, allow_insecure=allow_insecure)
        self.executor = Executor(circuit, self.evaluator, threads=threads, plaintext_budget=plaintext_budget)
        self.moduli: tuple[int, ...] = self.evaluator.moduli

    def prepare(self, progress: Progress) -> None:
        """Encode weights ahead, as many as the budget holds."""
        self.executor.prepare(progress)

    def load_key(self, path: Path, file: KeyFile, manifest: Manifest) -> None:
        """Load one key whose bytes may come from an enemy.

        Raises:
            WireError: size, header, hash or residues are wrong; keys loaded before stay.
        """
        keys.check_file(path, file, manifest)
        data = path.read_bytes()
        if (
            hashlib.sha256(data).hexdigest() != file.sha256
        ):  # a file of an earlier process: the disk may have changed it
            raise WireError(f"{file.name}: its hash is not the manifest's")
        keycheck.rehearse(manifest.params, file, path)
        self.evaluator.load_key(file.kind, file.k, file.level, memoryview(data)[keys.HEADER :])
        self.executor.reserve()

    def forget_keys(self) -> None:
        self.evaluator.close()

    def run(self, inputs: Mapping[Part, Sealed], progress: Progress, cancel: threading.Event) -> Result:
        """Import, evaluate, export."""
        return self._run(inputs, {}, 0, progress, cancel)

    def run_step(
        self, inputs: Mapping[Part, Sealed], state: Any, step: int, progress: Progress, cancel: threading.Event
    ) -> Result:
        """One step on the state that the last one left; before the first one all states are 0, which is no secret."""
        return self._run(inputs, self.empty() if state is None else state, step, progress, cancel)

    def empty(self) -> dict[Part, Any]:
        """States that hold 0: ciphertexts of residues 0, which any key opens."""
        circuit = self.executor.circuit
        return {
            part: self.evaluator.import_ciphertext(
                np.zeros((ELEMENTS, level + 1, 1 << circuit.params.log_n), dtype=np.uint64), level=level
            )
            for part, level in circuit.state_parts.items()
        }

    def _run(
        self,
        inputs: Mapping[Part, Sealed],
        state: Mapping[Part, Any],
        step: int,
        progress: Progress,
        cancel: threading.Event,
    ) -> Result:
        levels = {
            (s.name, i): s.level for s in self.executor.circuit.inputs for i in range(len(self._layout(s.layout)))
        }
        ciphertexts = {
            part: self.evaluator.import_ciphertext(sealed.residues, level=levels[part])
            for part, sealed in inputs.items()
        }
        run = self.executor.run({**ciphertexts, **state}, step=step, progress=progress, cancel=cancel)
        outputs = {
            part: Sealed(self.evaluator.export_ciphertext(c), run.scales[part])
            for part, c in run.outputs.items()
            if part not in state
        }
        kept = {part: run.outputs[part] for part in state}
        return Result(outputs=outputs, timing=self._timing(run.timing), state=kept or None)

    def _layout(self, name: str) -> Any:
        return self.executor.circuit.client_arrays[name]

    def _timing(self, timing: Timing) -> dict[str, Any]:
        """As plain data, with the number of primitives behind each operator's seconds."""
        counts: Counter[tuple[int, str]] = Counter()
        for node in self.executor.trace.nodes:
            counts[node.source, node.op] += len(node.args) if node.op == "weighted_sum" else 1
        data = asdict(timing)
        for row in data["ops"]:
            row["primitives"] = {
                name: {"count": counts[row["op"], name] or 1, "seconds": seconds}
                for name, seconds in row["primitives"].items()
            }
        totals = {name: {"count": data["counts"].get(name, 0), "seconds": s} for name, s in data["primitives"].items()}
        return {**data, "primitives": totals}


class KeyOwner:
    """The secret key of a folder, with what `owner.py` needs of its backend."""

    def __init__(self, spec: ClientSpec, folder: Path, *, allow_insecure: bool = False) -> None:
        self._client = keys.open_client(spec, folder, allow_insecure=allow_insecure)
        self.key_id: str = self._client.key_id
        self.moduli: tuple[int, ...] = self._client.moduli
        self.counter_path = folder / "secret" / "decryptions.json"

    def encrypt(self, values: Array, *, level: int) -> Sealed:
        return Sealed(self._client.export_ciphertext(self._client.encrypt(values, level=level)), self._client.scale)

    def decrypt(self, sealed: Sealed, *, level: int) -> Array:
        ciphertext = self._client.import_ciphertext(sealed.residues, level=level)
        values: Array = self._client.decrypt(ciphertext, scale=sealed.scale)
        return values
