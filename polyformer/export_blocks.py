"""Residual blocks, and both ends of a Transformer, as ONNX nodes."""

from __future__ import annotations

from torch import Tensor, nn

from polyformer.encoder import Classifier
from polyformer.export_graph import Graph
from polyformer.export_layers import linear, mlp, norm
from polyformer.export_mixers import mixer
from polyformer.model import Block, Transformer


def positioned(g: Graph, model: Transformer | Classifier, x: str) -> str:
    """Embedded tokens with what the model adds to them: learned positions, the row of token type 0, both as one constant,
    or nothing.
    """
    segment: nn.Embedding | None = getattr(model, "segment", None)
    added: list[Tensor] = [] if model.position is None else [model.position]
    added += [] if segment is None else [segment.weight[:1]]
    if not added:
        return x
    return g.node("Add", [x, g.constant("position.weight", sum(added[1:], added[0]))], "position")


def block(g: Graph, layer: Block, name: str, x: str) -> str:
    """Mixer and MLP with their norms before them, behind each sum (post), or one before both (parallel)."""

    def add(left: str, right: str, part: str) -> str:
        return g.node("Add", [left, right], f"{name}.{part}.residual")

    if layer.post:
        assert layer.norm2 is not None
        x = norm(g, layer.norm1, f"{name}.norm1", add(x, mixer(g, layer.mixer, f"{name}.mixer", x), "mixer"))  # type: ignore[arg-type]
        return norm(g, layer.norm2, f"{name}.norm2", add(x, mlp(g, layer.mlp, f"{name}.mlp", x), "mlp"))  # type: ignore[arg-type]
    h = norm(g, layer.norm1, f"{name}.norm1", x)  # type: ignore[arg-type]
    mixed = add(x, mixer(g, layer.mixer, f"{name}.mixer", h), "mixer")
    h = h if layer.norm2 is None else norm(g, layer.norm2, f"{name}.norm2", mixed)  # type: ignore[arg-type]
    return add(mixed, mlp(g, layer.mlp, f"{name}.mlp", h), "mlp")


def head(g: Graph, model: Transformer, x: str) -> tuple[str, list[int]]:
    """Logits and their shape; without a head the last value itself, called states. A tied head reads the token table."""
    config = model.config
    shape = [1, config.length, config.width if config.head == "none" else config.vocab]
    if config.head == "none":
        return g.renamed("states"), shape
    assert isinstance(model.head, nn.Linear)
    weight = g.node("Transpose", ["token.weight"], "head.weight", perm=[1, 0]) if config.head == "tied" else None
    return linear(g, model.head, "head", x, weight=weight, output="logits"), shape
