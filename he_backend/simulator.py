"""The living definition of every op: a circuit run on plain slot vectors, and the same with CKKS noise added.

`simulate` executes the compiled circuit op by op, straight from the table in `circuit.py` and without the kernels: it is what
the other interpretations are compared with. `simulate_noise` runs the *primitives* and adds to each the error that the scheme
adds, so that amplification along the circuit is followed on real values; from it the compiler predicts the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import refresh
from .base import Array, LevelError, RangeError, UnsupportedOpError
from .circuit import Circuit, Op, pack, unpack
from .kernels import StepRow
from .params import SPECIAL_PRIME_BITS, Params
from .scales import assign_scales, foretold
from .trace import Trace, trace

SIMULATIONS = 2  # at once: numpy lets other threads run while it works on a slot vector
ERROR_STD = 3.19  # standard deviation of the error distribution in every library used here


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one run takes: input tensors by name, states among them, and the number of the step."""

    tensors: Mapping[str, np.ndarray]
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Outputs (states among them) as tensors by name, and every op's slot vector [slots] by op id."""

    outputs: dict[str, Array]
    values: list[Array]


def input_slots(circuit: Circuit, tensors: Mapping[str, np.ndarray]) -> dict[tuple[str, int], Array]:
    """Pack input tensors, and states if there are any, into slot vectors by (name, part)."""
    packed = {}
    for signature in (*circuit.inputs, *circuit.states):
        slots = pack(tensors[signature.name], signature, layout_of(circuit, signature.layout))
        packed.update({(signature.name, part): row for part, row in enumerate(slots)})
    return packed


def output_tensors(circuit: Circuit, slots: Mapping[tuple[str, int], Array]) -> dict[str, Array]:
    """Unpack slot vectors by (name, part) into output tensors; states only where they are among `slots`."""
    tensors = {}
    kept = [s for s in circuit.states if (s.name, 0) in slots]
    for signature in (*circuit.outputs, *kept):
        layout = layout_of(circuit, signature.layout)
        rows = np.stack([slots[signature.name, part] for part in range(layout.shape[0])])
        tensors[signature.name] = unpack(rows, signature, layout)
    return tensors


def layout_of(circuit: Circuit, name: str) -> np.ndarray:
    """A layout by name: the client has those of inputs and outputs, the server alone those of states."""
    return circuit.client_arrays[name] if name in circuit.client_arrays else circuit.arrays[name]


def simulate(
    circuit: Circuit,
    tensors: Mapping[str, np.ndarray],
    *,
    step: int = 0,
    visit: Callable[[Op, Array], None] | None = None,
) -> Simulation:
    """Run a circuit in float64.

    Args:
        tensors: input tensors by name, shapes as in circuit.inputs and circuit.states.
        step: its number, for a circuit with steps.
        visit: is given every op and its value, which is then dropped after its last use: the result holds no values, and memory
            what is alive at once (the values of a deep circuit at N = 2^16 are many GB).

    Raises:
        LevelError: an op uses more levels than the circuit gives it.
    """
    packed = input_slots(circuit, tensors)
    values: list[Array] = []
    out: dict[tuple[str, int], Array] = {}
    last = {a: op.id for op in circuit.ops for a in op.args}
    for op in circuit.ops:
        args = [values[a] for a in op.args]
        for a in op.args:
            if op.kind != "refresh" and circuit.ops[a].level < op.level:
                raise LevelError(f"{op} takes %{a} of level {circuit.ops[a].level}")
        if op.kind == "input":
            values.append(packed[op.attrs["name"], op.attrs["part"]])
        else:
            values.append(_run(op, args, circuit, step))
        if op.kind == "output":
            out[op.attrs["name"], op.attrs["part"]] = values[-1]
        if visit is not None:
            visit(op, values[-1])
            for a in op.args:
                if last[a] == op.id:
                    values[a] = np.zeros(0)
    return Simulation(outputs=output_tensors(circuit, out), values=[] if visit is not None else values)


def peaks(circuit: Circuit, cases: Iterable[Case]) -> Array:
    """Largest |slot| of every op over some runs, [ops]."""

    def of(case: Case) -> Array:
        largest: Array = np.zeros(len(circuit.ops))

        def visit(op: Op, value: Array) -> None:
            largest[op.id] = float(np.max(np.abs(value)))

        simulate(circuit, case.tensors, step=case.step, visit=visit)
        return largest

    with ThreadPoolExecutor(SIMULATIONS) as pool:
        return np.max(list(pool.map(of, cases)), axis=0)


def _run(op: Op, args: list[Array], circuit: Circuit, step: int) -> Array:
    y: Array
    slots, arrays, a = circuit.params.slots, circuit.arrays, op.attrs

    def expand(array: np.ndarray) -> Array:
        return np.repeat(array.astype(np.float64), slots // array.size)

    match op.kind:
        case "add":
            return args[0] + args[1]
        case "sub":
            return args[0] - args[1]
        case "mul":
            return args[0] * args[1]
        case "add_plain":
            return args[0] + expand(arrays[a["array"]])
        case "mul_step":
            return args[0] * expand(arrays[a["array"]][step])
        case "add_step":
            return args[0] + expand(arrays[a["array"]][step])
        case "linear" if (matrix := _matrix(a, arrays[a["weights"]], slots)) is not None:
            y = (matrix @ args[0].reshape(len(matrix), -1)).reshape(-1)
            return y if a.get("bias") is None else y + expand(arrays[a["bias"]])
        case "linear":
            y = np.zeros(slots)
            for giant, terms in a["plan"]:
                for baby, row in terms:
                    y += expand(arrays[a["weights"]][row]) * np.roll(args[0], -(giant + baby))
            return y if a.get("bias") is None else y + expand(arrays[a["bias"]])
        case "rotate":
            return np.roll(args[0], -a["k"])
        case "rotate_sum":
            y = args[0]
            for k in a["steps"]:
                y = y + np.roll(y, -k)
            return y
        case "polynomial" if "factors" in a:
            y = np.ones(slots)
            for alpha, beta in a["factors"]:
                y = y * (args[0] + alpha if beta is None else (args[0] + alpha) ** 2 + beta)
            return y
        case "polynomial":
            return np.polynomial.chebyshev.chebval(a["domain"][0] * args[0] + a["domain"][1], a["chebyshev"])
        case "refresh" if a.get("kind") == "functional":
            x = a["scale"] * args[0]
            if (worst := float(np.abs(x).max())) > 0.5:
                raise RangeError(
                    f"{op} sees {worst:.3g} times the period of its series; it may see at most 0.5: scale it"
                )
            return refresh.series(x, [part for pair in a["fourier"] for part in pair])
        case "refresh" | "output":
            return args[0]
    raise UnsupportedOpError(f"the simulator knows no op kind {op.kind!r}")


def _matrix(attrs: Mapping[str, Any], weights: np.ndarray, slots: int) -> np.ndarray | None:
    """A linear op whose m weights stand for slots / m slots each and rotate by multiples of as many, as a matrix [m, m]: the same sum,
    faster where diagonals are many; None for others."""
    m = weights.shape[-1]
    terms = [(giant + baby, row) for giant, inner in attrs["plan"] for baby, row in inner]
    if m == slots or len(terms) < 8 or any(k % (slots // m) for k, _ in terms):
        return None
    at = np.arange(m)
    matrix = np.zeros((m, m))
    for k, row in terms:
        matrix[at, (at + k // (slots // m)) % m] += weights[row]
    return matrix


def coefficient_noise(op: str, params: Params, level: int) -> float:
    """Standard deviation of the error that a primitive adds to each coefficient, before division by the scale.

    Average-case CKKS noise (Costache et al., eprint 2022/162, in spirit): a uniform ternary secret has 2N/3 non-zero entries.
    """
    n = 1 << params.log_n
    weight = 192 if params.secret == "sparse192" else 2 * n / 3
    rounding = math.sqrt((1 + weight) / 12)
    match op:
        case "input":
            return ERROR_STD * math.sqrt(4 * n / 3 + 1)
        case "rescale":
            return rounding
        case "mod_down":  # an unrounded sum of one fraction a special prime
            return rounding * math.sqrt(params.special_limbs)
        case "rotate" | "rotate_hoisted" | "relinearize" | "rotate_extended" | "conjugate":
            digits = math.ceil((level + 1) / params.digit_limbs)
            width = params.first_bits + (params.digit_limbs - 1) * params.scale_bits
            ratio = 2.0 ** (width - SPECIAL_PRIME_BITS * params.special_limbs)
            switch = ERROR_STD * math.sqrt(digits * n / 12) * ratio
            return switch if op == "rotate_extended" else math.hypot(switch, rounding * math.sqrt(params.special_limbs))
    return 0.0


class KeySwitchBias:
    """The part of a key switch's error that is no rounding noise: an offset common to all coefficients.

    Times the secret (or a key's error) it lies in the few slots whose root of unity z is near 1, since 1 + X + ... + X^(N-1) is
    2 / (1 - z) there. OpenFHE's mod-down is low by half a unit for each special prime; its backend corrects it where no pending
    rescale divides the offset away, but for half a unit of changing sign (`openfhe_rounding`). SEAL decomposes into digits in
    [0, q), half of q too high on average, which a key's error multiplies.
    """

    def __init__(self, params: Params, rng: np.random.Generator) -> None:
        n = 1 << params.log_n
        self.params, self.rng = params, rng
        exponent = np.array([pow(5, j, 2 * n) for j in range(params.slots)])
        points = np.exp(1j * np.pi * exponent / n)
        self.ones = 2 / (1 - points)
        self.signs = other = np.ones(params.slots, dtype=complex)
        for _ in range(params.log_n):
            self.signs, other = self.signs + points * other, self.signs - points * other
            points = points * points
        weight = 192 if params.secret == "sparse192" else 2 * n / 3
        self.secret = self._spread(math.sqrt(weight))

    def _spread(self, norm: float) -> np.ndarray:
        """Values in the slots of a random polynomial of that Euclidean norm, [slots] complex."""
        pair = self.rng.normal(size=(2, self.params.slots))
        return norm / math.sqrt(2) * (pair[0] + 1j * pair[1])

    def __call__(self, op: str, degree: int) -> Array | float:
        """Offset [slots] that an op adds, before division by the scale."""
        params = self.params
        if op not in ("rotate", "rotate_hoisted", "relinearize", "mod_down", "conjugate"):
            return 0.0
        if params.backend == "openfhe":
            if degree == 1 and op != "relinearize":  # corrected
                return np.real((1 + self.secret) * self.signs) / 2 if params.special_limbs % 2 else 0.0
            return -params.special_limbs / 2 * np.real((1 + self.secret) * self.ones)
        ratio = 2.0 ** (params.first_bits - SPECIAL_PRIME_BITS)
        return ratio / 2 * np.real(self._spread(ERROR_STD * math.sqrt(2.0**params.log_n)) * self.ones)


def simulate_noise(
    circuit: Circuit,
    tensors: Mapping[str, np.ndarray],
    *,
    step: int = 0,
    seed: int | Sequence[int] = 0,
    traced: Trace | None = None,
    visit: Callable[[int, Array], None] | None = None,
) -> dict[str, Array]:
    """Output tensors of one run with simulated CKKS noise, and with sums of values whose scales differ, as far as the primes can be
    foretold (`scales.foretold`; for others `execute.scale_tolerance` bounds what they add).

    Args:
        tensors: as for `simulate`; states bring the noise that the caller gives them, and get none.
        visit: is given the id of every circuit op that something reads, and its value with noise [slots].
    """
    params = circuit.params
    t = traced if traced is not None else trace(circuit)
    rng = np.random.default_rng(seed)
    scale = 2.0**params.scale_bits
    scales = assign_scales(t, foretold(params), scale)
    packed = input_slots(circuit, tensors)
    names = {node: key for key, node in t.inputs.items()}
    kept = {node for part, node in t.inputs.items() if part in circuit.state_parts}  # not encrypted again at every step
    spread = math.sqrt((1 << params.log_n) / 2)  # coefficient noise -> real part of a slot
    bias = KeySwitchBias(params, rng)
    values: dict[int, Array] = {}
    squares: tuple[tuple[int, ...], Array] = (), np.zeros(0)
    uses = np.zeros(len(t.nodes), dtype=int)
    for node in t.nodes:
        uses[list(set(node.args))] += 1
    uses[list(t.outputs.values())] += 1
    made: dict[int, list[int]] = {}
    for op_id, value in t.values.items() if visit is not None else ():
        made.setdefault(value, []).append(op_id)
    for node in t.nodes:
        args = [values[a] for a in node.args]
        if node.op == "input":
            y = packed[names[node.id]]
        elif node.op == "refresh_function":
            y = refresh.apply_function(params, args[0], node.plains, rng)  # type: ignore[arg-type]
        elif node.op == "refresh":
            y = refresh.apply_error(params, args[0], scale / scales.result[node.id], rng)
        elif node.op in ("add", "sub") and scales.result[node.args[0]] != scales.result[node.args[1]]:
            apart = (
                scales.result[node.args[1]] / scales.result[node.args[0]]
            )  # the second is read at the first one's scale
            y = _primitive(node.op, [args[0], args[1] * apart], node.k, [])
        elif node.op == "weighted_sum":
            if squares[0] != node.args:  # groups of one linear map weigh the same rotations
                squares = node.args, np.sum([np.abs(a) ** 2 for a in args], axis=0)
            y = _weighted_sum(args, node.plains, squares[1], spread / math.sqrt(12) / scales.plain[node.id], rng)
        else:
            y = _primitive(
                node.op, args, node.k, [_plain(p, step, scales.plain[node.id], spread, rng) for p in node.plains]
            )
        std = (
            0.0 if node.id in kept else coefficient_noise(node.op, params, node.level) * spread / scales.result[node.id]
        )
        y = y + bias(node.op, node.degree) / scales.result[node.id]
        if std:
            noise: Any = rng.standard_normal(y.shape, dtype=np.float32)
            if np.iscomplexobj(y):
                noise = noise + 1j * rng.standard_normal(y.shape, dtype=np.float32)
            y = y + std * noise
        values[node.id] = y
        for op_id in made.get(node.id, ()):
            visit(op_id, y)  # type: ignore[misc]
        for a in set(node.args):
            uses[a] -= 1
            if not uses[a]:
                del values[a]
    return output_tensors(circuit, {key: values[node] for key, node in t.outputs.items()})


def _plain(plain: object, step: int, scale: float, spread: float, rng: np.random.Generator) -> Array | float:
    """A plaintext operand with the rounding error of its encoding."""
    if isinstance(plain, StepRow):
        plain = plain.at(step)
    if isinstance(plain, float):
        return round(plain * scale) / scale
    values: Array = plain.slots()  # type: ignore[attr-defined]
    return values + spread / math.sqrt(12) / scale * rng.standard_normal(values.shape, dtype=np.float32)


def _weighted_sum(
    args: Sequence[Array], plains: Sequence[Any], squares: Array, std: float, rng: np.random.Generator
) -> Array:
    """A sum of products by plaintexts; the rounding errors of their encodings, independent, as the one normal error that they sum to.

    Args:
        squares: sum of the arguments' squares; std: of an encoding's error, in a slot.
    """
    total = std * np.sqrt(squares) * rng.standard_normal(squares.shape, dtype=np.float32)
    if np.iscomplexobj(args[0]):
        total = total.astype(np.complex128)
    product = np.empty_like(total)
    for a, plain in zip(args, plains, strict=True):
        if isinstance(plain, float):
            total += a * plain
        elif plain.roll % (block := plain.size // plain.weights.shape[-1]):
            total += a * plain.slots()
        else:  # a weight for `block` slots each: no need to write them out
            weights = np.roll(plain.weights[plain.row].astype(np.float64), plain.roll // block)
            np.multiply(a.reshape(-1, block), weights[:, None], out=product.reshape(-1, block))
            total += product
    return total


def _primitive(op: str, args: list[Array], k: int, plains: list[Array | float]) -> Array:
    match op:
        case "add":
            return args[0] + args[1]
        case "sub":
            return args[0] - args[1]
        case "mul":
            return args[0] * args[1]
        case "square":
            return args[0] * args[0]
        case "add_plain" | "add_scalar":
            return args[0] + plains[0]
        case "mul_plain" | "mul_scalar":
            return args[0] * plains[0]
        case "rotate" | "rotate_hoisted" | "rotate_extended":
            return np.roll(args[0], -k)
        case "join":
            return args[0] + 1j * args[1]
        case "conjugate":
            return np.conj(args[0])
        case "twice_real":  # at twice the scale: the sum of two halves
            return np.real(args[0] + args[1]) / 2
        case "twice_imaginary":
            return np.imag(args[0] - args[1]) / 2
        case "rescale" | "relinearize" | "drop" | "hoist" | "extend" | "mod_down":
            return args[0]
    raise UnsupportedOpError(f"no noise model for primitive {op!r}")
