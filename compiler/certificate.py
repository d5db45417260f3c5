"""The certificate that a model is a polynomial: which ops it holds, its degree, and the depth that the degree forces.

Importing has already refused everything else. The degree is that of the output in the entries of the embedded input, counted
along the graph: sums take the larger, products add, a polynomial of degree n multiplies. Unless terms cancel, that is the degree,
and no circuit has fewer levels of ciphertext products than ceil(log2 degree) (the argument of arXiv 2502.02209).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .ir import Graph


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """ops counts the graph's nodes by kind; degree is an upper bound, reached unless terms cancel; bound is ceil(log2 degree)."""

    ops: dict[str, int]
    degree: int

    @property
    def bound(self) -> int:
        return (self.degree - 1).bit_length()

    def __str__(self) -> str:
        ops = ", ".join(f"{count} {op}" for op, count in sorted(self.ops.items()))
        return f"polynomial of degree {self.degree:,}, at least {self.bound} levels of products; ops: {ops}"


def certify(graph: Graph) -> Certificate:
    """Degree of a graph whose ops are all polynomial."""
    degree = dict.fromkeys(graph.inputs, 1)
    for node in graph.nodes:
        d = [degree[name] for name in node.inputs]
        match node.op:
            case "gather":
                degree[node.name] = 1
            case "mul" | "matmul":
                degree[node.name] = d[0] + d[1]
            case "polynomial":
                highest = max(i for i, c in enumerate(node.attrs["coefficients"]) if c)
                degree[node.name] = d[0] * highest
            case _:
                degree[node.name] = max(d)
    return Certificate(ops=dict(Counter(n.op for n in graph.nodes)), degree=degree[graph.output])
