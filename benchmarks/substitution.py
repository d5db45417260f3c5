"""Range training and substitution for ablations, on intervals measured on training text: `training/substitution.py` with
every kind replaced alone if wanted, or without range losses. The models of the demonstration come from `training`'s stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from benchmarks.train_runs import Budget, Training, fit
from polyformer.model import Transformer
from polyformer.ranges import Collector, Range, Targets, measure, range_loss
from training.loop import Batches, Schedule
from training.substitution import KINDS, choose_targets, polynomial_config, with_polynomials


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Degrees of the polynomials, and the factor by which their intervals exceed what training text showed."""

    division: int = 4
    activation: int = 4
    norm: int = 3
    margin: float = 1.2


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Targets of the range losses: activations within +-`activation`, the others within a ratio hi/lo."""

    activation: float = 4.0
    variance_ratio: float = 4.0
    denominator: tuple[float, float] = (0.05, 3.0)  # below is harmless: the numerator is smaller still
    weight: float = 0.3


DEGREES, WANTED = Degrees(), Wanted()


def targets(model: Transformer, tokens_NT: Tensor, wanted: Wanted) -> dict[str, tuple[float, float]]:
    """Return the wanted interval of each tap; those of variances are centred on what the model has."""
    return choose_targets(
        model,
        tokens_NT,
        activation_bound=wanted.activation,
        variance_ratio=wanted.variance_ratio,
        denominator_target=wanted.denominator,
    )


def train_ranges(
    model: Transformer, batches: Batches, budget: Budget, schedule: Schedule, aims: Targets, weight: float
) -> Training:
    """Train on in place with the range losses; weight 0 is the control, as many steps without them."""
    with Collector(model) as collector:

        def extra() -> Tensor:
            return range_loss(collector, aims, activation=weight, variance=weight, denominator=weight)

        return fit(model, batches, budget, schedule=schedule, extra=extra)


def intervals(model: Transformer, tokens_NT: Tensor, degrees: Degrees) -> dict[str, tuple[float, float]]:
    """Return what each tap shows on tokens, widened by the margin."""
    return widened(measure(model.eval(), tokens_NT), degrees.margin)


def widened(ranges: Mapping[str, Range], margin: float) -> dict[str, tuple[float, float]]:
    """Return measured ranges, wider by a factor: symmetric ones if a value is not positive, else divided and multiplied."""
    found = {}
    for name, seen in ranges.items():
        bound = max(-seen.low, seen.high) * margin
        found[name] = (seen.low / margin, seen.high * margin) if seen.low > 0 else (-bound, bound)
    return found


def substituted(
    model: Transformer, fitted: Mapping[str, tuple[float, float]], degrees: Degrees, kinds: tuple[str, ...] = KINDS
) -> Transformer:
    """Return a copy of a model in the form `rows` whose functions of some kinds are polynomials; the rest is equal."""
    config = polynomial_config(
        model.config, kinds, division=degrees.division, activation=degrees.activation, norm=degrees.norm
    )
    return with_polynomials(model, config, fitted)


def outside(model: Transformer, tokens_NT: Tensor, fitted: Mapping[str, tuple[float, float]]) -> float:
    """Return the largest share of values that leave the interval of their tap."""
    return max(r.below + r.above for r in measure(model, tokens_NT, intervals=fitted).values())
