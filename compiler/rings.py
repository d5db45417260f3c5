"""Which rings are worth lowering for: a graph's depth is known before its layout, and a ring holds so many levels."""

from __future__ import annotations

import numpy as np

from he_backend import security
from he_backend.base import BACKENDS

from .deepen import chains
from .ir import Graph, Node
from .plan import LARGEST_RING, Target, candidates

SMALLEST_RING = 13  # below it 128 bits leave no two levels


def fewest_levels(graph: Graph) -> int:
    """Levels that no layout avoids: one for each product by weights or of two tensors on the longest path, more for polynomials."""
    depth = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        levels = [depth[name] for name in node.inputs]
        if node.op == "matmul" and not graph.steps:  # one operand at least has to be rearranged by a linear map
            levels[1] += 1
        depth[node.name] = max(levels) + _levels(node)
    return depth[graph.output]


def _levels(node: Node) -> int:
    match node.op:
        case "linear" | "sparse" | "matmul" | "mul" | "mul_step":
            return 1
        case "mul_const":
            return int(node.const is not None and node.const.size > 1)
        case "polynomial":
            highest = int(np.max(np.flatnonzero(node.attrs["coefficients"]), initial=0))
            return max(0, highest - 1).bit_length()
    return 0


def possible_rings(graph: Graph, target: Target) -> list[int]:
    """log2 N to try, smallest first: those that hold the graph's levels at 128 bits or refresh, and the largest in any case."""
    if target.insecure_log_n is not None:
        return [target.insecure_log_n]
    need = fewest_levels(graph)
    largest = LARGEST_RING[target.backend]
    return [n for n in range(SMALLEST_RING, largest + 1) if n == largest or _holds(target.backend, n, need)]


def _holds(backend: str, log_n: int, levels: int) -> bool:
    if "bootstrap" in BACKENDS[backend] and log_n in security.LIMITS["sparse192"] and any(chains(log_n, False)):
        return True
    return any(p.log_qp <= security.limit(p) for p in candidates(backend, log_n, max(1, levels), False))
