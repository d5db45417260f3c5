"""Activations: GELU (and its tanh form, GPT-2's), SiLU, ReLU, the square and the fourth power, and the fitted
polynomial that replaces them on a trained interval.

Every activation is an `Activation`: a `Tap`, then the function. The polynomial one holds scalar coefficients (never
one set a channel), so that a compiled circuit evaluates it once on packed slots. Degrees against error: methods.md
1.6.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.approx import Polynomial, depth_of_degree, fit, fit_weighted
from polyformer.layers import PolynomialLayer, Tap

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "square": lambda x: x * x,
    "quartic": lambda x: (x * x) * (x * x),
}
DEGREES = {"square": 2, "quartic": 4}  # of the activations that are polynomials as they stand: powers of 2
ACTIVATIONS = (*EXACT, "polynomial")


class Activation(nn.Module):
    """Elementwise function by name: gelu, gelu_tanh, silu, relu, square, quartic, or polynomial (of `degree`,
    coefficients in the state dict).
    """

    def __init__(self, kind: str, *, degree: int = 2, trainable: bool = True) -> None:
        super().__init__()
        if kind not in ACTIVATIONS:
            raise ValueError(f"unknown activation {kind!r}; known: {', '.join(ACTIVATIONS)}")
        self.kind = kind
        self.tap = Tap("activation")
        self.polynomial = PolynomialLayer(degree, trainable=trainable) if kind == "polynomial" else None

    @property
    def degree(self) -> int:
        if self.kind in DEGREES:
            return DEGREES[self.kind]
        if self.polynomial is None:
            raise ValueError(f"activation {self.kind!r} is not polynomial; use 'square', 'quartic' or 'polynomial'")
        return self.polynomial.degree

    @property
    def depth(self) -> int:
        return depth_of_degree(self.degree)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap(x)
        return EXACT[self.kind](x) if self.polynomial is None else self.polynomial(x)


def fit_activation(kind: str, degree: int, interval: tuple[float, float], *, spread: float | None = None) -> Polynomial:
    """Fit gelu, silu or relu on an interval by the minimax polynomial in absolute error, or, given a `spread`, by least
    squares under the normal density of that standard deviation around 0.

    The minimax fit of a low degree spends itself on the tails: of degree 2 on [-6, 6] it has a quarter of the curvature that
    GELU has at 0, so a model trained with it is nearly linear. Least squares keeps the curvature where inputs are
    and makes no promise at the ends; the error is measured over the whole interval either way.
    """
    if spread is None:
        return fit(lambda x: _numpy(kind, x), degree, interval)
    return fit_weighted(lambda x: _numpy(kind, x), degree, interval, lambda x: np.exp(-0.5 * (x / spread) ** 2))


def _numpy(kind: str, x: np.ndarray) -> np.ndarray:
    import torch

    return EXACT[kind](torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))).numpy()
