"""What a config asks for is read by a layer of the model, or refused: never left out in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyformer import mixers
from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.mixers.base import OPTIONS
from polyformer.model import ModelConfig, Transformer
from polyformer.swin import Swin, SwinConfig

BASE = ModelConfig(vocab=16, length=16, width=8, heads=2, hidden=8, blocks=2, norms=("rms",) * 5, grid=(4, 4))
SET = {"causal": False, "kv_heads": 1, "rotary": 2, "score_norm": True, "las_decay": 0.5, "las_width": 3}
READ = {
    "softmax": OPTIONS, "power_softmax": OPTIONS, "pointwise": OPTIONS, "linear": ("kv_heads", "rotary"),
    "gated_linear": ("kv_heads", "rotary"), "hyena_nd": ("causal",),
}  # fmt: skip
PAIRS = [(name, option) for name in mixers.names() for option in SET]


@pytest.mark.parametrize(("name", "option"), PAIRS, ids=lambda x: x)
def test_an_option_is_read_or_refused(name, option):
    assert set(SET) == set(OPTIONS)
    if option in READ.get(name, ()):
        assert getattr(replace(BASE, mixer=name, **{option: SET[option]}), option) == SET[option]
        return
    with pytest.raises(ValueError, match=rf"^{option}={SET[option]}, which no mixer .* reads \({name}\).*softmax"):
        replace(BASE, mixer=name, **{option: SET[option]})
    assert getattr(replace(BASE, mixers=(name, "softmax"), **{option: SET[option]}), option) == SET[option]


@pytest.mark.parametrize("name", sorted(set(mixers.names()) - {"softmax", "power_softmax", "pointwise", "hyena_nd"}))
def test_in_a_hybrid_stack_a_layer_is_what_it_is_without_what_others_read(name):
    hybrid = replace(BASE, mixers=(name, "softmax"), causal=False, las_decay=0.5, las_width=3, score_norm=True)
    layers = []
    for config in (hybrid, replace(BASE, mixer=name)):
        torch.manual_seed(0)
        layers.append(mixers.load(name)(config).eval())
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    x = torch.randn(2, 16, 8)
    assert torch.equal(layers[0](x), layers[1](x))
    buffers = [dict(layer.named_buffers()) for layer in layers]
    assert all(torch.equal(buffers[0][k], v) for k, v in buffers[1].items())  # the mask of what export writes, too
    model = Transformer(hybrid)
    model(torch.randint(0, 16, (2, 16))).sum().backward()
    assert model.blocks[1].mixer.score_norm is not None


@pytest.mark.parametrize("first", ["hyena_nd", "mamba"])
def test_a_stage_of_a_swin_may_leave_unread_what_another_reads(first):
    body = replace(BASE, mixers=(first, "softmax"), causal=False, score_norm=True, norms=("batch",) * 5)
    config = SwinConfig(body=body, classes=3, image=(8, 8), patch=2, window=2, stages=(1, 1))
    assert (config.stage(0).body.score_norm, config.stage(1).body.score_norm) == (False, True)
    Swin(config)(torch.randn(2, 1, 8, 8)).sum().backward()


def test_an_encoder_whose_mixers_are_all_causal_says_so():
    body = replace(BASE, mixer="mamba")
    assert Encoder(ClassifierConfig(body=body, classes=3))(torch.randint(0, 16, (2, 16))).shape == (2, 3)
    with pytest.raises(ValueError, match="sees no other one; use 'mean'"):
        ClassifierConfig(body=body, classes=3, pool="first")
    with pytest.raises(ValueError, match="the body is causal"):
        ClassifierConfig(body=replace(body, mixers=("mamba", "softmax")), classes=3)


@pytest.mark.parametrize("name", ["linear", "gated_linear", "mamba", "hyena"])
def test_a_mixer_that_cannot_hide_keys_is_named(name):
    model, tokens = Transformer(replace(BASE, mixer=name)), torch.zeros(1, 16, dtype=torch.int64)
    kind = type(model.blocks[0].mixer).__name__
    with pytest.raises(ValueError, match=f"mixer {kind} cannot hide keys.*power_softmax or pointwise"):
        model(tokens, visible_BT=torch.ones(1, 16, dtype=torch.bool))
