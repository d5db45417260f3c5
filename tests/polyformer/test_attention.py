"""Grouped queries, rotary positions, both directions and hidden keys: every attention mixer against its reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polyformer import mixers
from polyformer.model import ModelConfig, Transformer

BASE = ModelConfig(vocab=16, length=7, width=24, heads=4, hidden=16, blocks=1, norms=("affine",) * 3, eps=0.7)
SHAPES = {
    "grouped": {"kv_heads": 2},
    "one-key-head": {"kv_heads": 1},
    "rotary": {"rotary": 6},
    "partial-rotary": {"rotary": 2, "rotary_base": 50.0},
    "no-biases": {"biases": False},
    "both-directions": {"causal": False},
    "all": {"kv_heads": 2, "rotary": 4, "biases": False, "causal": False},
}
KINDS = {
    "softmax": {"mixer": "softmax"},
    "stable": {"form": "stable"},
    "mean": {"form": "mean", "power": 2},
    "rows": {"form": "rows"},
    "pointwise": {"mixer": "pointwise"},
}
HIDDEN = {"all-visible": False, "padded": True}


def make(**changes):
    torch.manual_seed(0)
    config = replace(BASE, **changes)
    mixer = mixers.load(config.mixer)(config).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.5)
    return mixer


def inputs() -> Tensor:
    return torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def visible(padded: bool) -> tuple[Tensor, ...]:
    return (torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),) if padded else ()


@pytest.mark.parametrize("padded", HIDDEN.values(), ids=HIDDEN.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_matrix_and_gradients_equal_the_reference(shape, kind, padded):
    mixer, hidden = make(**shape, **kind), visible(padded)
    results = []
    for run in (mixer.forward, mixer.reference):
        x = inputs().requires_grad_()
        mixer.zero_grad()
        y = run(x, *hidden)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y.detach(), x.grad, mixer.q.weight.grad.clone(), mixer.k.weight.grad.clone()))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    y = mixer.o(mixer.merge(mixer.matrix(inputs(), *hidden) @ mixer.value(inputs())))
    torch.testing.assert_close(y.detach(), results[0][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_hidden_keys_are_as_if_absent(kind):
    mixer = make(causal=False, **kind)
    padded, alone = mixer(inputs(), *visible(True))[1, :4], mixer(inputs()[1:, :4])[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)
    assert (mixer(inputs())[1, :4] - alone).abs().max() > 0.01


def test_grouped_queries_are_repeated_key_heads():
    grouped, whole = make(kv_heads=2, rotary=6), make(rotary=6)
    whole.q.load_state_dict(grouped.q.state_dict())
    whole.o.load_state_dict(grouped.o.state_dict())
    with torch.no_grad():
        for ours, theirs in ((whole.k, grouped.k), (whole.v, grouped.v)):
            ours.weight.copy_(theirs.weight.view(2, 6, 24).repeat_interleave(2, 0).reshape(24, 24))
            ours.bias.copy_(theirs.bias.view(2, 6).repeat_interleave(2, 0).reshape(24))
    torch.testing.assert_close(grouped(inputs()), whole(inputs()), rtol=1e-10, atol=1e-10)


def test_rotary_scores_depend_on_the_distance_alone():
    mixer = make(rotary=4)
    q, k = torch.randn(2, 1, 4, 1, 6, dtype=torch.float64).expand(2, 1, 4, 7, 6)
    scores = mixer.rotate(q) @ mixer.rotate(k).transpose(-1, -2)
    for shift in range(-3, 4):
        diagonal = scores.diagonal(shift, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=0, atol=1e-6)
    assert (scores[..., 0, 0] - scores[..., 0, 3]).abs().max() > 0.01
    torch.testing.assert_close(mixer.rotate(q)[..., 4:], q[..., 4:], rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"rotary": 4}, {"las_decay": 0.5}], ids=str)
def test_weights_of_bfloat16_beside_buffers_of_float32(changes):
    """What sharding in bfloat16 makes of a model: it gathers parameters in that type and leaves buffers alone."""
    mixer = make(mixer="softmax", **changes).float().eval()
    expected = mixer(inputs().float())
    for p in mixer.parameters():
        p.data = p.data.bfloat16()
    q, k, v = mixer.qkv(inputs().bfloat16())
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    y = mixer(inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"rotary": 3}, "even"),
        ({"rotary": 8}, "head size 6"),
        ({"order": "middle"}, "known: pre, post"),
        ({"positions": "sine"}, "known: learned, none"),
        ({"head": "two"}, "known: linear, tied, none"),
        ({"order": "post", "parallel": True, "norms": ("affine",) * 2}, "parallel=False"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


@pytest.mark.parametrize("head", ["linear", "tied", "none"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_every_new_part_trains(order, head):
    torch.manual_seed(0)
    config = replace(
        BASE,
        order=order,
        head=head,
        causal=False,
        kv_heads=2,
        rotary=2,
        token_types=2,
        gated=True,
        norms=("layer",) * 3,
    )
    model = Transformer(config)
    tokens = torch.randint(0, 16, (2, 7))
    y = model(tokens, visible_BT=visible(True)[0], types_BT=(tokens > 8).long())
    assert y.shape == (2, 7, 24 if head == "none" else 16)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters())
    # the logits of a fresh model are of order one, whichever way its head is made
    assert 0.05 < float(y.detach().std()) < 3


def test_types_without_a_table_are_refused():
    with pytest.raises(ValueError, match="token_types is 0"):
        Transformer(BASE)(torch.zeros(1, 7, dtype=torch.int64), types_BT=torch.zeros(1, 7, dtype=torch.int64))
