"""The encoder sees both sides, hybrid stacks mix, configs survive JSON, and a small task is learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from polyformer.encoder import ClassifierConfig, Encoder
from polyformer.export import export_onnx
from polyformer.fold import folded
from polyformer.mixers.hyena import Hyena
from polyformer.mixers.mamba import Mamba
from polyformer.model import ModelConfig, Transformer

BODY = ModelConfig(
    vocab=6,
    length=8,
    width=16,
    heads=2,
    hidden=24,
    blocks=2,
    norms=("affine", "rms", "rms", "rms", "rms"),
    causal=False,
)
CONFIG = ClassifierConfig(body=BODY, classes=3)
BODIES = [
    pytest.param(BODY, id="power-softmax"),
    pytest.param(replace(BODY, mixer="softmax"), id="softmax"),
    pytest.param(replace(BODY, mixer="hyena_nd", grid=(8,)), id="hyena-both-sides"),
    pytest.param(replace(BODY, mixers=("hyena_nd", "power_softmax"), grid=(8,)), id="hybrid"),
    pytest.param(replace(BODY, parallel=True, norms=("rms",) * 3), id="parallel"),
]


def make(body: ModelConfig, **changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(replace(CONFIG, body=body, **changes))


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("body", BODIES)
def test_every_token_reaches_the_class(body, pool):
    model = make(body, pool=pool).double()
    x = model.embed(torch.randint(0, 6, (1, 8))).detach().requires_grad_()
    model.classify(x)[0, 0].backward()
    assert torch.all(x.grad.abs().sum(-1) > 1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_config_survives_json_and_rebuilds_the_model(body):
    model = make(body).eval()
    config = ClassifierConfig.from_json(model.config.to_json())
    assert config == model.config
    again = Encoder(config).eval()
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 6, (2, 8))
    torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=0)


def test_pooling_is_what_it_says():
    mean, first, tokens = make(BODY), make(BODY, pool="first"), torch.randint(0, 6, (3, 8))
    x = mean.embed(tokens)
    for block in mean.blocks:
        x = block(x)
    torch.testing.assert_close(mean(tokens), mean.head(mean.norm(x)).mean(1))
    torch.testing.assert_close(first(tokens), first.head(first.norm(x)[:, 0]))


def test_a_small_task_is_learned_that_compares_two_positions():
    # the class is whether the first and the last token agree: no single position tells
    body = replace(BODY, vocab=2, norms=("rms",) * 5, form="mean", power=2)
    torch.manual_seed(0)
    model = Encoder(ClassifierConfig(body=body, classes=2))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        tokens = torch.randint(0, 2, (64, 8))
        loss = F.cross_entropy(model(tokens), (tokens[:, 0] == tokens[:, -1]).long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokens = torch.randint(0, 2, (256, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        right = model(tokens).argmax(1) == (tokens[:, 0] == tokens[:, -1]).long()
    assert right.double().mean() > 0.95  # chance: 0.5


def test_a_hybrid_stack_has_the_mixers_it_names_and_a_mixer_without_onnx_form_is_named(tmp_path):
    config = replace(BODY, causal=True, mixers=("hyena", "mamba"))
    model = Transformer(config)
    assert [type(block.mixer) for block in model.blocks] == [Hyena, Mamba]
    assert ModelConfig.from_json(config.to_json()) == config
    tokens = torch.randint(0, 6, (1, 8))
    changed = torch.cat([tokens[:, :4], (tokens[:, 4:] + 1) % 6], 1)
    torch.testing.assert_close(model(tokens)[:, :4], model(changed)[:, :4], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"blocks\.1\.mixer is a Mamba"):
        export_onnx(model, tmp_path / "model.onnx")


def test_levels_of_a_polynomial_encoder_add_up():
    body = replace(BODY, mixer="hyena_nd", grid=(8,), norms=("affine",) * 5, activation="square")
    assert make(body).levels == 2 * (6 + 3) + 1
    with pytest.raises(ValueError, match="not polynomial"):
        _ = make(BODY).levels


def test_folding_follows_the_body():
    model = make(replace(BODY, norms=("batch",) * 5, mlp_norm=True))
    model(torch.randint(0, 6, (32, 8)))
    plain, tokens = folded(model), torch.randint(0, 6, (4, 8))
    torch.testing.assert_close(plain(tokens), model.eval()(tokens), rtol=1e-4, atol=1e-5)
    assert plain.config.body.norms == ("affine",) * 5 and not plain.config.body.mlp_norm


@pytest.mark.parametrize(
    ("make_config", "words"),
    [
        pytest.param(lambda: replace(CONFIG, body=replace(BODY, causal=True)), "causal=False", id="causal"),
        pytest.param(lambda: replace(CONFIG, pool="max"), "known: mean, first", id="pool"),
        pytest.param(lambda: replace(CONFIG, classes=0), "at least 1", id="classes"),
        pytest.param(lambda: replace(BODY, mixers=("softmax",)), "1 mixers given for 2 blocks", id="mixers"),
        pytest.param(lambda: Encoder(CONFIG)(torch.zeros(1, 5, dtype=torch.int64)), "windows of 8", id="length"),
    ],
)
def test_bad_settings_are_refused(make_config, words):
    with pytest.raises(ValueError, match=words):
        make_config()
