"""The exact scale of every value of a trace: the primes of a modulus are near the scale and not equal to it.

What is added must have one scale, or one of the two is read a little wrong. Where one side of a sum still has a plaintext
factor of its own, as every term of a linear map or of a series has, that factor is encoded at the scale that the other side
asks for, and nothing is lost. (The cheap half of Kim, Papadimitriou and Polyakov, eprint 2020/1118, section 4.2, which multiply
other values by 1 for it, at a level.) Elsewhere a difference is left, and simulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .base import ScaleError
from .params import Params
from .primes import moduli
from .trace import Node, Trace

# Relative difference of two scales that may be added, whatever a circuit promises. Chebyshev sums of products left up to 2^-14.8
# (degree 20, nearest primes to 2^40 at N = 2^14 and 2^16).
SCALE_TOLERANCE = 2.0**-14
STATE_DRIFT = 1e-12  # relative, of a state's scale in one step

_FACTORS = ("mul_plain", "mul_scalar", "weighted_sum")
_FIXED = ("input", "mul", "square", "refresh", "refresh_function")  # no plaintext below them can change their scale


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Exact scales: of every node's result, of every plaintext operand; and the largest relative mismatch of a sum."""

    result: tuple[float, ...]
    plain: tuple[float, ...]
    mismatch: float


def foretold(params: Params) -> list[int]:
    """The modulus [levels + 1] as far as it can be known without a context: OpenFHE's own primes, powers of two for other libraries."""
    if params.backend == "openfhe":
        return moduli(params)
    return [1 << params.first_bits, *[1 << params.scale_bits] * params.levels]


def assign_scales(trace: Trace, moduli: Sequence[int], scale: float, *, tolerance: float = SCALE_TOLERANCE) -> Scales:
    """Follow exact scales through a trace.

    A plaintext factor is encoded at the scale that brings the product to exactly `scale` after its rescale, or to that of what it
    is added to.

    Args:
        moduli: moduli[i] is the prime that a rescale at level i divides by.
        tolerance: largest relative difference of the scales of a sum.

    Raises:
        ScaleError: a sum of values whose scales differ by more.
    """
    readers: list[list[int]] = [[] for _ in trace.nodes]
    for node in trace.nodes:
        for a in node.args:
            readers[a].append(node.id)
    for last in trace.outputs.values():
        readers[last].append(-1)
    result: list[float] = []
    plain: list[float] = []
    worst = 0.0
    for n in trace.nodes:
        s = [result[a] for a in n.args]
        p = 0.0
        match n.op:
            case "input" | "refresh_function":
                out = scale
            case "add" | "sub":
                for i in (1, 0) if s[0] != s[1] else ():
                    if own := _own(trace.nodes, readers, n.args[i], n.id):
                        ratio = s[1 - i] / s[i]
                        for a in own:
                            result[a] *= ratio
                            plain[a] *= ratio
                        result[n.args[i]] = s[i] = s[1 - i]
                        break
                gap = abs(s[0] / s[1] - 1.0)
                worst = max(worst, gap)
                if gap > tolerance:
                    raise ScaleError(
                        f"node {n.id} adds scales 2^{math.log2(s[0]):.8f} and 2^{math.log2(s[1]):.8f} (op {n.source}): "
                        f"they differ by {gap:.2g}, {tolerance:.2g} is allowed"
                    )
                out = s[0]
            case "mul":
                out = s[0] * s[1]
            case "square":
                out = s[0] * s[0]
            case "twice_real" | "twice_imaginary":
                out = 2.0 * s[0]
            case "mul_plain" | "mul_scalar" | "weighted_sum":
                out = scale * moduli[n.level]
                p = out / s[0]
            case "rescale":
                out = s[0] / moduli[n.level + 1]
            case "add_plain" | "add_scalar":
                out = p = s[0]
            case _:
                out = s[0]
        result.append(out)
        plain.append(p)
    return Scales(result=tuple(result), plain=tuple(plain), mismatch=worst)


def _own(nodes: Sequence[Node], readers: Sequence[Sequence[int]], root: int, reader: int) -> set[int]:
    """The nodes that give a value its scale, down to products by plaintexts; none if something else than `reader` reads one of them,
    or if there are others than plaintexts among them."""
    own, stack = {root}, [root]
    while stack:
        n = nodes[stack.pop()]
        if n.op in _FIXED:
            return set()
        if n.op not in _FACTORS:
            new = set(n.args) - own
            stack += new
            own |= new
    return own if all(r in own or (a == root and r == reader) for a in own for r in readers[a]) else set()
