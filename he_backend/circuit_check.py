"""Rules that every circuit keeps, recomputed from its ops, arrays and parameters: nothing that a circuit says of itself is believed.

`faults` and then `traced_faults` are asked whenever a circuit is loaded. What only the model can tell (the meaning of every tensor,
the magnitudes) is checked by the compiler, `compiler/verify.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .base import BACKENDS, HEError, ScaleError
from .circuit import Circuit, Op, Signature
from .container import Arrays
from .kernels import depth
from .params import Params
from .scales import STATE_DRIFT, assign_scales, foretold
from .trace import Trace, trace

# Number of arguments and the attributes that an op of a kind cannot do without; see the table in `circuit.py`. A refresh of a pair
# takes two.
FORMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "input": (0, ("name", "part")),
    "add": (2, ()),
    "sub": (2, ()),
    "mul": (2, ()),
    "add_plain": (1, ("array",)),
    "linear": (1, ("weights", "plan")),
    "rotate": (1, ("k",)),
    "rotate_sum": (1, ("steps",)),
    "polynomial": (1, ()),
    "refresh": (1, ()),
    "output": (1, ("name", "part")),
    "mul_step": (1, ("array",)),
    "add_step": (1, ("array",)),
}
REFRESHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "plain": (1, ()),
    "pair": (2, ()),
    "functional": (1, ("scale", "fourier")),
}
ROUNDING = 1e-9  # relative difference of two factors that are one
LEEWAY = 1e-5  # above the interval of a refresh: sites are chosen by the same bounds, to rounding


def faults(circuit: Circuit) -> Iterator[str]:
    """Sentences about what is wrong, the simplest first; nothing for a sound circuit.

    A later rule may rely on the earlier ones: whoever raises should raise the first.
    """
    for op in circuit.ops:
        yield from _form(op, circuit)
    for signature in circuit.inputs:
        yield from _signature(signature, circuit, "input")
    for signature in circuit.outputs:
        yield from _signature(signature, circuit, "output")
    for signature in circuit.states:
        for kind in ("input", "output"):
            yield from _signature(signature, circuit, kind)
    for kind, signatures in (("input", circuit.inputs), ("output", circuit.outputs)):
        known = [s.name for s in (*signatures, *circuit.states)]
        if len(set(known)) < len(known):
            yield f"two {kind}s have one name: {sorted(known)}"
        for op in circuit.ops:
            if op.kind == kind and op.attrs["name"] not in known:
                yield f"{op}: there is no {kind} {op.attrs['name']!r}; known are {', '.join(known)}"
    yield from level_faults(circuit)


def level_faults(circuit: Circuit) -> Iterator[str]:
    """Levels that the chain does not have, and operands with fewer levels than their readers use."""
    params = circuit.params
    for op in circuit.ops:
        if not 0 <= op.level <= params.levels:
            yield f"{op}: level {op.level} of a chain of {params.levels}"
        need = op.level + depth(op, circuit.arrays, params.slots)
        if op.kind == "refresh":
            need = params.refresh_input + (op.attrs.get("kind") == "functional")
            if op.level > params.refresh_output:
                yield f"{op}: a refresh reaches level {params.refresh_output}"
            yield from _repeats(op, circuit)
            yield from _small(op, circuit)
        for a in op.args:
            have = circuit.ops[a].level
            if op.kind != "linear" and circuit.ops[a].attrs.get("kind") == "pair":
                have = min(have, params.refresh_output - 1)  # half of a pair is at twice the scale
            if have < need:
                yield f"{op} needs its operand at level {need}; %{a} has {have}"


def _repeats(op: Op, circuit: Circuit) -> Iterator[str]:
    """A refresh of a period spoils whatever does not repeat with it."""
    period, layout = circuit.params.refresh_period, circuit.arrays.get(op.layout)
    if period == circuit.params.slots:
        return
    rows = None if layout is None else layout.reshape(-1, period)
    if rows is None or (rows < 0).any() or (rows != rows[0]).any():
        yield f"{op}: its slots do not repeat with the refresh's period {period}"


def _small(op: Op, circuit: Circuit) -> Iterator[str]:
    """A refresh evaluates its sine on slots within [-1, 1]; a function's argument is scaled, and its series checked by the simulator."""
    for a in op.args if op.attrs.get("kind") != "functional" else ():
        if (bound := circuit.ops[a].bound) > 1 + LEEWAY:
            yield f"{op}: %{a} reaches {bound:.6g}; a refresh keeps slots within [-1, 1]"


def traced_faults(circuit: Circuit) -> Iterator[str]:
    """What only the primitives tell: evaluation keys that the circuit lacks, or makes its client generate and upload for nothing;
    and states that leave at another scale than they came in.

    Relies on `faults` having found none.
    """
    params = circuit.params
    if params.backend not in BACKENDS:
        yield f"parameters are for backend {params.backend!r}; known are {', '.join(BACKENDS)}"
        return
    try:
        found = trace(circuit, capabilities=BACKENDS[params.backend])
    except HEError as error:
        yield str(error)
        return
    yield from _key_faults(circuit, found)
    yield from _state_faults(circuit, found)


def _key_faults(circuit: Circuit, found: Trace) -> Iterator[str]:
    params = circuit.params
    for k, level in found.keys.items():
        if circuit.keys.get(k, -1) < level:
            known = f"for level {circuit.keys[k]}" if k in circuit.keys else "missing"
            yield f"rotation by {k} is used at level {level}; its key in the circuit's list is {known}"
    if circuit.relin_level < found.relin_level:
        yield f"a product at level {found.relin_level} is relinearised; the circuit's key is for level {circuit.relin_level} (-1: none)"
    for k, level in circuit.keys.items():
        if level > found.keys.get(k, -math.inf):
            used = f"at most at level {found.keys[k]}" if k in found.keys else "by no op"
            yield f"rotation by {k} is used {used}; the circuit's list wants {_size(params, level)}: compile again"
    if circuit.relin_level > found.relin_level:
        used = f"at most at level {found.relin_level}" if found.relin_level >= 0 else "by no op"
        yield f"relinearisation is used {used}; the circuit's list wants {_size(params, circuit.relin_level)}: compile again"


def _state_faults(circuit: Circuit, found: Trace) -> Iterator[str]:
    """A state's scale would drift from step to step."""
    params = circuit.params
    if not circuit.states:
        return
    scale = 2.0**params.scale_bits
    try:
        scales = assign_scales(found, foretold(params), scale)
    except ScaleError as error:
        yield str(error)
        return
    for (name, part), node in found.outputs.items():
        if (name, part) in circuit.state_parts and (gap := abs(scales.result[node] / scale - 1.0)) > STATE_DRIFT:
            yield (
                f"state {name!r} goes out at a scale that differs by {gap:.2g} from the one at which it comes in; "
                f"{STATE_DRIFT:.0e} is rounding"
            )


def _size(params: Params, level: int) -> str:
    """A key that is too much, with what it costs its client."""
    return f"a key for level {level}, {params.key_bytes(level) / 1e6:.4g} MB"


def _form(op: Op, circuit: Circuit) -> Iterator[str]:
    """Arguments, attributes and arrays of one op."""
    count, needed = FORMS[op.kind]
    if op.kind == "refresh":
        kind = op.attrs.get("kind", "plain")
        if kind not in REFRESHES:
            yield f"{op}: a refresh is {', '.join(REFRESHES)}, not {kind!r}"
            return
        count, needed = REFRESHES[kind]
    if len(op.args) != count:
        yield f"{op}: a {op.kind} takes {count} operands, not {len(op.args)}"
    if missing := [name for name in needed if name not in op.attrs]:
        yield f"{op}: a {op.kind} needs the attribute {missing[0]!r}"
    if any(circuit.ops[a].kind == "output" for a in op.args):
        yield f"{op}: an output is no operand"
    if not (math.isfinite(op.factor) and op.factor and math.isfinite(op.bound) and op.bound >= 0):
        yield f"{op}: factor {op.factor} and bound {op.bound}; need a finite factor that is not 0 and a bound of at least 0"
    if op.kind == "add_plain":
        yield from _spread(op, "array", circuit, rank=1)
    if op.kind in ("mul_step", "add_step"):
        yield from _spread(op, "array", circuit, rank=2)
        if (rows := len(circuit.arrays[op.attrs["array"]])) != circuit.steps:
            yield f"{op}: array {op.attrs['array']!r} has {rows} rows for {circuit.steps} steps"
    if op.kind == "linear":
        yield from _spread(op, "weights", circuit, rank=2)
        if op.attrs.get("bias") is not None:
            yield from _spread(op, "bias", circuit, rank=1)
        rows = len(circuit.arrays[op.attrs["weights"]])
        used = [row for _, terms in op.attrs["plan"] for _, row in terms]
        if not used or not 0 <= min(used) <= max(used) < rows:
            yield f"{op}: its plan reads rows {sorted({*used[:1], *used[-1:]})} of {rows} in array {op.attrs['weights']!r}"
    if op.kind == "rotate_sum" and "runs" in op.attrs:
        steps, runs = len(op.attrs["steps"]), op.attrs["runs"]
        if min(runs, default=0) < 1 or sum(runs) != steps or 1 << max(runs) > circuit.params.slots:
            yield f"{op}: runs {runs} for {steps} steps: need positive ones that sum to them, of r steps at most, 2^r <= slots"
    if op.kind == "polynomial" and not ("factors" in op.attrs or {"chebyshev", "domain"} <= set(op.attrs)):
        yield f"{op}: a polynomial needs factors, or Chebyshev coefficients and their domain"
    if op.layout:
        yield from _held(str(op), op.layout, circuit.arrays, (circuit.params.slots,))


def _spread(op: Op, attribute: str, circuit: Circuit, *, rank: int) -> Iterator[str]:
    """An array of numbers whose last axis is repeated over the slots."""
    name, slots = op.attrs[attribute], circuit.params.slots
    array = circuit.arrays.get(name)
    if array is None:
        yield f"{op}: there is no array {name!r} ({attribute})"
    elif array.ndim != rank or not array.size or slots % array.shape[-1]:
        yield f"{op}: array {name!r} has shape {array.shape}; need {rank} axes, the last one a divisor of {slots} slots"
    elif array.dtype.kind != "f" or not np.isfinite(array).all():
        yield f"{op}: array {name!r} holds something that is no finite number"


def _held(where: str, name: str, arrays: Arrays, shape: tuple[int, ...], size: int | None = None) -> Iterator[str]:
    """A layout: an index below `size`, if that is known, or -1 in every slot."""
    layout = arrays.get(name)
    if layout is None:
        yield f"{where}: there is no layout array {name!r}"
    elif layout.shape != shape or layout.dtype.kind != "i":
        yield f"{where}: layout {name!r} is {layout.dtype.name} {layout.shape}; need integers of shape {shape}"
    elif layout.min() < -1 or (size is not None and layout.max() >= size):
        yield f"{where}: layout {name!r} holds indices {layout.min()} to {layout.max()}; the tensor's are 0 to {size}, exclusive"


def _signature(signature: Signature, circuit: Circuit, kind: str) -> Iterator[str]:
    """A tensor of the circuit's door: its layout holds every element, its ops are there, at its level and factor."""
    where, size = f"{kind} {signature.name!r}", math.prod(signature.shape)
    arrays = {**circuit.arrays, **circuit.client_arrays}  # the server alone has the layouts of states
    layout = arrays.get(signature.layout)
    parts = len(layout) if layout is not None and layout.ndim == 2 else 1
    yield from _held(where, signature.layout, arrays, (parts, circuit.params.slots), size)
    if layout is not None and (lost := size - np.unique(layout[layout >= 0]).size):
        yield f"{where}: {lost} of {size} elements lie in no slot of layout {signature.layout!r}"
    ops = [op for op in circuit.ops if op.kind == kind and op.attrs["name"] == signature.name]
    if (there := sorted(op.attrs["part"] for op in ops)) != list(range(parts)):
        yield f"{where}: ciphertexts {there} are there; its layout has {parts}"
    for op in ops:
        if op.level != signature.level:
            yield f"{op}: its signature says level {signature.level}"
        if not math.isclose(op.factor, signature.factor, rel_tol=ROUNDING):
            yield f"{op}: factor {op.factor:.6g}; its signature says {signature.factor:.6g}"
