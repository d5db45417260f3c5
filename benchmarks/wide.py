"""An encoder block of any width as a circuit, without weights that mean anything and without calibration: to be counted and costed.

The graph is what the compiler's passes make of such an encoder; its lowering, the way sums are carried out and the trace are the
compiler's own (a test compares the counts of primitives with those of a compiled model). Added here: a refresh of whole tensors that
are named, with levels to match.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compiler.cost import CostTable
from compiler.ir import Graph, Node
from compiler.layout import Heads
from compiler.lower import Lowered, lower
from compiler.passes.levels import shares_rotations
from compiler.plan import STYLES, Style, as_circuit, with_style
from compiler.schedule import forecast
from compiler.search import plan_cost
from he_backend.base import LevelError
from he_backend.circuit import Circuit, Op
from he_backend.kernels import depth
from he_backend.params import Params
from he_backend.trace import trace

# Groups of tensors of a block that may be refreshed, by the last name that each has: reshapes and transposes are no ops.
SITES = {
    "heads": ("q.heads", "kt", "v.heads"),
    "powers": ("powers",),
    "sum": ("sum",),
    "attended": ("merged",),
    "mixed": ("mixed",),
    "out": ("out",),
}
SQUARE, RECIPROCAL, ACTIVATION = (0.0, 0.0, 1.0), (1.55, -0.7, 0.1), (0.0, 0.5, 0.2)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An encoder with PowerSoftmax (p = 2, quadratic reciprocal), quadratic activation and norms that fold.

    head  outputs of a linear map on every token behind the last block, 0 for none
    """

    blocks: int
    width: int
    heads: int
    hidden: int
    tokens: int
    causal: bool = False
    head: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads; choose a divisor of it")

    @property
    def parameters(self) -> int:
        """Weights and biases of the blocks and of the head."""
        d, h = self.width, self.hidden
        return self.blocks * (4 * d * (d + 1) + 2 * d * h + d + h) + self.head * (d + 1)

    def geometry(self, slots: int) -> Heads:
        """Where the heads lie."""
        return Heads(
            tokens=self.tokens, heads=self.heads, channels=self.width // self.heads, positions=slots // self.tokens
        )

    def narrow(self, slots: int) -> Shape:
        """One block of one group of heads, whose layers are a ciphertext each: as deep as this, and small."""
        heads = self.geometry(slots)
        if heads.ranges > 1:
            raise ValueError(
                f"a head of {heads.channels} channels is wider than a ciphertext of {heads.positions} positions; take more heads"
            )
        width = heads.group * heads.channels
        return replace(self, blocks=1, width=width, heads=heads.group, hidden=min(self.hidden, heads.positions), head=0)

    def graph(self, seed: int = 0) -> Graph:
        """The encoder behind all passes on graphs, with random weights."""
        rng = np.random.default_rng(seed)
        t, d, h, dk = self.tokens, self.width, self.heads, self.width // self.heads
        mask = np.tril(np.ones((t, t)))[None, None] if self.causal else None
        nodes: list[Node] = []

        def node(
            name: str, op: str, inputs: Sequence[str], shape: tuple[int, ...], source: str = "", **attrs: Any
        ) -> str:
            nodes.append(
                Node(name=name, op=op, inputs=tuple(inputs), shape=(1, *shape), attrs=attrs, source=source or name)
            )
            return name

        def linear(name: str, x: str, n_in: int, n_out: int) -> str:
            # Different in every entry: equal parts would be shared.
            const = rng.standard_normal((n_in, n_out), dtype=np.float32)
            nodes.append(
                Node(
                    name=name,
                    op="linear",
                    inputs=(x,),
                    shape=(1, t, n_out),
                    const=const,
                    bias=rng.standard_normal(n_out),
                    source=f"{name}.matmul",
                )
            )
            return name

        def polynomial(name: str, x: str, shape: tuple[int, ...], c: tuple[float, ...]) -> str:
            return node(name, "polynomial", (x,), shape, coefficients=np.array(c), interval=None)

        x = "x"
        for i in range(self.blocks):
            split = {n: node(f"{i}.{n}.split", "reshape", (linear(f"{i}.{n}", x, d, d),), (t, h, dk)) for n in "qkv"}
            q, v = (node(f"{i}.{n}.heads", "transpose", (split[n],), (h, t, dk), perm=[0, 2, 1, 3]) for n in "qv")
            k = node(f"{i}.kt", "transpose", (split["k"],), (h, dk, t), perm=[0, 2, 3, 1])
            scores = node(f"{i}.products", "matmul", (q, k), (h, t, t), mask=mask)
            powers = polynomial(f"{i}.powers", scores, (h, t, t), SQUARE)
            total = node(f"{i}.sum", "reduce_sum", (powers,), (h, t, 1))
            inverse = polynomial(f"{i}.reciprocal", total, (h, t, 1), RECIPROCAL)
            values = node(f"{i}.values", "matmul", (powers, v), (h, t, dk), mask=None)
            y = node(f"{i}.attended", "mul", (values, inverse), (h, t, dk))
            y = node(f"{i}.back", "transpose", (y,), (t, h, dk), perm=[0, 2, 1, 3])
            y = linear(f"{i}.o", node(f"{i}.merged", "reshape", (y,), (t, d)), d, d)
            x = node(f"{i}.mixed", "add", (x, y), (t, d))
            y = polynomial(f"{i}.act", linear(f"{i}.up", x, d, self.hidden), (t, self.hidden), ACTIVATION)
            x = node(f"{i}.out", "add", (x, linear(f"{i}.down", y, self.hidden, d)), (t, d))
        if self.head:
            x = linear("head", x, d, self.head)
        return Graph(input="x", input_shape=(1, t, d), output=x, nodes=tuple(nodes))


def lowered(shape: Shape, params: Params, table: CostTable, merge: bool | None = None) -> Lowered:
    """The compiler's lowering; all values are taken to lie within [-1, 1].

    Args:
        merge: whether scores of attention are merged; None for what the compiler thinks cheaper.
    """
    graph = shape.graph()
    ranges = dict.fromkeys((graph.input, *graph.by_name), (-1.0, 1.0))
    return lower(graph, ranges, params.slots, plan_cost(table, params.log_n), merge=merge)


def ciphertexts(build: Lowered, site: str) -> int:
    """How many ciphertexts a site has in all blocks."""
    return sum(_site(name) == site for name, _ in build.tensors.values())


def _site(tensor: str) -> str:
    part = tensor.partition(".")[2]
    return next((site for site, names in SITES.items() if part in names), "")


def refreshed(build: Lowered, sites: Collection[str]) -> Lowered:
    """The same program with a refresh behind every value of some sites."""
    ops: list[Op] = []
    current: dict[int, int] = {}  # op of `build` -> op that its readers take
    for op in build.ops:
        ops.append(replace(op, id=len(ops), args=tuple(current[a] for a in op.args)))
        current[op.id] = len(ops) - 1
        if op.id in build.tensors and _site(build.tensors[op.id][0]) in sites:
            attrs: Mapping[str, Any] = {"kind": "plain"}
            ops.append(replace(op, id=len(ops), kind="refresh", args=(len(ops) - 1,), attrs=attrs))
            current[op.id] = len(ops) - 1
    return replace(build, ops=tuple(ops), tensors={})


def leveled(build: Lowered, params: Params, bottom: int = 0) -> Lowered:
    """The lowest levels, as `compiler.passes.levels`, but a refresh starts anew.

    Args:
        bottom: level that the results have left.

    Raises:
        LevelError: the parameters have too few levels, or a refresh does not give enough of them.
    """
    depths = [depth(op, build.arrays, params.slots) for op in build.ops]
    level: list[int] = []
    shared: dict[int, int] = {}  # value -> level at which its linear maps read it
    for _ in range(2):
        level = [bottom if op.kind == "output" else 0 for op in build.ops]
        for op in reversed(build.ops):
            if shares_rotations(op):
                level[op.id] = max(level[op.id], shared.get(op.args[0], 0) - 1)
            need = params.refresh_input if op.kind == "refresh" else level[op.id] + depths[op.id]
            for a in op.args:
                level[a] = max(level[a], need)
        for op in build.ops:
            if shares_rotations(op):
                shared[op.args[0]] = max(shared.get(op.args[0], 0), level[op.id] + 1)
    for op in build.ops:
        most = params.refresh_output if op.kind == "refresh" else params.levels
        if level[op.id] > most:
            raise LevelError(
                f"op {op.source} ({op.kind}) needs level {level[op.id]}, {params.name} gives it {most}; refresh more values"
            )
    return replace(build, ops=tuple(replace(op, level=level[op.id]) for op in build.ops))


def best_style(build: Lowered, params: Params, table: CostTable) -> Style:
    """The way of carrying out sums and linear maps with the least predicted work, no plaintext being kept."""

    def work(style: Style) -> float:
        circuit = as_circuit(with_style(build, params, table, style), params)
        return forecast(trace(circuit), params, table, threads=1, plaintext_budget=0).work

    return min(STYLES, key=work)


def circuit(
    shape: Shape,
    params: Params,
    table: CostTable,
    *,
    sites: Collection[str] = (),
    bottom: int = 0,
    style: Style | None = None,
    merge: bool | None = None,
) -> Circuit:
    """All blocks with their levels; no keys, bounds or predictions.

    Args:
        sites: of `SITES`, refreshed in every block.
        bottom, merge: see `leveled` and `lowered`.
        style: how sums are carried out; None for the cheapest.

    Raises:
        LevelError: see `leveled`.
    """
    build = leveled(refreshed(lowered(shape, params, table, merge), sites), params, bottom)
    return as_circuit(with_style(build, params, table, style or best_style(build, params, table)), params)
