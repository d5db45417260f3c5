"""The factored optimiser against its closed form, its rounding, and both optimisers on a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyformer import mixers
from polyformer.model import Transformer
from training import accounts, optimiser, parallel, recipes
from training.optimiser import Factored, round_stochastically


def losses(name: str, dtype: torch.dtype, steps: int = 60) -> list[float]:
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 12, generator=g), torch.randn(12, 5, generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5)).to(dtype)
    opt = optimiser.build(name, model, lr=1e-2, weight_decay=0.0)
    found = []
    for _ in range(steps):
        loss = F.mse_loss(model(x.to(dtype)).float(), x @ target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", optimiser.OPTIMISERS)
def test_optimisers_lower_a_loss_and_repeat(name, dtype):
    found = losses(name, dtype)
    assert found[-1] < 0.6 * found[0]
    assert losses(name, dtype) == found


def test_a_gradient_of_rank_one_gives_its_signs():
    """r_i c_j / mean(r) is then the square of the gradient itself, and the update its sign."""
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, -0.1])
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.outer(a, b)
    Factored([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), -0.1 * torch.outer(a, b).sign())


def test_second_step_follows_the_definition():
    g = torch.Generator().manual_seed(0)
    p, lr, decay = nn.Parameter(torch.randn(4, 3, generator=g)), 0.05, 0.2
    expected, row, column = p.detach().clone(), torch.zeros(4), torch.zeros(3)
    opt = Factored([p], lr=lr, weight_decay=decay)
    for t in (1, 2, 3):
        p.grad = torch.randn(4, 3, generator=g) * 10**-t
        opt.step()
        kept = 1 - t**-0.8
        for i in range(4):
            row[i] = kept * row[i] + (1 - kept) * sum(p.grad[i, j] ** 2 for j in range(3)) / 3
        for j in range(3):
            column[j] = kept * column[j] + (1 - kept) * sum(p.grad[i, j] ** 2 for i in range(4)) / 4
        update = torch.stack(
            [torch.stack([p.grad[i, j] / (row[i] * column[j] / row.mean()) ** 0.5 for j in range(3)]) for i in range(4)]
        )
        update = update / max(1.0, float(update.square().mean().sqrt()))
        expected = expected * (1 - lr * decay) - lr * update
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_is_right_on_average_and_exact_on_bfloat16():
    g = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, -1.5, 3.140625, -(2.0**-100), 0.0078125])
    assert torch.equal(round_stochastically(exact, g).float(), exact)
    for value in (1.001, -1.001, 0.3, -7e-5):
        x = torch.full((200_000,), value)
        rounded = round_stochastically(x, g).float()
        step = 2.0**-8 * abs(value) * 2
        assert (rounded - x).abs().max() < step
        assert abs(float((rounded.double() - x.double()).mean())) < 5 * step / 200_000**0.5


def test_small_updates_move_bfloat16_weights():
    """An update of 1/1000 of the weight is lost by rounding to nearest, and kept on average here."""
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    opt = Factored([p], lr=1e-3)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        opt.step()
    assert torch.ones(1, dtype=torch.bfloat16) - 1e-3 == 1
    assert float(p.detach().float().mean()) == pytest.approx(1 - 20e-3, abs=1e-3)


@pytest.mark.parametrize("name", optimiser.OPTIMISERS)
def test_state_takes_the_bytes_that_the_accounts_say(name):
    model = Transformer(recipes.load("tiny_cpu").model)
    opt = optimiser.build(name, model, lr=1e-3, weight_decay=0.1)
    model(torch.zeros(1, 32, dtype=torch.int64)).sum().backward()
    opt.step()
    held = sum(t.numel() * t.element_size() for state in opt.state.values() for t in state.values())
    assert held == optimiser.state_bytes(name, model)


@pytest.mark.parametrize("name", [n for n in mixers.names() if n != "hyena_nd"])
def test_groups_hold_every_parameter_once_and_decay_weights_of_linears_alone(name):
    changes = {"hyena_window": "learned"} if name == "hyena" else {"head": "tied"} if name == "softmax" else {}
    model = Transformer(replace(recipes.load("tiny_cpu").model, mixer=name, token_types=2, **changes))
    decayed, others = optimiser.parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {names[id(p)] for p in decayed["params"]}
    assert found == (linears - {"head.weight"} if changes.get("head") == "tied" else linears)
    assert {"token.weight", "position", "segment.weight", "norm.gamma"} <= {names[id(p)] for p in others["params"]}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_groups_of_a_sharded_model_are_those_of_the_whole_one():
    whole = Transformer(recipes.load("tiny_cpu").model)
    sharded = accounts.on_meta(whole.config)
    with parallel.processes() as mesh:
        parallel.apply(sharded, parallel.Plan(), mesh)
        for ours, theirs in zip(*(optimiser.parameter_groups(m, 0.1) for m in (whole, sharded)), strict=True):
            assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="adamw, factored"):
        optimiser.build("sgd", nn.Linear(1, 1), lr=1.0, weight_decay=0.0)
