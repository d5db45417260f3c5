"""Heads are padded to powers of two without a change of meaning, or not at all where padding would count."""

from collections.abc import Sequence

import numpy as np
import pytest

from compiler.ir import Graph, Node, evaluate
from compiler.passes.pad_heads import pad_heads

T, H, K = 4, 3, 5
D = H * K
RNG = np.random.default_rng(0)


def node(name: str, op: str, inputs: Sequence[str], *shape: int, **rest) -> Node:
    return Node(name=name, op=op, inputs=tuple(inputs), shape=(1, *shape), **rest)


def polynomial(name: str, x: str, coefficients: Sequence[float], *shape: int) -> Node:
    return node(name, "polynomial", [x], *shape, attrs={"coefficients": np.array(coefficients), "interval": None})


def projected(name: str, perm: Sequence[int], *, by_token: bool = False) -> list[Node]:
    """A linear map with a bias, a factor for each token, heads, and a constant that is one number for all channels."""
    weight = RNG.normal(size=(T, 6, D) if by_token else (6, D))
    shape = tuple((T, H, K)[p - 1] for p in perm[1:])
    return [
        node(f"{name}.linear", "linear", ["x"], T, D, const=weight, bias=RNG.normal(size=D)),
        node(f"{name}.scaled", "mul", [f"{name}.linear", "sum"], T, D),
        node(f"{name}.split", "reshape", [f"{name}.scaled"], T, H, K),
        node(f"{name}.moved", "transpose", [f"{name}.split"], *shape, attrs={"perm": list(perm)}),
        node(name, "add_const", [f"{name}.moved"], *shape, const=np.array(0.7)),
    ]


def attention(*extra: Node, q: str = "q", y: str = "out", mask: np.ndarray | None = None) -> Graph:
    """Attention with denominators; `extra` comes after the projections."""
    nodes = [
        node("sum", "reduce_sum", ["x"], T, 1),
        *projected("q", (0, 2, 1, 3), by_token=True),
        *projected("k", (0, 2, 3, 1)),
        *projected("v", (0, 2, 1, 3)),
        *extra,
        node("scores", "matmul", [q, "k"], H, T, T, attrs={"mask": mask}),
        polynomial("powers", "scores", [0.0, 0.0, 1.0], H, T, T),
        node("total", "reduce_sum", ["powers"], H, T, 1),
        node("denominator", "add_const", ["total"], H, T, 1, const=RNG.uniform(1, 2, (H, T, 1))),
        polynomial("inverse", "denominator", [1.0, -0.1], H, T, 1),
        node("values", "matmul", ["powers", "v"], H, T, K, attrs={"mask": None}),
        node("attended", "mul", ["values", "inverse"], H, T, K),
        node("back", "transpose", ["attended"], T, H, K, attrs={"perm": [0, 2, 1, 3]}),
        node("merged", "reshape", ["back"], T, D),
        node("out", "linear", ["merged"], T, 2, const=RNG.normal(size=(D, 2)), bias=None),
    ]
    return Graph(input="x", input_shape=(1, T, 6), output=y, nodes=tuple(nodes))


def meant(graph: Graph) -> np.ndarray:
    return evaluate(graph, np.random.default_rng(1).normal(size=(1, T, 6)))[graph.output]


PADDED = {
    "plain": attention(),
    "mask": attention(mask=np.tril(np.ones((T, T)))),
    "mask of each head": attention(mask=RNG.normal(size=(1, H, T, T))),
    "square of the queries": attention(polynomial("q2", "q", [0.0, 0.0, 1.0], H, T, K), q="q2"),
    "channels scaled": attention(node("qs", "mul_const", ["q"], H, T, K, const=RNG.normal(size=K)), q="qs"),
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_heads_mean_the_same(name):
    graph = PADDED[name]
    padded = pad_heads(graph)
    shapes = {n.name: n.shape for n in padded.nodes}
    assert (shapes["scores"], shapes["q.split"], shapes["merged"]) == ((1, 4, T, T), (1, T, 4, 8), (1, T, 32))
    assert shapes["out"] == graph.by_name["out"].shape and shapes["sum"] == (1, T, 1)
    np.testing.assert_allclose(meant(padded), meant(graph), rtol=1e-12)
    assert pad_heads(padded) is padded


KEPT = {
    "a constant term on channels": attention(polynomial("q2", "q", [0.5, 1.0, 1.0], H, T, K), q="q2"),
    "heads that come out": attention(y="attended"),
    "features that come out": attention(y="merged"),
    "scores added to queries": attention(
        node("row", "reduce_sum", ["q"], H, T, 1), node("q2", "add", ["q", "row"], H, T, K), q="q2"
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_graph_whose_padding_would_count_stays_as_it_is(name):
    assert pad_heads(KEPT[name]) is KEPT[name]
