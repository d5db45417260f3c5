"""Client and server of one circuit as two objects of one process that share bytes only, so that peak memory is that of both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from he_backend import keys, wire
from he_backend.circuit import Circuit, Signature, pack, unpack
from he_backend.execute import Executor, Timing


@dataclass(kw_only=True)
class Parties:
    """Both sides, ready: keys made and loaded, weights encoded. `kept` is the server's state between steps."""

    circuit: Circuit
    client: Any
    server: Any
    executor: Executor
    keygen_s: float
    prepare_s: float
    key_bytes: int  # of the evaluation keys as they travel
    kept: dict[tuple[str, int], Any] = field(default_factory=dict)

    def ask(self, tensors: Mapping[str, np.ndarray], *, step: int = 0) -> tuple[np.ndarray, Timing]:
        """Encrypt, send, evaluate, send back, decrypt: the output tensor and the evaluation's timing."""
        sent = {}
        for s in self.circuit.inputs:
            for part, slots in enumerate(pack(tensors[s.name], s, self.circuit.client_arrays[s.layout])):
                data = self.client.export_ciphertext(self.client.encrypt(slots, level=s.level))
                sent[s.name, part] = self.server.import_ciphertext(data, level=s.level)
        run = self.executor.run({**sent, **self.kept}, step=step)
        self.kept = {part: run.outputs[part] for part in self.kept}
        (y,) = self.circuit.outputs
        layout = self.circuit.client_arrays[y.layout]
        rows = []
        for part in range(len(layout)):
            data = self.server.export_ciphertext(run.outputs[y.name, part])
            back = self.client.import_ciphertext(data, level=y.level)
            rows.append(self.client.decrypt(back, scale=run.scales[y.name, part]))
        return unpack(np.stack(rows), y, layout), run.timing

    def start(self) -> None:
        """Forget what came before: all states are 0, of which no key is needed."""
        n = 1 << self.circuit.params.log_n
        self.kept = {
            part: self.server.import_ciphertext(np.zeros((2, level + 1, n), dtype=np.uint64), level=level)
            for part, level in self.circuit.state_parts.items()
        }

    def traffic(self, signatures: tuple[Signature, ...]) -> int:
        """Bytes of the ciphertexts of some tensors on the wire."""
        parts = wire.parts(signatures, self.circuit.client_arrays)
        log_n = self.circuit.params.log_n
        return sum(wire.ciphertext_bytes(self.server.moduli, level, log_n) for level in parts.values())


@contextmanager
def parties(circuit: Circuit, *, threads: int) -> Iterator[Parties]:
    """Make keys, load them, encode weights, as many as the plan has memory for; everything is forgotten at the end."""
    module = keys.backend(circuit.params.backend)
    client = module.Client(circuit.params, allow_insecure=circuit.params.insecure)
    server = module.Evaluator(circuit.params, key_id=client.key_id, allow_insecure=circuit.params.insecure)
    try:
        start, key_bytes = time.perf_counter(), 0
        for kind, k, level in keys.wanted(circuit.spec()):
            body = client.make_key(kind, k, level)
            key_bytes += body.nbytes
            server.load_key(kind, k, level, body)
        keygen_s = time.perf_counter() - start
        budget = int(circuit.predicted["plaintext_bytes"])
        executor = Executor(circuit, server, threads=threads, plaintext_budget=budget)
        start = time.perf_counter()
        executor.prepare()
        prepare_s = time.perf_counter() - start
        made = Parties(
            circuit=circuit,
            client=client,
            server=server,
            executor=executor,
            keygen_s=keygen_s,
            prepare_s=prepare_s,
            key_bytes=key_bytes,
        )
        made.start()
        yield made
    finally:
        server.close()
