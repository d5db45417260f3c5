"""Programs of polynomials for exponentials, reciprocals and inverse square roots: fewest levels first, then fewest products.

    exponential   p(z)^(2^k): never negative, so that no denominator is, and small where e^z is small
    reciprocal    a polynomial, or Goldschmidt's steps y <- (1 + c) y (1 + e), e <- (1 + c) e^2 - c from e = 1 - x y
    inverse root  a polynomial, or Newton's steps y <- a y - b x y^3 from one

Goldschmidt's steps are relaxed: as T_2n = 2 T_n^2 - 1, the constants c = 1 / T_(2^j)(t) keep e = T_(2^j)(u) / T_(2^j)(t), u the map of
the interval to [-1, 1] and t = |u(0)|. So j steps are the polynomial of degree 2^j - 1 whose relative error is smallest of all, where
plain ones (c = 0, methods.md 1.6) need as many again as the interval's ratio is wide. Newton's constants make the error of each
step oscillate evenly: the best a t - b t^3 for 1 on the interval of t = y sqrt(x).

Products have no constants, so that stored magnitudes follow from those of the first operands: nodes whose argument must have a `unit`
say so, and the lowering keeps it (elementwise.py). An interval of length 4 is the unit of Goldschmidt's steps, as monic polynomials
that are small on it are neither large nor tiny (its capacity is 1): e is then x^2 - 2 of the e before. Newton's is x y^2 = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial, chebyshev
from scipy.optimize import linprog

from he_backend.base import Array

from ..ir import Graph, Node, evaluate
from ..polynomials import MAX_FACTORED_DEGREE

Interval = tuple[float, float]
GRID = 4001  # points that errors are measured on
POINTS = 161  # and that they are bounded on while fitting
MOST_SQUARINGS = 8
SMALLEST = 1e-11  # error of an exponential over its largest value: digits end there
MOST_STEPS = 11  # of Goldschmidt: ratios up to half a million
MOST_NEWTON = 6
PAUSE = 3  # Goldschmidt's steps after which both values may be refreshed


@dataclass(frozen=True, kw_only=True)
class Form:
    """A program for one function on an interval.

    words   what it is, in a report
    build   (node to be replaced, argument) -> its nodes; the last one keeps the node's name
    """

    words: str
    build: Callable[[Node, str], list[Node]]

    def graph(self) -> Graph:
        """The same on a vector of GRID numbers."""
        node = Node(name="y", op="function", inputs=("x",), shape=(GRID,))
        return Graph(input="x", input_shape=(GRID,), output="y", nodes=tuple(self.build(node, "x")))

    def __call__(self, x: Array) -> Array:
        return evaluate(self.graph(), x)["y"]


class Steps:
    """Nodes between an argument and the node that they replace; fusion keeps them as they are.

    Args:
        free: their stored size belongs to the form: they need not be small enough for a refresh.
    """

    def __init__(self, node: Node, *, free: bool = False) -> None:
        self.node, self.free = node, free
        self.nodes: list[Node] = []

    def _emit(self, op: str, inputs: tuple[str, ...], const: float | None = None, **attrs: Any) -> str:
        name = f"{self.node.name}.step{len(self.nodes)}"
        value = None if const is None else np.array(const)
        attrs = {"kept": True, "free": self.free, **attrs}
        self.nodes.append(replace(self.node, name=name, op=op, inputs=inputs, const=value, attrs=attrs))
        return name

    def polynomial(self, x: str, coefficients: Iterable[float], on: Interval | None = None, **attrs: Any) -> str:
        attrs = {"coefficients": np.array([*coefficients]), "interval": None if on is None else list(on), **attrs}
        return self._emit("polynomial", (x,), **attrs)

    def times(self, x: str, c: float) -> str:
        return x if c == 1.0 else self._emit("mul_const", (x,), c)

    def plus(self, x: str, c: float) -> str:
        return self._emit("add_const", (x,), c) if c else x

    def product(self, x: str, y: str, **attrs: Any) -> str:
        return self._emit("mul", (x, y), **attrs)

    def sum(self, x: str, y: str) -> str:
        return self._emit("add", (x, y))

    def done(self) -> list[Node]:
        return [*self.nodes[:-1], replace(self.nodes[-1], name=self.node.name)]


def minimax(
    degree: int, on: Interval, x: Array, centre: Array, half: Array, zero: float | None = None
) -> tuple[Array, float]:
    """Coefficients c_k of x^k and the smallest t with |p(x_i) - centre_i| <= t half_i at all points, a linear program.

    Args:
        zero: a point where p must be 0.
    """
    lo, hi = on

    def basis(x: Array) -> Array:
        return np.asarray(chebyshev.chebvander((2.0 * x - lo - hi) / (hi - lo), degree), dtype=np.float64)

    rows, ones = basis(x) / half[:, None], np.ones((len(x), 1))
    fixed = None if zero is None else np.append(basis(np.array([zero]))[0], 0.0)[None]
    found = linprog(
        np.append(np.zeros(degree + 1), 1.0),
        A_ub=np.block([[rows, -ones], [-rows, -ones]]),
        b_ub=np.concatenate([centre / half, -centre / half]),
        A_eq=fixed,
        b_eq=None if fixed is None else np.zeros(1),
        bounds=(None, None),
        method="highs",
    )
    if found.status != 0:
        return np.zeros(degree + 1), np.inf
    p = Chebyshev(found.x[:-1], domain=[lo, hi]).convert(kind=Polynomial)
    p = p if zero is None else p - p(zero)  # what the solver's tolerance left
    return np.pad(p.coef, (0, degree + 1 - len(p.coef))), float(found.x[-1])


def points(on: Interval) -> Array:
    """Points of an interval, denser towards its ends."""
    lo, hi = on
    return (lo + hi) / 2 + (hi - lo) / 2 * np.cos(np.linspace(0.0, np.pi, POINTS))


def _levels(degree: int) -> int:
    return (degree - 1).bit_length()


def exponential(on: Interval, error: float, *, zero: bool) -> Form | None:
    """e^z within an absolute error; None if no form keeps it.

    |p^n - e^z| <= error for n even is a pair of bounds on p, linear in its coefficients, so that whether a degree can keep them is a
    linear program.

    Args:
        zero: p is 0 at the interval's lower end, where e^z must be below the error: what is put there has weight 0.
    """
    z = points(on)
    e = np.exp(z)
    if error < SMALLEST * e.max():
        return None
    forms = sorted(
        (_levels(degree) + k, degree - 1 + k, degree, k)
        for degree in range(1, MAX_FACTORED_DEGREE + 1)
        for k in range(MOST_SQUARINGS + 1)
    )
    for *_, degree, k in forms:
        n = 1 << k
        upper = (e + error) ** (1.0 / n)
        lower = np.where(e > error, np.maximum(e - error, 0.0) ** (1.0 / n), -upper) if k else e - error
        c, t = minimax(degree, on, z, (upper + lower) / 2, (upper - lower) / 2, on[0] if zero else None)
        if t <= 1.0:
            return _powers(c, k, on)
    return None


def _powers(c: Array, k: int, on: Interval) -> Form:
    def build(node: Node, x: str) -> list[Node]:
        steps = Steps(node)
        y = steps.polynomial(x, c, on, unit=True)
        for _ in range(k):
            y = steps.polynomial(y, (0.0, 0.0, 1.0))
        return steps.done()

    times = {0: "", 1: ", squared", 2: ", squared twice"}.get(k, f", squared {k} times")
    return Form(words=f"a polynomial of degree {len(c) - 1}{times}", build=build)


@dataclass(frozen=True, kw_only=True)
class Power:
    """scale (a x + b)^exponent of a tensor x."""

    scale: float = 1.0
    a: float = 1.0
    b: float = 0.0
    exponent: float = 1.0

    def __call__(self, x: Array) -> Array:
        return self.scale * (self.a * x + self.b) ** self.exponent

    def base(self, on: Interval) -> Interval:
        """The interval of a x + b."""
        lo, hi = sorted(self.a * x + self.b for x in on)
        return lo, hi

    def times(self, c: float) -> Power | None:
        return replace(self, scale=self.scale * c) if c else None

    def plus(self, c: float) -> Power | None:
        return Power(a=self.scale * self.a, b=self.scale * self.b + c) if self.exponent == 1.0 else None

    def to(self, exponent: float) -> Power | None:
        """Itself to a power; None where the sign of its scale would matter."""
        if self.exponent == 1.0:
            return Power(a=self.scale * self.a, b=self.scale * self.b, exponent=exponent)
        if self.scale <= 0.0:
            return None
        return replace(self, scale=self.scale**exponent, exponent=self.exponent * exponent)


def inverse(f: Power, on: Interval, tolerance: float) -> Form:
    """1 / x or 1 / sqrt(x), of a positive tensor: the first form that keeps a relative error, or else the most precise one.

    Args:
        f: its exponent is -1 or -1/2.
    """
    base = f.base(on)
    least = np.inf
    best: Form | None = None
    for error, form in _divisions(f, on, base) if f.exponent == -1.0 else _roots(f, on, base):
        if error <= tolerance:
            return form
        if error < least:
            least, best = error, form
    assert best is not None
    return best


def _divisions(f: Power, on: Interval, base: Interval) -> Iterator[tuple[float, Form]]:
    """Relative errors and forms of scale / (a x + b), by levels, then products."""
    t = (base[1] + base[0]) / (base[1] - base[0])

    def error(degree: int) -> float:
        return float(1.0 / np.cosh((degree + 1) * np.arccosh(t)))

    polynomials = [(_levels(n), n - 1, n, 0) for n in range(1, MAX_FACTORED_DEGREE + 1)]
    steps = [(k, 2 * (k - 1), 2**k - 1, k) for k in range(2, MOST_STEPS + 1)]
    for *_, degree, k in sorted(polynomials + steps):
        form = _goldschmidt(f, on, base, k, degree) if k else _one(f, on, degree)
        yield error(degree), form


def _one(f: Power, on: Interval, degree: int) -> Form:
    """The polynomial through the zeros of T_(n+1): for 1 / x that of smallest relative error."""
    lo, hi = on
    nodes = (lo + hi) / 2 + (hi - lo) / 2 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    p = Chebyshev.fit(nodes, f(nodes), degree, domain=[lo, hi]).convert(kind=Polynomial)
    return _polynomial(np.asarray(p.coef, dtype=np.float64), on)


def _polynomial(c: Array, on: Interval) -> Form:
    def build(node: Node, x: str) -> list[Node]:
        steps = Steps(node)
        steps.polynomial(x, c, on)
        return steps.done()

    return Form(words=f"a polynomial of degree {len(c) - 1}", build=build)


def _goldschmidt(f: Power, on: Interval, base: Interval, count: int, degree: int) -> Form:
    lo, hi = base
    t = (hi + lo) / (hi - lo)
    relaxed = [float(1.0 / np.cosh(2**j * np.arccosh(t))) for j in range(count + 1)]
    first = Polynomial([1.0, -2.0 / (lo + hi)])(Polynomial([f.b, f.a]))  # e = 1 - (a x + b) y with y = 2 / (lo + hi)

    def build(node: Node, x: str) -> list[Node]:
        steps, c = Steps(node, free=True), relaxed[1]
        # Stored, 1 + e is at most 2 + 2 / c: the first y is as much below 1 as the last is above.
        peak = float(np.prod([(2.0 + 2.0 / c) ** -0.5 for c in relaxed[1:count]]))
        y = steps.polynomial(x, ((1.0 + c) * f.scale * 2.0 / (lo + hi) * (1.0 + first)).coef, on, unit=True, peak=peak)
        e = steps.polynomial(x, ((1.0 + c) * first**2 - c).coef, on, unit=True)
        for j, c in enumerate(relaxed[2:], start=2):
            pause: dict[str, Any] = {"pause": True} if j % PAUSE == 0 and j < count else {}
            y = steps.times(steps.product(y, steps.plus(e, 1.0), **pause), 1.0 + c)
            if j < count:
                e = steps.polynomial(e, (-c, 0.0, 1.0 + c), **pause)
        return steps.done()

    return Form(words=f"{count} Goldschmidt steps, degree {degree}", build=build)


def _roots(f: Power, on: Interval, base: Interval) -> Iterator[tuple[float, Form]]:
    """The same of scale (a x + b)^(-1/2): polynomials of degree n, then Newton's steps."""

    @cache
    def seed(degree: int) -> tuple[Array, float]:
        x = points(on)
        return minimax(degree, on, x, f(x), np.abs(f(x)))

    forms = sorted(
        (_levels(degree) + 2 * count, degree - 1 + 3 * count, degree, count)
        for count in range(MOST_NEWTON + 1)
        for degree in range(1, MAX_FACTORED_DEGREE + 1)
        if degree > 1 or not count  # the argument's unit takes a level beside the seed's
    )
    for *_, degree, count in forms:
        c, error = seed(degree)
        if error >= 1.0:
            continue
        relaxed = []
        for _ in range(count):
            a, b, error = newton_constants(1.0 - error, 1.0 + error)
            relaxed.append((a, b))
        yield error, _newton(f, on, c, relaxed)


def newton_constants(lo: float, hi: float) -> tuple[float, float, float]:
    """a, b and the error of the best a t - b t^3 for 1 on [lo, hi]: it is 1 - error at both ends, 1 + error at its maximum."""
    top = np.sqrt((lo * lo + lo * hi + hi * hi) / 3.0)
    b = 2.0 / (lo * hi * (lo + hi) + 2.0 * top**3)
    return float(3.0 * b * top**2), float(b), float(2.0 * b * top**3 - 1.0)


def _newton(f: Power, on: Interval, c: Array, constants: Sequence[tuple[float, float]]) -> Form:
    def build(node: Node, x: str) -> list[Node]:
        steps = Steps(node, free=bool(constants))
        y = steps.polynomial(x, c, on)
        argument = steps.times(steps.plus(steps.times(x, f.a), f.b), f.scale**-2.0) if constants else x
        for a, b in constants:
            cube = steps.product(steps.product(argument, y, unit=True), steps.product(y, y))
            y = steps.sum(steps.times(cube, -b), steps.times(y, a))  # the shallower one takes the other's factor
        return steps.done()

    words, degree = f"a polynomial of degree {len(c) - 1}", len(c) - 1
    for _ in constants:
        degree = 3 * degree + 1
    if constants:
        words += f" and {len(constants)} Newton step{'s' * (len(constants) > 1)}, degree {degree}"
    return Form(words=words, build=build)
