"""Lowering of a decoding step: the layouts of `step_layout` on the machinery of `lower`.

Linear maps alternate between tiled and block layouts; attention of one query works where its keys and values are kept. What
is elementwise stays where its operands are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from he_backend.base import UnsupportedOpError
from he_backend.circuit import Signature

from .ir import Graph, Node
from .layout import broadcast_index, power_of_two
from .lower import HANDLERS, Lowered, Lowering, Placed, Range
from .matvec import PlanCost
from .step_layout import Blocks, Cache, Product, Tiled, inner, outer

Form = Tiled | Blocks


class StepLowering(Lowering):
    """One run of the pass; `forms` tells the layout of each tensor [1, 1, F] by name."""

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], slots: int, cost: PlanCost) -> None:
        super().__init__(graph, ranges, slots, cost)
        if graph.input_shape[:2] != (1, 1) or len(graph.input_shape) != 3:
            raise UnsupportedOpError(
                f"input {graph.input!r} has shape {graph.input_shape}; a step takes one token, [1, 1, D]"
            )
        self.forms: dict[str, Form] = {}
        self.caches: dict[str, Cache] = {}

    def run(self) -> Lowered:
        x = self._input()
        states = [self._state(k.before) for k in self.graph.kept]
        for node in self.graph.nodes:
            placed = self._lower(node)
            self.placed[node.name] = placed
            for part, op in enumerate(placed.ops):
                if placed.factor == self.ops[op].factor:
                    self.tensors[op] = (node.name, part)
        y = self._output()
        for k, state in zip(self.graph.kept, states, strict=True):
            after = self.placed[k.after]
            if not np.array_equal(after.layout[0], self.arrays[state.layout][0]) or after.factor != state.factor:
                raise UnsupportedOpError(
                    f"kept tensor {k.before!r} is changed by more than a sum: it comes back in another layout"
                )
            self.emit("output", after.ops, k.after, factor=after.factor, name=k.before, part=0)
        for op, (name, part) in self.tensors.items():
            layout = self._layout_name(self.placed[name].layout[part])
            self.ops[op] = replace(self.ops[op], layout=layout)
        return Lowered(
            ops=tuple(self.ops),
            arrays=self.arrays,
            client_arrays=self.client_arrays,
            inputs=(x,),
            outputs=(y,),
            tensors=self.tensors,
            states=tuple(states),
            steps=self.graph.steps,
        )

    def _lower(self, node: Node) -> Placed:
        handler = OWN.get(node.op) or HANDLERS.get(node.op)
        if handler is None or node.op == "sparse":
            known = ", ".join(sorted({*OWN, *HANDLERS} - {"sparse"}))
            raise UnsupportedOpError(f"{node}: no lowering in a step; known are {known}")
        placed: Placed = handler(self, node)
        if node.op in SAME_FORM and node.inputs[0] in self.forms:
            self.forms.setdefault(node.name, self.forms[node.inputs[0]])
        return placed

    def _input_layout(self) -> np.ndarray:
        """The client fills every slot of the blocks."""
        features = self.graph.input_shape[-1]
        feature = np.arange(power_of_two(features))
        if feature.size > self.slots // 2:
            raise UnsupportedOpError(f"{features} features leave no blocks in {self.slots} slots; take a larger ring")
        form = Blocks(feature=np.where(feature < features, feature, -1), valid=self.slots // feature.size)
        self.forms[self.graph.input] = form
        return form.layout(self.slots)[None]

    def _state(self, name: str) -> Signature:
        cache, keys = self.cache(name)
        layout = cache.kept(keys=keys)[None]
        factor = self.wanted(name)
        op = self.emit("input", (), name, factor=factor, name=name, part=0)
        self.placed[name] = Placed(ops=(op,), layout=layout, factor=factor)
        self.tensors[op] = (name, 0)
        array = f"state.{'keys' if keys else 'values'}"
        self.arrays[array] = layout.astype(np.int32)
        shape = self.graph.shape(name)[1:]
        return Signature(name=name, shape=shape, layout=array, factor=factor, bound=self.bound(name), level=0)

    def cache(self, name: str) -> tuple[Cache, bool]:
        """Where a tensor [1, T, D] goes: the geometry, and whether it holds keys (else values), judged by how it is transposed.

        Raises:
            UnsupportedOpError: it does not go to attention.
        """
        users = self.users[name]
        while users and users[0].op in ("add", "mul_step", "reshape"):
            users = self.users[users[0].name]
        if not users or users[0].op != "transpose" or len(users[0].shape) != 4:
            raise UnsupportedOpError(
                f"kept tensor {name!r} is not split into heads and transposed; only attention keeps tensors"
            )
        perm, shape = list(users[0].attrs["perm"]), users[0].shape
        channels, tokens = (shape[2], shape[3]) if perm == [0, 2, 3, 1] else (shape[3], shape[2])
        return Cache(slots=self.slots, tokens=tokens, heads=shape[1], channels=channels), perm == [0, 2, 3, 1]

    def order(self, name: str, features: int) -> np.ndarray:
        """Which output each position of a tile holds: heads inside where it goes to attention."""
        users = self.users[name]
        while users and users[0].op in ("add_const", "mul", "mul_step", "add_step", "add"):
            users = self.users[users[0].name]
        if users and users[0].op == "reshape" and len(users[0].shape) == 4:
            _, _, heads, channels = users[0].shape
            return Cache(slots=self.slots, tokens=1, heads=heads, channels=channels).order
        at = np.arange(power_of_two(features))
        return np.where(at < features, at, -1)

    def table(self, name: str, values: np.ndarray) -> str:
        """Store rows [T, slots], each shortened to what repeats."""
        m = 1
        while m < values.shape[1]:
            grid = values.reshape(len(values), m, -1)
            if np.array_equal(grid, np.broadcast_to(grid[..., :1], grid.shape)):
                break
            m *= 2
        self.arrays[name] = np.ascontiguousarray(values[:, :: values.shape[1] // m])
        return name

    def product(
        self, name: str, source: str, x: Placed, found: Product, bias: np.ndarray | None, factor: float
    ) -> Placed:
        """The ops of a planned matrix-vector product."""
        layout = found.form.layout(self.slots)
        constant = None
        if bias is not None:
            values = np.where(layout >= 0, bias[np.maximum(layout, 0)], 0.0) / factor
            constant = self.array(f"{name}.bias", values)
        op = self.emit(
            "linear",
            x.ops,
            source,
            factor=factor,
            weights=self.array(f"{name}.weights", found.weights * (x.factor / factor)),
            plan=[[g, [[b, row] for b, row in terms]] for g, terms in found.plan],
            bias=None if found.folds else constant,
        )
        if found.folds:
            op = self.emit("rotate_sum", (op,), source, factor=factor, steps=list(found.folds))
            if constant is not None:
                op = self.emit("add_plain", (op,), source, factor=factor, array=constant)
        clean = isinstance(found.form, Tiled)
        return Placed(ops=(op,), layout=layout[None], factor=factor, clean=clean)

    def multiply(
        self,
        name: str,
        source: str,
        x: Placed,
        form: Form,
        matrix: np.ndarray,
        bias: np.ndarray | None,
        order: np.ndarray,
    ) -> Placed:
        """x @ matrix + bias, into the other of the two layouts."""
        if isinstance(form, Blocks):
            found = outer(matrix, form, order, self.slots, self.cost)
        else:
            found = inner(matrix, form, self.slots, self.cost)
        self.forms[name] = found.form
        factor = self.wanted(name) if name in self.nodes else x.factor
        return self.product(name, source, x, found, bias, factor)

    def form(self, name: str) -> Form:
        """The layout of a vector.

        Raises:
            UnsupportedOpError: the tensor is none.
        """
        if name not in self.forms:
            raise UnsupportedOpError(f"{name!r} has shape {self.graph.shape(name)} and lies in no layout of a vector")
        return self.forms[name]


def _linear(low: StepLowering, node: Node) -> Placed:
    assert node.const is not None
    x, out = low.placed[node.inputs[0]], node.const.shape[1]
    bias = None if node.bias is None else np.broadcast_to(node.bias, (out,))
    order = low.order(node.name, out)
    return low.multiply(node.name, node.source, x, low.form(node.inputs[0]), node.const, bias, order)


def _add(low: StepLowering, node: Node) -> Placed:
    """A sum of two vectors, or of a kept tensor and its new row."""
    names = list(node.inputs)
    if any(low.graph.shape(name) != node.shape for name in names):
        raise UnsupportedOpError(f"{node}: a step adds tensors of one shape")
    if names[0] not in low.forms:
        return HANDLERS["add"](low, node)
    forms = [low.form(name) for name in names]
    pair = [low.placed[name] for name in names]
    if type(forms[0]) is not type(forms[1]):  # the way to the other layout costs one level: the second operand takes it
        name, size = f"{names[1]}.turned.{len(low.ops)}", node.shape[-1]
        order = forms[0].feature if isinstance(forms[0], Tiled) else np.arange(size)
        pair[1] = low.multiply(name, node.source, pair[1], forms[1], np.eye(size), None, order)
        forms[1] = low.forms[name]
    if not np.array_equal(forms[0].feature, forms[1].feature):
        raise UnsupportedOpError(f"{node}: its operands hold their features in different places")
    form = min(forms, key=lambda f: f.valid if isinstance(f, Blocks) else 0)
    layout = form.layout(low.slots)[None]
    low.forms[node.name] = form
    a, b = (replace(p, layout=layout) for p in pair)
    if not np.isclose(a.factor, b.factor, rtol=1e-9):
        weights = low.array(f"scale.{len(low.ops)}", np.full((1, 1), b.factor / a.factor))
        op = low.emit("linear", b.ops, node.source, factor=a.factor, weights=weights, plan=[[0, [[0, 0]]]], bias=None)
        b = replace(b, ops=(op,), factor=a.factor)
    op = low.emit("add", (*a.ops, *b.ops), node.source, factor=a.factor)
    return replace(a, ops=(op,), clean=a.clean and b.clean)


def _step(low: StepLowering, node: Node) -> Placed:
    """A row of a table, added or multiplied; the one-hot row of a token's place makes [1, T, D] of [1, 1, D]."""
    assert node.const is not None
    x, shape = low.placed[node.inputs[0]], low.graph.shape(node.inputs[0])
    kind, layout, spread = node.op, x.layout[0], node.shape != shape
    if spread:
        cache, keys = low.cache(node.name)
        form = low.form(node.inputs[0])
        if not isinstance(form, Tiled) or not np.array_equal(form.feature, cache.order):
            raise UnsupportedOpError(
                f"{node}: a row is written to its place from a tile of {cache.width} features in order of channels"
            )
        layout = cache.kept(keys=keys)
        low.caches[node.name] = cache
    factor = x.factor if kind == "add_step" else low.wanted(node.name)
    values = _rows(node.const, node.shape, layout)
    scale = 1.0 / x.factor if kind == "add_step" else x.factor / factor
    name = low.table(f"{node.name}.table", values * scale)
    op = low.emit(kind, x.ops, node.source, factor=factor, array=name)
    if not spread and node.inputs[0] in low.forms:
        low.forms[node.name] = low.forms[node.inputs[0]]
    return replace(x, ops=(op,), layout=layout[None], factor=factor, clean=x.clean and kind == "mul_step")


def _rows(table: np.ndarray, shape: tuple[int, ...], layout: np.ndarray) -> np.ndarray:
    """A table [T, ...], each row broadcast to `shape`, in the slots of a layout: [T, slots], or [T, 1] of one number a step."""
    wide = table.reshape(len(table), *(1,) * (len(shape) + 1 - table.ndim), *table.shape[1:])
    flat = np.broadcast_to(wide, (len(table), *shape)).reshape(len(table), -1)
    if (flat == flat[:, :1]).all():
        return flat[:, :1]  # in unused slots too
    return np.where(layout >= 0, flat[:, np.maximum(layout, 0)], 0.0)


def _reduce_sum(low: StepLowering, node: Node) -> Placed:
    """Over tokens of scores; or over the features of a vector, after which every slot holds the sum."""
    name = node.inputs[0]
    x, shape = low.placed[name], low.graph.shape(name)
    if len(shape) == 4:
        cache = _cache_of_scores(low, node, x, shape)
        op = low.emit("rotate_sum", x.ops, node.source, factor=x.factor, steps=cache.token_steps)
        return replace(x, ops=(op,), layout=cache.row[None], clean=False)
    form = low.form(name)
    whole = form.valid == form.width(low.slots) if isinstance(form, Blocks) else True
    if whole and (x.clean or (form.feature >= 0).all()):
        stride, count = (form.width(low.slots), form.feature.size) if isinstance(form, Blocks) else (1, form.period)
        steps = [stride << k for k in range(count.bit_length() - 1)]
        op = low.emit("rotate_sum", x.ops, node.source, factor=x.factor, steps=steps)
        placed = replace(x, ops=(op,), layout=np.zeros((1, low.slots), dtype=int), clean=True)
    else:
        placed = low.multiply(node.name, node.source, x, form, np.ones((shape[-1], 1)), None, np.zeros(1, dtype=int))
        if isinstance(low.forms[node.name], Blocks):
            raise UnsupportedOpError(f"{node}: a sum over a tile that has unused places which do not hold 0")
    low.forms[node.name] = Tiled(feature=np.zeros(1, dtype=int))
    return placed


def _cache_of_scores(low: StepLowering, node: Node, x: Placed, shape: tuple[int, ...]) -> Cache:
    _, heads, _, tokens = shape
    for cache in low.caches.values():
        if (cache.heads, cache.tokens) == (heads, tokens) and np.array_equal(cache.scores, x.layout[0]):
            return cache
    raise UnsupportedOpError(f"{node}: {node.inputs[0]!r} of shape {shape} are no scores against kept keys")


def _matmul(low: StepLowering, node: Node) -> Placed:
    """Scores of one query, or values weighted by its powers.

    Factors of scores that depend on the step multiply the query: it lies beside the keys of every place, so that each copy
    takes the factors of its place and its heads, in a product by one plaintext and with no level after the sum over channels.
    """
    pair = node.inputs[:2]
    a, b = (low.placed[name] for name in pair)
    (_, heads, one, _), (_, _, channels, tokens) = (low.graph.shape(name) for name in pair)
    caches = list(low.caches.values())
    keys = next(
        (c for c in caches if _holds(low, b, c, keys=True) and (c.heads, c.channels) == (heads, channels)), None
    )
    if one == 1 and keys is not None:
        q = np.tile(keys.order, low.slots // keys.width)
        if not np.array_equal(a.layout[0], q):
            raise UnsupportedOpError(f"{node}: its query does not lie beside the keys")
        mask = node.attrs.get("mask")
        if mask is not None and np.asarray(mask).size != 1:
            raise UnsupportedOpError(
                f"{node}: scores of a step are multiplied by one number, or by rows of tables that are looked up by the step"
            )
        if node.const is not None:
            a = _scaled_query(low, node, a, keys)
        factor = a.factor * b.factor * (1.0 if mask is None else float(np.asarray(mask).reshape(())))
        op = low.emit("mul", (*a.ops, *b.ops), node.source, factor=factor)
        op = low.emit("rotate_sum", (op,), node.source, factor=factor, steps=keys.channel_steps)
        return Placed(ops=(op,), layout=keys.scores[None], factor=factor, clean=False)
    tokens, channels = channels, tokens
    values = next(
        (c for c in caches if _holds(low, b, c, keys=False) and (c.heads, c.channels) == (heads, channels)), None
    )
    if (
        one != 1
        or values is None
        or not np.array_equal(a.layout[0], values.scores)
        or node.attrs.get("mask") is not None
        or node.const is not None
    ):
        raise UnsupportedOpError(
            f"{node}: is no attention of one query; a step multiplies nothing else that is encrypted by matrices"
        )
    factor = a.factor * b.factor
    op = low.emit("mul", (*a.ops, *b.ops), node.source, factor=factor)
    op = low.emit("rotate_sum", (op,), node.source, factor=factor, steps=values.token_steps)
    low.forms[node.name] = values.out
    return Placed(ops=(op,), layout=values.out.layout(low.slots)[None], factor=factor, clean=False)


def _scaled_query(low: StepLowering, node: Node, q: Placed, keys: Cache) -> Placed:
    """A query times the factors of its scores: those of head and place in every slot of both tiles.

    It is stored within [-1, 1], as its keys are. Sums of powers are then well below 1, where a reciprocal can be evaluated by
    its factors; scaled to 1 they needed a Chebyshev series, which takes two levels more.
    """
    assert node.const is not None
    factor = low.bound(node.inputs[0]) * float(np.abs(node.const).max())
    score = np.arange(low.slots) % keys.heads * keys.tokens + keys.token
    values = _rows(node.const, node.shape, score) * (q.factor / factor)
    op = low.emit("mul_step", q.ops, node.source, factor=factor, array=low.table(f"{node.name}.table", values))
    return replace(q, ops=(op,), factor=factor)


def _holds(low: StepLowering, x: Placed, cache: Cache, *, keys: bool) -> bool:
    """Whether a tensor is what a cache keeps, seen by head: keys [1, H, dk, T] or values [1, H, T, dk]."""
    index = np.arange(cache.tokens * cache.width).reshape(cache.tokens, cache.heads, cache.channels)
    moved = index.transpose((1, 2, 0) if keys else (1, 0, 2)).reshape(-1)
    kept = cache.kept(keys=keys)
    seen = np.empty(moved.size, dtype=int)
    seen[moved] = np.arange(moved.size)
    return np.array_equal(x.layout[0], np.where(kept >= 0, seen[np.maximum(kept, 0)], -1))


def _mul(low: StepLowering, node: Node) -> Placed:
    """Of what lies in the same places; one number a vector, or one a head, is in all of them."""
    names = list(node.inputs)
    if low.graph.shape(names[0]) != node.shape:
        names.reverse()
    a, b = (low.placed[name] for name in names)
    small = low.graph.shape(names[1])
    index = broadcast_index(small, node.shape)
    used = a.layout[0] >= 0
    needed = np.where(used, index[np.maximum(a.layout[0], 0)], -1)
    met = np.where(used, b.layout[0], -1)
    if low.graph.shape(names[0]) != node.shape or not ((met == needed) | (met < 0)).all():
        raise UnsupportedOpError(
            f"{node}: its operands of shapes {low.graph.shape(names[0])} and {small} lie in different places"
        )
    layout = np.where(used & (b.layout[0] >= 0), a.layout[0], -1)
    factor = a.factor * b.factor
    op = low.emit("mul", (*a.ops, *b.ops), node.source, factor=factor)
    if names[0] in low.forms:
        forms = [low.forms[name] for name in names if name in low.forms]
        blocks = [f for f in forms if isinstance(f, Blocks)]
        low.forms[node.name] = min(blocks, key=lambda f: f.valid) if isinstance(forms[0], Blocks) else forms[0]
    return replace(a, ops=(op,), layout=layout[None], factor=factor, clean=a.clean or b.clean)


SAME_FORM = ("add_const", "mul_const", "polynomial", "reshape", "transpose")
OWN: dict[str, Callable[[StepLowering, Node], Placed]] = {
    "linear": _linear,
    "add": _add,
    "mul": _mul,
    "mul_step": _step,
    "add_step": _step,
    "reduce_sum": _reduce_sum,
    "matmul": _matmul,
}


def lower_step(graph: Graph, ranges: Mapping[str, Range], slots: int, cost: PlanCost) -> Lowered:
    """Lower a folded graph with steps; arguments and errors as those of `lower.lower`."""
    return StepLowering(graph, ranges, slots, cost).run()
