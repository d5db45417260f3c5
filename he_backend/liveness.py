"""Bytes of values, and the most that are alive at once: what the compiler plans with and the executor takes from the system."""

from __future__ import annotations

from .params import Params
from .trace import Node, Trace


def value_bytes(node: Node, params: Params) -> int:
    """Memory of a node's result in bytes, from its limbs; a hoist holds one polynomial a digit in the extended basis."""
    limb, limbs = 8 << params.log_n, params.limbs(node.level)
    if node.op == "hoist":
        return -(-limbs // params.digit_limbs) * (limbs + params.special_limbs) * limb
    return node.elements * (limbs + params.special_limbs * node.extended) * limb


def live_bytes(trace: Trace, params: Params) -> int:
    """Largest sum, in bytes, of values alive at once when the nodes run in order; outputs stay to the end."""
    nodes = trace.nodes
    last = {a: node.id for node in nodes for a in node.args}
    last.update((kept, len(nodes)) for kept in trace.outputs.values())
    alive = peak = 0
    for node in nodes:
        alive += value_bytes(node, params)
        peak = max(peak, alive)
        alive -= sum(value_bytes(nodes[a], params) for a in set(node.args) if last[a] == node.id)
        if node.id not in last:
            alive -= value_bytes(node, params)
    return peak
