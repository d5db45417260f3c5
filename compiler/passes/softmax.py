"""Softmax as what can be fitted: exponentials of scores minus a constant, their sum, its reciprocal, one product.

Found as exp(z) / sum exp(z) over the last axis, z being scores through constants added and multiplied. What is added to a whole row,
such as its negative largest score, changes no weight and is left out; instead each row gets a constant, the mean over the samples
of the logarithm of its denominator, so that all denominators are around 1 and one interval serves them all. (Not the logarithm of the
mean, which follows the largest sample: of a trained block it left 8 % of unseen windows with a row above the interval, the mean of
logarithms 0.4 %.) A constant that lies far below the largest of its row is a mask: its key has weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logsumexp

from he_backend.base import Array, UnsupportedOpError

from ..ir import Graph, Node, evaluate

MASKED = -50.0  # a score's constant below the largest of its row from which on it is a mask
LOWEST = -1e4  # largest constant of a row below which all its keys are masked


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The argument of a softmax's exponential: factor * tensor + shift, of the node's shape, where a key is visible.

    source  the softmax; total: the node of its sum
    """

    source: str
    total: str
    tensor: str
    factor: Array
    shift: Array
    visible: Array

    @property
    def masked(self) -> int:
        return int(self.visible.size - np.count_nonzero(self.visible))

    def __call__(self, scores: Array) -> Array:
        """The argument, minus infinity where a key is masked."""
        return np.where(self.visible, self.factor * scores + self.shift, -np.inf)

    def nodes(self, node: Node, lowest: float) -> list[Node]:
        """The same as nodes in front of the exponential `node`, with `lowest` where a key is masked, and in slots of no key."""
        made, x = [], self.tensor
        factor = np.where(self.visible, self.factor, 0.0)
        if np.any(factor != 1.0):
            factor = factor.reshape(-1)[:1] if np.all(factor == factor.flat[0]) else factor
            made.append(replace(node, name=f"{node.name}.visible", op="mul_const", inputs=(x,), const=factor, attrs={}))
            x = made[-1].name
        shift, attrs = np.where(self.visible, self.shift, lowest), {"unused": lowest}
        return [*made, replace(node, name=argument(node), op="add_const", inputs=(x,), const=shift, attrs=attrs)]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What calibration saw of a softmax, on the node of its exponential as `rows`.

    constants  smallest and largest constant that a row's scores lost
    lowest     smallest argument of a visible key
    mean       smallest denominator over its number of visible keys
    """

    scores: Scores
    constants: tuple[float, float]
    lowest: float
    mean: float


def argument(node: Node) -> str:
    """The name of an exponential's argument."""
    return f"{node.name}.argument"


def centred(graph: Graph, samples: Sequence[np.ndarray]) -> Graph:
    """The same function, with every softmax over rows whose denominators are around 1 and `Rows` on its exponential.

    Raises:
        UnsupportedOpError: a maximum that no softmax subtracts; a row all of whose keys are masked.
    """
    found = {node.name: scores for node in graph.nodes if (scores := _scores(graph, node)) is not None}
    rows = _calibrated(graph, found, samples)
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += _exponential(node, rows[node.name]) if node.name in rows else [node]
    graph = replace(graph, nodes=tuple(nodes)).without_dead()
    for node in graph.nodes:
        if node.op == "reduce_max":
            raise UnsupportedOpError(
                f"node {node.source!r} is a ReduceMax that no softmax over the last axis subtracts; a maximum is not a polynomial: "
                "leave it out, or transpose the softmax so that its axis is the last"
            )
    return graph


def _exponential(node: Node, rows: Rows) -> list[Node]:
    visible = rows.scores.visible
    attrs = {"kind": "Exp", "call": lambda a: np.exp(a) * visible, "rows": rows}
    return [*rows.scores.nodes(node, rows.lowest), replace(node, inputs=(argument(node),), attrs=attrs)]


def _scores(graph: Graph, node: Node) -> Scores | None:
    """The scores of the softmax that an exponential belongs to, if it does."""
    if node.op != "function" or node.attrs["kind"] != "Exp":
        return None
    users = graph.users()
    total = next((u for u in users[node.name] if u.op == "reduce_sum"), None)
    if total is None or [u.attrs.get("kind") for u in users[total.name]] != ["Reciprocal"]:
        return None
    inverse = users[total.name][0].name
    if any(u is not total and not (u.op == "mul" and inverse in u.inputs) for u in users[node.name]):
        return None
    tensor, factor, shift = _affine(graph, node)
    top = shift.max(-1, keepdims=True)
    if np.any(top < LOWEST):
        raise UnsupportedOpError(
            f"node {total.source!r} is a softmax with all keys masked in {int(np.sum(top < LOWEST))} of {top.size} rows; leave "
            "each row a key, such as its own"
        )
    visible = shift - top > MASKED
    return Scores(
        source=total.source,
        total=total.name,
        tensor=tensor,
        factor=factor,
        shift=np.where(visible, shift, 0.0),
        visible=visible,
    )


def _affine(graph: Graph, node: Node) -> tuple[str, Array, Array]:
    """The argument of a function as tensor * factor + shift, but for what is the same for a whole row."""
    named, shape = graph.by_name, node.shape
    name, factor, shift = node.inputs[0], np.ones(shape), np.zeros(shape)
    while (maker := named.get(name)) is not None:
        inner = [x for x in maker.inputs if graph.shape(x) == shape]
        rest = [x for x in maker.inputs if x not in inner]
        if maker.op not in ("add", "add_const", "mul_const") or len(inner) != 1:
            break
        if any(graph.shape(x) != (*shape[:-1], 1) for x in rest):
            break
        if maker.const is not None and maker.op == "add_const":
            with np.errstate(invalid="ignore"):  # nothing times minus infinity
                shift = shift + np.where(factor == 0.0, 0.0, factor * maker.const)
        elif maker.const is not None:
            factor = factor * maker.const
        (name,) = inner
    return name, factor, shift


def _calibrated(graph: Graph, found: dict[str, Scores], samples: Sequence[np.ndarray]) -> dict[str, Rows]:
    """Each softmax with the constant of its rows subtracted, and what the samples say of it."""
    sums: dict[str, list[Array]] = {name: [] for name in found}
    lowest: dict[str, Array] = {}
    for x in samples if found else ():
        values = evaluate(graph, x)
        for name, scores in found.items():
            z = scores(values[scores.tensor])
            sums[name].append(logsumexp(z, axis=-1, keepdims=True))
            small = np.where(scores.visible, z, np.inf).min(-1, keepdims=True)
            lowest[name] = np.minimum(lowest.get(name, small), small)
    rows = {}
    for name, scores in found.items():
        every = np.stack(sums[name])
        constant = every.mean(0)
        keys = scores.visible.sum(-1, keepdims=True)
        rows[name] = Rows(
            scores=replace(scores, shift=np.where(scores.visible, scores.shift - constant, 0.0)),
            constants=(float(constant.min()), float(constant.max())),
            lowest=float(np.min(lowest[name] - constant)),
            mean=float(np.min(np.exp(every.min(0) - constant) / keys)),
        )
    return rows
