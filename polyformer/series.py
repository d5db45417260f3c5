"""A series sum_k c_k B_k(a x + b) whose backward pass keeps its input and nothing else.

Autograd keeps a tensor of the size of x for every degree of Clenshaw's recurrence, 32 of them at degree 31, where an exact
activation keeps one. Here the backward pass runs two recurrences
anew: that of the derivative, which is a series of one degree less in the same basis, and that of the basis itself,
against which the gradient is summed for the coefficients. Both are built of differentiable parts, so gradients of gradients
exist as well.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from polyformer.approx import Basis, evaluate

BLOCK = 1 << 17  # elements for each thread


def series(x: Tensor, coefficients_K: Tensor, a: Tensor, b: Tensor, basis: Basis) -> Tensor:
    """Return sum_k c_k B_k(a x + b) with a lean backward pass; the same numbers as `evaluate`.

    Args:
        x: any shape, of a floating type.
        coefficients_K: c_0 .. c_n.
        a, b: 0-d, the map onto the basis' interval; they get no gradient.
        basis: chebyshev or power.
    """
    # A compiler fuses the recurrence and decides by itself what to compute again; a certificate looks at every operation.
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return evaluate(x, coefficients_K.unbind(), a, b, basis)
    y: Tensor = _Series.apply(x, coefficients_K, a, b, basis)
    return y


class _Series(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, coefficients_K: Tensor, a: Tensor, b: Tensor, basis: Basis) -> Tensor:
        return _evaluate(x, coefficients_K, a, b, basis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, coefficients_K, a, b, ctx.basis = inputs
        ctx.save_for_backward(x, coefficients_K, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, c_K, a, b = ctx.saved_tensors
        grad_x = grad_c = None
        if ctx.needs_input_grad[0]:
            if len(c_K) == 1:
                grad_x = torch.zeros_like(x)
            else:
                slope_K = derivative(len(c_K) - 1, ctx.basis).to(c_K.device) @ c_K.double()
                grad_x = grad * a * series(x, slope_K.to(c_K.dtype), a, b, ctx.basis)
        if ctx.needs_input_grad[1]:
            grad_c = _against_basis(grad, x, len(c_K), a, b, ctx.basis).to(c_K.dtype)
        return grad_x, grad_c, None, None, None


def _evaluate(x: Tensor, coefficients_K: Tensor, a: Tensor, b: Tensor, basis: Basis) -> Tensor:
    """Return the series by the recurrences of `approx.evaluate`, Clenshaw in blocks and partly in place."""
    c = coefficients_K.unbind()
    if basis == "power" or len(c) < 3:
        return evaluate(x, c, a, b, basis)

    def clenshaw(x: Tensor) -> Tensor:
        u = x * a + b
        two_u = u + u
        b1, b2 = two_u * c[-1] + c[-2], c[-1]
        for k in range(len(c) - 3, 0, -1):
            b1, b2 = (two_u * b1).sub_(b2).add_(c[k]), b1
        return (u * b1).sub_(b2).add_(c[0])

    blocks = in_blocks(x)
    return clenshaw(x) if len(blocks) == 1 else torch.cat([clenshaw(block) for block in blocks]).view(x.shape)


def _against_basis(grad: Tensor, x: Tensor, count: int, a: Tensor, b: Tensor, basis: Basis) -> Tensor:
    """Return sum(grad B_k(a x + b)) for k < count [K]."""

    def sums(grad: Tensor, x: Tensor) -> Tensor:
        u = x * a + b
        before, now = grad, grad * u
        found = [before.sum(), now.sum()]
        factor = u if basis == "power" else u + u
        for _ in range(count - 2):
            before, now = now, factor * now if basis == "power" else factor * now - before
            found.append(now.sum())
        return torch.stack(found[:count])

    return torch.stack([sums(*pair) for pair in zip(in_blocks(grad), in_blocks(x), strict=True)]).sum(0)


def in_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Return x, or on a CPU flat parts of it that stay in the caches: a recurrence is as fast as its passes over memory."""
    block = BLOCK * torch.get_num_threads()
    if x.device.type != "cpu" or x.numel() <= block:
        return (x,)
    return x.flatten().split(block)


@functools.cache
def derivative(degree: int, basis: Basis) -> Tensor:
    """Return the matrix [degree, degree + 1] that turns the coefficients of a series into those of its derivative in u.

    Chebyshev: T_k' = 2 k (T_{k-1} + T_{k-3} + ...), where a last term T_0 counts half.
    """
    D = torch.zeros(degree, degree + 1, dtype=torch.float64)
    for k in range(1, degree + 1):
        if basis == "power":
            D[k - 1, k] = k
        else:
            for j in range(k - 1, -1, -2):
                D[j, k] = 2 * k if j else k
    return D
