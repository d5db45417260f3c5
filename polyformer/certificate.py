"""The polynomial certificate of a torch model: its exact degree, a bound on depth, and the layers that are in the way.

    certify(model)                     a language model, an encoder or a ViT, as a function of the embedded input x0
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

from polyformer.field import PRIME, FieldTensor, Ray, UnsupportedError, reduced
from polyformer.mixers.base import Mixer
from polyformer.mixers.power_softmax import PowerSoftmax

MARGIN = 8  # differences that must vanish, and points that an interpolated quotient must leave over


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a model is as a function of its input.

    `degree` is the exact total degree, None where it is no polynomial or was not found; `numerator` and `denominator`
    are the degrees of the reduced quotient of one output, None likewise. `depth` is the least multiplicative depth of
    any circuit of that degree, ceil(log2 degree); `levels` what the model's own schedule takes, plaintext products
    included. `growth` is the degree after each block. `offending` lists (layer, operation) that is no field operation,
    `divisions` the layers that divide by what depends on the input.
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

    def __str__(self) -> str:
        if self.kind == "neither":
            layers = ", ".join(f"{layer} ({operation})" for layer, operation in self.offending)
            return f"not polynomial; in the way: {layers}"
        if self.kind == "rational":
            found = (
                "of a degree beyond the points that were tried"
                if self.numerator is None
                else f"{self.numerator} / {self.denominator}"
            )
            return f"rational, degrees {found}; divides in {', '.join(self.divisions)}"
        if self.degree is None:
            return "polynomial, of a degree beyond the points that were tried"
        spent = f"; {self.levels} levels used" if self.levels is not None else ""
        return f"polynomial of degree {self.degree:,}, so of depth {self.depth} at least{spent}"


def certify(
    model: nn.Module, *, shape: tuple[int, int] | None = None, points: int = 512, rays: int = 2, seed: int = 0
) -> Certificate:
    """Certify a model, or a layer on inputs of `shape` (T, D); parameters and mode stay as they are.

    Args: `points` bounds the degrees that evaluation alone can find; `rays` are tried, and the largest degree counts.

    Raises:
        ValueError: a layer without `shape`; or an operation that cannot be followed and has no slow reference.
    """
    training = model.training
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
        model.train(training)


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
    if best.ray.vanished or not best.output.entries.any():
        degree = measured_degree(model, shape=shape, points=points, rays=len(passes), seed=seed)
    return Certificate(
        kind="polynomial",
        degree=degree,
        depth=None if degree is None else max(0, (max(degree, 1) - 1).bit_length()),
        levels=_levels(model),
        growth=tuple(best.growth) if not best.ray.vanished else (),
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
    return Certificate(kind="rational", numerator=numerator, denominator=denominator, divisions=divisions)


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
            if name.rpartition(".")[0] == "blocks" and isinstance(output, FieldTensor):
                self.growth.append((name, output.top))

        return leave


def degree_of_values(values_N: np.ndarray) -> int | None:
    """Return the degree of a polynomial modulo PRIME from its values at t = 0, 1, ..., N - 1, by forward differences;
    None if fewer than MARGIN of the last ones vanish.
    """
    differences, degree = values_N.astype(np.int64) % PRIME, 0
    for index in range(len(values_N)):
        if differences[0]:
            degree = index
        differences = np.diff(differences) % PRIME
    return degree if degree + MARGIN < len(values_N) else None


def degrees_of_quotient(values_N: np.ndarray) -> tuple[int, int] | None:
    """Return the degrees of numerator and denominator of a rational function from its values at t = 0 .. N - 1 modulo
    PRIME; None if N is too small to tell.

    The Euclidean algorithm on prod (t - i) and the interpolating polynomial runs through all pairs (r, s) with
    r = s f at the points; the pair before the largest quotient is the function (Monagan, ISSAC 2004).
    """
    n = len(values_N)
    r0, r1 = _vanishing(n), _interpolated(values_N)
    s0, s1 = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    best: tuple[int, int, int] | None = None
    while r1.any():
        quotient, rest = _divided(r0, r1)
        size = len(quotient) - 1
        if best is None or size > best[0]:
            best = (size, len(r1) - 1, len(s1) - 1)
        r0, r1 = r1, rest
        s0, s1 = s1, _trimmed(_minus(s0, _times(quotient, s1)))
    if best is None:
        return 0, 0
    size, above, below = best
    return (above, below) if size > MARGIN else None


def _vanishing(n: int) -> np.ndarray:
    p = np.ones(1, dtype=np.int64)
    for i in range(n):
        p = _minus(np.concatenate(([0], p)), p * i % PRIME)
    return p


def _interpolated(values_N: np.ndarray) -> np.ndarray:
    """Coefficients, lowest first, by Newton's divided differences."""
    c = values_N.astype(np.int64) % PRIME
    n = len(c)
    for j in range(1, n):
        c[j:] = np.diff(c[j - 1 :]) * pow(j, -1, PRIME) % PRIME
    p = np.zeros(1, dtype=np.int64)
    for i in range(n - 1, -1, -1):
        p = _minus(np.concatenate(([0], p)), p * i % PRIME)
        p[0] = (p[0] + c[i]) % PRIME
    return _trimmed(p)


def _divided(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, lead = a.copy(), pow(int(b[-1]), -1, PRIME)
    quotient = np.zeros(max(len(a) - len(b) + 1, 1), dtype=np.int64)
    for i in range(len(a) - len(b), -1, -1):
        q = int(a[i + len(b) - 1]) * lead % PRIME
        quotient[i] = q
        a[i : i + len(b)] = (a[i : i + len(b)] - q * b) % PRIME
    return quotient, _trimmed(a[: len(b) - 1])


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros(len(a) + len(b) - 1, dtype=np.int64)
    for i, x in enumerate(a):
        out[i : i + len(b)] = (out[i : i + len(b)] + int(x) * b) % PRIME
    return out


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros(max(len(a), len(b)), dtype=np.int64)
    out[: len(a)] += a
    out[: len(b)] -= b
    return out % PRIME


def _trimmed(a: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(a)
    return a[: used[-1] + 1] if len(used) else np.zeros(1, dtype=np.int64)


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
    the exact one, which is the same map; a mixer whose fast path cannot be followed takes its reference.
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
