"""How near a run came to its bound, by node of the model and by primitive: the two tables that records and reports share.

    bound = sum over primitives of (count * fastest measured cost at that level) / threads        efficiency = bound / measured

The fastest cost is that of any call of the runs at hand, and of a cost table of the same parameters if there is one; a call on fewer
limbs is never taken to cost more than one on more. Encodings that a run had to do on the way are primitives like others. The rows are
those of the PowerSoftmax paper's latency tables (a table by node and one by CKKS primitive), so that both can be read side by side.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Costs = Mapping[tuple[str, int], float]  # (primitive, level) -> seconds of one call

# Nodes of a transformer by the names of their ONNX nodes; the first that matches. What matches none goes by the kind of its op.
NODES = (
    ("norm", r"norm"),
    ("head", r"head|logits|first"),
    ("activation", r"\bact\b|activation|square"),
    ("division", r"reciprocal|slope|mixer\.out\b|attended"),
    ("FFN", r"\bmlp\b|\bup\b|\bdown\b|\bout$"),
    ("denominator", r"denominator|\bsum\b"),
    ("weighted sum", r"numerator|values"),
    ("power", r"\bpowers?\b"),
    ("scores", r"scores|products"),
    ("QKV", r"\b(q|k|v|qkv|kt)\b"),
    ("projection", r"\bo\b|merged|mixed|mixer\.residual"),
)
KINDS = {"polynomial": "activation", "refresh": "refresh", "linear": "linear map", "rotate_sum": "linear map"}
ORDER = (
    *("norm", "QKV", "scores", "power", "denominator", "division", "weighted sum", "projection", "FFN", "activation"),
    *("head", "refresh", "linear map", "other", "state"),
)
PRIMITIVES = {
    "encode": ("encode", "encode_extended"),
    "rotate": ("rotate", "rotate_hoisted", "rotate_extended", "conjugate"),
    "ct-ct": ("mul", "square"),
    "ct-pt": ("mul_plain", "mul_scalar", "weighted_sum", "weighted_sum_extended"),
    "rescale": ("rescale",),
    "key switch": ("hoist", "mod_down", "relinearize"),
    "refresh": ("refresh", "refresh_function"),
    "add, drop": ("add", "add_extended", "sub", "add_plain", "add_scalar", "drop", "extend"),
}
_GROUP = {name: group for group, names in PRIMITIVES.items() for name in names}


def node_of(source: str, kind: str) -> str:
    """The row of the table by node that an op belongs to.

    Args:
        source: name of its ONNX node; kind: of the circuit op.
    """
    if kind == "refresh":
        return "refresh"
    name = source.strip("/").replace("/", ".")
    for row, pattern in NODES:
        if re.search(pattern, name):
            return row
    return KINDS.get(kind, "other")


def fastest(runs: Sequence[Mapping[str, Any]], table: Costs | None = None) -> dict[tuple[str, int], float]:
    """Seconds of the fastest call of each (primitive, level) over runs and a table.

    Args:
        runs: timings as plain data, see `execute.Timing`.
    """
    best: dict[tuple[str, int], float] = {}
    for run in runs:
        for call in run["calls"]:
            key = call["primitive"], int(call["level"])
            best[key] = min(best.get(key, float("inf")), float(call["fastest"]), (table or {}).get(key, float("inf")))
    for name in {name for name, _ in best}:
        cheapest = float("inf")
        for level in sorted((at for known, at in best if known == name), reverse=True):
            cheapest = best[name, level] = min(best[name, level], cheapest)
    return best


def tables(
    ops: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    *,
    table: Costs | None = None,
    errors: Mapping[int, float] | None = None,
    predicted_errors: Mapping[int, float] | None = None,
) -> Row:
    """Efficiency and both tables of a request.

    Args:
        ops: the circuit's, with id, kind, source and level.
        runs: timings of requests, as plain data; the one of median wall time is shown, all of them make the bound.
        table: costs measured for the same parameters, if any.
        errors: largest |error| after an op, by op id, where it was measured; predicted_errors: the same from the circuit.

    Returns:
        efficiency, bound_s (wall), evaluate_s, threads, operators (by node) and primitives, each row with name, count, seconds
        (of threads), share, levels [highest, lowest], bound_s (of threads), efficiency; those by node with error and
        predicted_error (None where unknown).
    """
    run = sorted(runs, key=lambda r: r["wall_s"])[(len(runs) - 1) // 2]
    best = fastest(runs, table)
    by_id = {int(op["id"]): op for op in ops}

    def node(call: Mapping[str, Any]) -> str:
        op = by_id[int(call["op"])]
        return node_of(op["source"], op["kind"])

    nodes = _rows(run["calls"], best, node, ORDER)
    measured, predicted = (largest(ops, found or {}) for found in (errors, predicted_errors))
    for row in nodes:
        row |= {"error": measured.get(row["name"]), "predicted_error": predicted.get(row["name"])}
    bound = sum(row["bound_s"] for row in nodes) / run["threads"]
    return {
        "evaluate_s": run["wall_s"],
        "threads": run["threads"],
        "bound_s": bound,
        "efficiency": bound / run["wall_s"],
        "operators": nodes,
        "primitives": _rows(
            run["calls"], best, lambda call: _GROUP.get(call["primitive"], "other"), (*PRIMITIVES, "other")
        ),
    }


def largest(ops: Sequence[Mapping[str, Any]], errors: Mapping[int, float]) -> dict[str, float]:
    """The largest error of each row of the table by node, in the table's order.

    Args:
        ops: the circuit's, with id, kind and source; errors: by op id. Those of outputs are of what a step keeps, row "state".
    """
    found: dict[str, float] = {}
    for op in ops:
        if (error := errors.get(int(op["id"]))) is not None:
            name = "state" if op["kind"] == "output" else node_of(op["source"], op["kind"])
            found[name] = max(error, found.get(name, 0.0))
    return {name: found[name] for name in ORDER if name in found}


def _rows(
    calls: Sequence[Mapping[str, Any]], best: Costs, key: Callable[[Mapping[str, Any]], str], order: Sequence[str]
) -> list[Row]:
    """One row a key, in a given order."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for call in calls:
        groups[key(call)].append(call)
    total = sum(float(call["seconds"]) for call in calls) or 1.0
    rows = []
    for name in order:
        if not (mine := groups.get(name)):
            continue
        seconds = sum(float(call["seconds"]) for call in mine)
        bound = sum(int(call["count"]) * best[call["primitive"], int(call["level"])] for call in mine)
        levels = [int(call["level"]) for call in mine]
        rows.append(
            {
                "name": name,
                "count": sum(int(call["count"]) for call in mine),
                "seconds": seconds,
                "share": seconds / total,
                "levels": [max(levels), min(levels)],
                "bound_s": bound,
                "efficiency": bound / seconds if seconds else None,
            }
        )
    return rows
