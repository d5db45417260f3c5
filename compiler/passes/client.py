"""Split off what the client does: the embedding. Table rows and positions are public to the client and cost no ciphertext."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import UnsupportedOpError

from ..ir import Graph


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """x[t] = table[token t] + positions[t]; table [V, D], positions [T, D], T also where a graph takes one token a step."""

    table: np.ndarray
    positions: np.ndarray

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """[T] token ids -> [T, D]."""
        return self.table[tokens] + self.positions


def split_client(graph: Graph) -> tuple[Graph, Embedding | None]:
    """The graph behind the embedding, with the embedded tensor as its input; (graph, None) if it starts from numbers.

    Raises:
        UnsupportedOpError: token ids are used otherwise than by one embedding.
    """
    gathers = [n for n in graph.nodes if n.op == "gather"]
    if not gathers:
        return graph, None
    readers = graph.users()[graph.input]
    if len(gathers) > 1 or len(readers) > 1:
        names = ", ".join(dict.fromkeys(f"{n.source!r} ({n.op})" for n in (*readers, *gathers)))
        raise UnsupportedOpError(
            f"the client computes one embedding of the token ids and sends nothing else of them; they are read by {names}: "
            "put all that the model takes from the ids into one table"
        )
    (gather,) = gathers
    assert gather.const is not None
    tokens, features = gather.shape[-2:]
    end, positions = gather, np.zeros((tokens, features))
    users = graph.users()[gather.name]
    if len(users) == 1 and users[0].op == "add_const" and users[0].const is not None:
        end = users[0]
        positions = np.broadcast_to(users[0].const, gather.shape).reshape(tokens, features).astype(np.float64)
    elif len(users) == 1 and users[0].op == "add_step" and users[0].const is not None:
        end = users[0]
        positions = users[0].const.reshape(graph.steps, features).astype(np.float64)
    rest = tuple(n for n in graph.nodes if n.name not in (gather.name, end.name))
    graph = replace(graph, input=end.name, input_shape=gather.shape, nodes=rest)
    return graph, Embedding(table=gather.const, positions=positions)
