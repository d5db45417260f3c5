"""Small parts that everything else is made of: a `Tap` to watch a value, a `PolynomialLayer` to evaluate a polynomial, and
`beside`, by which every model takes its inputs from any device.

A `Tap` is an identity through which flows a value that will be approximated. Hooks on it (see `ranges.py`) collect
ranges and losses without running anything twice, and its dotted path is the name under which the range is reported.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polyformer.approx import Basis, Polynomial, unit_map
from polyformer.series import series

TapKind = Literal["activation", "variance", "denominator"]


def beside(x: Tensor, weight: Tensor) -> Tensor:
    """Return x on the device of a weight. Batches are drawn on the CPU, and each model's `embed` brings them to itself."""
    return x.to(weight.device)


class Tap(nn.Module):
    """Identity on the input of an approximated function. `kind` picks the range loss: absolute for activations, log
    ratio otherwise.
    """

    def __init__(self, kind: TapKind) -> None:
        super().__init__()
        self.kind: TapKind = kind

    def forward(self, x: Tensor) -> Tensor:
        return x


class PolynomialLayer(nn.Module):
    """A `Polynomial` inside a model: coefficients c0..cn, the input map a x + b and the interval live in the state
    dict.

    Built by shape alone (degree and basis) so that a checkpoint can be loaded into it, then filled with `set`. With
    `trainable=True` the coefficients are parameters (an activation may be tuned); otherwise they are buffers and keep
    their error contract.

    In training mode inputs are clamped to the interval, so that one early excursion does not blow up all layers behind
    it; the range losses look at the values before the clamp and bring them in. In evaluation mode, as in the ONNX file
    and under encryption, nothing is clamped.
    """

    coefficients: Tensor
    map: Tensor
    interval: Tensor

    def __init__(self, degree: int, *, basis: Basis = "chebyshev", trainable: bool = False) -> None:
        super().__init__()
        self.degree, self.basis = degree, basis
        coefficients = torch.zeros(degree + 1)
        if trainable:
            self.coefficients = nn.Parameter(coefficients)
        else:
            self.register_buffer("coefficients", coefficients)
        self.register_buffer("map", torch.tensor([1.0, 0.0]))
        self.register_buffer("interval", torch.tensor([-1.0, 1.0]))

    @torch.no_grad()
    def set(self, p: Polynomial) -> PolynomialLayer:
        """Fill in a polynomial of the same degree and basis; returns self."""
        if (p.degree, p.basis) != (self.degree, self.basis):
            raise ValueError(
                f"polynomial is {p.basis} of degree {p.degree}, the layer {self.basis} of degree {self.degree}"
            )
        self.coefficients.copy_(torch.tensor(p.coefficients, dtype=torch.float64))
        self.map.copy_(torch.tensor([p.a, p.b], dtype=torch.float64))
        self.interval.copy_(torch.tensor(p.interval, dtype=torch.float64))
        return self

    @torch.no_grad()
    def rescale_input(self, factor: float) -> None:
        """Turn p(x) into p(x / factor): the interval and the input map follow, the coefficients stay."""
        self.interval.mul_(factor)
        lo, hi = self.interval.tolist()
        self.map.copy_(torch.tensor(unit_map(lo, hi), dtype=torch.float64))

    def polynomial(self) -> Polynomial:
        """Return the polynomial now in the layer (no error is claimed: training may have moved the coefficients)."""
        a, b = self.map.tolist()
        lo, hi = self.interval.tolist()
        return Polynomial(coefficients=tuple(self.coefficients.tolist()), interval=(lo, hi), basis=self.basis, a=a, b=b)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x.clamp(self.interval[0], self.interval[1])
        return series(x, self.coefficients, self.map[0], self.map[1], self.basis)
