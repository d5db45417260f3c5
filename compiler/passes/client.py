"""Split off what the client does: the embedding, and an exact norm right behind it. Table rows, positions and that norm are public to
the client and cost no ciphertext.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from he_backend.base import UnsupportedOpError
from he_backend.circuit import layer_norm

from ..ir import Graph
from ..ops.functions import OR_FIT
from ..ops.refuse import NORM


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """x[t] = table[token t] + positions[t]; table [V, D], positions [T, D], T also where a graph takes one token a step. `norm` is
    the scale [D], shift [D] and eps of the LayerNorm that follows, if there is one.
    """

    table: np.ndarray
    positions: np.ndarray
    norm: tuple[np.ndarray, np.ndarray, float] | None = None

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """[T] token ids -> [T, D]."""
        return self._opened(self.table[tokens] + self.positions)

    def step(self, token: np.ndarray, step: int) -> np.ndarray:
        """Token ids of one step -> their rows at that place."""
        return self._opened(self.table[token] + self.positions[step])

    def _opened(self, x: np.ndarray) -> np.ndarray:
        return x if self.norm is None else layer_norm(x, *self.norm)


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
    end, done = gather, {gather.name}
    positions: np.ndarray = np.zeros((tokens, features))
    users = graph.users()
    while len(users[end.name]) == 1 and users[end.name][0].op == "add_const":
        end = users[end.name][0]
        done.add(end.name)
        assert end.const is not None
        positions = positions + np.broadcast_to(end.const, gather.shape).reshape(tokens, features)
    if end is gather and len(users[end.name]) == 1 and users[end.name][0].op == "add_step":
        end = users[end.name][0]
        done.add(end.name)
        assert end.const is not None
        positions = end.const.reshape(graph.steps, features).astype(np.float64)
    if graph.steps:  # without positions of its own, or with one row for all
        positions = np.broadcast_to(positions, (graph.steps, features))
    norm, readers = None, users[end.name]
    opening = next((n for n in readers if n.op == "client_norm"), None)
    if opening is not None:
        if len(readers) > 1:
            other = next(n.source for n in readers if n is not opening)
            raise UnsupportedOpError(
                f"node {opening.source!r} is a LayerNormalization of an embedding that {other!r} reads as well: the client "
                f"sends one of them, so that the norm must be a polynomial; use {NORM} instead{OR_FIT}"
            )
        assert opening.const is not None and opening.bias is not None
        norm, end = (opening.const, opening.bias, float(opening.attrs["eps"])), opening
        done.add(end.name)
    rest = tuple(n for n in graph.nodes if n.name not in done)
    graph = replace(graph, input=end.name, input_shape=gather.shape, nodes=rest)
    return graph, Embedding(table=gather.const, positions=positions, norm=norm)
