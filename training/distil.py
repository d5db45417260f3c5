"""Distil a swapped model against the released one: layer by layer on attention outputs, then on the last states.

A layer's own step needs that layer alone: it reads what the released model's layer reads and is fitted to what that
one answers, so thousands of steps cost what tens of the whole model do. The whole model then only mends what errors
add up to. Targets inside the teacher are those of FitNets (Romero et al. 2015, arXiv 1412.6550); that the teacher's own
inputs feed every layer, so that layers can be fitted apart, is ours.

Shapes: N windows, T positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyformer.layers import beside
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.mixers.softmax import Softmax
from polyformer.model import Block, Transformer
from polyformer.models import Model, body
from polyformer.swin import Swin
from training.power_match import match_powers

Watch = Callable[[int, int, str], None]  # done, total, what


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Steps of AdamW without weight decay, batches of windows, learning rate after a warm-up of a tenth and then a
    cosine to zero.
    """

    steps: int
    batch: int = 8
    lr: float = 1e-3
    seed: int = 0

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, 10 * (step + 1) / self.steps) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """Relative errors |y' - y|^2 / |y|^2 of one attention's outputs on windows that it was not fitted to: with the
    parameters as copied, after the powers were matched, after the fit.
    """

    layer: int
    copied: float
    matched: float
    fitted: float


def distil_layers(
    original: Model,
    swapped: Model,
    inputs: Tensor,
    visible_NT: Tensor | None = None,
    *,
    fit: Fit,
    match: bool = True,
    watch: Watch | None = None,
) -> list[LayerFit]:
    """Fit every swapped attention in place to the original's outputs; the last eighth of the windows measures.

    Args:
        original: released model, softmax attention.
        swapped: what `swap_attention` made of it; blocks that kept softmax are left alone.
        inputs: windows [N, T] or images.
        visible_NT: False where a token is padding.
        fit: of each layer.
        match: start from `match_powers` (needs biases) instead of the copied parameters.
    """
    if isinstance(original, Swin):
        raise ValueError(
            "the stages of a Swin merge patches between their blocks, which are not fitted apart; set matched=0"
        )
    held = max(1, len(inputs) // 8)
    if held == len(inputs):
        raise ValueError(f"{held} window given; at least 2 are needed, one of them to measure on")
    x_NTD, found = first_states(original, inputs), []
    visible_NT = None if visible_NT is None else beside(visible_NT, x_NTD)
    for i, (theirs, ours) in enumerate(zip(original.blocks, swapped.blocks, strict=True)):  # type: ignore[arg-type]
        read_NTD, answer_NTD, x_NTD = run_block(theirs, x_NTD, visible_NT)  # type: ignore[arg-type]
        if not isinstance(theirs.mixer, Softmax) or not isinstance(ours.mixer, PowerSoftmax):
            continue
        if watch is not None:
            watch(i, len(original.blocks), f"layer {i}")
        parts = [None if v is None else v.split((len(v) - held, held)) for v in (read_NTD, answer_NTD, visible_NT)]
        train, test = ([None if p is None else p[k] for p in parts] for k in (0, 1))
        copied = relative_error(ours.mixer, *test)  # type: ignore[arg-type]
        if match:
            few = slice(0, MATCHED)
            match_powers(theirs.mixer, ours.mixer, read_NTD[few], None if visible_NT is None else visible_NT[few])
        matched = relative_error(ours.mixer, *test)  # type: ignore[arg-type]
        fit_mixer(ours.mixer, *train, fit=fit)  # type: ignore[arg-type]
        fitted = relative_error(ours.mixer, *test)  # type: ignore[arg-type]
        found.append(LayerFit(layer=i, copied=copied, matched=matched, fitted=fitted))
    return found


MATCHED = 16  # windows on which powers are matched


@torch.no_grad()
def first_states(model: Model, inputs: Tensor) -> Tensor:
    """Return what the first block reads [N, T, D]."""
    x_NTD = model.embed(inputs)
    return model.norm(x_NTD) if body(model).order == "post" else x_NTD


@torch.no_grad()
def run_block(block: Block, x_NTD: Tensor, visible_NT: Tensor | None, *, batch: int = 16) -> tuple[Tensor, ...]:
    """Return what the block's mixer reads, what it answers, and the block's output, each [N, T, D]."""
    read: list[Tensor] = []
    answers: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        read.append(args[0])
        answers.append(output)

    handle = block.mixer.register_forward_hook(keep)
    try:
        masks = [None] * len(x_NTD) if visible_NT is None else visible_NT.split(batch)
        out = [block(x, v) for x, v in zip(x_NTD.split(batch), masks, strict=False)]
    finally:
        handle.remove()
    return torch.cat(read), torch.cat(answers), torch.cat(out)


def fit_mixer(
    mixer: nn.Module, read_NTD: Tensor, answer_NTD: Tensor, visible_NT: Tensor | None = None, *, fit: Fit
) -> None:
    """Fit a mixer in place to answers on what it reads, by the relative error."""
    parameters = list(mixer.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=fit.lr, betas=(0.9, 0.98), weight_decay=0.0)
    g = torch.Generator().manual_seed(fit.seed)
    for step in range(fit.steps):
        rows = torch.randint(0, len(read_NTD), (fit.batch,), generator=g)
        for group in optimiser.param_groups:
            group["lr"] = fit.rate(step)
        loss = _error(mixer, read_NTD[rows], answer_NTD[rows], None if visible_NT is None else visible_NT[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()


@torch.no_grad()
def relative_error(mixer: nn.Module, read_NTD: Tensor, answer_NTD: Tensor, visible_NT: Tensor | None = None) -> float:
    """Return |y' - y|^2 / |y|^2 over all visible positions."""
    return float(_error(mixer, read_NTD, answer_NTD, visible_NT))


def _error(mixer: nn.Module, read_NTD: Tensor, answer_NTD: Tensor, visible_NT: Tensor | None) -> Tensor:
    y_NTD = mixer(read_NTD) if visible_NT is None else mixer(read_NTD, visible_NT)
    seen = 1.0 if visible_NT is None else visible_NT[..., None].to(y_NTD)
    return ((y_NTD - answer_NTD).square() * seen).sum() / (answer_NTD.square() * seen).sum()


def distil_states(
    original: Transformer,
    swapped: Transformer,
    tokens_NT: Tensor,
    visible_NT: Tensor | None = None,
    *,
    fit: Fit,
    extra: Callable[[], Tensor] | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Train all of a swapped encoder in place towards the original's states after every block.

    The loss is the mean over blocks of the relative error, and on top of it `extra`, called after the forward pass: range
    losses, where the encoder holds polynomials. `watch` gets steps done and the loss, after every step.
    """
    parameters = list(swapped.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=fit.lr, betas=(0.9, 0.98), weight_decay=0.0)
    g = torch.Generator().manual_seed(fit.seed)
    swapped.train()
    for step in range(fit.steps):
        rows = torch.randint(0, len(tokens_NT), (fit.batch,), generator=g)
        tokens, visible = tokens_NT[rows], None if visible_NT is None else beside(visible_NT[rows], parameters[0])
        seen = 1.0 if visible is None else visible[..., None].to(parameters[0])
        with torch.no_grad():
            theirs = _all_states(original, tokens, visible)
        errors = [
            ((a - b).square() * seen).sum() / (b.square() * seen).sum()
            for a, b in zip(_all_states(swapped, tokens, visible), theirs, strict=True)
        ]
        loss = torch.stack(errors).mean()
        if extra is not None:
            loss = loss + extra()
        for group in optimiser.param_groups:
            group["lr"] = fit.rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if watch is not None:
            watch(step + 1, float(loss.detach()))
    swapped.eval()


def _all_states(model: Transformer, tokens_NT: Tensor, visible_NT: Tensor | None) -> list[Tensor]:
    """Return the states after every block, of one forward pass, so that whoever watches the model sees it."""
    states: list[Tensor] = []
    handles = [b.register_forward_hook(lambda module, args, output: states.append(output)) for b in model.blocks]
    try:
        model(tokens_NT, visible_BT=visible_NT)
    finally:
        for handle in handles:
            handle.remove()
    return states
