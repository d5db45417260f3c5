"""Which mixers have an ONNX form, and the function that writes each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from polyformer.export_attention import WEIGHTED, attention
from polyformer.export_graph import Graph
from polyformer.export_hyena import hyena
from polyformer.mixers.base import Mixer
from polyformer.mixers.hyena import Hyena
from polyformer.mixers.hyena_nd import HyenaNd

WRITERS: Mapping[type[Mixer], Callable[..., str]] = {
    **dict.fromkeys(WEIGHTED, attention),
    Hyena: hyena,
    HyenaNd: hyena,
}


def mixer(g: Graph, layer: Mixer, name: str, x: str) -> str:
    """Append a mixer that reads `x` and return the name of its value.

    Raises:
        TypeError: it has no ONNX form here; lists those that have.
    """
    if type(layer) not in WRITERS:
        known = ", ".join(kind.__name__ for kind in WRITERS)
        raise TypeError(f"{name} is a {type(layer).__name__}, which export_onnx cannot write; known: {known}")
    return WRITERS[type(layer)](g, layer, name, x)
