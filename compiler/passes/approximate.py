"""Replace elementwise functions by polynomials fitted on calibrated ranges, and say what that cost.

A function is fitted together with the elementwise arithmetic around it that reads the same tensor: x . sigmoid(x),
x . (1 + erf(x / sqrt 2)) / 2 and 1 / sqrt(x + eps) are one polynomial each. The fit is Chebyshev interpolation, whose largest
error is within a small factor of the smallest possible (Trefethen, Approximation Theory and Approximation Practice, ch. 15);
the error stated is measured on a grid. A model trained without the polynomials may lose accuracy that these errors do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from he_backend.base import Array, UnsupportedOpError

from ..calibrate import calibrate
from ..ir import Graph, Node, evaluate
from .fuse import scalar

DEGREES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 15)
TOLERANCE = 0.01  # of the largest value on the interval: the degree rises until the error is below
MOST = 0.1  # and a function that no degree fits better than this is refused
MARGIN = 1.25  # of calibrated ranges
ROUNDS = 5  # of fitting: errors of one polynomial widen the range of the next
GRID = 4001

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """One polynomial: what it replaces, on which interval, and its largest error there beside the largest value."""

    source: str
    functions: tuple[str, ...]
    degree: int
    interval: Interval
    error: float
    size: float

    def __str__(self) -> str:
        lo, hi = self.interval
        return (
            f"{self.source}: {' of '.join(self.functions)} by a polynomial of degree {self.degree} on [{lo:.4g}, {hi:.4g}], "
            f"largest error {self.error:.2e} ({100 * self.error / self.size:.2g} % of its largest value)"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """All polynomials, and the largest change of the output on the samples beside its largest value."""

    approximations: tuple[Approximation, ...]
    error: float
    size: float

    def __str__(self) -> str:
        change = f"output on the samples: changed by at most {self.error:.2e}, largest value {self.size:.4g}"
        return "\n".join([*map(str, self.approximations), change])


@dataclass(frozen=True, kw_only=True)
class _Expression:
    """A tensor as call(root), elementwise; `functions` are those in it that are no polynomials, outermost first."""

    root: str
    call: Callable[[Array], Array]
    functions: tuple[str, ...] = ()


def _expressions(graph: Graph) -> dict[str, _Expression]:
    def itself(name: str) -> _Expression:
        return _Expression(root=name, call=lambda a: a)

    found = {graph.input: itself(graph.input)}
    for node in graph.nodes:
        inner = [found[name] for name in node.inputs]
        same = all(graph.shape(name) == node.shape for name in node.inputs) and len({e.root for e in inner}) == 1
        unary = node.op in ("function", "polynomial") or (
            node.op in ("mul_const", "add_const") and scalar(node.const) is not None
        )
        if same and (unary or node.op in ("add", "mul")):
            names = tuple(dict.fromkeys(name for e in inner for name in e.functions))
            own = (node.attrs["kind"],) if node.op == "function" else ()
            found[node.name] = _Expression(root=inner[0].root, call=_composed(node, inner), functions=own + names)
        else:
            found[node.name] = itself(node.name)
    return found


def _composed(node: Node, inner: Sequence[_Expression]) -> Callable[[Array], Array]:
    """The node on top of its inputs' expressions."""
    c = scalar(node.const) or 0.0
    match node.op:
        case "function":
            call = node.attrs["call"]
            return lambda a: call(inner[0].call(a))
        case "polynomial":
            return lambda a: np.polynomial.polynomial.polyval(inner[0].call(a), node.attrs["coefficients"])
        case "mul_const":
            return lambda a: c * inner[0].call(a)
        case "add_const":
            return lambda a: c + inner[0].call(a)
        case "mul":
            return lambda a: inner[0].call(a) * inner[1].call(a)
        case _:
            return lambda a: inner[0].call(a) + inner[1].call(a)


def widened(interval: Interval) -> Interval:
    """An interval with the margin; one that excludes zero keeps its sign, because reciprocals and roots need it."""
    lo, hi = interval
    if lo > 0.0:
        return lo / MARGIN, hi * MARGIN
    if hi < 0.0:
        return lo * MARGIN, hi / MARGIN
    more = (MARGIN - 1.0) * max(-lo, hi, 1e-6)
    return lo - more, hi + more


def fit(
    source: str, functions: tuple[str, ...], call: Callable[[Array], Array], on: Interval
) -> tuple[Approximation, Array]:
    """The first degree that meets the tolerance, or else the highest; coefficients c_k of x^k.

    Raises:
        UnsupportedOpError: the function is not finite there, is zero, or no degree comes near it.
    """
    lo, hi = on
    what = f"node {source!r} ({' of '.join(functions)}) on its calibrated range [{lo:.4g}, {hi:.4g}]"
    x: Array = np.linspace(lo, hi, GRID, dtype=np.float64)
    with np.errstate(all="ignore"):
        y = call(x)
    if not np.all(np.isfinite(y)):
        raise UnsupportedOpError(f"{what} is not finite everywhere: train it on a range that excludes the pole")
    size = float(np.max(np.abs(y)))
    if size == 0.0:
        raise UnsupportedOpError(f"{what} is zero: remove it from the model")
    for degree in DEGREES:
        nodes = (lo + hi) / 2 + (hi - lo) / 2 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
        p = Chebyshev.fit(nodes, call(nodes), degree, domain=[lo, hi]).convert(kind=Polynomial)
        error = float(np.max(np.abs(p(x) - y)))
        if error <= TOLERANCE * size:
            break
    if error > MOST * size:
        raise UnsupportedOpError(
            f"{what} is {error:.2e} away from a polynomial of degree {degree}, {100 * error / size:.0f} % of its largest "
            f"value; at most {100 * MOST:.0f} % is accepted: train it on a smaller range"
        )
    made = Approximation(source=source, functions=functions, degree=degree, interval=on, error=error, size=size)
    return made, np.asarray(p.coef, dtype=np.float64)


def approximate(graph: Graph, samples: Sequence[np.ndarray]) -> tuple[Graph, Report]:
    """The graph without `function` nodes.

    Args:
        samples: inputs [1, ...] of the graph; the ranges of the fits contain all that they produce, with a margin of 1.25,
            in the graph with the polynomials too.

    Raises:
        UnsupportedOpError: a function that no polynomial fits, or ranges that grow with every round of fitting.
    """
    expressions, users = _expressions(graph), graph.users()
    tops = [
        node
        for node in graph.nodes
        if expressions[node.name].functions
        and (
            node.name == graph.output
            or any(expressions[user.name].root != expressions[node.name].root for user in users[node.name])
        )
    ]
    with np.errstate(all="ignore"):  # poles are found, and named, when their function is fitted
        exact = [evaluate(graph, x)[graph.output] for x in samples]
        seen = calibrate(graph, samples, margin=1.0)
    size = max(float(np.max(np.abs(y))) for y in exact)
    if not tops:
        return graph, Report(approximations=(), error=0.0, size=size)
    roots = {node.name: expressions[node.name].root for node in tops}
    intervals = {name: widened(seen[root]) for name, root in roots.items()}
    for _ in range(ROUNDS):
        made, polynomials = [], {}
        for node in tops:
            e = expressions[node.name]
            fitted, coefficients = fit(node.source, e.functions, e.call, intervals[node.name])
            attrs = {"coefficients": coefficients, "interval": list(fitted.interval)}
            polynomials[node.name] = replace(node, op="polynomial", inputs=(e.root,), const=None, attrs=attrs)
            made.append(fitted)
        after = replace(graph, nodes=tuple(polynomials.get(n.name, n) for n in graph.nodes)).without_dead()
        seen = calibrate(after, samples, margin=1.0)
        outside = [n for n, r in roots.items() if seen[r][0] < intervals[n][0] or seen[r][1] > intervals[n][1]]
        if not outside:
            error = max(
                float(np.max(np.abs(evaluate(after, x)[after.output] - y))) for x, y in zip(samples, exact, strict=True)
            )
            return after, Report(approximations=tuple(made), error=error, size=size)
        for name in outside:
            lo, hi = widened(seen[roots[name]])
            intervals[name] = (min(lo, intervals[name][0]), max(hi, intervals[name][1]))
    raise UnsupportedOpError(
        f"the input of {graph.by_name[outside[0]].source!r} leaves its range in each of {ROUNDS} rounds of fitting: "
        "the errors of the polynomials before it grow; train the model with polynomials"
    )
