"""Lowering: tensors become slot vectors, graph nodes become circuit ops.

Every placed tensor carries a *factor*: tensor element = factor * stored slot. Constants that multiply whole tensors (means,
leading coefficients, 1/sqrt(d)) never become products, they move in the factors; each linear map is free to choose the factor
of its result, and chooses it so that what follows lies within [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import Array, UnsupportedOpError
from he_backend.circuit import Op, Signature
from he_backend.container import Arrays

from .attention import lower_scores, lower_values
from .ir import Graph, Node
from .layout import Heads, broadcast_index, from_features, periodic, to_features
from .matvec import PlanCost, plan_matvec
from .polynomials import prepare

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a tensor is: one op id a ciphertext, layout [ciphertexts, slots], factor; `clean` if unused slots hold 0.

    heads is set for tensors in attention's layout; `scores` tells those of [1, H, T, T] from queries, keys and values.
    """

    ops: tuple[int, ...]
    layout: np.ndarray
    factor: float
    clean: bool = True
    heads: Heads | None = None
    scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A circuit without levels and parameters yet."""

    ops: tuple[Op, ...]
    arrays: Arrays
    client_arrays: Arrays
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    tensors: Mapping[int, tuple[str, int]]  # op id -> (graph tensor, ciphertext) that it holds


class Lowering:
    """One run of the pass; `emit` and `array` are what the handlers share."""

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], slots: int, cost: PlanCost) -> None:
        self.graph, self.ranges, self.slots, self.cost = graph, ranges, slots, cost
        self.users = graph.users()
        self.nodes = graph.by_name
        if len(graph.input_shape) not in (2, 3) or graph.input_shape[0] != 1:
            raise UnsupportedOpError(
                f"input {graph.input!r} has shape {graph.input_shape}; [1, tokens, features] and [1, features] are compiled"
            )
        self.tokens = graph.input_shape[1] if len(graph.input_shape) == 3 else 1
        if slots % self.tokens:
            raise UnsupportedOpError(f"{self.tokens} tokens do not divide {slots} slots; pad to a power of two")
        self.positions = slots // self.tokens
        self.ops: list[Op] = []
        self.arrays: Arrays = {}
        self.client_arrays: Arrays = {}
        self.placed: dict[str, Placed] = {}
        self.tensors: dict[int, tuple[str, int]] = {}
        self.streams = self._streams()

    # Shared by handlers

    def emit(self, kind: str, args: tuple[int, ...], source: str, *, factor: float, **attrs: object) -> int:
        op = Op(id=len(self.ops), kind=kind, args=args, attrs=attrs, factor=factor, source=source)
        self.ops.append(op)
        return op.id

    def array(self, name: str, values: np.ndarray) -> str:
        """Store a constant array [.., slots], shortened where it repeats within each position."""
        grid = values.reshape(*values.shape[:-1], -1, self.tokens)
        if values.shape[-1] == self.slots and np.array_equal(grid, np.broadcast_to(grid[..., :1], grid.shape)):
            values = grid[..., 0]
        self.arrays[name] = np.ascontiguousarray(values)
        return name

    def bound(self, name: str) -> float:
        """Largest |element| seen in calibration, with its margin; never 0."""
        lo, hi = self.ranges[name]
        return max(abs(lo), abs(hi), 1e-30)

    def _streams(self) -> dict[str, float]:
        """Factor of each tensor that takes part in a sum: all operands of sums that touch each other share one.

        Where the squares of a stream are summed for a norm, the factor brings the largest such sum to 1.
        """
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        for node in self.graph.nodes:
            if node.op == "add":
                for name in node.inputs:
                    parent[root(name)] = root(node.name)
        root(self.graph.input)
        norms: dict[str, float] = {}
        for node in self.graph.nodes:
            square = self.nodes.get(node.inputs[0])
            if (
                node.op == "reduce_sum"
                and square is not None
                and square.op == "polynomial"
                and square.inputs[0] in parent
            ):
                group = root(square.inputs[0])
                norms[group] = max(norms.get(group, 0.0), self.bound(node.name) ** 0.5)
        peaks: dict[str, float] = {}
        for name in parent:
            peaks[root(name)] = max(peaks.get(root(name), 0.0), self.bound(name))
        return {name: norms.get(root(name), peaks[root(name)]) for name in parent}

    def wanted(self, name: str) -> float:
        """The factor that a tensor should have, judged by what reads it."""
        if name in self.streams:
            return self.streams[name]
        for user in self.users[name]:
            if user.op in ("add_const", "reshape", "transpose"):
                return self.wanted(user.name)
            if user.op == "mul":
                others = [i for i in user.inputs if i != name and i in self.placed]
                if others:
                    return self.wanted(user.name) / self.placed[others[0]].factor
            if user.op == "polynomial" and name in self.nodes and self.nodes[name].op == "matmul":
                # Scores: the sum of their powers, the denominator, is what should be near 1.
                power = len(user.attrs["coefficients"]) - 1
                sums = [u for u in self.users[user.name] if u.op == "reduce_sum"]
                if sums:
                    return float(self.bound(sums[0].name) ** (1.0 / power))
        return self.bound(name)

    def goes_to_heads(self, name: str) -> Heads | None:
        """The head geometry if a tensor [1, T, D] is split into heads for a product of two tensors."""
        for user in self.users[name]:
            if user.op == "reshape" and len(user.shape) == 4:
                _, tokens, heads, channels = user.shape
                return Heads(tokens=tokens, heads=heads, channels=channels, positions=self.positions)
            if user.op in ("add_const", "mul") and user.shape == self.graph.shape(name):
                return self.goes_to_heads(user.name)
        return None

    def run(self) -> Lowered:
        self.inputs = (self._input(),)
        for node in self.graph.nodes:
            handler = HANDLERS.get(node.op)
            if handler is None:
                raise UnsupportedOpError(f"{node}: no lowering; the compiler lowers {', '.join(HANDLERS)}")
            placed = handler(self, node)
            self.placed[node.name] = placed
            for part, op in enumerate(placed.ops):
                self.tensors[op] = (node.name, part)
        outputs = (self._output(),)
        for op, (name, part) in self.tensors.items():
            layout = self._layout_name(self.placed[name].layout[part])
            self.ops[op] = replace(self.ops[op], layout=layout)
        return Lowered(
            ops=tuple(self.ops),
            arrays=self.arrays,
            client_arrays=self.client_arrays,
            inputs=self.inputs,
            outputs=outputs,
            tensors=self.tensors,
        )

    def _layout_name(self, layout: np.ndarray) -> str:
        for name, known in self.arrays.items():
            if name.startswith("layout.") and np.array_equal(known, layout):
                return name
        name = f"layout.{sum(n.startswith('layout.') for n in self.arrays)}"
        self.arrays[name] = layout.astype(np.int32)
        return name

    def _input(self) -> Signature:
        name, features = self.graph.input, self.graph.input_shape[-1]
        layout = from_features(periodic(features, self.positions), self.tokens, features)
        factor = self.wanted(name)
        op = self.emit("input", (), name, factor=factor, name="x", part=0)
        self.placed[name] = Placed(ops=(op,), layout=layout[None], factor=factor)
        self.tensors[op] = (name, 0)
        self.client_arrays["input"] = layout[None].astype(np.int32)
        return Signature(
            name="x", shape=self.graph.input_shape[1:], layout="input", factor=factor, bound=self.bound(name), level=0
        )

    def _output(self) -> Signature:
        name = self.graph.output
        placed = self.placed[name]
        for part, op in enumerate(placed.ops):
            self.emit("output", (op,), name, factor=placed.factor, name="y", part=part)
        self.client_arrays["output"] = placed.layout.astype(np.int32)
        return Signature(
            name="y",
            shape=self.graph.shape(name)[1:],
            layout="output",
            factor=placed.factor,
            bound=self.bound(name),
            level=0,
        )


def _linear(low: Lowering, node: Node) -> Placed:
    assert node.const is not None
    x = low.placed[node.inputs[0]]
    features_in, features_out = node.const.shape
    source = to_features(x.layout[0], low.tokens, features_in) if len(x.ops) == 1 else None
    if source is None:
        raise UnsupportedOpError(f"{node}: the input is not one ciphertext of [tokens, features]")
    heads = low.goes_to_heads(node.name)
    target = heads.feature if heads is not None else periodic(features_out, low.positions)
    factor = low.wanted(node.name)
    plan = plan_matvec(source, target, node.const * (x.factor / factor), low.cost)
    t = low.tokens
    bias = None
    if node.bias is not None:
        values = np.where(target >= 0, node.bias[np.maximum(target, 0)] / factor, 0.0)
        bias = low.array(f"{node.name}.bias", values)
    op = low.emit(
        "linear",
        x.ops,
        node.source,
        factor=factor,
        weights=low.array(f"{node.name}.weights", plan.weights),
        plan=[[g * t, [[b * t, row] for b, row in terms]] for g, terms in plan.plan],
        bias=None if plan.folds else bias,
    )
    if plan.folds:
        op = low.emit("rotate_sum", (op,), node.source, factor=factor, steps=[f * t for f in plan.folds])
        if bias is not None:
            op = low.emit("add_plain", (op,), node.source, factor=factor, array=bias)
    layout = from_features(target, low.tokens, features_out)
    return Placed(ops=(op,), layout=layout[None], factor=factor, heads=heads)


def _scaled(low: Lowering, x: Placed, factor: float, source: str) -> Placed:
    """The same tensor under another factor: a product by a number, one level."""
    name = low.array(f"scale.{len(low.ops)}", np.full((1, low.positions), x.factor / factor))
    ops = tuple(
        low.emit("linear", (op,), source, factor=factor, weights=name, plan=[[0, [[0, 0]]]], bias=None) for op in x.ops
    )
    return replace(x, ops=ops, factor=factor)


def _add(low: Lowering, node: Node) -> Placed:
    a, b = (low.placed[name] for name in node.inputs)
    if a.layout.shape != b.layout.shape or not np.array_equal(a.layout, b.layout):
        raise UnsupportedOpError(f"{node}: the operands lie in different layouts")
    if not np.isclose(a.factor, b.factor, rtol=1e-9):
        b = _scaled(low, b, a.factor, node.source)
    ops = tuple(low.emit("add", pair, node.source, factor=a.factor) for pair in zip(a.ops, b.ops, strict=True))
    return replace(a, ops=ops, clean=a.clean and b.clean)


def constant_slots(low: Lowering, const: np.ndarray, shape: tuple[int, ...], layout: np.ndarray) -> Array:
    """A broadcast constant in a layout: [ciphertexts, slots], 0 where the layout is unused."""
    flat = np.broadcast_to(const, shape).reshape(-1)
    return np.where(layout >= 0, flat[np.maximum(layout, 0)], 0.0)


def _add_const(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    assert node.const is not None
    values = constant_slots(low, node.const, node.shape, x.layout) / x.factor
    ops = tuple(
        low.emit("add_plain", (op,), node.source, factor=x.factor, array=low.array(f"{node.name}.{part}", values[part]))
        for part, op in enumerate(x.ops)
    )
    return replace(x, ops=ops)


def _mul_const(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    assert node.const is not None
    if node.const.size == 1:
        c = float(node.const.reshape(-1)[0])
        if c == 0.0:
            raise UnsupportedOpError(f"{node}: a product by zero; remove the branch")
        return replace(x, factor=x.factor * c)
    factor = low.wanted(node.name)
    values = constant_slots(low, node.const, node.shape, x.layout) * (x.factor / factor)
    ops = tuple(
        low.emit(
            "linear",
            (op,),
            node.source,
            factor=factor,
            weights=low.array(f"{node.name}.{part}", values[part][None]),
            plan=[[0, [[0, 0]]]],
            bias=None,
        )
        for part, op in enumerate(x.ops)
    )
    return replace(x, ops=ops, factor=factor, clean=True)


def _mul(low: Lowering, node: Node) -> Placed:
    names = sorted(node.inputs, key=lambda n: -int(np.prod(low.graph.shape(n))))
    a, b = (low.placed[name] for name in names)
    index = broadcast_index(low.graph.shape(names[1]), node.shape)
    wanted = np.where(a.layout >= 0, index[np.maximum(a.layout, 0)], b.layout)
    if low.graph.shape(names[0]) != node.shape or not np.array_equal(wanted, np.broadcast_to(b.layout, wanted.shape)):
        raise UnsupportedOpError(f"{node}: the second operand does not lie where the first one needs it")
    pairs = zip(a.ops, b.ops * (len(a.ops) // len(b.ops)), strict=True)
    factor = a.factor * b.factor
    ops = tuple(low.emit("mul", pair, node.source, factor=factor) for pair in pairs)
    return replace(a, ops=ops, factor=factor, clean=a.clean or b.clean)


def _polynomial(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    lo, hi = low.ranges[node.inputs[0]]
    interval = tuple(sorted((lo / x.factor, hi / x.factor)))
    attrs, factor = prepare(node.attrs["coefficients"], x.factor, (interval[0], interval[1]))
    ops = tuple(low.emit("polynomial", (op,), node.source, factor=factor, **attrs) for op in x.ops)
    at_zero = np.polynomial.polynomial.polyval(0.0, node.attrs["coefficients"])
    return replace(x, ops=ops, factor=factor, clean=x.clean and abs(at_zero) < 1e-12)


def _reduce_sum(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    shape = low.graph.shape(node.inputs[0])
    rows = broadcast_index(node.shape, shape)
    total = x.ops[0]
    if x.heads is not None and x.scores:
        for op in x.ops[1:]:
            total = low.emit("add", (total, op), node.source, factor=x.factor)
        steps = x.heads.copy_steps
    else:
        feature = to_features(x.layout[0], low.tokens, shape[-1])
        if feature is None or not np.array_equal(feature, periodic(shape[-1], low.positions)):
            raise UnsupportedOpError(f"{node}: sums are taken over features in the periodic layout, or over keys")
        if (feature < 0).any() and not x.clean:
            raise UnsupportedOpError(
                f"{node}: {shape[-1]} features are padded with values that are not 0; use a power of two"
            )
        period = 1 << (shape[-1] - 1).bit_length()
        steps = [low.tokens << k for k in range(period.bit_length() - 1)]
    if steps:
        total = low.emit("rotate_sum", (total,), node.source, factor=x.factor, steps=steps)
    # The sum is complete in every slot of its row; unused slots of a periodic layout hold it too.
    layout = np.where(x.layout[0] >= 0, rows[np.maximum(x.layout[0], 0)], np.tile(np.arange(low.tokens), low.positions))
    return Placed(ops=(total,), layout=layout[None], factor=x.factor, clean=False, heads=x.heads)


def _transpose(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    shape = low.graph.shape(node.inputs[0])
    moved = np.arange(int(np.prod(shape))).reshape(shape).transpose(node.attrs["perm"]).reshape(-1)
    inverse = np.empty_like(moved)
    inverse[moved] = np.arange(moved.size)
    return replace(x, layout=np.where(x.layout >= 0, inverse[np.maximum(x.layout, 0)], -1))


def _reshape(low: Lowering, node: Node) -> Placed:
    return low.placed[node.inputs[0]]


def _matmul(low: Lowering, node: Node) -> Placed:
    a, b = (low.placed[name] for name in node.inputs)
    if a.heads is None or a.heads != b.heads:
        raise UnsupportedOpError(
            f"{node}: products of two encrypted matrices are compiled for attention heads of equal shape"
        )
    return (lower_values if a.scores else lower_scores)(low, node, a, b, a.heads)


HANDLERS: dict[str, Callable[[Lowering, Node], Placed]] = {
    "linear": _linear,
    "add": _add,
    "add_const": _add_const,
    "mul": _mul,
    "mul_const": _mul_const,
    "polynomial": _polynomial,
    "reduce_sum": _reduce_sum,
    "transpose": _transpose,
    "reshape": _reshape,
    "matmul": _matmul,
}


def lower(graph: Graph, ranges: Mapping[str, Range], slots: int, cost: PlanCost) -> Lowered:
    """Lower a folded graph.

    Args:
        ranges: smallest and largest element of every tensor in calibration, with margin.
        slots: of a ciphertext.
        cost: predicted seconds of a linear map's plan.

    Raises:
        UnsupportedOpError: a node, a shape or a layout that this compiler does not lower; the message says which.
    """
    return Lowering(graph, ranges, slots, cost).run()
