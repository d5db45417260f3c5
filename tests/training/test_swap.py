"""Swapping attention keeps every parameter; continued training brings the loss back down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyformer.model import ModelConfig, Transformer
from training.data import Mix, Sampler
from training.evaluate import heldout_loss
from training.loop import Schedule, run_stage
from training.swap import recover, swap_attention

# the shape of a released Llama-like model
CONFIG = ModelConfig(
    vocab=13, length=12, width=24, heads=4, kv_heads=2, hidden=32, blocks=2, norms=("rms",) * 5, mixer="softmax",
    activation="silu", rotary=6, positions="none", biases=False, gated=True, head="tied", head_bias=False,
)  # fmt: skip


def documents(count: int, seed: int) -> list[torch.Tensor]:
    """Texts with something to learn: each token is the one two places before it plus one."""
    g = torch.Generator().manual_seed(seed)
    docs = []
    for _ in range(count):
        ids = torch.randint(1, 13, (2,), generator=g).tolist()
        while len(ids) < 40:
            ids.append(ids[-2] % 12 + 1)
        docs.append(torch.tensor(ids))
    return docs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Transformer:
    out = tmp_path_factory.mktemp("softmax")
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    sampler = Sampler(documents(30, 0), length=12, vocab=13, mix=Mix(batch=16), seed=0)
    schedule = Schedule(steps=150, lr=1e-2, warmup=10, weight_decay=0.0, clip=1.0, checkpoint_every=1000)
    run_stage(model, sampler, stage="softmax", schedule=schedule, folder=out, log=out / "train.jsonl")
    return model


def test_swap_keeps_every_parameter_and_the_original(trained):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    swapped = swap_attention(trained, power=2, eps=0.5)
    assert (swapped.config.mixer, swapped.config.power, swapped.config.eps) == ("power_softmax", 2, 0.5)
    assert replace(swapped.config, mixer="softmax", power=4, eps=1.0) == trained.config
    assert swapped.head.weight is swapped.token.weight
    tokens = torch.randint(0, 13, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (swapped(tokens) - trained(tokens)).abs().max() > 0.1
        torch.testing.assert_close(swap_attention(swapped, mixer="softmax")(tokens), trained(tokens))
        swapped.token.weight.zero_()
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_continued_training_recovers(trained, tmp_path):
    held = torch.stack([d[:13] for d in documents(20, 1)])
    swapped = swap_attention(trained, power=4, eps=1.0)
    result = recover(trained, swapped, documents(30, 0), held, tmp_path, steps=60, batch=16, lr=5e-3, every=20)
    assert [step for step, _ in result.curve] == [0, 20, 40, 60]
    assert result.before == pytest.approx(heldout_loss(trained, held))
    lost, left = result.curve[0][1] - result.before, result.curve[-1][1] - result.before
    assert lost > 0.3
    assert left < 0.25 * lost
    assert result.curve[-1][1] == pytest.approx(heldout_loss(swapped, held))
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 6


def test_training_some_parameters_leaves_the_others(trained, tmp_path):
    held = torch.stack([d[:13] for d in documents(20, 1)])
    swapped = swap_attention(trained, power=4, eps=1.0)
    before = {k: v.clone() for k, v in swapped.state_dict().items()}
    result = recover(
        trained,
        swapped,
        documents(30, 0),
        held,
        tmp_path,
        steps=20,
        lr=5e-3,
        every=10,
        heldout_batch=7,
        only=("mixer.",),
    )
    assert result.curve[-1][1] < result.curve[0][1]
    for name, value in swapped.state_dict().items():
        assert torch.equal(value, before[name]) == (".mixer." not in name)
    assert all(p.requires_grad for p in swapped.parameters())
    with pytest.raises(ValueError, match="nothing to train"):
        recover(trained, swapped, documents(3, 0), held, tmp_path, steps=1, every=10, only=("attention",))


def test_what_cannot_be_swapped_or_trained_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="unknown mixer"):
        swap_attention(trained, mixer="softmin")
    hybrid = Transformer(replace(CONFIG, mixers=("softmax", "hyena")))
    with pytest.raises(ValueError, match="does not take the parameters of 'hyena' in block 1"):
        swap_attention(hybrid)
    with torch.no_grad():
        hybrid.blocks[1].mixer.inputs.bias.fill_(0.5)
    assert torch.all(swap_attention(hybrid, layers=(0,), biases=True).blocks[1].mixer.inputs.bias == 0.5)
    encoder = Transformer(replace(CONFIG, head="none"))
    with pytest.raises(ValueError, match="no head"):
        recover(encoder, encoder, documents(3, 0), torch.zeros(1, 13, dtype=torch.int64), tmp_path, steps=1)
    with pytest.raises(ValueError, match="multiple of 10"):
        recover(trained, trained, documents(3, 0), torch.zeros(1, 13, dtype=torch.int64), tmp_path, steps=1, every=15)
