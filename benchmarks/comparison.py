"""Two records side by side: ratios of their figures, and the conditions in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .blocks import is_number

MOST_ROWS = 50  # of a list that is compared row by row
# What rows are called in the records: by name, by node of the model, by what was varied.
KEYS = (
    *("name", "label", "source", "kind", "level", "axis", "figure", "tokens", "width", "blocks", "threads"),
    *("mixer", "case", "model", "variant", "task", "seed"),
)
MACHINE = ("cpu", "cores", "threads")
CONDITIONS = ("version", "commit", "machine", "versions", "params", "seed", "repeats", "quick")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure of both records."""

    name: str  # dotted path within the metrics
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        """b / a; None where a is 0."""
        return self.b / self.a if self.a else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two records of one benchmark say about each other."""

    name: str
    ratios: tuple[Ratio, ...]
    differ: Mapping[str, tuple[Any, Any]]  # dotted path -> what a and b have there
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "ratios": [asdict(r) | {"ratio": r.ratio} for r in self.ratios],
            "differ": {k: list(v) for k, v in self.differ.items()},
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        lines = [f"{self.name}: B / A", *(f"! {w}" for w in self.warnings)]
        width = max([len(r.name) for r in self.ratios], default=0)
        lines += [
            f"{r.name:<{width}}  {r.a:>12.4g}  {r.b:>12.4g}  {'-' if r.ratio is None else format(r.ratio, '.3f'):>8}"
            for r in self.ratios
        ]
        if self.differ:
            lines += ["conditions that differ:", *(f"  {k}: {a} | {b}" for k, (a, b) in self.differ.items())]
        return "\n".join(lines)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compare two records of one benchmark.

    Raises:
        ValueError: they are of two benchmarks.
    """
    if a["name"] != b["name"]:
        raise ValueError(f"records of two benchmarks cannot be compared: {a['name']!r} and {b['name']!r}")
    warnings = []
    if a["version"] != b["version"]:
        warnings.append(f"the benchmark changed between them: version {a['version']} and {b['version']}")
    machines = [flat({key: r["machine"].get(key) for key in MACHINE}) for r in (a, b)]
    if machines[0] != machines[1]:
        told = " and ".join(", ".join(f"{value} {key}" for key, value in m.items()) for m in machines)
        warnings.append(f"they are of different machines, so that ratios of times say little: {told}")
    for label, record in (("A", a), ("B", b)):
        if record.get("quiet") is None:
            warnings.append(f"{label} does not say whether others used the machine")
        elif not record["quiet"]:
            warnings.append(f"{label} was made while others used the machine{_share(record)}: its times are too long")
        if record.get("status", "complete") != "complete":
            warnings.append(f"{label} is {record['status']}: some figures are missing")
        if record.get("quick"):
            warnings.append(f"{label} is a quick run: its figures prove nothing")
    left, right = flat(a["metrics"]), flat(b["metrics"])
    ratios = [
        Ratio(name=key, a=float(left[key]), b=float(right[key]))
        for key in left
        if key in right and is_number(left[key]) and is_number(right[key])
    ]
    conditions = [flat({c: r.get(c) for c in CONDITIONS}) for r in (a, b)]
    differ = {
        key: (conditions[0].get(key), conditions[1].get(key))
        for key in {**conditions[0], **conditions[1]}
        if conditions[0].get(key) != conditions[1].get(key)
    }
    return Comparison(name=a["name"], ratios=tuple(ratios), differ=differ, warnings=tuple(warnings))


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects and lists as dotted paths; rows are keyed by what they are called (see `_row_keys`), lists of more than
    `MOST_ROWS` rows left out: nobody reads them, and they hide the rest.
    """
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list):
            if len(value) > MOST_ROWS:
                continue
            value = dict(zip(_row_keys(value), value, strict=True))
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + str(key)] = value
    return result


def _row_keys(rows: Sequence[Any]) -> list[str]:
    """A key for each row: those of the fields `KEYS` that it has; a row with none of them is called by its place.

    Rows that are called the same get their place among their namesakes, so that none replaces another.
    """
    keys: list[str] = []
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        parts = [str(row[k]) for k in KEYS if row.get(k) not in (None, "")] if isinstance(row, Mapping) else []
        key = "/".join(parts) or str(i)
        seen[key] = seen.get(key, 0) + 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


def _share(record: Mapping[str, Any]) -> str:
    share = (record.get("noise") or {}).get("others_share")
    return "" if share is None else f" ({share:.0%} of it)"
