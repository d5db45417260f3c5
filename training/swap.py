"""Swap the attention of a trained or released model and go on training (methods.md 1.4, stages 1 and 2).

The parameters q, k, v, o are the same for every attention mixer, so the swap copies them and changes the score
non-linearity alone. Put onto a frozen softmax checkpoint it is a bug: PowerSoftmax keeps the order of scores only in
|s|, so a swapped model must be trained on. `recover` does that and returns the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from polyformer.model import ModelConfig, Transformer
from polyformer.models import M, body, rebuilt
from training.data import EOT_ID, Mix, Sampler
from training.evaluate import heldout_loss
from training.loop import Schedule, run_stage
from training.recipe import Progress


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Continued training after a swap. Losses in nats a token; `curve` holds (steps done, held-out loss), the first at
    0 steps.
    """

    before: float  # of the model before the swap
    curve: tuple[tuple[int, float], ...]


def swapped_config(
    before: ModelConfig,
    *,
    mixer: str,
    power: int,
    eps: float,
    form: str,
    layers: Sequence[int] | None = None,
    biases: bool = False,
) -> ModelConfig:
    """Return a config with another mixer in some layers, None in all; `biases` adds them where there are none.

    Raises:
        ValueError: a layer does not exist, or the mixer does not go with the config.
    """
    blocks = range(before.blocks)
    chosen = set(blocks if layers is None else layers)
    if not chosen <= set(blocks):
        raise ValueError(f"layers {sorted(chosen - set(blocks))} given; the model has blocks 0 to {blocks[-1]}")
    mixed = () if layers is None else tuple(mixer if i in chosen else before.layer_mixers[i] for i in blocks)
    return replace(
        before,
        mixer=mixer if layers is None else before.mixer,
        mixers=mixed,
        power=power,
        eps=eps,
        form=form,
        reciprocal="exact",
        biases=before.biases or biases,
    )


def swap_attention(
    model: M,
    *,
    mixer: str = "power_softmax",
    power: int = 4,
    eps: float = 1.0,
    form: str = "stable",
    layers: Sequence[int] | None = None,
    biases: bool = False,
) -> M:
    """Return a copy of a model with another attention mixer and the same parameters; the original is left alone.

    Args:
        mixer, power, eps, form: of the new attention.
        layers: the blocks that get it, the others keep theirs; None is all.
        biases: give zero biases to the linears of a model that has none (`match_powers` needs those of q and k).

    Raises:
        ValueError: the mixer has parameters that the model lacks, or the other way round; a layer does not exist.
    """
    before = body(model)
    config = swapped_config(before, mixer=mixer, power=power, eps=eps, form=form, layers=layers, biases=biases)
    swapped = rebuilt(model, config)
    state = model.state_dict()
    if config.biases and not before.biases:
        # a new model's biases are zero, so they may stay as they are; some mixers have their own in any case
        fresh = swapped.state_dict()
        state = {k: v for k, v in fresh.items() if k.startswith("blocks.") and k.endswith(".bias")} | state
    result = swapped.load_state_dict(state, strict=False)
    # `row_T`, the public factors of the form `rows`, starts at its own value and is not learned
    missing = [name for name in result.missing_keys if not name.endswith("row_T")]
    unexpected = [name for name in result.unexpected_keys if not name.endswith("row_T")]
    if missing or unexpected:
        layer = int((missing + unexpected)[0].split(".")[1])
        raise ValueError(
            f"mixer {mixer!r} does not take the parameters of {before.layer_mixers[layer]!r} in block {layer}: missing {missing[:3]}, "
            f"left over {unexpected[:3]}; swap between softmax and power_softmax"
        )
    return swapped.train(model.training)


def recover(
    original: Transformer,
    swapped: Transformer,
    docs: Sequence[Tensor],
    heldout_NS: Tensor,
    out: Path,
    *,
    steps: int,
    batch: int = 8,
    lr: float = 1e-4,
    warmup: int = 10,
    every: int = 50,
    checkpoint_every: int | None = None,
    heldout_batch: int = 256,
    only: Sequence[str] = (),
    seed: int = 0,
    end: int = EOT_ID,
    progress: Progress | None = None,
) -> Recovery:
    """Train `swapped` in place on next-token loss and measure it before, every `every` steps and at the end.

    Args:
        docs: training documents as token ids, one int64 vector each; `end` is the id that ends one.
        heldout_NS: held-out windows [n, T + 1], T at most the model's window.
        out: folder for `train.jsonl` and the checkpoint; an interrupted run goes on there and measures from there. The
            checkpoint stays: keep the model, then `loop.discard_checkpoint(out / "checkpoints", "swap")`.
        steps, batch, lr, warmup: of the schedule.
        every: steps between measurements, a multiple of 10 (the loop reports every 10).
        checkpoint_every: steps between checkpoints (of a large model three times its size); None is `every`.
        only: parts of parameter names, such as "mixer." and "norm": the others stay as they are and cost neither
            gradient nor optimiser state; () trains all.
        heldout_batch: windows measured at once: their logits are heldout_batch x T x vocabulary floats.

    Raises:
        ValueError: the model has no head, so there is no next-token loss; `every` is no multiple of 10; no parameter
            has a name with a part of `only`.
    """
    if every < 10 or every % 10:
        raise ValueError(f"every is {every}; it must be a multiple of 10")
    if swapped.config.head == "none":
        raise ValueError("the model has no head (head is 'none'); distil its states instead of training on tokens")
    chosen = {name for name, _ in swapped.named_parameters() if not only or any(part in name for part in only)}
    if not chosen:
        raise ValueError(f"no parameter has {' or '.join(only)} in its name, so there is nothing to train")
    out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(
        docs, length=heldout_NS.shape[1] - 1, vocab=swapped.config.vocab, mix=Mix(batch=batch), seed=seed, end=end
    )
    before = heldout_loss(original.eval(), heldout_NS, batch=heldout_batch)
    curve = [(0, heldout_loss(swapped.eval(), heldout_NS, batch=heldout_batch))]
    if progress is not None:
        progress("swap", 0, steps, {"heldout": curve[0][1]})

    def measured(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if done % every == 0 or done == total:
            swapped.eval()
            curve.append((done, heldout_loss(swapped, heldout_NS, batch=heldout_batch)))
            swapped.train()
            figures = figures | {"heldout": curve[-1][1]}
        if progress is not None:
            progress(stage, done, total, figures)

    for name, parameter in swapped.named_parameters():
        parameter.requires_grad_(name in chosen)
    run_stage(
        swapped,
        sampler,
        stage="swap",
        schedule=Schedule(
            steps=steps,
            lr=lr,
            warmup=min(warmup, max(1, steps // 4)),
            weight_decay=0.0,
            clip=1.0,
            checkpoint_every=checkpoint_every or every,
        ),
        folder=out / "checkpoints",
        log=out / "train.jsonl",
        progress=measured,
    )
    swapped.requires_grad_(True)
    return Recovery(before=before, curve=tuple(curve))
