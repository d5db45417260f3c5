"""What every backend promises, and every error that this room raises.

    HEError
    ├── UnsupportedOpError   an op that no kernel or backend knows
    ├── LevelError           too few levels, or operands at different levels
    ├── ScaleError           operands whose scales differ by more than rounding
    ├── RangeError           a value outside the interval that it was promised in
    ├── MissingKeyError      a rotation or relinearisation without its key, or a key at too low a level
    ├── CapabilityError      a backend (or this installation) cannot do what is asked
    ├── ParamsError          parameters above the security limit, or that do not exist
    ├── WireError            malformed bytes from outside; nothing of them is kept
    └── ManifestError        two sides disagree: circuit, parameters, keys, field by field

Legend used through the room: a *slot vector* is a float64 array of shape [slots], slots = N / 2; a *level* is the
number of rescales that a ciphertext can still take (it counts down to 0); rotate(x, k)[i] = x[(i + k) mod slots].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
C = TypeVar("C")

# What each backend can do beside `SlotOps`, known without its library: a circuit is compiled and checked where there is none.
BACKENDS: Mapping[str, frozenset[str]] = {
    "openfhe": frozenset({"hoisting", "double_hoisting", "bootstrap"}),
    "tenseal": frozenset(),
}


class HEError(Exception):
    """The root of every error that this package raises on purpose."""


class UnsupportedOpError(HEError):
    """An op that no kernel, pass or backend knows."""


class LevelError(HEError):
    """A ciphertext has too few levels left for what is asked of it."""


class ScaleError(HEError):
    """Two operands carry scales that differ by more than rounding."""


class RangeError(HEError):
    """A value leaves the interval that a polynomial or an encoding was made for."""


class MissingKeyError(HEError):
    """An evaluation key is not there, or was generated for a lower level."""


class CapabilityError(HEError):
    """The backend, or this installation, lacks what is asked; the message says how to get it."""


class ParamsError(HEError):
    """Encryption parameters that are above the security limit or that no backend can make."""


class WireError(HEError):
    """Bytes from outside that are not what they claim to be. Nothing of them is kept."""


class ManifestError(HEError):
    """Client and server disagree about circuit, parameters or keys. `differences` maps field -> (ours, theirs)."""

    def __init__(self, message: str, differences: dict[str, tuple[Any, Any]] | None = None) -> None:
        self.differences = dict(differences or {})
        pairs = self.differences.items()
        rows = "".join(f"\n  {name}: ours {ours!r}, theirs {theirs!r}" for name, (ours, theirs) in pairs)
        super().__init__(message + rows)


class SlotOps(Protocol[C]):
    """All that a kernel may use: arithmetic on slot vectors; no levels, scales or keys.

    The optional fast paths `weighted_rotations` and `doubled_sum` are named by the attribute `hoisting`; kernels fall back to
    rotate, mul and add when it is False.
    """

    slots: int
    hoisting: bool

    def add(self, a: C, b: C | Plain) -> C: ...
    def sub(self, a: C, b: C | Plain) -> C: ...
    def mul(self, a: C, b: C | Plain) -> C: ...
    def rotate(self, a: C, k: int) -> C: ...
    def weighted_rotations(self, a: C, groups: Sequence[tuple[int, Sequence[tuple[int, Plain]]]]) -> C: ...
    def doubled_sum(self, a: C, steps: Sequence[int]) -> C: ...  # for k in steps: a = a + rotate(a, k)


class Vector(Protocol):
    """A plaintext slot vector that is made when asked for, so that weights need not be expanded in memory."""

    def slots(self) -> Array: ...


class StepVector(Protocol):
    """One slot vector a step, of a circuit that is run step by step: which one is known when it runs."""

    def at(self, step: int) -> Vector: ...


# A plaintext operand: a number for all slots, or a slot vector made on demand.
Plain = float | Vector | StepVector


class Evaluator(Protocol[C]):
    """The server's half of a backend: primitives on ciphertexts. It never holds a secret key.

    Every method is a pure function of immutable values and may be called from several threads at once. Each refuses
    operands at different levels; no method rescales, relinearises or drops a level on its own.

    `elements` of a ciphertext is 2, or 3 after `mul` until `relinearize`. An *extended* ciphertext lives modulo P·Q
    (Bossuat et al., eprint 2020/1203, section 4: double hoisting); only `add`, `weighted_sum` and `mod_down` take it.
    """

    capabilities: frozenset[str]  # of {"hoisting", "double_hoisting", "bootstrap", "conjugate"}
    slots: int
    scale: float  # the nominal scale, 2^scale_bits
    moduli: tuple[int, ...]  # the prime that the rescale from level i to i - 1 divides by; [0] is the last one standing

    def prepare(
        self, *, refresh: bool
    ) -> None: ...  # do ahead what the first calls would do, those of a refresh if any comes
    def level(self, a: C) -> int: ...
    def encode(self, values: Array, *, level: int, scale: float, extended: bool = False) -> Any: ...
    def add(self, a: C, b: C) -> C: ...
    def sub(self, a: C, b: C) -> C: ...
    def add_plain(self, a: C, plain: Any) -> C: ...
    def add_scalar(self, a: C, value: float, *, scale: float) -> C: ...
    def mul_plain(self, a: C, plain: Any) -> C: ...
    def mul_scalar(self, a: C, value: float, *, scale: float) -> C: ...
    def weighted_sum(self, terms: Iterable[tuple[C, Any]]) -> C: ...  # read one at a time
    def mul(self, a: C, b: C) -> C: ...
    def square(self, a: C) -> C: ...
    def relinearize(self, a: C) -> C: ...
    def rescale(self, a: C) -> C: ...
    def drop(self, a: C, *, level: int) -> C: ...
    def refresh(self, a: C) -> C: ...  # params.refresh_input -> params.refresh_output
    def refresh_function(self, a: C, fourier: Sequence[float]) -> C: ...  # re c_0, im c_0, re c_1, ... see `circuit`
    def join(self, a: C, b: C) -> C: ...  # a + i b: two real vectors as a complex one
    def conjugate(self, a: C) -> C: ...
    def twice_real(self, a: C, mirrored: C) -> C: ...  # a + conj(a), given both
    def twice_imaginary(self, a: C, mirrored: C) -> C: ...  # (a - conj(a)) / i
    def rotate(self, a: C, k: int) -> C: ...
    def hoist(self, a: C) -> Any: ...
    def rotate_hoisted(self, a: C, digits: Any, k: int) -> C: ...
    def rotate_extended(self, a: C, digits: Any, k: int) -> C: ...
    def extend(self, a: C) -> C: ...
    def mod_down(self, a: C) -> C: ...
