"""Fold the BatchNorms of a trained model away: what is left has no statistics, no square root and no division."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

from torch import nn

from polyformer.mixers.base import Attention
from polyformer.model import MLP, ModelConfig
from polyformer.norms import BATCH, BatchNorm, fold_before

M = TypeVar("M", bound=nn.Module)


def folded(model: M) -> M:
    """Return a copy in evaluation mode, equal to `model.eval()`, without a BatchNorm at a norm's site or in an MLP.

    A norm before a mixer or an MLP becomes an affine `Norm`, which costs no level and merges with the linears behind
    it; the one inside an MLP goes into the linear before it. The one over attention scores stays: it is a scale and a
    shift a head, constants that merge with mask and 1/sqrt(K). The config of the copy says what the copy is.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, MLP) and module.norm is not None:
            if module.gate is None:
                module.up = fold_before(module.up, module.norm)
            else:
                module.gate = fold_before(module.gate, module.norm)
            module.norm = None
        for name, child in list(module.named_children()):
            if isinstance(child, BatchNorm) and not isinstance(module, (MLP, Attention)):
                setattr(module, name, child.to_norm())
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        model.config = without_batch(config)  # type: ignore[assignment]
    elif config is not None:
        model.config = replace(config, body=without_batch(config.body))
    return model


def without_batch(config: ModelConfig) -> ModelConfig:
    """Return the config of a folded model: BatchNorms are affine norms, none is left in the MLPs."""
    return replace(config, norms=tuple("affine" if n == BATCH else n for n in config.norms), mlp_norm=False)
