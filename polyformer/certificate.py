"""The polynomial certificate of a torch model: its exact degree, a bound on depth, and the layers that are in the way.

    certify(model)                     a language model, an encoder, a ViT or a Swin, as a function of the embedded input x0
    certify(layer, shape=(T, D))       any layer that maps x_BTD

The input is a ray x0 + t d with random coefficients in a prime field (`field.py`; the measured degree of methods.md 3.3,
after arXiv 2502.02209). Following the coefficient of the highest power of t through the model gives a degree that is an
upper bound by construction and, where that coefficient is not zero, is attained: both together are the exact degree,
also of a deep model whose degree is in the millions. If leading parts cancel, and for models that divide, the outputs
at many points t decide: the degree is the index of the last difference that does not vanish, and that of a quotient
comes out of its values by the extended Euclidean algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyformer.field import FieldTensor, Ray, UnsupportedError, reduced
from polyformer.interpolation import degree_of_values, degrees_of_quotient
from polyformer.mixers.base import Mixer
from polyformer.mixers.power_softmax import PowerSoftmax
from polyformer.model import Block

BEYOND = "degrees that {} points of a ray do not decide (certify with more)"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a model is as a function of its input.

    `degree` is the exact total degree, None where it is no polynomial or was not found; `numerator` and `denominator`
    are the degrees of the reduced quotient of one output, None likewise. `depth` is the least multiplicative depth of
    any circuit of that degree, ceil(log2 degree); `levels` what the model's own schedule takes, plaintext products
    included. `growth` is the degree after each block. `offending` lists (layer, operation) that is no field operation,
    `divisions` the layers that divide by what depends on the input. `points` is how many were tried, where degrees came from
    values.
    """

    kind: Literal["polynomial", "rational", "neither"]
    degree: int | None = None
    numerator: int | None = None
    denominator: int | None = None
    depth: int | None = None
    levels: int | None = None
    growth: tuple[tuple[str, int], ...] = ()
    offending: tuple[tuple[str, str], ...] = ()
    divisions: tuple[str, ...] = ()
    points: int | None = None

    def __str__(self) -> str:
        if self.kind == "neither":
            layers = ", ".join(f"{layer} ({operation})" for layer, operation in self.offending)
            return f"not polynomial; in the way: {layers}"
        if self.kind == "rational":
            found = f"of {BEYOND}" if self.numerator is None else f"degrees {self.numerator} / {self.denominator}"
            return f"rational, {found.format(self.points)}; divides in {', '.join(self.divisions)}"
        if self.degree is None:
            return f"polynomial, of {BEYOND}".format(self.points)
        spent = f"; {self.levels} levels used" if self.levels is not None else ""
        return f"polynomial of degree {self.degree:,}, so of depth {self.depth} at least{spent}"


def certify(
    model: nn.Module, *, shape: tuple[int, int] | None = None, points: int = 512, rays: int = 2, seed: int = 0
) -> Certificate:
    """Certify a model, or a layer on inputs of `shape` (T, D); parameters and mode stay as they are.

    Args: `points` bounds the degrees that evaluation alone can find, those of a quotient together to points - 2: two blocks
    that divide, of some positions, have more than the 512; `rays` are tried, and the largest degree counts.

    Raises:
        ValueError: a layer without `shape`; or an operation that cannot be followed and has no slow reference.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _followable(model):
            passes = [_Pass(model, shape, leading=True, points=1, seed=seed + i) for i in range(rays)]
            first = passes[0].ray
            if first.offences:
                return Certificate(kind="neither", offending=tuple(first.offences), divisions=tuple(first.divisions))
            if first.divisions:
                return _rational(model, shape, points, rays, seed, tuple(first.divisions))
            return _polynomial(model, shape, points, passes, seed)
    finally:
        for module, mode in training.items():
            module.training = mode


def measured_degree(
    model: nn.Module, *, shape: tuple[int, int] | None = None, points: int = 512, rays: int = 1, seed: int = 0
) -> int | None:
    """Return the degree of a polynomial model from its values at `points` points of each ray; None if they are too
    few. It errs, downwards, only where a number that is not zero is zero modulo PRIME at every ray.
    """
    with torch.no_grad(), _followable(model):
        runs = [_Pass(model, shape, leading=False, points=points, seed=seed + i) for i in range(rays)]
    found = [degree_of_values(run.combined()) for run in runs]
    return None if None in found else max(d for d in found if d is not None)


def _polynomial(
    model: nn.Module, shape: tuple[int, int] | None, points: int, passes: list[_Pass], seed: int
) -> Certificate:
    best = max(passes, key=lambda p: p.output.top)
    degree: int | None = best.output.top
    measured = bool(best.ray.vanished) or not best.output.entries.any()
    if measured:
        degree = measured_degree(model, shape=shape, points=points, rays=len(passes), seed=seed)
    return Certificate(
        kind="polynomial",
        degree=degree,
        depth=None if degree is None else max(0, (max(degree, 1) - 1).bit_length()),
        levels=_levels(model),
        growth=tuple(best.growth) if not best.ray.vanished else (),
        points=points if measured else None,
    )


def _rational(
    model: nn.Module, shape: tuple[int, int] | None, points: int, rays: int, seed: int, divisions: tuple[str, ...]
) -> Certificate:
    found = []
    for i in range(rays):
        size, degrees = 64, None
        while degrees is None and size <= points:
            run = _Pass(model, shape, leading=False, points=size, seed=seed + i)
            degrees = degrees_of_quotient(run.one_row())
            size *= 2
        found.append(degrees)
    known = [d for d in found if d is not None]
    numerator, denominator = max(known) if len(known) == rays else (None, None)
    return Certificate(
        kind="rational", numerator=numerator, denominator=denominator, divisions=divisions, points=points
    )


class _Pass:
    """One evaluation along a random ray."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, int] | None, *, leading: bool, points: int, seed: int
    ) -> None:
        self.ray = Ray(leading=leading, seed=seed)
        self.growth: list[tuple[str, int]] = []
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name or type(module).__name__)))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            self.output = self._run(model, shape, points)
        except UnsupportedError as error:
            raise ValueError(f"{self.ray.layer}: {error}; certify the layers around it one by one") from error
        finally:
            for handle in handles:
                handle.remove()

    def combined(self) -> np.ndarray:
        """Return a random combination of all outputs at every point, int64 [points]."""
        return self._combination(self.output.entries.flatten(1))

    def one_row(self) -> np.ndarray:
        """Return a random combination of the outputs of the last position: one denominator, not that of all rows."""
        values = self.output.entries
        return self._combination(values[:, -1] if values.ndim == 3 else values.flatten(1))

    def _combination(self, values_NK: Tensor) -> np.ndarray:
        mixed = reduced(values_NK * self.ray.random(values_NK.shape[1:])).sum(1)
        return reduced(mixed).long().numpy()

    def _run(self, model: nn.Module, shape: tuple[int, int] | None, points: int) -> FieldTensor:
        if shape is not None:
            return self._checked(model(self._input(shape, points)))
        embed = getattr(model, "embed", None)
        config = getattr(model, "config", None)
        body = getattr(config, "body", config)
        if embed is None or body is None:
            raise ValueError(f"{type(model).__name__} has no embedding to start behind; give shape=(T, D)")
        x = self._input((body.length, body.width), points)
        with ExitStack() as stack:
            stack.enter_context(_attribute(model, "embed", lambda *_: x))
            if body.order == "post":  # the norm behind the embedding is the client's
                stack.enter_context(_attribute(model.norm, "forward", lambda y: y))
            return self._checked(model(None))

    def _input(self, shape: tuple[int, int], points: int) -> FieldTensor:
        start, step = self.ray.random(shape), self.ray.random(shape)
        if self.ray.leading:
            return FieldTensor(step[None], 1, self.ray)
        t_N11 = torch.arange(points, dtype=torch.float64)[:, None, None]
        return FieldTensor(reduced(start + t_N11 * step), 0, self.ray)

    def _checked(self, output: Any) -> FieldTensor:
        if not isinstance(output, FieldTensor):
            raise ValueError("the output does not depend on the input; there is no degree to certify")
        return output

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.ray.path.append(name)

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.ray.path.pop()
            if isinstance(module, Block) and isinstance(output, FieldTensor):
                self.growth.append((name, output.top))

        return leave


def _levels(model: nn.Module) -> int | None:
    for name in ("levels", "depth"):
        try:
            value = getattr(model, name, None)
        except ValueError:
            return None
        if isinstance(value, int):
            return value
    return None


@contextmanager
def _followable(model: nn.Module) -> Iterator[None]:
    """Make every mixer followable: the stable form of PowerSoftmax, whose factors are no function of degree, becomes
    the exact one, which is the same map because it divides exactly; a mixer whose fast path cannot be followed takes its reference.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PowerSoftmax) and module.form == "stable":
                stack.enter_context(_attribute(module, "form", "exact"))
            if isinstance(module, Mixer):
                stack.enter_context(_attribute(module, "forward", _fast_or_reference(module)))
        yield


def _fast_or_reference(mixer: Mixer) -> Callable[..., Tensor]:
    fast, slow = mixer.forward, mixer.reference

    def forward(*args: Tensor) -> Tensor:
        ray = next(a.ray for a in args if isinstance(a, FieldTensor))
        before = (dict(ray.offences), dict(ray.divisions), dict(ray.vanished), list(ray.path))
        try:
            return fast(*args)
        except UnsupportedError:
            ray.offences, ray.divisions, ray.vanished, ray.path = before
            return slow(*args)

    return forward


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object for the length of a block."""
    had, old = name in vars(owner), vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = old
        else:
            del vars(owner)[name]
