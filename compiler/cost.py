"""Predicted time and memory of primitives, from a table measured on a machine.

`polyformer bench run ops` writes the tables in `benchmarks/costs/`. A table holds milliseconds for one set of parameters; other rings,
chains and digit counts are reached by the ratio of limb operations, which is how hybrid key switching scales (Han and Ki, eprint
2019/688). With n limbs, K special limbs and B digits of a limbs each,

    a decomposition  transforms B (n + K) limbs and converts each digit to the n + K - a limbs that it lacks
    a key's product  multiplies 2 B (n + K) limbs
    a mod-down       transforms 2 (n + K) limbs and converts K limbs to n, twice
    an automorphism  moves 2 (n + K) limbs, or 2 n behind a mod-down

A product or a conversion of one limb is far cheaper than a transform, which decides between sums modulo Q and modulo P·Q.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from he_backend.base import HEError
from he_backend.params import Params
from he_backend.trace import Node, Trace, cost_name

REFERENCE = "intel-r-xeon-r-processor-openfhe-128-bit-N65536-L30-s40-d5.json"
# A refresh of complex slots over one of real slots, processor time (openfhe 1.6.1, N = 2^13, 23 levels, three periods: 1.38 to 1.42).
COMPLEX = 1.4
COSTS = Path(__file__).resolve().parent.parent / "benchmarks" / "costs"


# Of one limb, in number-theoretic transforms of one: solved from the times at level 23 of chains of 30 levels, 5 digits (7 special limbs)
# and 23 levels, 2 digits (12) (N = 2^16, openfhe 1.6.1, one thread of the reference machine).
CONVERT, MULTIPLY, MOVE = 0.054, 0.11, 0.40


def work(op: str, params: Params, level: int) -> float:
    """Limb operations of a primitive on a ciphertext of `level`, in transforms, times the size of a limb; only ratios are used."""
    n, k, alpha = level + 1, params.special_limbs, params.digit_limbs
    digits = [min(alpha, n - start) for start in range(0, n, alpha)]
    hoist = len(digits) * (n + k) + CONVERT * sum(limbs * (n + k - limbs) for limbs in digits)
    key = MULTIPLY * 2 * len(digits) * (n + k)
    down = 2 * (n + k) + CONVERT * 2 * k * n
    units = {
        "hoist": hoist,
        "rotate_extended": key + MOVE * 2 * (n + k),
        "mod_down": down,
        "rotate_hoisted": key + down + MOVE * 2 * n,
        "rotate": hoist + key + down + MOVE * 2 * n,
        "relinearize": hoist + key + down,
        "rescale": 2 * (n + 1),
        "encode": n + 4,
        "encode_extended": n + k + 4,
        "weighted_sum_extended": n + k,
        "add_extended": n + k,
        "extend": n + k,
    }.get(op, n)
    return units * params.log_n * 2.0**params.log_n


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Milliseconds by primitive and level, for one thread of one machine.

    name     of the file that it came from
    refreshes  (parameters, thread-seconds of one call) of refreshes, which have tables of their own
    threads  factor by which two threads at once slow one thread down is in `contention`
    known    what `seconds` found before: a search for parameters asks for the same few thousand figures millions of times
    """

    name: str
    cpu: str
    params: Params
    ms: Mapping[str, Mapping[int, float]]
    contention: float = 1.0
    refreshes: tuple[tuple[Params, float], ...] = ()
    known: dict[tuple[str, Params, int], float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, path: Path | None = None, *, backend: str = "openfhe") -> CostTable:
        """A table by path; without one the newest of a processor of this name and this backend, else see `default_table`.

        Raises:
            HEError: there is no table, or it is not one.
        """
        path = path or default_table(backend)
        try:
            data = json.loads(path.read_text())
            return cls(
                name=path.name,
                cpu=data["cpu"],
                params=Params.from_json(data["params"]),
                ms={op: {int(level): float(v) for level, v in row.items()} for op, row in data["ms"].items()},
                contention=float(data.get("contention", 1.0)),
                refreshes=measured_refreshes(data["cpu"]),
            )
        except (OSError, ValueError, KeyError, AttributeError, HEError) as error:
            raise HEError(f"{path} is no cost table ({error!r}); measure one with: polyformer bench run ops") from error

    def seconds(self, op: str, params: Params, level: int) -> float:
        """One call on a ciphertext of `level` under `params`; 0 for what costs nothing."""
        key = op, params, level
        if key not in self.known:
            self.known[key] = self._seconds(op, params, level)
        return self.known[key]

    def _seconds(self, op: str, params: Params, level: int) -> float:
        op = {"conjugate": "rotate", "refresh_function": "refresh"}.get(op, op)
        row = self.ms.get(op)
        if op == "refresh" and not row:
            return self._refresh(params)
        if not row:
            return 0.0
        at = min(row, key=lambda known: (abs(known - level), known))
        return row[at] * work(op, params, level) / work(op, self.params, at) / 1000.0

    def _refresh(self, params: Params) -> float:
        """From the measured refresh of the most similar parameters, by the ratio of work: the period first, then the ring.

        Raises:
            HEError: none was ever measured.
        """
        if not self.refreshes:
            raise HEError(
                f"no cost of a refresh is known in {COSTS}; measure one with: polyformer bench run ops-refresh"
            )
        share = math.log2(params.refresh_period / params.slots)

        def distance(known: tuple[Params, float]) -> tuple[float, int]:
            other = known[0]
            return abs(math.log2(other.refresh_period / other.slots) - share), abs(other.log_n - params.log_n)

        other, seconds = min(self.refreshes, key=distance)
        slots = (COMPLEX if params.refresh_complex else 1.0) / (COMPLEX if other.refresh_complex else 1.0)
        return seconds * slots * refresh_work(params) / refresh_work(other)

    def measured(self, params: Params) -> dict[tuple[str, int], float] | None:
        """Seconds by (primitive, level) where the table was measured under just these parameters; else None."""
        if self.params != params:
            return None
        return {(op, level): ms / 1000.0 for op, row in self.ms.items() for level, ms in row.items()}

    def node(self, node: Node, trace: Trace, params: Params) -> float:
        """Seconds of one node without its encodings; weighted_sum counts its terms."""
        level = trace.nodes[node.args[0]].level if node.args else node.level
        if node.op == "weighted_sum":
            name = cost_name(node) if cost_name(node) in self.ms else "mul_plain"
            return len(node.args) * self.seconds(name, params, level)
        return 0.0 if node.op == "input" else self.seconds(cost_name(node), params, level)

    def encodings(self, node: Node, params: Params) -> float:
        """Seconds to encode the node's plaintexts, if none is cached."""
        vectors = sum(not isinstance(p, float) for p in node.plains)
        return vectors * self.seconds("encode_extended" if node.extended else "encode", params, node.level)


def refresh_work(params: Params) -> float:
    """Limb operations of a refresh but for a constant: key switches of about all limbs."""
    return 2.0**params.log_n * params.log_n * (params.levels + 1) ** 2


def measured_refreshes(cpu: str) -> tuple[tuple[Params, float], ...]:
    """(parameters, seconds) of every table of a refresh: those of this processor, of any where there are none."""
    found: list[tuple[bool, Params, float]] = []
    for path in sorted(COSTS.glob("*.json")):
        data = json.loads(path.read_text())
        for ms in data["ms"].get("refresh", {}).values():
            found.append((data["cpu"] == cpu, Params.from_json(data["params"]), float(ms) / 1000.0))
    mine = any(same for same, _, _ in found)
    return tuple((params, seconds) for same, params, seconds in found if same or not mine)


def default_table(backend: str = "openfhe") -> Path:
    """The newest table of a backend on this machine's processor; one of its on any processor; the reference.

    The reference is OpenFHE's: a ratio of limb operations then stands for another library, which is only as good as that.
    """
    try:
        here = Path("/proc/cpuinfo").read_text()
    except OSError:
        here = ""
    found = []
    for path in sorted(COSTS.glob("*.json")):
        record = json.loads(path.read_text())
        params = record["params"]
        if "rotate" not in record["ms"] or params["insecure"] or params.get("backend", "openfhe") != backend:
            continue
        mine = f": {record['cpu']}\n" in here
        if mine or backend != "openfhe":
            found.append((mine, record["created"], path))
    return max(found)[2] if found else COSTS / REFERENCE


def plaintext_bytes(node: Node, params: Params) -> int:
    """Bytes of one encoded plaintext of a node."""
    return (node.level + 1 + (params.special_limbs if node.extended else 0)) * (8 << params.log_n)
