"""Factors of stored slots, chosen so that all values may be refreshed: constants fold into neighbours and cost no level.

Stored slots of value v are multiplied by m_v > 0, and its `factor` divided by it, so that the circuit means the same:

    input, output, linear, mul_step
                            m free (client's packing, weights and bias, rows); one tensor's ciphertexts have one m, and what a step
                            keeps leaves as it came
    add, sub                m equal to both arguments'
    add_plain, rotate, rotate_sum, refresh, add_step   m equal to the argument's
    mul                     product of both arguments'
    polynomial              factors of degree n: m_x^n; Chebyshev: m_x free where the domain is scaled anyway, m of the result too

With logarithms this is a linear program (HiGHS): every slot stays within a limit, a refresh's interval with margin, and as little
below it as possible, because a refresh adds the same noise to a small value as to a large one. Values inside of a form (`Lowered.free`)
may lie above it: squeezed below, the squares of Goldschmidt's errors would shrink to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import optimize, sparse

from he_backend.circuit import Op, Signature
from he_backend.container import Arrays

from .lower import Lowered

SMALL = 4.0  # bits below the limit from which on a value's smallness counts STEEP times
STEEP = 5.0
ABOVE = 1e4  # cost of a bit above the limit, over that of a bit below it
MOST = 200.0  # bits of a multiplier, far from where float64 ends


def fold_factors(build: Lowered, peaks: Sequence[float] | np.ndarray, limit: float) -> tuple[Lowered, np.ndarray]:
    """The same program with stored slots of at most `limit`, where that can be had.

    Args:
        peaks: largest |stored slot| of each op.

    Returns:
        The program, and the multiplier of each op's stored slots.
    """
    logs = _solve(build, np.log2(np.maximum(peaks, 1e-30)) - math.log2(limit))
    m = np.exp2(logs)
    arrays: Arrays = dict(build.arrays)
    ops = tuple(_scaled(op, m, build, arrays) for op in build.ops)
    ends = {op.attrs["name"]: float(m[op.id]) for op in ops if op.kind in ("input", "output")}

    def signed(signatures: Sequence[Signature]) -> tuple[Signature, ...]:
        return tuple(replace(s, factor=s.factor / ends[s.name]) for s in signatures)

    return (
        replace(
            build,
            ops=ops,
            arrays=arrays,
            inputs=signed(build.inputs),
            outputs=signed(build.outputs),
            states=signed(build.states),
        ),
        m,
    )


def _solve(build: Lowered, excess: np.ndarray) -> np.ndarray:
    """log2 of the multipliers, given how many bits each value lies above its limit.

    Unknowns [4, ops]: log2 m; how far below the limit the value then is, how far above, and how far below beyond SMALL. A value
    that no multiplier can help (what it is tied to fixes it) may stay above its limit: that costs most.
    """
    n = len(build.ops)
    above = np.array([1.0 if op.id in build.free else ABOVE for op in build.ops])
    rows: list[dict[int, float]] = []
    right: list[float] = []
    ends: dict[str, int] = {}

    def equal(terms: dict[int, float], value: float = 0.0) -> None:
        rows.append(terms)
        right.append(value)

    def tie(v: int, terms: Sequence[tuple[int, float]]) -> None:
        row = {v: 1.0}
        for a, c in terms:
            row[a] = row.get(a, 0.0) - c
        equal(row)

    for op in build.ops:
        v = op.id
        if op.kind in ("input", "output"):
            first = ends.setdefault(op.attrs["name"], v)
            if first != v:
                tie(v, [(first, 1.0)])
        if op.kind in ("add", "sub"):
            for a in set(op.args):
                tie(v, [(a, 1.0)])
        elif op.kind == "mul":
            tie(v, [(a, 1.0) for a in op.args])
        elif op.kind == "polynomial" and "factors" in op.attrs:
            degree = sum(1 if beta is None else 2 for _, beta in op.attrs["factors"])
            tie(v, [(op.args[0], float(degree))])
        elif op.kind == "polynomial":
            # A factor where there was none would be a product, and cost a level.
            if op.attrs["domain"][0] == 1.0:
                equal({op.args[0]: 1.0})
            if 1.0 in op.attrs["chebyshev"][1:]:
                equal({v: 1.0})
        elif op.kind not in ("input", "linear", "mul_step"):
            tie(v, [(op.args[0], 1.0)])
    entries = [(i, j, c) for i, row in enumerate(rows) for j, c in row.items()]
    i, j, c = (np.array(x) for x in zip(*entries, strict=True)) if entries else (np.zeros(0, int),) * 3
    eye, none = sparse.identity(n, format="csr"), sparse.csr_matrix((n, n))
    ties = sparse.csr_matrix((c, (i, j)), shape=(len(rows), n))
    solved: Any = optimize.linprog(
        np.concatenate([np.zeros(n), np.ones(n), above, np.full(n, STEEP - 1.0)]),
        A_eq=sparse.vstack(
            [sparse.hstack([ties, sparse.csr_matrix((len(rows), 3 * n))]), sparse.hstack([eye, eye, -eye, none])]
        ),
        b_eq=np.concatenate([np.array(right), -excess]),
        A_ub=sparse.hstack([none, eye, none, -eye]),
        b_ub=np.full(n, SMALL),
        bounds=[(-MOST, MOST)] * n + [(0, None)] * (3 * n),
        method="highs",
    )
    return np.asarray(solved.x[:n]) if solved.x is not None else np.zeros(n)


def _scaled(op: Op, m: np.ndarray, build: Lowered, arrays: Arrays) -> Op:
    """One op with its constants for the new multipliers; new arrays are added to `arrays`."""
    own, attrs = float(m[op.id]), dict(op.attrs)

    def scaled(name: str, factor: float) -> str:
        if abs(factor - 1.0) < 1e-12:
            return name
        new = f"{name}*{factor:.17g}"
        if new not in arrays:
            arrays[new] = build.arrays[name] * np.float64(
                factor
            )  # single weights too: single products are off by 2^-24
        return new

    match op.kind:
        case "linear":
            attrs["weights"] = scaled(attrs["weights"], own / float(m[op.args[0]]))
            if attrs.get("bias") is not None:
                attrs["bias"] = scaled(attrs["bias"], own)
        case "mul_step":
            attrs["array"] = scaled(attrs["array"], own / float(m[op.args[0]]))
        case "add_plain" | "add_step":
            attrs["array"] = scaled(attrs["array"], own)
        case "polynomial" if "factors" in attrs:
            x = float(m[op.args[0]])
            attrs["factors"] = [[alpha * x, beta if beta is None else beta * x * x] for alpha, beta in attrs["factors"]]
        case "polynomial":
            x = float(m[op.args[0]])
            attrs["domain"] = [attrs["domain"][0] / x, attrs["domain"][1]]
            attrs["chebyshev"] = [c * own for c in attrs["chebyshev"]]
    return replace(op, attrs=attrs, factor=op.factor / own)
