"""A bidirectional encoder with a classification head: token ids of a whole text to the logits of its class.

Shapes: B batch, T positions, D width, C classes. Blocks, mixers and norms are those of `model.py`; a hybrid stack is
`ModelConfig.mixers`. As in the language model every window has the full length: a shorter text is padded with one
token, which training sees too, so that no mask depends on the data. `Classifier` is also the trunk of `vision.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyformer import mixers
from polyformer.layers import beside
from polyformer.model import ModelConfig, lone_norm, reset_linears, stack, stack_levels

C = TypeVar("C", bound="ClassifierConfig")

POOLS = ("mean", "first")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A body, the number of classes, and how positions become one vector: their mean, or the first of them."""

    body: ModelConfig
    classes: int
    pool: str = "mean"

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"unknown pool {self.pool!r}; known: {', '.join(POOLS)}")
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}; it must be at least 1")
        if self.body.causal and "causal" not in mixers.unread(self.body.layer_mixers):
            raise ValueError("the body is causal; an encoder sees both sides, set causal=False in its ModelConfig")
        if self.body.causal and self.pool == "first":
            raise ValueError("pool is 'first', and the first position of a causal body sees no other one; use 'mean'")
        for name, known in (("positions", "learned"), ("token_types", 0), ("head", "linear")):
            if getattr(self.body, name) != known:
                raise ValueError(f"{name} of the body is {getattr(self.body, name)!r}; a classifier has {known!r}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        values: dict[str, Any] = json.loads(text)
        values["body"] = ModelConfig.from_json(json.dumps(values["body"]))
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


class Classifier(nn.Module):
    """Blocks, the norm around them, pooling and head on embedded positions: x_BTD -> logits_BC."""

    def __init__(self, config: ClassifierConfig, layers: list[mixers.Mixer]) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Parameter(torch.zeros(config.body.length, config.body.width))
        self.blocks = stack(config.body, layers)
        self.norm = lone_norm(config.body)
        self.head = nn.Linear(config.body.width, config.classes)

    def reset(self) -> None:
        """Initialise as the language model does."""
        nn.init.normal_(self.position, std=0.2)
        reset_linears(self, self.config.body.blocks)

    def classify(self, x_BTD: Tensor) -> Tensor:
        """Return logits_BC. The mean is linear, so it commutes with the head and its 1/T folds into it."""
        if x_BTD.shape[1] != self.config.body.length:
            raise ValueError(
                f"{x_BTD.shape[1]} positions given, the model reads windows of {self.config.body.length}; pad or cut"
            )
        post = self.config.body.order == "post"
        x_BTD = self.norm(x_BTD) if post else x_BTD
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = x_BTD if post else self.norm(x_BTD)
        return self.head(x_BTD.mean(1) if self.config.pool == "mean" else x_BTD[:, 0])

    @property
    def levels(self) -> int:
        """Multiplicative levels from x0 to the logits; raises ValueError if a part is not polynomial. The norm that opens a
        post-norm stack belongs to the client, who embeds.
        """
        return stack_levels(self.blocks, None if self.config.body.order == "post" else self.norm)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Encoder(Classifier):
    """tokens_BT (int64) -> logits_BC."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, [mixers.load(name)(config.body) for name in config.body.layer_mixers])
        self.token = nn.Embedding(config.body.vocab, config.body.width)
        self.reset()

    def reset(self) -> None:
        super().reset()
        nn.init.normal_(self.token.weight)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return x0_BTD = E[token] + P[position]: the client computes this in clear."""
        return self.token(beside(tokens_BT, self.token.weight)) + self.position[: tokens_BT.shape[1]]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.classify(self.embed(tokens_BT))
