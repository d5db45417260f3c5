"""What only the owner of the data does: pack and encrypt a request, decrypt and unpack a reply. No network here.

A decrypted vector holds, beside the result, the noise of the encryption, and whoever sees that together with the ciphertext
learns about the key (Li and Micciancio, eprint 2020/1533). So `open_reply` reads only the slots that carry a result, rounds
to the promised accuracy, and counts: after `limit` decryptions a key must be replaced. Neither is a proof; a result that
is given to somebody else needs noise flooding, which is not built yet.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import wire
from .base import Array, HEError, RangeError
from .circuit import ClientSpec, pack, unpack
from .wire import Sealed

DECRYPTION_LIMIT = 10_000


class Owner(Protocol):
    """Keys and primitives of the secret's owner, as this module uses them."""

    key_id: str
    moduli: tuple[int, ...]

    def encrypt(self, values: Array, *, level: int) -> Sealed: ...
    def decrypt(self, sealed: Sealed, *, level: int) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A decrypted reply, by tensor name.

    tensors  rounded to the promised accuracy: what a program may use and show
    exact    as decrypted, noise included: for measuring the error on this machine, never to be stored or shown
    """

    tensors: Mapping[str, Array]
    exact: Mapping[str, Array]


def expected(spec: ClientSpec, owner: Owner, kind: str) -> wire.Expected:
    """What a "request" or a "reply" must be, in the client's own view."""
    return wire.Expected(
        format=kind,
        circuit_sha256=spec.circuit_sha256,
        key_id=owner.key_id,
        log_n=spec.params.log_n,
        moduli=owner.moduli,
        scale=2.0**spec.params.scale_bits,
        parts=wire.parts(spec.inputs if kind == "request" else spec.outputs, spec.arrays),
    )


def embed(spec: ClientSpec, tokens: NDArray[np.int64]) -> dict[str, Array]:
    """Token ids [T] -> the circuit's one input tensor.

    Raises:
        RangeError: another number of tokens, or an id outside the vocabulary.
        HEError: the circuit takes tensors, not tokens.
    """
    if spec.steps:
        raise HEError("this circuit takes one token a step: run it with `polyformer generate`")
    if not spec.embedding or len(spec.inputs) != 1:
        raise HEError("this circuit has no embedding for token ids: give it its input tensor instead")
    vocabulary, wanted = len(spec.arrays["embedding"]), len(spec.arrays["positions"])
    tokens = np.asarray(tokens)
    if tokens.shape != (wanted,):
        raise RangeError(f"{tokens.size} tokens; the circuit takes {wanted}")
    if not ((tokens >= 0) & (tokens < vocabulary)).all():
        raise RangeError(
            f"token ids run from {tokens.min()} to {tokens.max()}; the vocabulary has 0 to {vocabulary - 1}"
        )
    return {spec.inputs[0].name: spec.embed(tokens)}


def embed_step(spec: ClientSpec, token: int, step: int) -> dict[str, Array]:
    """One token id at its place in a sequence -> the input tensor [1, D] of a circuit with steps.

    Raises:
        RangeError: an id outside the vocabulary, or a step outside the window.
        HEError: the circuit has no steps, or takes no tokens.
    """
    if not spec.steps or not spec.embedding or len(spec.inputs) != 1:
        raise HEError(
            "this circuit takes no token a step: make one with `polyformer export --step` and `polyformer compile`"
        )
    table, positions = spec.arrays["embedding"], spec.arrays["positions"]
    if not 0 <= token < len(table):
        raise RangeError(f"token id {token}; the vocabulary has 0 to {len(table) - 1}")
    if not 0 <= step < min(spec.steps, len(positions)):
        raise RangeError(f"step {step}; the window has {spec.steps} places, 0 to {spec.steps - 1}")
    return {spec.inputs[0].name: spec.embed_step(token, step).reshape(spec.inputs[0].shape)}


def seal(spec: ClientSpec, owner: Owner, tensors: Mapping[str, Array]) -> bytes:
    """Pack and encrypt the input tensors into a request frame.

    Raises:
        RangeError: a tensor is larger than the circuit was calibrated for.
    """
    ciphertexts = {}
    for s in spec.inputs:
        if s.name not in tensors:
            raise RangeError(f"input {s.name!r} is missing; the circuit takes {[i.name for i in spec.inputs]}")
        largest = float(np.abs(tensors[s.name]).max(initial=0.0))
        if not largest <= s.bound:  # true for NaN too
            raise RangeError(
                f"input {s.name!r} has elements up to {largest:.4g}; the circuit was made for {s.bound:.4g}"
            )
        for part, slots in enumerate(pack(np.asarray(tensors[s.name]), s, spec.arrays[s.layout])):
            ciphertexts[s.name, part] = owner.encrypt(slots, level=s.level)
    return wire.dumps(expected(spec, owner, "request"), ciphertexts)


def open_reply(spec: ClientSpec, owner: Owner, data: bytes, counter: Counter) -> Opened:
    """Check, decrypt, unpack and round a reply frame.

    Raises:
        WireError, ManifestError: the frame is not a reply to this client.
        HEError: the key has decrypted as often as it may, or the circuit promises no accuracy to round to.
    """
    if not (math.isfinite(spec.error_bound) and spec.error_bound > 0.0):
        raise HEError(f"error bound {spec.error_bound}: without rounding, a decrypted reply would show its noise")
    ciphertexts = wire.loads(data, expected(spec, owner, "reply"))
    counter.count()
    exact, rounded = {}, {}
    for s in spec.outputs:
        layout = spec.arrays[s.layout]
        slots = np.stack([owner.decrypt(ciphertexts[s.name, i], level=s.level) for i in range(len(layout))])
        exact[s.name] = unpack(slots, s, layout)
        rounded[s.name] = round_to(exact[s.name], spec.error_bound)
    return Opened(tensors=rounded, exact=exact)


def round_to(values: Array, accuracy: float) -> Array:
    """To the nearest multiple of the largest power of two that is at most `accuracy`; 0 rounds nothing."""
    if accuracy <= 0.0:
        return values
    step = 2.0 ** math.floor(math.log2(accuracy))
    return np.round(values / step) * step


class Counter:
    """Decryptions under one secret key, counted in a file beside it."""

    def __init__(self, path: Path, limit: int = DECRYPTION_LIMIT) -> None:
        self.path, self.limit = path, limit

    def count(self) -> int:
        """One more; counted before it happens, so that a crash cannot lose it.

        Raises:
            HEError: the limit is reached.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:  # its own file: the count's is replaced under it
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self._done()
            if done >= self.limit:
                raise HEError(
                    f"this key has decrypted {done} replies, its limit: make new keys with `polyformer keygen`"
                )
            part = self.path.with_suffix(".part")
            with part.open("w") as stream:
                json.dump({"decryptions": done + 1}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self.path)
        return done + 1

    def _done(self) -> int:
        """The count so far; only a file that was never there means none."""
        try:
            done = json.loads(self.path.read_bytes())["decryptions"]
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError):
            done = None
        if type(done) is not int or done < 1:
            raise HEError(f"{self.path} is damaged, so nobody knows how often this key decrypted: make new keys")
        return done
