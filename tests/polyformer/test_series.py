"""The series with a lean backward pass against the recurrence under autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyformer import series as module
from polyformer.approx import Basis, evaluate
from polyformer.series import derivative, series

A, B = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-0.1, dtype=torch.float64)


def random(degree: int, shape: tuple[int, ...] = (3, 5, 7)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(degree)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(degree + 1, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("basis", ["chebyshev", "power"])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4, 9, 31])
@pytest.mark.parametrize("block", [1 << 17, 16])  # whole, and in parts of which the last is short
def test_values_and_gradients_are_those_of_the_recurrence(
    basis: Basis, degree: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    x, c = random(degree)
    ours, theirs = series(x, c, A, B, basis), evaluate(x, c.unbind(), A, B, basis)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    weight = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (x, c)),
        torch.autograd.grad((theirs * weight).sum(), (x, c), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("basis", ["chebyshev", "power"])
def test_gradients_of_gradients_are_right(basis: Basis) -> None:
    x, c = random(4, (6,))
    assert torch.autograd.gradgradcheck(lambda x, c: series(x, c, A, B, basis), (x, c))


@pytest.mark.parametrize("degree", [1, 2, 7])
def test_derivative_of_a_chebyshev_series_is_numpys(degree: int) -> None:
    from numpy.polynomial import chebyshev

    c = torch.randn(degree + 1, dtype=torch.float64)
    torch.testing.assert_close(derivative(degree, "chebyshev") @ c, torch.from_numpy(chebyshev.chebder(c.numpy())))


def test_frozen_coefficients_and_inputs_get_no_gradient() -> None:
    x, c = random(3)
    series(x, c.detach(), A, B, "chebyshev").sum().backward()
    assert x.grad is not None and c.grad is None
    series(x.detach(), c, A, B, "chebyshev").sum().backward()
    assert c.grad is not None


def test_backward_keeps_the_input_alone() -> None:
    x, c = random(31, (64, 64))
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Any:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        series(x, c, A, B, "chebyshev")
    assert sum(v.numel() for v in kept) <= x.numel() + c.numel() + 2


def test_it_can_be_exported() -> None:
    x, c = random(5)

    class Layer(nn.Module):
        c: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("c", c.detach())

        def forward(self, x: Tensor) -> Tensor:
            return series(x, self.c, A, B, "chebyshev")

    exported = torch.export.export(Layer().eval(), (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), series(x, c, A, B, "chebyshev").detach())
