"""Lowering: tensors become slot vectors, graph nodes become circuit ops.

Every placed tensor carries a *factor*: tensor element = factor * stored slot. Constants that multiply whole tensors (means,
leading coefficients, 1/sqrt(d)) never become products, they move in the factors; each linear map is free to choose the factor
of its result, and chooses it so that what follows lies within [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from he_backend.base import UnsupportedOpError
from he_backend.circuit import Op, Signature
from he_backend.container import Arrays

from .attention import choose, heads_of, lower_product
from .elementwise import (
    LENGTH,
    MOST_AT_LEVEL_0,
    leaving,
    lower_add,
    lower_add_const,
    lower_mul,
    lower_mul_const,
    lower_polynomial,
    lower_reshape,
    lower_transpose,
)
from .features import lower_linear, lower_reduce_sum, lower_sparse
from .general import matrix_of
from .ir import Graph, Node
from .layout import Heads, feature_tiles, from_features
from .matvec import PlanCost
from .placed import INPUT, OUTPUT
from .placed import Lowered as Lowered
from .placed import Placed as Placed
from .sparse import input_layouts, places, plan_sparse

Range = tuple[float, float]


class Lowering:
    """One run of the pass; `emit` and `array` are what the handlers share."""

    def __init__(
        self,
        graph: Graph,
        ranges: Mapping[str, Range],
        slots: int,
        cost: PlanCost,
        merge: bool | None = None,
        roomy: bool = False,
    ) -> None:
        self.graph, self.ranges, self.slots, self.cost, self.merge, self.roomy = (
            graph,
            ranges,
            slots,
            cost,
            merge,
            roomy,
        )
        self.users = graph.users()
        self.nodes = graph.by_name
        one_request(graph)
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
        self.free: set[int] = set()
        self.pauses: set[int] = set()
        self.memo: dict[Any, Any] = {}  # of handlers: what equal shapes share
        self.streams = self._streams()

    # Shared by handlers

    def emit(self, kind: str, args: tuple[int, ...], source: str, *, factor: float, **attrs: object) -> int:
        op = Op(id=len(self.ops), kind=kind, args=args, attrs=attrs, factor=factor, source=source)
        self.ops.append(op)
        return op.id

    def rotated(self, op: int, k: int) -> int:
        """A rotation, made once."""
        k %= self.slots
        if k and (op, k) not in self.memo:
            known = self.ops[op]
            self.memo[op, k] = self.emit("rotate", (op,), known.source, factor=known.factor, k=k)
        return self.memo[op, k] if k else op

    def array(self, name: str, values: np.ndarray) -> str:
        """Store a constant array [.., slots], shortened where it repeats within each position and where float32 is exact.

        Returns:
            its name, or that of an equal array that is stored already.
        """
        if values.shape[-1] == self.slots:
            grid = values.reshape(*values.shape[:-1], -1, self.tokens)
            if np.array_equal(grid, np.broadcast_to(grid[..., :1], grid.shape)):
                values = grid[..., 0]
        if np.array_equal(values, short := values.astype(np.float32)):
            values = short
        values = np.ascontiguousarray(values)
        key = (values.shape, values.dtype.str, hashlib.blake2b(values.tobytes()).digest())
        if key not in self.memo:
            self.memo[key] = name
            self.arrays[name] = values
        return self.memo[key]

    def bound(self, name: str) -> float:
        """Largest |element| seen in calibration, with its margin; never 0."""
        lo, hi = self.ranges[name]
        return max(abs(lo), abs(hi)) or 1.0  # a tensor of zeros has no size, any factor will do

    def _streams(self) -> dict[str, float]:
        """Factor of each tensor that takes part in a sum: all operands of sums that touch each other share one.

        Where powers of a stream are summed (squares for a norm), the factor brings the largest such sum to 1; where it leaves by a
        sum, it leaves that room in the first modulus.
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
        left: dict[str, float] = {}
        for name in parent:
            peaks[root(name)] = max(peaks.get(root(name), 0.0), self.bound(name))
            left[root(name)] = max(left.get(root(name), 0.0), leaving(self, name) / MOST_AT_LEVEL_0)
        return {name: max(norms.get(root(name), peaks[root(name)]), left[root(name)]) for name in parent}

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
            if user.op == "matmul":
                # Keys take what their product with the queries should be divided by: its weights are 0 and 1 then.
                queries = [
                    p for i in user.inputs if i != name and (p := self.placed.get(i)) and p.heads and not p.scores
                ]
                if queries:
                    return self.wanted(user.name) / queries[0].factor
            if user.op == "polynomial" and "kept" in user.attrs:
                return self.unit(user)
            if user.op == "polynomial" and name in self.nodes and self.nodes[name].op == "matmul":
                # Scores: the sum of their powers, the denominator, is what should be near 1.
                power = len(user.attrs["coefficients"]) - 1
                sums = [u for u in self.users[user.name] if u.op == "reduce_sum"]
                if sums:
                    return float(self.bound(sums[0].name) ** (1.0 / power))
        return max(self.bound(name), leaving(self, name) / MOST_AT_LEVEL_0)

    def unit(self, node: Node) -> float:
        """The factor of the argument of a kept polynomial: its interval is stored with length 4.

        That of a softmax is chosen for the sum of its powers instead: stored polynomials are monic, so that the factor of a power is
        its leading coefficient times the argument's factor to its degree.
        """
        power, lead, degree = node, 1.0, 1
        while True:
            c = power.attrs["coefficients"]
            lead, degree = lead ** (len(c) - 1) * abs(c[-1]), degree * (len(c) - 1)
            users = self.users[power.name]
            if (total := next((u for u in users if u.op == "reduce_sum"), None)) is not None:
                readers = [u for u in self.users[total.name] if u.op == "polynomial" and "kept" in u.attrs]
                wanted = self.unit(readers[0]) if readers else self.bound(total.name)
                return float((wanted / lead) ** (1.0 / degree))
            if (following := next((u for u in users if u.op == "polynomial" and "kept" in u.attrs), None)) is None:
                lo, hi = node.attrs["interval"] or self.ranges[node.inputs[0]]
                return float((hi - lo) / LENGTH)
            power = following

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
                heads = heads_of(user.shape, self.positions)
                return None if heads is None else choose(heads, self.cost, self.merge)
            if user.op in ("add_const", "mul") and user.shape == self.graph.shape(name):
                return self.goes_to_heads(user.name)
        return None

    def run(self) -> Lowered:
        self.inputs = (self._input(),)
        for node in self.graph.nodes:
            handler = HANDLERS.get(node.op)
            if handler is None:
                raise UnsupportedOpError(f"{node}: no lowering; the compiler lowers {', '.join(HANDLERS)}")
            first = len(self.ops)
            placed = handler(self, node)
            if node.attrs.get("free"):
                self.free.update(range(first, len(self.ops)))
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
            free=frozenset(self.free - self.pauses),
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
        ops = tuple(self.emit("input", (), name, factor=factor, name=INPUT, part=part) for part in range(len(layout)))
        self.placed[name] = Placed(ops=ops, layout=layout, factor=factor)
        self.tensors |= {op: (name, part) for part, op in enumerate(ops)}
        self.client_arrays["input"] = layout.astype(np.int32)
        return Signature(
            name=INPUT, shape=self.graph.input_shape[1:], layout="input", factor=factor, bound=self.bound(name), level=0
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
            self.emit("output", (op,), name, factor=placed.factor, name=OUTPUT, part=part)
        self.client_arrays["output"] = placed.layout.astype(np.int32)
        return Signature(
            name=OUTPUT,
            shape=self.graph.shape(name)[1:],
            layout="output",
            factor=placed.factor,
            bound=self.bound(name),
            level=0,
        )


ELEMENTWISE = ("add", "add_const", "mul", "mul_const", "polynomial", "reshape")

HANDLERS: dict[str, Callable[[Lowering, Node], Placed]] = {
    "linear": lower_linear,
    "sparse": lower_sparse,
    "add": lower_add,
    "add_const": lower_add_const,
    "mul": lower_mul,
    "mul_const": lower_mul_const,
    "polynomial": lower_polynomial,
    "reduce_sum": lower_reduce_sum,
    "transpose": lower_transpose,
    "reshape": lower_reshape,
    "matmul": lower_product,
}


def one_request(graph: Graph) -> None:
    """Check that a graph takes one request and gives one reply, each with a leading axis of 1.

    Raises:
        UnsupportedOpError: it does not.
    """
    ends = {"input": (graph.input, graph.input_shape, 2), "output": (graph.output, graph.shape(graph.output), 1)}
    for what, (name, shape, axes) in ends.items():
        if len(shape) < axes or shape[0] != 1:
            raise UnsupportedOpError(f"{what} {name!r} has shape {shape}; one request, [1, ...], is compiled at a time")


def lower(
    graph: Graph,
    ranges: Mapping[str, Range],
    slots: int,
    cost: PlanCost,
    *,
    merge: bool | None = None,
    roomy: bool = False,
) -> Lowered:
    """Lower a folded graph.

    Args:
        ranges: smallest and largest element of every tensor in calibration, with margin.
        slots: of a ciphertext.
        cost: predicted seconds of a linear map's plan.
        merge: whether scores of attention are merged; None for what costs less.
        roomy: arguments of forms (passes/forms.py) get their unit by a product, a level more, so that what is before them may be
            as small as a refresh wants it.

    Raises:
        UnsupportedOpError: a node, a shape or a layout that this compiler does not lower; the message says which.
    """
    return Lowering(graph, ranges, slots, cost, merge, roomy).run()
