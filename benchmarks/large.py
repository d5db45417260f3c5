"""An encoder block of any width as circuit ops, written down by the rules of the compiler's layouts, to be counted and costed.

The compiler lowers attention only where all heads lie in one ciphertext. Here a layer that is wider is cut: with P = slots / T
positions and heads of dk channels,

    stream        d / P ciphertexts of P features; feed-forward likewise
    linear maps   one matrix-vector product for each pair of (source, target) ciphertexts, planned by `compiler.matvec`; those of one
                  source share its baby steps, those of one target are summed before the rescale
    attention     groups of P / dk heads, a ciphertext each; a group has B = min(T, P / (heads of it * dk)) shifted copies and T / B
                  ciphertexts of scores

Where one ciphertext is enough these are the compiler's own ops, in its order: a test compares the counts of all primitives, level by
level. `he_backend.trace` makes primitives of the ops, `compiler.schedule` seconds, `compiler.cost` bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from compiler.cost import CostTable
from compiler.layout import Heads, feature_tiles, held, local
from compiler.matvec import MatVec, PlanCost, plan_matvec
from compiler.passes.levels import SHARED_BABIES
from compiler.search import plan_cost
from he_backend.base import LevelError
from he_backend.circuit import Circuit, Op
from he_backend.kernels import depth
from he_backend.params import Params

SQUARE = [[0.0, 0.0]]  # monic factors, see `he_backend.kernels.polynomial`
QUADRATIC = [[0.5, 0.5]]
SITES = ("heads", "sum", "attended", "mixed", "out")  # values that may be refreshed, in the order of a block


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

    def groups(self, slots: int) -> list[Heads]:
        """Geometry of the heads that share a ciphertext, once for each group; equal for all."""
        positions, channels = slots // self.tokens, self.width // self.heads
        together = min(self.heads, max(1, positions // channels))
        one = Heads(tokens=self.tokens, heads=together, channels=channels, positions=positions)
        return [one] * (self.heads // together)

    def ciphertexts(self, slots: int) -> dict[str, int]:
        """How many ciphertexts each value of a block has; `heads` are queries, keys and values."""
        groups, positions = self.groups(slots), slots // self.tokens
        stream = len(feature_tiles(self.width, positions))
        return {
            "heads": 3 * len(groups),
            "scores": sum(g.ciphertexts for g in groups),
            "sum": len(groups),
            "attended": len(groups),
            "mixed": stream,
            "hidden": len(feature_tiles(self.hidden, positions)),
            "out": stream,
        }


@dataclass
class Writer:
    """Collects ops and the arrays that they name; every op returns its id."""

    slots: int
    tokens: int
    cost: PlanCost
    refreshed: Collection[str] = ()
    ops: list[Op] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def emit(self, op: str, args: tuple[int, ...], source: str, **attrs: Any) -> int:
        self.ops.append(Op(id=len(self.ops), kind=op, args=args, attrs=attrs, source=source))
        return len(self.ops) - 1

    def array(self, name: str, values: np.ndarray) -> str:
        self.arrays[name] = values
        return name

    def site(self, name: str, ids: list[int], source: str) -> list[int]:
        """The values themselves, or their refreshed copies."""
        return [self.emit("refresh", (i,), source, kind="plain") for i in ids] if name in self.refreshed else ids

    def linear(
        self, x: Sequence[int], sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], name: str
    ) -> list[int]:
        """A dense map with bias between feature maps [P], one a ciphertext."""
        return [self._tile(x, sources, part, target, name) for part, target in enumerate(targets)]

    def _tile(self, x: Sequence[int], sources: Sequence[np.ndarray], part: int, target: np.ndarray, name: str) -> int:
        t, columns = self.tokens, held(target)
        bias = self.array(f"{name}.{part}.bias", np.ones(1))
        partial: dict[tuple[int, ...], int] = {}
        for i, source in enumerate(sources):
            rows = held(source)
            plan = planned(_key(local(source, rows)), _key(local(target, columns)), self.cost)
            alone = len(sources) == 1 and not plan.folds
            op = self.emit(
                "linear",
                (x[i],),
                name,
                weights=self.array(f"{name}.{part}.{i}.weights", plan.weights),
                plan=[[g * t, [[b * t, row] for b, row in terms]] for g, terms in plan.plan],
                bias=bias if alone else None,
            )
            if alone:
                return op
            known = partial.get(plan.folds)
            partial[plan.folds] = op if known is None else self.emit("add", (known, op), name)
        total = -1
        for folds, op in partial.items():
            if folds:
                op = self.emit("rotate_sum", (op,), name, steps=[f * t for f in folds])
            total = op if total < 0 else self.emit("add", (total, op), name)
        return self.emit("add_plain", (total,), name, array=bias)

    def shifted(self, x: int, heads: Heads, name: str, causal: bool, source: str) -> list[int]:
        """Keys or values at every token shift, one op a ciphertext of scores (`compiler.attention.shifted`)."""
        t, b, ops = heads.tokens, heads.shifts, []
        for part in range(heads.ciphertexts):
            moves = [
                wrap * t - i for wrap in ((0,) if causal else (0, 1)) for i in range(b) if not wrap or i + b * part
            ]
            weights = self.array(f"{name}.{part}", np.ones((len(moves), 1)))
            plan = [[-b * part, [[move, row] for row, move in enumerate(moves)]]]
            ops.append(self.emit("linear", (x,), source, weights=weights, plan=plan, bias=None))
        return ops

    def attention(self, q: int, k: int, v: int, heads: Heads, causal: bool, prefix: str, group: int) -> int:
        """One group of heads, from queries, keys and values to their weighted sum."""
        scores = []
        for key in self.shifted(k, heads, f"{prefix}.{group}.keys", causal, f"{prefix}.products"):
            product = self.emit("mul", (q, key), f"{prefix}.products")
            scores.append(self.emit("rotate_sum", (product,), f"{prefix}.products", steps=heads.channel_steps))
        powers = [self.emit("polynomial", (s,), f"{prefix}.powers", factors=SQUARE) for s in scores]
        total = powers[0]
        for power in powers[1:]:
            total = self.emit("add", (total, power), f"{prefix}.sum")
        if heads.copy_steps:
            total = self.emit("rotate_sum", (total,), f"{prefix}.sum", steps=heads.copy_steps)
        (total,) = self.site("sum", [total], f"{prefix}.sum")
        inverse = self.emit("polynomial", (total,), f"{prefix}.reciprocal", factors=QUADRATIC)
        source, mixed = f"{prefix}.values", -1
        values = self.shifted(v, heads, f"{prefix}.{group}.values", causal, source)
        for power, value in zip(powers, values, strict=True):
            product = self.emit("mul", (power, value), source)
            mixed = product if mixed < 0 else self.emit("add", (mixed, product), source)
        if heads.shifts > 1:
            mixed = self.emit("rotate_sum", (mixed,), source, steps=heads.copy_steps)
            first = self.array(f"{prefix}.{group}.first", np.ones((1, 1)))
            mixed = self.emit("linear", (mixed,), source, weights=first, plan=[[0, [[0, 0]]]], bias=None)
            mixed = self.emit("rotate_sum", (mixed,), source, steps=[-s for s in heads.copy_steps])
        return self.emit("mul", (mixed, inverse), f"{prefix}.attended")

    def block(self, x: list[int], shape: Shape, index: int) -> list[int]:
        """One block: attention, feed-forward, both with their residuals."""
        stream = feature_tiles(shape.width, self.slots // self.tokens)
        inner = feature_tiles(shape.hidden, self.slots // self.tokens)
        groups = shape.groups(self.slots)
        maps = [g.feature + i * g.heads * g.channels for i, g in enumerate(groups)]
        parts = [
            self.site("heads", self.linear(x, stream, maps, f"{index}.{n}.matmul"), f"{index}.{n}.matmul")
            for n in "qkv"
        ]
        mixed = [
            self.attention(q, k, v, g, shape.causal, f"{index}", i)
            for i, (g, q, k, v) in enumerate(zip(groups, *parts, strict=True))
        ]
        mixed = self.site("attended", mixed, f"{index}.attended")
        y = self.linear(mixed, maps, stream, f"{index}.o.matmul")
        x = [self.emit("add", pair, f"{index}.mixed") for pair in zip(x, y, strict=True)]
        x = self.site("mixed", x, f"{index}.mixed")
        h = self.linear(x, stream, inner, f"{index}.up.matmul")
        h = [self.emit("polynomial", (i,), f"{index}.act", factors=QUADRATIC) for i in h]
        y = self.linear(h, inner, stream, f"{index}.down.matmul")
        x = [self.emit("add", pair, f"{index}.out") for pair in zip(x, y, strict=True)]
        return self.site("out", x, f"{index}.out")


def write(
    shape: Shape, params: Params, table: CostTable, *, refreshed: Collection[str] = (), bottom: int = 0
) -> Circuit:
    """The ops of all blocks with their levels, as low as their readers allow.

    Args:
        refreshed: those of `SITES` whose values are refreshed in every block.
        bottom: level that the results must have left.

    Raises:
        LevelError: the parameters have too few levels, or a refresh does not give enough of them.
    """
    w = Writer(params.slots, shape.tokens, plan_cost(table, params.log_n), refreshed)
    stream = feature_tiles(shape.width, params.slots // shape.tokens)
    x = [w.emit("input", (), "x", name="x", part=i) for i in range(len(stream))]
    for index in range(shape.blocks):
        x = w.block(x, shape, index)
    if shape.head:
        x = w.linear(x, stream, feature_tiles(shape.head, params.slots // shape.tokens), "head.matmul")
    for part, op in enumerate(x):
        w.emit("output", (op,), "y", name="y", part=part)
    ops = leveled(w.ops, w.arrays, params, bottom)
    return Circuit(
        params=params, ops=ops, arrays=w.arrays, client_arrays={}, inputs=(), outputs=(), keys={}, relin_level=-1
    )


def leveled(ops: Sequence[Op], arrays: Mapping[str, np.ndarray], params: Params, bottom: int = 0) -> tuple[Op, ...]:
    """The lowest levels, as `compiler.passes.levels`, but a refresh starts anew.

    Raises:
        LevelError: see `write`.
    """
    depths = [depth(op, dict(arrays), params.slots) for op in ops]
    level = [0] * len(ops)
    shared: dict[int, int] = {}  # value -> level at which its linear maps read it
    for _ in range(2):
        level = [bottom if op.kind == "output" else 0 for op in ops]
        for op in reversed(ops):
            if _shares(op):
                level[op.id] = max(level[op.id], shared.get(op.args[0], 0) - 1)
            need = params.refresh_input if op.kind == "refresh" else level[op.id] + depths[op.id]
            for a in op.args:
                level[a] = max(level[a], need)
        for op in ops:
            if _shares(op):
                shared[op.args[0]] = max(shared.get(op.args[0], 0), level[op.id] + 1)
    for op in ops:
        most = params.refresh_output if op.kind == "refresh" else params.levels
        if level[op.id] > most:
            raise LevelError(
                f"op {op.source} ({op.kind}) needs level {level[op.id]}, {params.name} gives it {most}; refresh more values"
            )
    return tuple(replace(op, level=level[op.id]) for op in ops)


def _shares(op: Op) -> bool:
    return op.kind == "linear" and len({b for _, terms in op.attrs["plan"] for b, _ in terms}) > SHARED_BABIES


def _key(feature: np.ndarray) -> tuple[int, ...]:
    return tuple(int(f) for f in feature)


@lru_cache(maxsize=256)
def planned(source: tuple[int, ...], target: tuple[int, ...], cost: PlanCost) -> MatVec:
    """The compiler's plan of a dense map between two feature maps; tiles of one kind have one."""
    features = np.array(source), np.array(target)
    return plan_matvec(*features, np.ones((features[0].max() + 1, features[1].max() + 1)), cost)
