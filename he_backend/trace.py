"""From a circuit to primitives: one graph that cost, keys, scales and execution all read.

`trace(circuit)` interprets the kernels with a tracer that inserts what CKKS needs and no kernel says: rescales and
relinearisations as late as possible (sums of products are relinearised and rescaled once), level drops as early as
possible (work is cheapest at low levels), and hoisting (one digit decomposition for all rotations of a value; inner sums
of linear maps in the extended basis, eprint 2020/1203 section 4). Equal subexpressions are one node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import refresh
from .base import CapabilityError, LevelError
from .circuit import Circuit, Op
from .kernels import Row, StepRow, apply, doubled_sum
from .params import Params


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One primitive; `op` is the name of the `Evaluator` method that runs it (or "input").

    level     of the result, counting limbs: a pending rescale has not yet taken its level
    degree    1, or 2 while a rescale is pending
    elements  2, or 3 while a relinearisation is pending
    extended  the result lives modulo P·Q
    k         rotation amount
    plains    plaintext operands, numbers, `Row`s or `StepRow`s: one, or one an argument for weighted_sum
    source    id of the circuit op that it works for
    """

    id: int
    op: str
    args: tuple[int, ...]
    level: int
    degree: int = 1
    elements: int = 2
    extended: bool = False
    k: int = 0
    plains: tuple[float | Row | StepRow, ...] = ()
    source: int = -1


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A circuit as primitives, in an order in which they can run.

    inputs   node ids of the circuit's input ops, by (name, part); outputs likewise
    keys     rotation -> highest level at which it is used, inside refreshes too; relin_level is -1 without products
    values   op id -> node that holds its value, relinearised and rescaled if anything wants it so; without ops that nothing reads
    """

    nodes: tuple[Node, ...]
    inputs: dict[tuple[str, int], int]
    outputs: dict[tuple[str, int], int]
    keys: dict[int, int]
    relin_level: int
    values: dict[int, int] = field(default_factory=dict)

    def counts(self) -> Counter[tuple[str, int]]:
        """How often each (primitive, level of its first argument) occurs; weighted_sum counts its terms."""
        total: Counter[tuple[str, int]] = Counter()
        for node in self.nodes:
            at = self.nodes[node.args[0]].level if node.args else node.level
            total[node.op, at] += len(node.args) if node.op == "weighted_sum" else 1
        return total


def cost_name(node: Node) -> str:
    """The row of a cost table that a node belongs to: sums and products modulo P·Q have their own."""
    return f"{node.op}_extended" if node.extended and node.op in ("add", "weighted_sum") else node.op


@dataclass
class Tracer:
    """SlotOps on node ids."""

    slots: int
    double_hoisting: bool = True
    hoisting: bool = True
    extended: bool = True  # whether the linear map at hand sums modulo P·Q, where the library can
    nodes: list[Node] = field(default_factory=list)
    source: int = -1
    _seen: dict[Any, int] = field(default_factory=dict)
    doubled: set[int] = field(default_factory=set)  # parts of a complex refresh: at twice the scale

    def emit(self, op: str, args: tuple[int, ...], *, anew: bool = False, **fields: Any) -> int:
        """The node, made once: an equal one that exists is returned, unless it is wanted anew."""
        key = (op, args, fields["level"], fields.get("k", 0), fields.get("plains", ()))
        if op == "input" or anew or key not in self._seen:
            self._seen[key] = len(self.nodes)
            self.nodes.append(Node(id=len(self.nodes), op=op, args=args, **{"source": self.source, **fields}))
        return self._seen[key]

    def settle(self, a: int) -> int:
        """Two elements, degree one: pending relinearisation first, then the pending rescale.

        Both count for the op that left them pending, not for the one that happens to need the value first.
        """
        n = self.nodes[a]
        if n.elements == 3:
            a = self.emit("relinearize", (a,), level=n.level, degree=n.degree, source=n.source)
            n = self.nodes[a]
        if n.degree == 2:
            if n.level < 1:
                raise LevelError(f"op {self.source} needs a rescale at level 0: the circuit has too few levels")
            a = self.emit("rescale", (a,), level=n.level - 1, source=n.source)
        return a

    def at(self, a: int, level: int) -> int:
        """`a`, settled, at exactly `level`."""
        a = self.settle(a)
        n = self.nodes[a]
        if n.level < level:
            raise LevelError(f"op {self.source} wants level {level}, its operand has {n.level} left")
        if (
            n.level > level and a in self.doubled
        ):  # the levels that are dropped pay for the way back to the nominal scale
            a = a if n.level == level + 1 else self.emit("drop", (a,), level=level + 1)
            a = self.emit("mul_scalar", (a,), level=level + 1, degree=2, plains=(1.0,))
            return self.emit("rescale", (a,), level=level)
        return a if n.level == level else self.emit("drop", (a,), level=level)

    def refresh(self, a: int, level: int) -> int:
        return self.emit("refresh", (a,), level=level)

    def refresh_function(self, a: int, op: Op, level: int) -> int:
        """The product brings the argument into the series' interval, and to exactly the nominal scale: f is not linear."""
        a = self.settle(self.mul(a, float(op.attrs["scale"])))
        flat = tuple(float(part) for pair in op.attrs["fourier"] for part in pair)
        return self.emit("refresh_function", (a,), level=level, plains=flat)

    def refresh_pair(self, a: int, b: int, level: int) -> int:
        """The copy of `a` out of the refresh of both; that of `b` shares all but the last node."""
        low, high = min(a, b), max(a, b)
        joined = self.emit("refresh", (self.emit("join", (low, high), level=self.nodes[low].level),), level=level)
        mirrored = self.emit("conjugate", (joined,), level=level)
        part = self.emit("twice_real" if a == low else "twice_imaginary", (joined, mirrored), level=level)
        self.doubled.add(part)
        return part

    def net(self, a: int) -> int:
        """Level after the pending rescale."""
        n = self.nodes[a]
        return n.level - (n.degree - 1)

    def _relinearized(self, a: int) -> int:
        """The relinearised form of a product if some rotation already asked for it: a sum with it needs no second one."""
        n = self.nodes[a]
        key = ("relinearize", (a,), n.level, 0, ())
        return self._seen.get(key, a)

    def _pair(self, a: int, b: int) -> tuple[int, int]:
        a, b = self._relinearized(a), self._relinearized(b)
        na, nb = self.nodes[a], self.nodes[b]
        if (na.level, na.degree) == (nb.level, nb.degree):
            return a, b
        if na.degree == 2 and self.net(b) >= na.level:
            return a, self.pending(b, na.level)
        if nb.degree == 2 and self.net(a) >= nb.level:
            return self.pending(a, nb.level), b
        level = min(self.net(a), self.net(b))
        return self.at(a, level), self.at(b, level)

    def pending(self, a: int, level: int) -> int:
        """`a` with a pending rescale at a lower level, like the product that it is added to: what is pending stays pending for the sum,
        and the scales of both can be one (`scales`), which is why no other sum may share it.

        A sum of multiples is taken at that level to begin with; anything else is multiplied by 1.
        """
        n = self.nodes[a]
        match n.op:
            case "mul_scalar" if n.degree == 2:
                x, plains = n.args[0], n.plains
            case "add" | "sub" if self._of_multiples(a):
                args = tuple(self.pending(x, level) for x in n.args)
                return self.emit(n.op, args, level=level, degree=2)
            case "add_scalar" if self._of_multiples(a):
                return self.emit(n.op, (self.pending(n.args[0], level),), level=level, degree=2, plains=n.plains)
            case _:
                x, plains = a, (1.0,)
        return self.emit("mul_scalar", (self.at(x, level),), anew=True, level=level, degree=2, plains=plains)

    def _of_multiples(self, a: int) -> bool:
        n = self.nodes[a]
        return n.op == "mul_scalar" or (n.op in ("add", "sub", "add_scalar") and all(map(self._of_multiples, n.args)))

    def _sum(self, op: str, a: int, b: Any) -> int:
        if not isinstance(b, int):
            n = self.nodes[a]
            plain = b if op == "add" else -b
            kind = "add_scalar" if isinstance(b, float) else "add_plain"
            return self.emit(kind, (a,), level=n.level, degree=n.degree, elements=n.elements, plains=(plain,))
        a, b = self._pair(a, b)
        na, nb = self.nodes[a], self.nodes[b]
        return self.emit(op, (a, b), level=na.level, degree=na.degree, elements=max(na.elements, nb.elements))

    def add(self, a: int, b: Any) -> int:
        return self._sum("add", a, b)

    def sub(self, a: int, b: Any) -> int:
        return self._sum("sub", a, b)

    def mul(self, a: int, b: Any) -> int:
        if not isinstance(b, int):
            a = self.settle(a)
            kind = "mul_scalar" if isinstance(b, float) else "mul_plain"
            return self.emit(kind, (a,), level=self.nodes[a].level, degree=2, plains=(b,))
        a, b = self.settle(a), self.settle(b)
        level = min(self.nodes[a].level, self.nodes[b].level)
        a, b = self.at(a, level), self.at(b, level)
        if a == b:
            return self.emit("square", (a,), level=level, degree=2, elements=3)
        return self.emit("mul", (min(a, b), max(a, b)), level=level, degree=2, elements=3)

    def rotate(self, a: int, k: int) -> int:
        """A pending rescale stays pending: it then divides the error of the key switch too (OpenFHE's mod-down is biased: in
        slot 0 the error of a rotation at degree 1 is 2^-15 at N = 2^16, scale 2^40; at degree 2 it is 2^-24)."""
        n = self.nodes[a]
        if n.elements == 3:
            a = self.emit("relinearize", (a,), level=n.level, degree=n.degree, source=n.source)
        k %= self.slots
        return self.emit("rotate", (a,), level=n.level, degree=n.degree, k=k) if k else a

    def doubled_sum(self, a: int, steps: Sequence[int]) -> int:
        """All sums of steps as rotations of one value: one decomposition, one mod-down (Bossuat et al., eprint 2020/1203,
        section 4, without weights). Rotations that coincide are counted as often as they occur."""
        if not self.double_hoisting:
            return doubled_sum(self, a, steps)
        n = self.nodes[a]
        if n.elements == 3:
            a = self.emit("relinearize", (a,), level=n.level, degree=n.degree, source=n.source)
        rotations = [0]
        for k in steps:
            rotations += [r + k for r in rotations]
        digits = self.emit("hoist", (a,), level=n.level, degree=n.degree)
        wide, narrow = -1, a
        for k in (r % self.slots for r in rotations[1:]):
            if not k:
                narrow = self.add(narrow, a)
                continue
            term = self.emit("rotate_extended", (a, digits), level=n.level, degree=n.degree, extended=True, k=k)
            if wide >= 0:
                term = self.emit("add", (wide, term), level=n.level, degree=n.degree, extended=True)
            wide = term
        return narrow if wide < 0 else self.add(narrow, self.emit("mod_down", (wide,), level=n.level, degree=n.degree))

    def weighted_rotations(self, a: int, groups: Sequence[tuple[int, Sequence[tuple[int, Any]]]]) -> int:
        a = self.settle(a)
        level = self.nodes[a].level
        groups = [(g % self.slots, [(b % self.slots, p) for b, p in terms]) for g, terms in groups if terms]
        if {g for g, _ in groups} == {0} and {b for _, terms in groups for b, _ in terms} == {0}:
            return self.mul(a, groups[0][1][0][1])
        wide = self.double_hoisting and self.extended
        return self._extended_sum(a, groups, level) if wide else self._hoisted_sum(a, groups, level)

    def _extended_sum(self, a: int, groups: Any, level: int) -> int:
        """Baby steps and inner sums modulo P·Q; one mod-down a giant step and one at the end."""
        digits = self.emit("hoist", (a,), level=level)

        def baby(k: int) -> int:
            if k == 0:
                return self.emit("extend", (a,), level=level, extended=True)
            return self.emit("rotate_extended", (a, digits), level=level, extended=True, k=k)

        total = -1
        for giant, terms in groups:
            args, plains = tuple(baby(b) for b, _ in terms), tuple(p for _, p in terms)
            part = self.emit("weighted_sum", args, level=level, degree=2, extended=True, plains=plains)
            if giant:
                part = self.emit("mod_down", (part,), level=level, degree=2)
                again = self.emit("hoist", (part,), level=level, degree=2)
                part = self.emit("rotate_extended", (part, again), level=level, degree=2, extended=True, k=giant)
            total = part if total < 0 else self.emit("add", (total, part), level=level, degree=2, extended=True)
        return self.emit("mod_down", (total,), level=level, degree=2)

    def _hoisted_sum(self, a: int, groups: Any, level: int) -> int:
        """The same in the ordinary basis, for libraries without the extended one."""
        digits = self.emit("hoist", (a,), level=level) if self.hoisting else -1

        def baby(k: int) -> int:
            if k == 0:
                return a
            if not self.hoisting:
                return self.emit("rotate", (a,), level=level, k=k)
            return self.emit("rotate_hoisted", (a, digits), level=level, k=k)

        total = -1
        for giant, terms in groups:
            args, plains = tuple(baby(b) for b, _ in terms), tuple(p for _, p in terms)
            part = self.emit("weighted_sum", args, level=level, degree=2, plains=plains)
            if giant:
                part = self.emit("rotate", (part,), level=level, degree=2, k=giant)
            total = part if total < 0 else self.emit("add", (total, part), level=level, degree=2)
        return total


def trace(
    circuit: Circuit, *, capabilities: frozenset[str] = frozenset({"hoisting", "double_hoisting", "bootstrap"})
) -> Trace:
    """Interpret a circuit as primitives.

    Each op first drops its operands to the level that the circuit gives its result, plus the levels that it costs.

    Raises:
        LevelError: an operand has fewer levels than the circuit says.
        CapabilityError: the circuit refreshes, and the backend (or its parameters) cannot.
    """
    from .kernels import depth

    slots = circuit.params.slots
    t = Tracer(slots, double_hoisting="double_hoisting" in capabilities, hoisting="hoisting" in capabilities)
    values: list[int] = []
    inputs: dict[tuple[str, int], int] = {}
    outputs: dict[tuple[str, int], int] = {}
    for op in circuit.ops:
        t.source = op.id
        if op.kind == "input":
            values.append(t.emit("input", (), level=op.level, plains=(float(op.id),)))
            inputs[op.attrs["name"], op.attrs["part"]] = values[-1]
            continue
        if op.kind == "output":
            values.append(_settled(t, t.at(values[op.args[0]], op.level), op))
            outputs[op.attrs["name"], op.attrs["part"]] = values[-1]
            continue
        if op.kind == "refresh":
            _check_refresh(op, circuit.params, capabilities)
            kind, top = op.attrs.get("kind", "plain"), circuit.params.refresh_output
            start = circuit.params.refresh_input + (kind == "functional")
            args = [_settled(t, t.at(values[a], start), op) for a in op.args]
            if kind == "functional":
                fresh = t.refresh_function(args[0], op, top)
            else:
                fresh = t.refresh(args[0], top) if kind == "plain" else t.refresh_pair(args[0], args[1], top)
            values.append(t.at(fresh, op.level))
            continue
        start = op.level + depth(op, circuit.arrays, slots)
        # Sums and rotations keep a pending rescale, the rest would repeat it; unless the circuit wants it done first.
        lazy = op.kind in ("add", "sub", "add_plain", "rotate", "rotate_sum") and not op.attrs.get("settled")
        args = [values[a] if lazy and t.net(values[a]) == start else t.at(values[a], start) for a in op.args]
        if op.kind in ("add", "sub") and any(t.nodes[a].degree == 2 for a in args):
            # What has levels to spare can be brought to the other one's scale: it is not dropped yet.
            above = [v for v in (values[a] for a in op.args) if t.net(v) > start and v not in t.doubled]
            args = [v if v in above else a for v, a in zip((values[a] for a in op.args), args, strict=True)]
        t.extended = op.attrs.get("basis") != "ordinary"
        if op.kind != "linear":
            args = [_settled(t, a, op) for a in args]
        values.append(apply(t, op, args, circuit.arrays))
        if t.net(values[-1]) != op.level:
            raise LevelError(f"op {op} comes out at level {t.net(values[-1])}")
    nodes = _live(t.nodes, set(outputs.values()) | set(inputs.values()))
    renumber = {n.id: i for i, n in enumerate(nodes)}
    keys: dict[int, int] = {}
    settled = {n.args[0]: n.id for n in nodes if n.op in ("relinearize", "rescale")}
    relin = -1
    final = []
    for n in nodes:
        final.append(replace(n, id=renumber[n.id], args=tuple(renumber[a] for a in n.args)))
        if n.k:
            keys[n.k] = max(keys.get(n.k, 0), n.level)
        if n.op == "relinearize":
            relin = max(relin, n.level)
        if n.op in ("refresh", "refresh_function"):
            relin = max(relin, refresh.relin_level(circuit.params))
            for k, level in refresh.rotations(circuit.params).items():
                keys[k] = max(keys.get(k, 0), level)
    return Trace(
        nodes=tuple(final),
        inputs={k: renumber[v] for k, v in inputs.items()},
        outputs={k: renumber[v] for k, v in outputs.items()},
        keys=dict(sorted(keys.items())),
        relin_level=relin,
        values={i: renumber[a] for i, a in enumerate(_ends(values, settled)) if a in renumber},
    )


def _ends(values: Sequence[int], settled: Mapping[int, int]) -> Iterator[int]:
    """Each value behind the relinearisation and the rescale that it gets, if it gets them."""
    for a in values:
        while a in settled:
            a = settled[a]
        yield a


def _check_refresh(op: Op, params: Params, capabilities: frozenset[str]) -> None:
    if "bootstrap" not in capabilities:
        raise CapabilityError(f"op {op}: this backend refreshes nothing; compile a leveled circuit, or for openfhe")
    if not params.refreshes:
        raise CapabilityError(f"op {op}: {params.name} has no refresh: give it a refresh budget")
    kind = op.attrs.get("kind", "plain")
    if {"plain": 1, "pair": 2, "functional": 1}.get(kind) != len(op.args) or len(set(op.args)) != len(op.args):
        raise CapabilityError(
            f"op {op} is a refresh of kind {kind!r}; built are 'plain' and 'functional' of one value and 'pair' of two"
        )
    if (kind == "functional") != (params.refresh_terms > 0):
        raise CapabilityError(
            f"op {op} is a refresh of kind {kind!r}, and {params.name} has {params.refresh_terms} Fourier terms: plain and "
            "functional refreshes exclude each other in one context; set refresh_terms, or write the identity as a function"
        )
    if kind == "functional" and not 0 < len(op.attrs["fourier"]) <= params.refresh_terms:
        raise CapabilityError(
            f"op {op} has a series of {len(op.attrs['fourier'])} terms; {params.name} has room for 1 to {params.refresh_terms}"
        )
    if kind == "pair" and not params.refresh_complex:
        raise CapabilityError(f"op {op}: {params.name} refreshes real slots only: set refresh_complex for pairs")
    if op.level > params.refresh_output:
        raise LevelError(f"op {op}: a refresh reaches level {params.refresh_output} with {params.name}")


def _settled(t: Tracer, a: int, op: Op) -> int:
    """`a`, which must not be at twice the scale."""
    if a in t.doubled:
        raise LevelError(f"op {op} reads half of a pair at its own level {t.net(a)}; give it one level less")
    return a


def _live(nodes: list[Node], roots: set[int]) -> list[Node]:
    """Nodes that some root needs, in their order."""
    alive, stack = set(roots), list(roots)
    while stack:
        for a in nodes[stack.pop()].args:
            if a not in alive:
                alive.add(a)
                stack.append(a)
    return [n for n in nodes if n.id in alive]
