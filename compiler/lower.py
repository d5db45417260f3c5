"""Lowering: tensors become slot vectors, graph nodes become circuit ops.

Every placed tensor carries a *factor*: tensor element = factor * stored slot. Constants that multiply whole tensors (means,
leading coefficients, 1/sqrt(d)) never become products, they move in the factors; each linear map is free to choose the factor
of its result, and chooses it so that what follows lies within [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import UnsupportedOpError
from he_backend.circuit import Op, Signature
from he_backend.container import Arrays

from .attention import lower_scores, lower_values
from .general import lower_map, lower_matmul, matrix_of, move
from .ir import Graph, Node
from .layout import (
    Heads,
    broadcast_index,
    constant_slots,
    feature_tiles,
    from_features,
    held,
    local,
    periodic,
    power_of_two,
    to_features,
)
from .matvec import PlanCost, plan_matvec
from .polynomials import prepare
from .sparse import input_layouts, places, plan_sparse

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
        if len(graph.input_shape) < 2 or graph.input_shape[0] != 1:
            raise UnsupportedOpError(
                f"input {graph.input!r} has shape {graph.input_shape}; one request, [1, ...], is compiled at a time"
            )
        # Tokens side by side, if that is what the second axis can be; else every tensor is a vector.
        sequence = len(graph.input_shape) == 3 and slots % graph.input_shape[1] == 0
        sequence = sequence and all(user.op != "sparse" for user in self.users[graph.input])
        self.tokens = graph.input_shape[1] if sequence else 1
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

        Where powers of a stream are summed (squares for a norm), the factor brings the largest such sum to 1.
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
                and not np.any(square.attrs["coefficients"][:-1])
            ):
                group, power = root(square.inputs[0]), len(square.attrs["coefficients"]) - 1
                norms[group] = max(norms.get(group, 0.0), self.bound(node.name) ** (1.0 / power))
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

    def repeats(self, name: str) -> bool:
        """Whether a tensor takes part in sums of two tensors or over features, which want it repeated over the slots."""
        if name in self.streams and len(self.users[name]) > 0 and any(u.op == "add" for u in self.users[name]):
            return True
        return any(
            user.op == "reduce_sum" or (user.op in ELEMENTWISE and self.repeats(user.name)) for user in self.users[name]
        )

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
                if placed.factor == self.ops[op].factor:  # else a product by a number gave the slots another meaning
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
        name = self.graph.input
        layout = self._input_layout()
        factor = self.wanted(name)
        ops = tuple(self.emit("input", (), name, factor=factor, name="x", part=part) for part in range(len(layout)))
        self.placed[name] = Placed(ops=ops, layout=layout, factor=factor)
        self.tensors |= {op: (name, part) for part, op in enumerate(ops)}
        self.client_arrays["input"] = layout.astype(np.int32)
        return Signature(
            name="x", shape=self.graph.input_shape[1:], layout="input", factor=factor, bound=self.bound(name), level=0
        )

    def _input_layout(self) -> np.ndarray:
        """Layout [ciphertexts, slots]; a vector that one linear map reads is packed as that map wants it."""
        shape = self.graph.input_shape
        if self.tokens > 1:
            parts = feature_tiles(shape[-1], self.positions)
            return np.stack([from_features(part, self.tokens, shape[-1]) for part in parts])
        size, users = int(np.prod(shape)), self.users[self.graph.input]
        wide = int(np.prod(users[0].shape)) if users else size
        layouts = input_layouts(size, wide, self.slots)
        if len(users) != 1 or users[0].op not in ("linear", "sparse"):
            return layouts[0]
        matrix, repeated = matrix_of(users[0], shape), self.repeats(users[0].name)

        def seconds(layout: np.ndarray) -> float:
            return plan_sparse(matrix, layout, places(wide, layout, matrix, repeated=repeated), self.cost).seconds

        return min(layouts, key=seconds)

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
    shape = low.graph.shape(node.inputs[0])
    sources = [to_features(part, low.tokens, features_in) for part in x.layout]
    if low.tokens == 1 or shape != (1, low.tokens, features_in) or any(f is None for f in sources):
        rows = int(np.prod(shape[:-1]))
        bias = None if node.bias is None else np.tile(np.broadcast_to(node.bias, (features_out,)), rows)
        return lower_map(low, node, x, matrix_of(node, shape), bias)
    heads = low.goes_to_heads(node.name)
    targets = [heads.feature] if heads is not None else feature_tiles(features_out, low.positions)
    factor = low.wanted(node.name)
    ops = []
    for part, target in enumerate(targets):
        constant = None
        if node.bias is not None:
            values = np.where(target >= 0, np.broadcast_to(node.bias, (features_out,))[np.maximum(target, 0)], 0.0)
            constant = low.array(f"{node.name}.{part}.bias", values / factor)
        ops.append(_tile(low, node, x, [f for f in sources if f is not None], part, target, constant, factor))
    layout = np.stack([from_features(target, low.tokens, features_out) for target in targets])
    return Placed(ops=tuple(ops), layout=layout, factor=factor, heads=heads)


def _tile(
    low: Lowering,
    node: Node,
    x: Placed,
    sources: list[np.ndarray],
    part: int,
    target: np.ndarray,
    bias: str | None,
    factor: float,
) -> int:
    """One ciphertext of a linear map's result: a matrix-vector product of every source ciphertext, those with equal folds summed first."""
    assert node.const is not None
    t = low.tokens
    columns = held(target)
    partial: dict[tuple[int, ...], int] = {}
    for i, source in enumerate(sources):
        rows = held(source)
        matrix = node.const[rows][:, columns] * (x.factor / factor)
        plan = plan_matvec(local(source, rows), local(target, columns), matrix, low.cost)
        alone = len(sources) == 1 and not plan.folds
        op = low.emit(
            "linear",
            (x.ops[i],),
            node.source,
            factor=factor,
            weights=low.array(f"{node.name}.{part}.{i}.weights", plan.weights),
            plan=[[g * t, [[b * t, row] for b, row in terms]] for g, terms in plan.plan],
            bias=bias if alone else None,
        )
        if alone:
            return op
        known = partial.get(plan.folds)
        partial[plan.folds] = op if known is None else low.emit("add", (known, op), node.source, factor=factor)
    total = -1
    for folds, op in partial.items():
        if folds:
            op = low.emit("rotate_sum", (op,), node.source, factor=factor, steps=[f * t for f in folds])
        total = op if total < 0 else low.emit("add", (total, op), node.source, factor=factor)
    return total if bias is None else low.emit("add_plain", (total,), node.source, factor=factor, array=bias)


def _sparse(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    return lower_map(low, node, x, node.attrs["matrix"], node.bias)


def _scaled(low: Lowering, x: Placed, factor: float, source: str) -> Placed:
    """The same tensor under another factor: a product by a number, one level."""
    name = low.array(f"scale.{len(low.ops)}", np.full((1, low.positions), x.factor / factor))
    ops = tuple(
        low.emit("linear", (op,), source, factor=factor, weights=name, plan=[[0, [[0, 0]]]], bias=None) for op in x.ops
    )
    return replace(x, ops=ops, factor=factor)


def _add(low: Lowering, node: Node) -> Placed:
    a, b = (low.placed[name] for name in node.inputs)
    if low.graph.shape(node.inputs[0]) != node.shape:
        a, b = b, a
    index = broadcast_index(_smaller(low, node), node.shape)
    if low.graph.shape(node.inputs[0]) != low.graph.shape(node.inputs[1]) or not np.array_equal(a.layout, b.layout):
        b = move(low, node, b, index, a.layout, int(np.prod(_smaller(low, node))))
    if not np.isclose(a.factor, b.factor, rtol=1e-9):
        b = _scaled(low, b, a.factor, node.source)
    ops = tuple(low.emit("add", pair, node.source, factor=a.factor) for pair in zip(a.ops, b.ops, strict=True))
    return replace(a, ops=ops, clean=a.clean and b.clean)


def _smaller(low: Lowering, node: Node) -> tuple[int, ...]:
    """Shape of the operand that is broadcast; of the second one where both have the node's shape.

    Raises:
        UnsupportedOpError: both are broadcast.
    """
    a, b = (low.graph.shape(name) for name in node.inputs)
    if node.shape not in (a, b):
        raise UnsupportedOpError(f"{node}: both operands, {a} and {b}, would have to be broadcast; expand one of them")
    return b if a == node.shape else a


def _add_const(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    assert node.const is not None
    values = constant_slots(node.const, node.shape, x.layout) / x.factor
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
    values = constant_slots(node.const, node.shape, x.layout) * (x.factor / factor)
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
    a, b = (low.placed[name] for name in node.inputs)
    if low.graph.shape(node.inputs[0]) != node.shape:
        a, b = b, a
    index = broadcast_index(_smaller(low, node), node.shape)
    wanted = np.where(a.layout >= 0, index[np.maximum(a.layout, 0)], b.layout[0] if len(b.layout) == 1 else -1)
    if not np.array_equal(wanted, np.broadcast_to(b.layout, wanted.shape) if len(b.layout) in (1, len(wanted)) else 0):
        b = move(low, node, b, index, a.layout, int(np.prod(_smaller(low, node))))
    pairs = zip(a.ops, b.ops * (len(a.ops) // len(b.ops)), strict=True)
    factor = a.factor * b.factor
    ops = tuple(low.emit("mul", pair, node.source, factor=factor) for pair in pairs)
    return replace(a, ops=ops, factor=factor, clean=a.clean or b.clean)


def _polynomial(low: Lowering, node: Node) -> Placed:
    x = low.placed[node.inputs[0]]
    lo, hi = low.ranges[node.inputs[0]]
    interval = tuple(sorted((lo / x.factor, hi / x.factor)))
    attrs, factor = prepare(node.attrs["coefficients"], x.factor, (interval[0], interval[1]), low.bound(node.name))
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
        whole = len(x.ops) == 1 and shape in ((1, low.tokens, shape[-1]), (1, shape[-1]))
        feature = to_features(x.layout[0], low.tokens, shape[-1]) if whole else None
        if feature is None or power_of_two(shape[-1]) > low.positions:
            return lower_map(low, node, x, matrix_of(node, shape), None)
        padded = (feature < 0).any() and not x.clean
        if padded or not np.array_equal(feature, periodic(shape[-1], low.positions)):
            return lower_map(low, node, x, matrix_of(node, shape), None)
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
        return lower_matmul(low, node, a, b)
    return (lower_values if a.scores else lower_scores)(low, node, a, b, a.heads)


ELEMENTWISE = ("add", "add_const", "mul", "mul_const", "polynomial", "reshape")

HANDLERS: dict[str, Callable[[Lowering, Node], Placed]] = {
    "linear": _linear,
    "sparse": _sparse,
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
