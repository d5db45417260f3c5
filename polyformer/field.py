"""Exact arithmetic for torch modules: tensors over a prime field that flow through a model in place of floats.

Every float weight is a dyadic rational m 2^e, and m 2^e has one exact image modulo an odd prime P: sums, products and
quotients of weights become sums, products and quotients of images, without rounding. What is not zero modulo P is not
zero. So a model that is a polynomial (or a rational function) of its input can be evaluated exactly, at small cost.

A `FieldTensor` is what the input is made of. It holds residues modulo P as integral float64 (P < 2^21, so that a dot
product of 2048 terms stays below 2^53 and BLAS stays exact), and does one of two things:

    points   its first axis runs over points t of a ray x0 + t d; each operation is done at all points
    leading  it holds, of each entry as a polynomial in t, the coefficient of t^top alone; `top` is an upper bound of
             the degree by construction, and attained where a coefficient is not zero

An operation that is no field operation is recorded with the layer in which it happened, and random numbers take the
place of its result, so that one pass finds all of them. Constants (weights, masks, decays) are combined in floats as
the model does it and enter exactly where they meet the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

PRIME = 2_097_143  # the largest below 2^21
LONGEST = 2048  # terms of a sum of products below 2^53

# 2^e modulo P for every exponent that a float64, cut into mantissa (53 bits) and exponent, can have.
_LOWEST = -1074 - 54
_POWERS = torch.tensor([pow(2, e, PRIME) for e in range(_LOWEST, 1025)], dtype=torch.int64)

aten = torch.ops.aten
Handler = Callable[..., Any]


class UnsupportedError(Exception):
    """An operation that cannot be followed in a field, though the function may be polynomial (a Fourier transform)."""


class Ray:
    """What one pass through a model finds out: offences and divisions by layer, and whether a leading part vanished."""

    def __init__(self, *, leading: bool, seed: int) -> None:
        self.leading = leading
        self.generator = torch.Generator().manual_seed(seed)
        self.path: list[str] = []
        self.offences: dict[tuple[str, str], None] = {}
        self.divisions: dict[str, None] = {}
        self.vanished: dict[str, None] = {}  # layers in which all coefficients of t^top cancelled: top is a bound alone

    @property
    def layer(self) -> str:
        return self.path[-1] if self.path else ""

    def random(self, shape: Sequence[int]) -> Tensor:
        """Return residues that are not 0."""
        return torch.randint(1, PRIME, tuple(shape), generator=self.generator).double()


class FieldTensor(torch.Tensor):
    """Residues modulo PRIME with the shape, and to torch the type, of the float tensor that they stand for."""

    entries: Tensor
    top: int
    ray: Ray

    @staticmethod
    def __new__(cls, values: Tensor, top: int, ray: Ray, dtype: torch.dtype = torch.float32) -> FieldTensor:
        out = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype)
        out.entries, out.top, out.ray = values, top, ray
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FieldTensor(shape={tuple(self.shape)}, top={self.top})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func.overloadpacket)
        ray = next(a.ray for a in tree_flatten((args, kwargs))[0] if isinstance(a, FieldTensor))
        if handler is not None:
            result = handler(ray, func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _foreign(ray, func, args, kwargs or {})


def residues(x: Any) -> Tensor:
    """Return the exact image of finite floats or integers as integral float64 in [0, PRIME).

    Raises:
        UnsupportedError: a number is infinite or none.
    """
    t = torch.as_tensor(x).detach().double()
    if not torch.isfinite(t).all():
        raise UnsupportedError("a constant is infinite or not a number")
    mantissa, exponent = torch.frexp(t)
    m = (mantissa * 2.0**53).to(torch.int64) % PRIME  # an integer of at most 53 bits
    return ((m * _POWERS[exponent.long() - 53 - _LOWEST]) % PRIME).double()


def reduced(x: Tensor) -> Tensor:
    return torch.remainder(x, PRIME)


def inverse(x: Tensor) -> Tensor:
    """Return x^(P-2), the inverse; 0 stays 0."""
    result, base, k = torch.ones_like(x), x, PRIME - 2
    while k:
        if k & 1:
            result = reduced(result * base)
        base, k = reduced(base * base), k >> 1
    return result


def _like(a: FieldTensor, values: Tensor, top: int | None = None) -> FieldTensor:
    top = a.top if top is None else top
    if a.ray.leading and top > 0 and not values.any():
        a.ray.vanished[a.ray.layer] = None
    return FieldTensor(values, top if a.ray.leading else 0, a.ray, a.dtype)


def _any_field(*xs: Any) -> FieldTensor:
    return next(x for x in xs if isinstance(x, FieldTensor))


def _structure(ray: Ray, func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that moves entries about, or puts zeros in their place."""
    field = _any_field(*args)
    kwargs.pop("dtype", None), kwargs.pop("memory_format", None)
    result = func(*(a.entries if isinstance(a, FieldTensor) else a for a in args), **kwargs)
    return tree_map(
        lambda v: FieldTensor(v.clone(), field.top, ray, field.dtype) if isinstance(v, Tensor) else v, result
    )


def _same(ray: Ray, func: Any, x: FieldTensor, *_: Any, **__: Any) -> FieldTensor:
    """A copy or a change of type: nothing to numbers."""
    return FieldTensor(x.entries, x.top, ray, x.dtype)


def _viewed(ray: Ray, func: Any, x: FieldTensor, size: Any, *_: Any) -> FieldTensor:
    """A view by shape; the residues may lie in another order in memory than the floats would."""
    return FieldTensor(x.entries.reshape(size), x.top, ray, x.dtype)


def _summed(ray: Ray, func: Any, x: FieldTensor, *args: Any, **kwargs: Any) -> FieldTensor:
    kwargs.pop("dtype", None)
    return _like(x, reduced(func(x.entries, *args, **kwargs)))


def _mean(ray: Ray, func: Any, x: FieldTensor, dim: Any = None, keepdim: bool = False, **_: Any) -> FieldTensor:
    axes = list(range(x.ndim)) if dim is None else list(dim)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    total = reduced(x.entries.sum(axes, keepdim=keepdim))
    return _like(x, reduced(total * pow(count, -1, PRIME)))


def _add(ray: Ray, func: Any, a: Any, b: Any, alpha: Any = 1, **_: Any) -> FieldTensor:
    minus = func.overloadpacket in (aten.sub, aten.rsub)
    if func.overloadpacket is aten.rsub:
        a, b = b, a
    factor = residues(-alpha if minus else alpha)
    field, other = _any_field(a, b), b if isinstance(a, FieldTensor) else a
    if isinstance(other, FieldTensor):
        parts = [(a.entries, a.top), (factor * b.entries, b.top)]
    else:
        constant = residues(other)
        parts = (
            [(field.entries, field.top), (factor * constant, 0)]
            if field is a
            else [(constant, 0), (factor * field.entries, field.top)]
        )
    top = max((t for v, t in parts if v.any()), default=0)  # what is exactly zero has no degree
    first, second = (v if t == top or not ray.leading else torch.zeros_like(v) for v, t in parts)
    return _like(field, reduced(first + second), top)


def _mul(ray: Ray, func: Any, a: Any, b: Any, **_: Any) -> FieldTensor:
    if isinstance(a, FieldTensor) and isinstance(b, FieldTensor):
        return _like(a, reduced(a.entries * b.entries), a.top + b.top)
    field, constant = (a, b) if isinstance(a, FieldTensor) else (b, a)
    factor = residues(constant)
    if not factor.any():  # exactly zero, not a cancellation
        return FieldTensor(field.entries * factor, 0, ray, field.dtype)
    return _like(field, reduced(field.entries * factor))


def _matmul(ray: Ray, func: Any, a: Any, b: Any, **_: Any) -> FieldTensor:
    field = _any_field(a, b)
    tops = [x.top for x in (a, b) if isinstance(x, FieldTensor)]
    x, y = (v.entries if isinstance(v, FieldTensor) else residues(v) for v in (a, b))
    if not all(v.any() for v in (x, y)):
        return FieldTensor(x @ y, 0, ray, field.dtype)
    parts = [reduced(x[..., i : i + LONGEST] @ y[..., i : i + LONGEST, :]) for i in range(0, x.shape[-1], LONGEST)]
    return _like(field, reduced(torch.stack(parts).sum(0)), sum(tops))


def _addmm(ray: Ray, func: Any, bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    if (beta, alpha) != (1, 1):
        return NotImplemented
    return _matmul(ray, func, a, b) + bias


def _convolution(
    ray: Ray, func: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    if isinstance(weight, FieldTensor) or weight[0].numel() > LONGEST:
        raise UnsupportedError("a convolution with a filter that depends on the input, or a very long one")
    y = func(x.entries, residues(weight), None, stride, padding, dilation, transposed, output_padding, groups)
    y = _like(x, reduced(y))
    return y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))


def _pow(ray: Ray, func: Any, x: Any, exponent: Any) -> Any:
    if not isinstance(x, FieldTensor) or isinstance(exponent, Tensor) or exponent != int(exponent):
        return NotImplemented
    n = int(exponent)
    if n <= 0:
        return NotImplemented if n == 0 else _divide(ray, func, 1.0, _pow(ray, func, x, -n))
    result: FieldTensor = x
    for _ in range(n - 1):
        result = _mul(ray, func, result, x)
    return result


def _square(ray: Ray, func: Any, x: FieldTensor) -> FieldTensor:
    return _mul(ray, func, x, x)


def _negative(ray: Ray, func: Any, x: FieldTensor) -> FieldTensor:
    return _like(x, reduced(-x.entries))


def _divide(ray: Ray, func: Any, a: Any, b: Any = None, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if func.overloadpacket is aten.reciprocal:
        a, b = 1.0, a
    if not isinstance(b, FieldTensor):
        return _like(a, reduced(a.entries * inverse(residues(b))))
    ray.divisions[ray.layer] = None
    top = a.top if isinstance(a, FieldTensor) else 0
    values = a.entries if isinstance(a, FieldTensor) else residues(a)
    return _like(b, reduced(values * inverse(b.entries)), top - b.top)


def _joined(ray: Ray, func: Any, parts: Sequence[Any], dim: int = 0) -> FieldTensor:
    field = _any_field(*parts)
    values = [p.entries if isinstance(p, FieldTensor) else residues(p) for p in parts]
    tops = [p.top if isinstance(p, FieldTensor) else 0 for p in parts]
    top = max(tops)
    if ray.leading:
        values = [v if t == top else torch.zeros_like(v) for v, t in zip(values, tops, strict=True)]
    return _like(field, func(values, dim), top)


def _batch_norm(
    ray: Ray, func: Any, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, momentum: Any,
    eps: float,
) -> Any:  # fmt: skip
    if training:
        return NotImplemented
    shape = (-1, *[1] * (x.ndim - 2))
    scale = (weight * torch.rsqrt(variance + eps)).view(shape)
    return x * scale + (bias.view(shape) - mean.view(shape) * scale), mean, variance


def _filled(ray: Ray, func: Any, x: FieldTensor, mask: Any, value: Any) -> Any:
    if isinstance(mask, FieldTensor) or bool(value):
        return NotImplemented
    return _like(x, torch.where(mask, 0.0, x.entries))


def _constant(ray: Ray, func: Any, x: FieldTensor, *args: Any, **kwargs: Any) -> Tensor:
    """zeros_like, ones_like and the like: a plain tensor."""
    kwargs.pop("device", None), kwargs.pop("layout", None), kwargs.pop("pin_memory", None)
    kwargs.pop("memory_format", None)
    return func(torch.empty(x.shape, dtype=x.dtype), *args, **kwargs)


def _refuse(ray: Ray, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(f"{func} cannot be followed in a field")


def _foreign(ray: Ray, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record an operation that is no field operation and go on with random numbers of the right shape."""
    if func._schema.is_mutable:
        raise UnsupportedError(f"{func} changes a tensor in place")

    def meta(x: Any) -> Any:
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    with torch.no_grad():
        shapes = func(*tree_map(meta, args), **{k: v for k, v in tree_map(meta, kwargs).items() if k != "device"})
    ray.offences[ray.layer, func.overloadpacket._qualified_op_name.removeprefix("aten::").strip("_")] = None
    return tree_map(lambda s: FieldTensor(ray.random(s.shape), 0, ray, s.dtype) if isinstance(s, Tensor) else s, shapes)


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(
        (
            aten.expand, aten.permute, aten.transpose, aten.t, aten.slice,
            aten.select, aten.unsqueeze, aten.squeeze, aten.flip, aten.split, aten.split_with_sizes, aten.chunk,
            aten.unbind, aten.unfold, aten.repeat, aten.index, aten.index_select, aten.diagonal, aten.triu, aten.tril,
            aten.constant_pad_nd, aten.roll, aten.diag_embed, aten.narrow, aten.unflatten,
        ),
        _structure,
    ),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), _viewed),
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.lift_fresh, aten.contiguous), _same),
    **dict.fromkeys((aten.sum, aten.cumsum), _summed),
    **dict.fromkeys((aten.add, aten.sub, aten.rsub), _add),
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv), _matmul),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _addmm),
    **dict.fromkeys((aten.div, aten.reciprocal), _divide),
    **dict.fromkeys((aten.cat, aten.stack), _joined),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.new_zeros, aten.new_ones, aten.full_like), _constant),
    **dict.fromkeys((aten._fft_r2c, aten._fft_c2r, aten._fft_c2c, aten._local_scalar_dense), _refuse),
    aten.mul: _mul,
    aten.mean: _mean,
    aten.pow: _pow,
    aten.square: _square,
    aten.neg: _negative,
    aten.convolution: _convolution,
    aten.native_batch_norm: _batch_norm,
    aten.masked_fill: _filled,
}  # fmt: skip
