"""Ranges of what will be approximated: collect them, push them into targets, report them.

Three kinds of values matter (methods.md 1.3): inputs of activations, variances at norms, denominators of PowerSoftmax.
Each flows through a `Tap`; a `Collector` hooks all taps of a model for the length of a `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polyformer.layers import Tap, TapKind

# The wanted or fitted interval of each tap, by the tap's path.
Targets = Mapping[str, tuple[float, float]]


def taps(model: nn.Module) -> dict[str, Tap]:
    """Return all taps by the path of the layer that owns them, e.g. `blocks.0.mlp.act`."""
    return {name.removesuffix(".tap"): m for name, m in model.named_modules() if isinstance(m, Tap)}


class Collector:
    """Hold what flows through the taps: `with Collector(model) as c: model(x)`, then `c.values[path]`, with their gradients,
    one for each time that the tap was passed (attention in windows passes its own once for each size of window).

    Each forward replaces the values of the one before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.taps = taps(model)
        self.model = model
        self.values: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Collector:
        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda module, args, output: self.values.setdefault(name, []).append(output)

        self._handles = [self.model.register_forward_pre_hook(lambda module, args: self.values.clear())]
        self._handles += [tap.register_forward_hook(keep(name)) for name, tap in self.taps.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def passed(self) -> Iterator[tuple[str, Tensor]]:
        """Yield path and value of every time that a tap was passed."""
        return ((name, value) for name, values in self.values.items() for value in values)

    def kind(self, name: str) -> TapKind:
        return self.taps[name].kind


@dataclass(frozen=True, kw_only=True)
class Range:
    """What one tap saw: extremes, and the shares of values below and above an interval (0 if none was given)."""

    low: float
    high: float
    below: float
    above: float
    count: int

    def join(self, other: Range) -> Range:
        n = self.count + other.count
        return Range(
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            count=n,
            below=(self.below * self.count + other.below * other.count) / n,
            above=(self.above * self.count + other.above * other.count) / n,
        )


@torch.no_grad()
def measure(
    model: nn.Module, inputs: Tensor, *, intervals: Targets | None = None, batch: int = 256
) -> dict[str, Range]:
    """Run a model over inputs [N, ...] and return the range of every tap and the share of values outside `intervals`; what is
    no number lies above.
    """
    found: dict[str, Range] = {}
    with Collector(model) as collector:
        for rows in inputs.split(batch):
            model(rows)
            for name, value in collector.passed():
                lo, hi = (intervals or {}).get(name, (-torch.inf, torch.inf))
                r = Range(
                    low=float(value.min()),
                    high=float(value.max()),
                    count=value.numel(),
                    below=float((value < lo).double().mean()),
                    above=float((~(value <= hi)).double().mean()),
                )
                found[name] = found[name].join(r) if name in found else r
    return found


def range_loss(
    collector: Collector, targets: Targets, *, activation: float, variance: float, denominator: float
) -> Tensor:
    """Return the range losses of methods.md 1.3 on the values last collected, weighted by kind.

    Activations: relu(max|x| - R)/R with R = min(|lo|, hi). Variances and denominators: relu(log(max/hi)) +
    relu(log(lo/min)). The extremes are taken over the batch, for each position and head (each channel of an
    activation), and averaged: many small subgradients instead of one.
    """
    weights = {"activation": activation, "variance": variance, "denominator": denominator}
    total = torch.zeros(())
    for name, values in collector.values.items():
        if name not in targets or not weights[collector.kind(name)]:
            continue
        kind, losses = collector.kind(name), [_excess(v, targets[name], collector.kind(name)) for v in values]
        total = total + weights[kind] * torch.cat(losses).mean()
    return total


def _excess(value: Tensor, target: tuple[float, float], kind: TapKind) -> Tensor:
    """Return the losses of one value, a vector."""
    lo, hi = target
    if kind == "activation":
        bound = min(-lo, hi)
        return torch.relu(value.abs().flatten(0, -2).amax(0) - bound) / bound
    floor = torch.finfo(value.dtype).tiny
    above = torch.relu(torch.log(value.amax(0).clamp_min(floor) / hi))
    return (above + torch.relu(torch.log(lo / value.amin(0).clamp_min(floor)))).flatten()


@torch.no_grad()
def log_mean_rows(model: nn.Module, inputs: Tensor, *, batch: int = 256) -> dict[str, Tensor]:
    """Return, for each denominator tap, the mean logarithm of the denominators of each row [T], over heads, inputs
    [N, ...] and, of attention in windows, all windows that have such a row.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    with Collector(model) as collector:
        for rows in inputs.split(batch):
            model(rows)
            for name, values in collector.values.items():
                if collector.kind(name) != "denominator":
                    continue
                zeros_T = torch.zeros(max(v.shape[2] for v in values), dtype=torch.float64, device=values[0].device)
                for value in values:
                    t = value.shape[2]
                    sums.setdefault(name, zeros_T.clone())[:t] += value.double().log().mean(1)[..., 0].sum(0)
                    counts.setdefault(name, zeros_T.clone())[:t] += len(value)
    return {name: total / counts[name] for name, total in sums.items()}
