"""Replace functions by polynomials fitted on calibrated ranges, and say what that cost.

A function is fitted together with the elementwise arithmetic around it that reads the same tensor: x . sigmoid(x) and
x . (1 + erf(x / sqrt 2)) / 2 are one polynomial each. The fit is Chebyshev interpolation, whose largest error is within a small
factor of the smallest possible (Trefethen, Approximation Theory and Approximation Practice, ch. 15). Reciprocals and inverse square
roots of positive numbers, which divide softmax and norms, keep a relative error; the exponential of a softmax (`softmax`) an error
relative to its row's sum. Their forms are in `forms`; all errors stated are measured on a grid. A model trained without the
polynomials may lose accuracy that these errors do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from he_backend.base import Array, UnsupportedOpError

from ..calibrate import calibrate
from ..certificate import certify
from ..ir import Graph, Node, evaluate
from ..ops.refuse import INSTEAD
from .forms import GRID, Form, Interval, Power, exponential, inverse
from .fuse import scalar
from .softmax import Rows, argument, centred

DEGREES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 15)
TOLERANCE = 0.01  # of the largest value on the interval: the degree rises until the error is below
MOST = 0.1  # and a function that no degree fits better than this is refused
MARGIN = 1.25  # of calibrated ranges
SPREAD = 1 / 8  # of the magnitudes that a range of one sign spans, if that is more
ROUNDS = 5  # of fitting: errors of one polynomial widen the range of the next


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """One polynomial: what it replaces, in which form, on which interval, and its largest error there beside the largest value.

    relative  the largest error relative to what `relation` says, where the form keeps that
    """

    source: str
    functions: tuple[str, ...]
    degree: int
    interval: Interval
    error: float
    size: float
    form: str = ""
    relative: float | None = None
    relation: str = "relative error"

    def __str__(self) -> str:
        lo, hi = self.interval
        form = self.form or f"a polynomial of degree {self.degree}"
        share = f"{100 * self.error / self.size:.2g} % of its largest value"
        share += "" if self.relative is None else f", {self.relation} at most {100 * self.relative:.2g} %"
        return (
            f"{self.source}: {' of '.join(self.functions)} by {form} on [{lo:.4g}, {hi:.4g}], "
            f"largest error {self.error:.2e} ({share})"
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
    """A tensor as call(root), elementwise; `functions` are those in it that are no polynomials, outermost first.

    power  the same as a power of the root, where it is one
    """

    root: str
    call: Callable[[Array], Array]
    functions: tuple[str, ...] = ()
    power: Power | None = None


def _expressions(graph: Graph) -> dict[str, _Expression]:
    def itself(name: str) -> _Expression:
        return _Expression(root=name, call=lambda a: a, power=Power())

    found = {graph.input: itself(graph.input)}
    for node in graph.nodes:
        inner = [found[name] for name in node.inputs]
        same = all(graph.shape(name) == node.shape for name in node.inputs) and len({e.root for e in inner}) == 1
        unary = node.op in ("function", "polynomial") or (
            node.op in ("mul_const", "add_const") and scalar(node.const) is not None
        )
        if "rows" in node.attrs:
            found[node.name] = _Expression(root=node.inputs[0], call=node.attrs["call"], functions=("Exp",))
        elif same and (unary or node.op in ("add", "mul")):
            names = tuple(dict.fromkeys(name for e in inner for name in e.functions))
            own = (node.attrs["kind"],) if node.op == "function" else ()
            call, power = _composed(node, inner), _power(node, inner[0])
            found[node.name] = _Expression(root=inner[0].root, call=call, functions=own + names, power=power)
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


def _power(node: Node, inner: _Expression) -> Power | None:
    """The node as a power of its root."""
    if inner.power is None:
        return None
    c = scalar(node.const) or 0.0
    match node.op, node.attrs.get("kind"):
        case "mul_const", _:
            return inner.power.times(c)
        case "add_const", _:
            return inner.power.plus(c)
        case "function", "Sqrt":
            return inner.power.to(0.5)
        case "function", "Reciprocal":
            return inner.power.to(-1.0)
        case "function", "Pow":
            return inner.power.to(node.attrs["options"]["exponent"])
    return None


def widened(interval: Interval) -> Interval:
    """An interval with the margin; one that excludes zero keeps its sign, because reciprocals and roots need it.

    Numbers of many magnitudes leave their range by magnitudes; those that are too large matter more, iterations diverge there.
    """
    lo, hi = interval
    if lo > 0.0:
        return lo / MARGIN, hi * max(MARGIN, (hi / lo) ** SPREAD)
    if hi < 0.0:
        return lo * max(MARGIN, (lo / hi) ** SPREAD), hi / MARGIN
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


Fitted = tuple[Approximation, dict[str, list[Node]]]  # and the nodes that take the place of nodes, by name


def _polynomial(node: Node, e: _Expression, on: Interval) -> Fitted:
    made, coefficients = fit(node.source, e.functions, e.call, on)
    attrs = {"coefficients": coefficients, "interval": list(made.interval)}
    return made, {node.name: [replace(node, op="polynomial", inputs=(e.root,), const=None, attrs=attrs)]}


def _measured(node: Node, e: _Expression, on: Interval, form: Form) -> Approximation:
    x: Array = np.linspace(*on, GRID, dtype=np.float64)
    y, wanted = form(x), e.call(x)
    return Approximation(
        source=node.source,
        functions=e.functions,
        degree=certify(form.graph()).degree,
        interval=on,
        error=float(np.max(np.abs(y - wanted))),
        size=float(np.max(np.abs(wanted))),
        form=form.words,
        relative=float(np.max(np.abs(y / wanted - 1.0))),
    )


def _inverse(node: Node, e: _Expression, power: Power, on: Interval) -> Fitted:
    """A reciprocal or an inverse square root of positive numbers.

    Raises:
        UnsupportedOpError: no form comes near it.
    """
    form = inverse(power, on, TOLERANCE)
    made = _measured(node, e, on, form)
    assert made.relative is not None
    if made.relative > MOST:
        lo, hi = power.base(on)
        raise UnsupportedOpError(
            f"node {node.source!r} ({' of '.join(e.functions)}) on its calibrated range [{lo:.4g}, {hi:.4g}], of ratio {hi / lo:.3g}: "
            f"{form.words}, the most that are tried, leave a relative error of {100 * made.relative:.0f} %; at most "
            f"{100 * MOST:.0f} % is accepted: train it on a range of smaller ratio"
        )
    return made, {node.name: form.build(node, e.root)}


def _exponential(node: Node, rows: Rows, on: Interval) -> Fitted:
    """The exponential of a softmax: errors of a row's keys, taken together, are within the tolerance of its sum.

    Raises:
        UnsupportedOpError: no form comes near it.
    """
    scores, least = rows.scores, rows.mean / MARGIN
    error = TOLERANCE * least
    uneven = any(n & (n - 1) for n in node.shape)  # sizes that are no powers of two leave slots unused
    zero = uneven or scores.masked > 0
    if zero:  # what has no weight is put where the polynomial is 0
        on = min(on[0], float(np.log(error)) - 1.0), on[1]
    form = exponential(on, error, zero=zero)
    if form is None:
        raise UnsupportedOpError(
            f"node {node.source!r} (Exp) on its calibrated range [{on[0]:.4g}, {on[1]:.4g}]: no polynomial that is tried comes within "
            f"{error:.2e}, {100 * TOLERANCE:.0f} % of the smallest sum of a row over its keys, of values up to {np.exp(on[1]):.3g}: rows "
            f"differ too much, train it on a smaller range of scores, or use {INSTEAD['Softmax']}"
        )
    made = _measured(node, _Expression(root="", call=np.exp, functions=("Exp",)), on, form)
    lo, hi = rows.constants
    words = f"{form.words}, of scores minus a constant for each row ({lo:.4g} to {hi:.4g}) instead of its largest,"
    words += f" {scores.masked} of {scores.visible.size} at its zero, which masks them," if scores.masked else ""
    made = replace(made, form=words, relative=made.error / least, relation="a row's errors together")
    *steps, last = form.build(node, argument(node))
    last = replace(last, attrs={**last.attrs, "visible": scores.visible})
    return made, {argument(node): scores.nodes(node, on[0])[-1:], node.name: [*steps, last]}


def _fitted(node: Node, e: _Expression, on: Interval) -> Fitted:
    """One function on an interval of its root.

    Raises:
        UnsupportedOpError: nothing fits it.
    """
    if not np.all(np.isfinite(on)):
        raise UnsupportedOpError(
            f"node {node.source!r} ({' of '.join(e.functions)}) is to be fitted on [{on[0]:.4g}, {on[1]:.4g}], which no polynomial "
            "can be: leave out what makes it infinite; a mask is compiled where a softmax follows it"
        )
    if (rows := node.attrs.get("rows")) is not None:
        return _exponential(node, rows, on)
    if e.power is not None and e.power.exponent in (-1.0, -0.5) and e.power.base(on)[0] > 0.0:
        return _inverse(node, e, e.power, on)
    return _polynomial(node, e, on)


def _range(node: Node, e: _Expression, seen: dict[str, Interval]) -> Interval:
    """The interval that a function is to be fitted on, from what the samples fill."""
    rows = node.attrs.get("rows")
    if rows is None:
        return widened(seen[e.root])
    # No weight is larger than its row's sum, whose range has a margin of its own.
    lo, hi = seen[e.root][0], float(np.log(widened(seen[rows.scores.total])[1]))
    return lo - (MARGIN - 1.0) * (hi - lo), hi


def approximate(graph: Graph, samples: Sequence[np.ndarray]) -> tuple[Graph, Report]:
    """The graph without `function` nodes.

    Args:
        samples: inputs [1, ...] of the graph; the ranges of the fits contain all that they produce, with a margin of 1.25,
            in the graph with the polynomials too.

    Raises:
        UnsupportedOpError: a function that no polynomial fits, or ranges that grow with every round of fitting.
    """
    with np.errstate(all="ignore"):  # poles are found, and named, when their function is fitted
        exact = [evaluate(graph, x)[graph.output] for x in samples]
        graph = centred(graph, samples)
        seen = calibrate(graph, samples, margin=1.0)
    size = max(float(np.max(np.abs(y))) for y in exact)
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
    if not tops:
        return graph, Report(approximations=(), error=0.0, size=size)
    intervals = {node.name: _range(node, expressions[node.name], seen) for node in tops}
    fits: dict[str, Fitted] = {}
    for _ in range(ROUNDS):
        for node in tops:
            if node.name not in fits:
                fits[node.name] = _fitted(node, expressions[node.name], intervals[node.name])
        new = {name: nodes for _, changes in fits.values() for name, nodes in changes.items()}
        nodes = [n for node in graph.nodes for n in new.get(node.name, [node])]
        after = replace(graph, nodes=tuple(nodes)).without_dead()
        seen = calibrate(after, samples, margin=1.0)
        outside = []
        for node in tops:
            (lo, hi), (least, most) = fits[node.name][0].interval, seen[expressions[node.name].root]
            if not lo <= least <= most <= hi:  # true of NaN, too
                outside.append((node, (lo, hi), (least, most)))
        if not outside:
            error = max(
                float(np.max(np.abs(evaluate(after, x)[after.output] - y))) for x, y in zip(samples, exact, strict=True)
            )
            return after, Report(approximations=tuple(fits[node.name][0] for node in tops), error=error, size=size)
        for node, _, _ in outside:
            lo, hi = _range(node, expressions[node.name], seen)
            intervals[node.name] = (min(lo, intervals[node.name][0]), max(hi, intervals[node.name][1]))
            del fits[node.name]
    node, (lo, hi), (least, most) = outside[0]
    raise UnsupportedOpError(
        f"the argument of {node.source!r} is fitted on [{lo:.4g}, {hi:.4g}] and fills [{least:.4g}, {most:.4g}] after {ROUNDS} rounds "
        "of fitting: the errors of the polynomials before it grow; train the model with polynomials"
    )
