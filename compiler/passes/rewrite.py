"""Rewriting to a fixed point: a rule looks at one node and returns the nodes that replace it, or None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir import Graph, Node


@dataclass(frozen=True)
class View:
    """What a rule may look at: producers and readers of tensors."""

    nodes: dict[str, Node]
    users: dict[str, list[Node]]
    outputs: tuple[str, ...]

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that makes a tensor, if it is one of these ops."""
        node = self.nodes.get(name)
        return node if node is not None and node.op in ops else None

    def only_user(self, name: str, user: Node) -> bool:
        """Whether `user` alone reads the tensor, so that its maker may be absorbed."""
        return name not in self.outputs and [u.name for u in self.users[name]] == [user.name]


Rule = Callable[[Node, View], Sequence[Node] | None]


def rewrite(graph: Graph, rules: Sequence[Rule], *, limit: int = 10_000) -> Graph:
    """Apply rules until none applies; the last of a rule's nodes must keep the name of the node that it replaces.

    Raises:
        RuntimeError: rules undo each other (more than `limit` rewrites).
    """
    for _ in range(limit):
        view = View(graph.by_name, graph.users(), graph.outputs)
        for i, node in enumerate(graph.nodes):
            new = next((r for rule in rules if (r := rule(node, view)) is not None), None)
            if new is not None:
                assert new[-1].name == node.name
                known = {n.name for n in graph.nodes[:i]}
                fresh = [n for n in new[:-1] if n.name not in known]
                graph = replace(graph, nodes=(*graph.nodes[:i], *fresh, new[-1], *graph.nodes[i + 1 :])).without_dead()
                break
        else:
            return graph
    raise RuntimeError(f"rewriting did not end after {limit} steps: two rules undo each other")
