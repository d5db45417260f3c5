"""The compiler's tensor graph: a dozen polynomial ops on named tensors of fixed shape, and their meaning in NumPy.

    op            inputs   const, attributes
    gather        tokens   const [V, D]: rows of a table
    add           a, b
    add_const     a        const, broadcast
    mul           a, b
    mul_const     a        const, broadcast
    matmul        a, b     both encrypted; `mask` (or None) multiplies the product, and so does const[step] where the step is a
                           third input
    linear        a        const [in, out], bias [out] or None: a @ const + bias on the last axis; const [T, in, out], bias
                           [T, out]: token t by its own, on a [1, T, in]
    reduce_sum    a        over the last axis, which stays with length 1
    polynomial    a        coefficients c_k of sum c_k a^k (power basis), interval or None
    transpose     a        perm
    reshape       a        (shape of the node)
    sparse        a        `matrix` scipy.sparse.csr_matrix [size out, size in], bias [size out] or None: any plaintext-linear
                           op (conv, pool, slice, concat, ...) on the flattened tensor, its leading axis of length 1 included
    client_norm   a        const [D] scale, bias [D], eps: the exact LayerNorm of an embedding, only up to `split_client`
    mul_step      a, step  const [T, ...]: a * const[step], broadcast; add_step likewise
    function      a        `call` in NumPy, `kind`: not a polynomial, only between the importer and the pass `approximate`
    reduce_max    a        over the last axis, which stays with length 1; only there, too

Attributes that do not change the meaning say how a form (passes/forms.py) wants to be lowered: `kept` is not to be fused, `free` need
not be small enough for a refresh, an argument has a `unit`, a result a `peak`, a value may `pause`, slots without an element hold `unused`,
weights are not 0 where `visible`.

A graph is a value: passes return new ones. `evaluate` is the meaning that every pass must keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from he_backend.base import Array, UnsupportedOpError
from he_backend.circuit import layer_norm

STEP = "step"  # the input that holds the number of a step


@dataclass(frozen=True, kw_only=True)
class Node:
    """One op; `name` is also the name of the tensor that it makes, `source` the ONNX node that it came from."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    const: np.ndarray | None = field(default=None, repr=False, compare=False)
    bias: np.ndarray | None = field(default=None, repr=False, compare=False)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.op}({', '.join(self.inputs)}) {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A tensor that is kept from step to step: it comes in as `before`, and goes out as the node `after`."""

    before: str
    after: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in order of use; `input` is the one tensor that comes from outside, `output` the one that leaves.

    A graph with `steps` T > 0 is one step of a sequence of at most T: the scalar input STEP is its number, and `kept` are the
    tensors that it hands on to the next one.
    """

    input: str
    input_shape: tuple[int, ...]
    output: str
    nodes: tuple[Node, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    steps: int = 0
    kept: tuple[Kept, ...] = ()

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.nodes))

    @property
    def by_name(self) -> dict[str, Node]:
        return {n.name: n for n in self.nodes}

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """All that comes from outside, with its shape."""
        step: dict[str, tuple[int, ...]] = {STEP: ()} if self.steps else {}
        return {self.input: self.input_shape, **step, **{k.before: k.shape for k in self.kept}}

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output, *(k.after for k in self.kept))

    def shape(self, name: str) -> tuple[int, ...]:
        inputs = self.inputs
        return inputs[name] if name in inputs else self.by_name[name].shape

    def users(self) -> dict[str, list[Node]]:
        """Tensor name -> the nodes that read it."""
        users: dict[str, list[Node]] = {name: [] for name in (*self.inputs, *self.by_name)}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return users

    def without_dead(self) -> Graph:
        """The same graph without nodes that the output does not need."""
        alive = set(self.outputs)
        for node in reversed(self.nodes):
            if node.name in alive:
                alive.update(node.inputs)
        return replace(self, nodes=tuple(n for n in self.nodes if n.name in alive))


def evaluate(graph: Graph, x: np.ndarray | Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Every tensor of the graph for one input, float64 (token ids stay integers).

    Args:
        x: the input; all inputs by name for a graph with steps.
    """
    given = x if isinstance(x, Mapping) else {graph.input: x}
    values: dict[str, Any] = {n: v.astype(np.float64) if v.dtype.kind == "f" else v for n, v in given.items()}
    for node in graph.nodes:
        try:
            kernel = OPS[node.op]
        except KeyError:
            raise UnsupportedOpError(f"{node}: the compiler's ops are {', '.join(OPS)}") from None
        values[node.name] = kernel(node, *(values[i] for i in node.inputs))
    return values


def _matmul(node: Node, a: Array, b: Array, step: Array | None = None) -> Array:
    product = a @ b
    if step is not None:
        assert node.const is not None
        product = product * node.const[int(step)]
    mask = node.attrs.get("mask")
    return product if mask is None else product * mask


def _linear(node: Node, a: Array) -> Array:
    assert node.const is not None
    product = a @ node.const if node.const.ndim == 2 else (a[..., None, :] @ node.const)[..., 0, :]
    return product if node.bias is None else product + node.bias


def _sparse(node: Node, a: Array) -> Array:
    product = node.attrs["matrix"] @ a.reshape(-1)
    return (product if node.bias is None else product + node.bias).reshape(node.shape)


OPS: dict[str, Callable[..., Array]] = {
    "gather": lambda n, ids: n.const[ids].astype(np.float64),
    "add": lambda n, a, b: a + b,
    "add_const": lambda n, a: a + n.const,
    "mul": lambda n, a, b: a * b,
    "mul_const": lambda n, a: a * n.const,
    "matmul": _matmul,
    "linear": _linear,
    "reduce_sum": lambda n, a: a.sum(-1, keepdims=True),
    "polynomial": lambda n, a: np.polynomial.polynomial.polyval(a, n.attrs["coefficients"]),
    "transpose": lambda n, a: np.transpose(a, n.attrs["perm"]),
    "reshape": lambda n, a: a.reshape(n.shape),
    "sparse": _sparse,
    "mul_step": lambda n, a, step: a * n.const[int(step)],
    "add_step": lambda n, a, step: a + n.const[int(step)],
    "client_norm": lambda n, a: layer_norm(a, n.const, n.bias, n.attrs["eps"]),
    "function": lambda n, a: n.attrs["call"](a),
    "reduce_max": lambda n, a: a.max(-1, keepdims=True),
}
