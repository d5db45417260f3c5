"""Powers that are matched to exponentials, and layers distilled one by one, come close to the softmax that they replace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyformer.model import ModelConfig, Transformer
from polyformer.ranges import Collector, range_loss, taps
from training.distil import Fit, distil_layers, distil_states, first_states, run_block
from training.power_match import free_channel, match_powers
from training.swap import swap_attention

# a Llama-like model with grouped heads, whose slow channels hardly turn over 16 tokens, and a BERT-like one
LLAMA = ModelConfig(
    vocab=40, length=16, width=32, heads=4, kv_heads=2, hidden=48, blocks=2, norms=("rms",) * 5, mixer="softmax",
    activation="silu", rotary=8, rotary_base=1e5, positions="none", biases=False, gated=True, head="tied",
    head_bias=False,
)  # fmt: skip
BERT = ModelConfig(
    vocab=40, length=16, width=32, heads=4, hidden=48, blocks=2, norms=("layer",) * 5, mixer="softmax", order="post",
    causal=False, token_types=2, head="none",
)  # fmt: skip
SHAPES = {"llama": LLAMA, "bert": BERT}


def model_of(shape: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SHAPES[shape])
    with torch.no_grad():  # scores of a spread that a trained model has
        for name, parameter in model.named_parameters():
            if name.endswith(("mixer.q.weight", "mixer.k.weight")):
                parameter.mul_(1.5)
    return model.eval()


def windows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 40, (count, 16), generator=torch.Generator().manual_seed(seed))


def visible(count: int) -> torch.Tensor:
    """The last positions of some windows are padding."""
    lengths = torch.randint(8, 17, (count,), generator=torch.Generator().manual_seed(2))
    return torch.arange(16) < lengths[:, None]


@torch.no_grad()
def test_freeing_a_channel_keeps_what_it_can():
    """With an empty direction nothing is lost but that the key has a one there; without, little of the scores is."""
    model = model_of("bert")
    mixer = model.blocks[0].mixer
    x = first_states(model, windows(40))
    for weight in (mixer.q.weight, mixer.k.weight):  # head 0: channel 3 repeats channel 1, so 7 directions remain
        weight[3] = weight[1]
    q, k, _ = mixer.qkv(x)
    before = q @ k.transpose(-1, -2)
    channel = free_channel(mixer, x)
    q, k, _ = mixer.qkv(x)
    after = q @ k.transpose(-1, -2)
    assert torch.equal(k[..., channel], torch.ones_like(k[..., channel]))
    assert torch.equal(q[..., channel], torch.zeros_like(q[..., channel]))
    lost = ((after - before).square().mean((0, 2, 3)) / before.square().mean((0, 2, 3))).sqrt()
    assert lost[0] < 1e-3
    assert lost.max() < 0.25


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_matched_powers_are_near_softmax(name):
    original = model_of(name)
    x, seen = first_states(original, windows(40)), None if name == "llama" else visible(40)
    ours = swap_attention(original, power=8, eps=1e-2, biases=True).blocks[0].mixer
    theirs = original.blocks[0].mixer
    x = original.blocks[0].norm1(x) if name == "llama" else x
    copied = (ours.matrix(x, seen) - theirs.matrix(x, seen)).abs().sum(-1)
    left = match_powers(theirs, ours, x, seen)
    matched = (ours.matrix(x, seen) - theirs.matrix(x, seen)).abs().sum(-1)
    assert matched.mean() < 0.4 * copied.mean()
    y, target = ours.matrix(x, seen) @ ours.value(x), theirs.matrix(x, seen) @ theirs.value(x)
    keep = torch.ones(40, 16, dtype=torch.bool) if seen is None else seen
    error = ((y - target).square().sum(-1) * keep[:, None]).sum((0, 2))
    torch.testing.assert_close(left, error / (target.square().sum(-1) * keep[:, None]).sum((0, 2)))
    assert left.max() < 0.2


def test_what_cannot_be_matched_is_refused():
    original = model_of("llama")
    x = first_states(original, windows(4))
    with pytest.raises(ValueError, match="biases=True"):
        match_powers(original.blocks[0].mixer, swap_attention(original).blocks[0].mixer, x)
    turning = Transformer(replace(LLAMA, rotary_base=1.5, length=16))
    with pytest.raises(ValueError, match="0 of 8 channels"):
        match_powers(turning.blocks[0].mixer, swap_attention(turning, biases=True).blocks[0].mixer, x)
    with pytest.raises(ValueError, match="at least 2"):
        distil_layers(original, swap_attention(original, biases=True), windows(1), fit=Fit(steps=1))


@torch.no_grad()
def test_running_a_block_gives_what_its_mixer_reads_and_answers():
    original = model_of("bert")
    x, seen = first_states(original, windows(20)), visible(20)
    read, answer, out = run_block(original.blocks[0], x, seen, batch=8)
    assert torch.equal(read, x)
    torch.testing.assert_close(answer, original.blocks[0].mixer(x, seen))
    torch.testing.assert_close(out, original.blocks[0](x, seen))


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_approaches_the_original(name):
    original, tokens = model_of(name), windows(128)
    seen = None if name == "llama" else visible(128)
    swapped = swap_attention(original, power=4, eps=1e-2, biases=True)
    kept = {k: v.clone() for k, v in original.state_dict().items()}
    fits = distil_layers(original, swapped, tokens, seen, fit=Fit(steps=80, batch=16, lr=1e-3))
    assert [f.layer for f in fits] == [0, 1]
    for f in fits:
        assert f.matched < 0.5 * f.copied
        assert f.fitted < 0.95 * f.matched
    assert all(torch.equal(v, kept[k]) for k, v in original.state_dict().items())


def test_copied_layers_approach_the_original_too_if_later():
    original, tokens = model_of("bert"), windows(128)
    swapped = swap_attention(original, power=4, eps=1e-2)
    for f in distil_layers(original, swapped, tokens, fit=Fit(steps=80, batch=16, lr=3e-3), match=False):
        assert f.matched == f.copied
        assert f.fitted < 0.8 * f.copied


def test_states_approach_the_original():
    original, tokens, seen = model_of("bert"), windows(64), visible(64)
    swapped = swap_attention(original, power=4, eps=1e-2)
    losses: list[float] = []
    distil_states(
        original, swapped, tokens, seen, fit=Fit(steps=40, lr=3e-3), watch=lambda done, loss: losses.append(loss)
    )
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]
    assert not swapped.training


def test_range_losses_hold_while_states_are_distilled():
    original, tokens = model_of("bert"), windows(64)
    swapped = swap_attention(original, power=4, eps=1e-2)
    aims = {name: (-0.1, 0.1) for name, tap in taps(swapped).items() if tap.kind == "activation"}
    losses: list[torch.Tensor] = []
    with Collector(swapped) as collector:

        def extra() -> torch.Tensor:
            assert all(len(values) == 1 for values in collector.values.values())  # of this step alone
            losses.append(range_loss(collector, aims, activation=1.0, variance=0.0, denominator=0.0))
            return losses[-1]

        distil_states(original, swapped, tokens, fit=Fit(steps=30, lr=3e-3), extra=extra)
    assert losses[-1].item() < 0.7 * losses[0].item()


def test_a_schedule_of_layers_is_swapped_and_fitted_alone():
    original = model_of("llama")
    swapped = swap_attention(original, layers=(1,), biases=True)
    assert swapped.config.layer_mixers == ("softmax", "power_softmax")
    torch.testing.assert_close(
        swapped.blocks[0].mixer(torch.ones(1, 4, 32)), original.blocks[0].mixer(torch.ones(1, 4, 32))
    )
    assert [f.layer for f in distil_layers(original, swapped, windows(16), fit=Fit(steps=2))] == [1]
    assert swap_attention(original, layers=range(2)).config.layer_mixers == ("power_softmax",) * 2
    with pytest.raises(ValueError, match=r"layers \[2\]"):
        swap_attention(original, layers=(0, 2))
