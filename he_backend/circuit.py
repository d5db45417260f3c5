"""The circuit: what the compiler hands to the server, and the specification that the client gets of it.

A circuit is a list of ops in single-assignment form. Op `i` makes value `i`, one ciphertext's slot vector [slots].

    kind         arguments  attributes
    input        -          name, part            ciphertext `part` of input tensor `name`
    add, sub     a, b
    mul          a, b
    add_plain    a          array                 a + array (float64 [m], each element repeated slots / m times)
    linear       x          weights, plan, bias   sum over (giant g, [(baby b, row r), ...]) of weights[r] * rotate(x, g + b);
                                                  weights float32/64 [rows, m] as above; bias is an array name or None;
                                                  basis (optional, for speed) "ordinary": no sums modulo P·Q
    rotate       a          k
    rotate_sum   a          steps, runs, settled  for k in steps: a = a + rotate(a, k). Optional, for speed: runs says how many
                                                  steps are taken at once and sums to their number; settled, that a pending
                                                  rescale comes first: one limb less to rotate, its error is summed too
    polynomial   x          factors | (chebyshev, domain)   see `kernels.polynomial`
    refresh      a          kind                  "plain": back to at most `params.refresh_output`; slots within [-1, 1] that
                                                  repeat with `params.refresh_period`
    refresh      a, b       kind                  "pair": the copy of `a`, out of the refresh of a + i b that it shares with the op
                                                  of b, a; its scale is twice the nominal one, which a linear map absorbs and
                                                  any other reader spends a level on
    refresh      a          kind, scale, fourier  "functional": f(scale a) in one refresh, for |scale a| <= 1/2; fourier
                                                  [[re c_j, im c_j], ...] of 2 Re sum c_j exp(i pi j x), at most
                                                  `params.refresh_terms` of them
    output       a          name, part
    mul_step     a          array                 a * row `step` of array [T, m], each element repeated slots / m times
    add_step     a          array                 a + row `step`

A circuit with `steps` T > 0 is one step of a sequence of at most T: it is run once for each, with the public number `step`
0 .. T - 1. Its `states` are tensors that the server keeps between steps, encrypted: input and output ops of one name, at one
level, in one layout, at the nominal scale, so that what a step leaves is what the next one takes. Before step 0 they are 0.

Every op carries the level of its result, after rescaling: operands above it are dropped, so levels need no op of their own.
A stored slot times `factor` is the model's value; `layout` names an int32 array [slots] (index into the flattened
tensor, -1 where the slot means nothing); `source` is the ONNX node that the op came from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import container
from .base import WireError
from .container import Arrays
from .params import Params

VERSION = 2
KINDS = (
    "input",
    "add",
    "sub",
    "mul",
    "add_plain",
    "linear",
    "rotate",
    "rotate_sum",
    "polynomial",
    "refresh",
    "output",
    "mul_step",
    "add_step",
)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One line of a circuit; see the module's table."""

    id: int
    kind: str
    args: tuple[int, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    level: int = 0
    factor: float = 1.0
    bound: float = 0.0  # largest |stored slot| seen in calibration, with its margin
    layout: str = ""
    source: str = ""

    def __str__(self) -> str:
        args = ", ".join(f"%{a}" for a in self.args)
        return f"%{self.id} = {self.kind}({args}) level={self.level} bound={self.bound:.3g} # {self.source}"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """How one tensor is spread over ciphertexts.

    shape   of the tensor, for example [tokens, features]
    layout  name of an int32 array [ciphertexts, slots]: index into the flattened tensor, or -1 for an unused slot
    factor  stored slot * factor = tensor element
    bound   largest |tensor element| that the circuit was calibrated for
    level   of the ciphertexts
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    factor: float
    bound: float
    level: int


@dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """All that a client may and must know: parameters, packing, keys, embedding, promised error. It holds no other weights.

    keys         rotation k -> highest level at which it is used
    relin_level  highest level of a ciphertext product, or -1
    error_bound  promised largest |encrypted - clear| of an output element, in the model's units
    embedding    whether arrays "embedding" [vocabulary, D] and "positions" [T, D] turn token ids into the input; where there are
                 arrays "norm" [2, D], scale and shift, and "norm_eps" [1], a LayerNorm follows
    steps        most steps of a sequence, 0 for a circuit that is run once; states: what the server keeps between steps
    """

    circuit_sha256: str
    params: Params
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    keys: Mapping[int, int]
    relin_level: int
    error_bound: float
    predicted: Mapping[str, float]
    model: Mapping[str, Any]
    embedding: bool
    arrays: Arrays = field(repr=False, compare=False)
    steps: int = 0
    states: tuple[Signature, ...] = ()

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """[T] token ids -> [T, D] float64, the circuit's input tensor."""
        return self._opened(self.arrays["embedding"][np.asarray(tokens)].astype(np.float64) + self.arrays["positions"])

    def embed_step(self, token: int, step: int) -> np.ndarray:
        """One token id at its place in a sequence -> [D] float64."""
        return self._opened(self.arrays["embedding"][token].astype(np.float64) + self.arrays["positions"][step])

    def _opened(self, x: np.ndarray) -> np.ndarray:
        if "norm" not in self.arrays:
            return x
        scale, shift = self.arrays["norm"]
        return layer_norm(x, scale, shift, float(self.arrays["norm_eps"][0]))

    def save(self, path: Path) -> str:
        header = {"format": "client-spec", "version": VERSION, **asdict(self, dict_factory=_plain)}
        del header["arrays"]
        if not self.steps:
            del header["steps"], header["states"]
        return container.write(path, header, self.arrays)

    @classmethod
    def load(cls, path: Path) -> ClientSpec:
        header, arrays, _ = container.read(path)
        return cls.from_parts(header, arrays)

    @classmethod
    def from_parts(cls, header: dict[str, Any], arrays: Arrays) -> ClientSpec:
        with _Parsing(header, "client-spec"):
            return cls(
                circuit_sha256=str(header["circuit_sha256"]),
                params=Params.from_json(header["params"]),
                inputs=tuple(_signature(s) for s in header["inputs"]),
                outputs=tuple(_signature(s) for s in header["outputs"]),
                keys={int(k): int(level) for k, level in header["keys"].items()},
                relin_level=int(header["relin_level"]),
                error_bound=float(header["error_bound"]),
                predicted=header["predicted"],
                model=header["model"],
                embedding=bool(header["embedding"]),
                arrays=arrays,
                steps=int(header.get("steps", 0)),
                states=tuple(_signature(s) for s in header.get("states", ())),
            )


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A compiled model: ops, their constant arrays, parameters, and what the compiler predicts.

    client_arrays are those that the client needs (layouts of inputs and outputs, embedding); `arrays` holds the rest, the
    layouts of states among it. errors: predicted largest error of a value in the model's units, as `error_bound` is for the
    outputs, by op id; for the last op of every ONNX node and what a step keeps, or empty where none were predicted.
    """

    params: Params
    ops: tuple[Op, ...]
    arrays: Arrays = field(repr=False)
    client_arrays: Arrays = field(repr=False)
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    keys: Mapping[int, int]
    relin_level: int
    error_bound: float = 0.0
    predicted: Mapping[str, float] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    embedding: bool = False
    steps: int = 0
    states: tuple[Signature, ...] = ()
    errors: Mapping[int, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __str__(self) -> str:
        return "\n".join([self.params.name, *map(str, self.ops)])

    @property
    def refreshes(self) -> int:
        """Refreshes that an evaluation makes: the two halves of a pair are one."""
        kinds = [op.attrs.get("kind", "plain") for op in self.ops if op.kind == "refresh"]
        pairs = kinds.count("pair")
        return len(kinds) - pairs + -(-pairs // 2)

    @property
    def ends(self) -> tuple[Op, ...]:
        """The last op of every ONNX node: where errors are looked at."""
        return tuple({op.source: op for op in self.ops if op.kind not in ("input", "output")}.values())

    def _parts(self) -> tuple[dict[str, Any], Arrays]:
        header: dict[str, Any] = {
            "format": "circuit",
            "version": VERSION,
            "params": self.params.to_json(),
            "ops": [asdict(op, dict_factory=_plain) for op in self.ops],
            "inputs": [asdict(s) for s in self.inputs],
            "outputs": [asdict(s) for s in self.outputs],
            "keys": {str(k): level for k, level in sorted(self.keys.items())},
            "relin_level": self.relin_level,
            "error_bound": self.error_bound,
            "predicted": dict(self.predicted),
            "model": dict(self.model),
            "embedding": self.embedding,
            "client_arrays": sorted(self.client_arrays),
        }
        if self.steps:
            header |= {"steps": self.steps, "states": [asdict(s) for s in self.states]}
        if self.errors:
            header["errors"] = {str(i): error for i, error in self.errors.items()}
        arrays = {**self.arrays, **self.client_arrays}
        return {**header, "content_sha256": container.fingerprint(header, arrays)}, arrays

    @property
    def sha256(self) -> str:
        """The circuit's own hash: that of its file's bytes."""
        return container.digest(container.dumps(*self._parts()))

    def save(self, path: Path) -> str:
        return container.write(path, *self._parts())

    @classmethod
    def load(cls, path: Path) -> Circuit:
        """Read a circuit and check it: bytes against its own hash, ops and keys against `circuit_check`.

        Raises:
            WireError: the file is not what was written, or breaks a rule; the message names the first one.
        """
        from .circuit_check import faults, traced_faults

        header, arrays, _ = container.read(path)
        with _Parsing(header, "circuit"):
            stated = header.pop("content_sha256")
            if stated != (found := container.fingerprint(header, arrays)):
                raise WireError(
                    f"{path}: content hashes to {found[:16]}.., the file says {str(stated)[:16]}..: it was changed or damaged "
                    "after it was written; compile again"
                )
            client = set(header["client_arrays"])
            circuit = cls(
                params=Params.from_json(header["params"]),
                ops=tuple(_op(i, row) for i, row in enumerate(header["ops"])),
                arrays={name: a for name, a in arrays.items() if name not in client},
                client_arrays={name: arrays[name] for name in client},
                inputs=tuple(_signature(s) for s in header["inputs"]),
                outputs=tuple(_signature(s) for s in header["outputs"]),
                keys={int(k): int(level) for k, level in header["keys"].items()},
                relin_level=int(header["relin_level"]),
                error_bound=float(header["error_bound"]),
                predicted=header["predicted"],
                model=header["model"],
                embedding=bool(header["embedding"]),
                steps=int(header.get("steps", 0)),
                states=tuple(_signature(s) for s in header.get("states", ())),
                errors={int(i): float(error) for i, error in header.get("errors", {}).items()},
            )
            for fault in itertools.chain(faults(circuit), traced_faults(circuit)):
                raise WireError(f"{path}: {fault}")
        return circuit

    def spec(self) -> ClientSpec:
        """What the client gets: everything public, no weight but the embedding."""
        return ClientSpec(
            circuit_sha256=self.sha256,
            params=self.params,
            inputs=self.inputs,
            outputs=self.outputs,
            keys=dict(self.keys),
            relin_level=self.relin_level,
            error_bound=self.error_bound,
            predicted=dict(self.predicted),
            model=dict(self.model),
            embedding=self.embedding,
            arrays=self.client_arrays,
            steps=self.steps,
            states=self.states,
        )

    @property
    def state_parts(self) -> dict[tuple[str, int], int]:
        """Every ciphertext of the states, by (name, part) -> its level."""
        return {(s.name, i): s.level for s in self.states for i in range(len(self.arrays[s.layout]))}

    @property
    def state_bytes(self) -> int:
        """Memory of one sequence's states."""
        return sum(self.params.ciphertext_bytes(level) for level in self.state_parts.values())


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: float) -> np.ndarray:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift it (Ba et al. 2016, arXiv 1607.06450)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * scale + shift


def pack(tensor: np.ndarray, signature: Signature, layout: np.ndarray) -> np.ndarray:
    """Tensor -> slot vectors [ciphertexts, slots]; unused slots are 0.

    Raises:
        WireError: the tensor has another shape than the signature.
    """
    if tuple(tensor.shape) != tuple(signature.shape):
        raise WireError(
            f"input {signature.name!r} has shape {tuple(tensor.shape)}, the circuit wants {signature.shape}"
        )
    flat = np.asarray(tensor, dtype=np.float64).reshape(-1)
    return np.where(layout >= 0, flat[np.maximum(layout, 0)], 0.0) / signature.factor


def unpack(slots: np.ndarray, signature: Signature, layout: np.ndarray) -> np.ndarray:
    """Slot vectors [ciphertexts, slots] -> tensor; of several copies of an element the last is read."""
    flat = np.zeros(int(np.prod(signature.shape)))
    used = layout >= 0
    flat[layout[used]] = np.asarray(slots)[used] * signature.factor
    return flat.reshape(signature.shape)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in items}


def _signature(row: Mapping[str, Any]) -> Signature:
    return Signature(**{**row, "shape": tuple(int(n) for n in row["shape"])})


def _op(index: int, row: Mapping[str, Any]) -> Op:
    op = Op(**{**row, "args": tuple(int(a) for a in row["args"])})
    if op.id != index or any(not 0 <= a < index for a in op.args):
        raise WireError(f"op {index} has id {op.id} and arguments {op.args}: a circuit is numbered in order of use")
    if op.kind not in KINDS:
        raise WireError(f"op {index} has kind {op.kind!r}; known are {', '.join(KINDS)}")
    return op


class _Parsing:
    """Turns the errors of a malformed header into one WireError, and checks format and version first."""

    def __init__(self, header: Mapping[str, Any], expected: str) -> None:
        self.header, self.expected = header, expected

    def __enter__(self) -> None:
        found, version = self.header.get("format"), self.header.get("version")
        if found != self.expected or version != VERSION:
            raise WireError(
                f"holds a {found!r} of version {version!r}; expected a {self.expected!r} of version {VERSION}"
            )

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)) and not isinstance(
            error, WireError
        ):
            raise WireError(f"malformed {self.expected}: {error!r}") from error
