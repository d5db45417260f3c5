"""What each kind of refresh costs and gives: plain, of few slots, of pairs, of functions.

Every figure is of a small circuit with one refresh, run as a compiled one is: on one thread, with all that the kind needs around it
(joining and parting a pair, halving a function's argument). Kinds are compared by processor seconds: what else a machine does in the
half an hour that all of them take would favour the one or the other. Contexts of different refreshes exclude each other in one process
(`openfhe_ring`), and memory is each kind's own, so that every kind has a process.

A functional refresh takes four levels more of the chain than a plain one, or more with many terms, and saves those of a polynomial.
Both are compared at the work that suits the functional one best: between two evaluations of the function lie just the levels that it
leaves. The plain one has to give those and the polynomial's, in all
seconds of the polynomial + seconds of a refresh * (levels left + depth) / levels between two plain refreshes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from he_backend import refresh, security
from he_backend.circuit import Circuit, Op, Signature
from he_backend.execute import Executor
from he_backend.kernels import depth
from he_backend.params import Params
from he_backend.simulator import input_slots, simulate_noise
from he_backend.trace import trace
from polyformer.commands.isolated import isolated

from . import fourier, ops, records
from .blocks import Block, Table
from .refresh_functions import Curve, Function, Ranges, functions
from .registry import Progress, Settings

END = 1  # level of outputs: at level 0 a result of size 1 would wrap the first modulus, which is one bit larger than the scale
NAMES = ("plain", "sparse", "pair", "functional, scale 54", "functional, scale 46")


def params_of(name: str, *, quick: bool) -> Params:
    """Parameters of a kind: of chains within 128 bits and 14 GB of memory those with most levels between two refreshes.

    At scale 2^54 a functional refresh has the chain of the plain one. Its noise is 2^10 times smaller there, so that it may also spend
    the same modulus on more levels of 46 bits.
    """
    plain = Params(
        log_n=11 if quick else 16,
        levels=20 if quick else 23,
        scale_bits=54,
        first_bits=60,
        digits=6,
        secret="sparse192",
        insecure=quick,
        refresh_encode=3,
        refresh_decode=3,
    )
    match name:
        case "plain":
            return plain
        case "sparse":
            return replace(plain, refresh_slots=64 if quick else 4096)
        case "pair":
            return replace(plain, refresh_complex=True)
        case "functional, scale 54":
            return replace(plain, levels=23, first_bits=55, refresh_terms=14)
        case "functional, scale 46":
            return replace(plain, levels=26, scale_bits=46, first_bits=47, digits=5, refresh_terms=28)
    raise ValueError(f"no kind of refresh is called {name!r}; known are: {'; '.join(NAMES)}")


def measure(settings: Settings) -> dict[str, Any]:
    """The record `refresh-kinds`: metrics {kinds: [a row of `one_kind` each], comparisons: see `comparisons`}."""
    found: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    ranges = Ranges.of_recipe()
    for i, name in enumerate(NAMES):
        step = settings.within(i, len(NAMES), name)
        found.append(isolated(one_kind, name, settings.quick, settings.repeats, ranges, progress=step))
        record = records.record(
            "refresh-kinds",
            metrics={"kinds": found, "comparisons": comparisons(found)},
            params={kind["name"]: kind["params"] for kind in found},
            threads=1,
            seed=0,
            repeats=settings.repeats,
        )
        settings.keep(record)
    return record


# --- One kind, in a process of its own -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One circuit: what it does beside the refresh, the circuit, and the exact results [period] of its inputs."""

    name: str
    circuit: Circuit
    inputs: Mapping[str, np.ndarray]
    exact: Mapping[str, np.ndarray]
    factor: float = 1.0  # stored result * factor = result
    about: Mapping[str, Any]


def one_kind(name: str, quick: bool, repeats: int, ranges: Ranges, *, progress: Progress) -> dict[str, Any]:
    """One kind with every function that it is compared on; the first case, which changes nothing, is repeated.

    Returns:
        name, params, log_qp, log_qp_limit, level_before and level_after of a refresh, levels between two of them, values that it
        serves, cases [see `_run`], wall_s and cpu_s: medians of one refresh, over cases; key_bytes and matrix_bytes, in tables and as
        seen; peak_gb.
    """
    params = params_of(name, quick=quick)
    before = params.refresh_input + (params.refresh_terms > 0)
    rows: list[dict[str, Any]] = []
    with ops.refresher(params, progress=progress, allow_insecure=quick) as ready:
        todo = cases(params, functions(ranges))
        for i, case in enumerate(todo):
            rows.append(_run(case, ready, repeats if i == 0 else 1))
            progress(i + 1, len(todo), case.name)
        peak = records.peak_gb()
        seen = ready.matrix_bytes
    return {
        "name": name,
        "params": params.to_json(),
        "log_qp": round(security.check(params, allow_insecure=quick), 1),
        "log_qp_limit": None if quick else security.limit(params),
        "level_before": before,
        "level_after": params.refresh_output,
        "levels": params.refresh_output - before,
        "slots": params.refresh_period,
        "values": 2 if params.refresh_complex else 1,
        "wall_s": statistics.median(row["refresh_s"] for row in rows),
        "cpu_s": statistics.median(row["refresh_cpu_s"] for row in rows),
        "cases": rows,
        "key_bytes": sum(params.key_bytes(level, kind) for kind, _, level in refresh.keys(params)),
        "keys": sum(1 for _ in refresh.keys(params)),
        "matrix_bytes": refresh.matrix_bytes(params),
        "matrix_bytes_seen": seen,
        "peak_gb": peak,
    }


def cases(params: Params, known: Sequence[Function]) -> list[Case]:
    """The circuits of a kind: the identity; with plain and functional refreshes of all slots also every function."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.0, 1.0, params.refresh_period)
    if params.refresh_complex:
        y = rng.uniform(-1.0, 1.0, params.refresh_period)
        return [_case("identity", params, {"x": x, "y": y}, {"x": x, "y": y}, [])]
    if params.refresh_terms:
        noise = refresh.function_std(params)
        curves: dict[str, Curve] = {"identity": lambda u: u, **{f.name: f.exact for f in known}}
        return [_functional(name, params, x, curve, noise) for name, curve in curves.items()]
    found = [_case("identity", params, {"x": x}, {"x": x}, [])]
    if params.refresh_period == params.slots:
        found += [_polynomial(f, params, x) for f in known]
    return found


def _functional(name: str, params: Params, x: np.ndarray, curve: Curve, noise: float) -> Case:
    series = fourier.fit(curve, params.refresh_terms, noise)
    attrs = {"kind": "functional", "scale": fourier.HALF, "fourier": [list(pair) for pair in series.coefficients]}
    case = _case(name, params, {"x": x}, {"x": curve(x)}, [], refresh_attrs=attrs)
    return replace(case, about={"fit_error": series.error, "size": series.size, "depth": 0})


def _polynomial(f: Function, params: Params, x: np.ndarray) -> Case:
    op = Op(id=0, kind="polynomial", args=(), attrs=f.polynomial, level=0)
    spent = depth(replace(op, args=(0,)), {}, params.slots)
    case = _case(f.name, params, {"x": x}, {"x": f.exact(x)}, [replace(op, level=params.refresh_output - spent)])
    about = {"fit_error": f.error, "degree": f.degree, "depth": spent}
    return replace(case, factor=f.factor, about=about)


def _case(
    name: str,
    params: Params,
    inputs: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    after: Sequence[Op],
    *,
    refresh_attrs: Mapping[str, Any] | None = None,
) -> Case:
    """Inputs, their refresh, `after` in a row behind it, and outputs."""
    attrs = dict(refresh_attrs or {"kind": "pair" if len(inputs) > 1 else "plain"})
    before = params.refresh_input + (params.refresh_terms > 0)
    chain = [
        Op(id=i, kind="input", args=(), attrs={"name": n, "part": 0}, level=before, source=n)
        for i, n in enumerate(inputs)
    ]
    first = range(len(inputs))
    results = []
    for i in first:
        args = (i, *(j for j in first if j != i))
        chain.append(
            Op(id=len(chain), kind="refresh", args=args, attrs=attrs, level=params.refresh_output, source="refresh")
        )
        for op in after:
            chain.append(replace(op, id=len(chain), args=(len(chain) - 1,), source=op.kind))
        results.append(len(chain) - 1)
    for n, result in zip(inputs, results, strict=True):
        chain.append(
            Op(id=len(chain), kind="output", args=(result,), attrs={"name": n, "part": 0}, level=END, source=n)
        )
    layout = np.arange(params.slots, dtype=np.int32) % params.refresh_period

    def side(n: str, level: int) -> Signature:
        return Signature(name=n, shape=(params.refresh_period,), layout="slots", factor=1.0, bound=1.0, level=level)

    draft = Circuit(
        params=params,
        ops=tuple(chain),
        arrays={},
        client_arrays={"slots": layout.reshape(1, -1)},
        inputs=tuple(side(n, before) for n in inputs),
        outputs=tuple(side(n, END) for n in inputs),
        keys={},
        relin_level=-1,
        error_bound=2.0**-10,
    )
    found = trace(draft)
    circuit = replace(draft, keys=found.keys, relin_level=found.relin_level)
    return Case(name=name, circuit=circuit, inputs=inputs, exact=exact, about={"depth": 0})


def _run(case: Case, ready: ops.Refresher, repeats: int) -> dict[str, Any]:
    """Time a circuit and compare its results with the exact ones, and with what the simulator makes of them.

    Returns:
        name, wall_s and cpu_s of the whole circuit; refresh_s and refresh_cpu_s without what follows the refresh, polynomial_cpu_s of
        that: medians;
        worst_bits and mean_bits, -log2 of the error, and the same predicted; and what the case says about itself.
    """
    circuit = case.circuit
    executor = Executor(circuit, ready.evaluator, threads=1)
    packed = input_slots(circuit, case.inputs)
    sent = {part: ready.send(row, level=circuit.inputs[0].level) for part, row in packed.items()}
    kinds = {op.id: op.kind for op in circuit.ops}
    wall, cpu, after, after_cpu = [], [], [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        run = executor.run(sent)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
        after.append(sum(row["seconds"] for row in run.timing.ops if row["kind"] == "polynomial"))
        behind = [row for row in run.timing.calls if kinds[row["op"]] == "polynomial"]
        after_cpu.append(sum(row["count"] * row["fastest"] for row in behind))
    period = circuit.params.refresh_period
    errors = []
    for (name, _), out in run.outputs.items():
        residues = ready.evaluator.export_ciphertext(out)
        back = ready.client.import_ciphertext(residues, level=END)
        values = ready.client.decrypt(back, scale=run.scales[name, 0]) * case.factor
        errors.append(values - np.tile(case.exact[name], len(values) // period))
    predicted = simulate_noise(circuit, case.inputs)
    foretold = [predicted[name] * case.factor - case.exact[name] for name in case.exact]
    return {
        "name": case.name,
        "wall_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "refresh_s": statistics.median(a - b for a, b in zip(wall, after, strict=True)),
        "refresh_cpu_s": statistics.median(a - b for a, b in zip(cpu, after_cpu, strict=True)),
        "polynomial_cpu_s": statistics.median(after_cpu),
        "repeats": repeats,
        **_bits(np.concatenate(errors), ""),
        **_bits(np.concatenate(foretold), "predicted_"),
        **case.about,
    }


def _bits(errors: np.ndarray, prefix: str) -> dict[str, float]:
    """Two digits: exact figures of decryptions do not belong into records (see `he_backend.owner`)."""
    size = np.abs(errors)
    return {
        f"{prefix}worst_bits": round(-math.log2(float(size.max())), 1),
        f"{prefix}mean_bits": round(-math.log2(float(size.mean())), 1),
    }


# --- Comparison ----------------------------------------------------------------------------------------------------------


def comparisons(kinds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every functional refresh beside a plain refresh and the same function's polynomial.

    Returns:
        for each kind and function, in processor seconds: functional_s and functional_levels between two of them; plain_s, one refresh
        and the polynomial, and plain_levels that are left after both; work_levels of other work between two evaluations;
        same_work_s, by the plain refresh, of what functional_s does; ratio, same_work_s / functional_s: above 1 the functional
        refresh pays.
    """
    plain = next((kind for kind in kinds if kind["name"] == "plain"), None)
    if plain is None:
        return []
    of = {case["name"]: case for case in plain["cases"] if case["name"] != "identity"}
    found = []
    for kind in kinds:
        if not Params.from_json(kind["params"]).refresh_terms:
            continue
        for case in kind["cases"]:
            if case["name"] not in of:
                continue
            other = of[case["name"]]
            share = (kind["levels"] + other["depth"]) / plain["levels"]
            same = other["polynomial_cpu_s"] + share * plain["cpu_s"]
            found.append(
                {
                    "kind": kind["name"],
                    "function": case["name"],
                    "functional_s": kind["cpu_s"],
                    "functional_levels": kind["levels"],
                    "plain_s": plain["cpu_s"] + other["polynomial_cpu_s"],
                    "plain_levels": plain["levels"] - other["depth"],
                    "work_levels": kind["levels"],
                    "same_work_s": same,
                    "ratio": same / kind["cpu_s"],
                    "functional_worst_bits": case["worst_bits"],
                    "plain_worst_bits": other["worst_bits"],
                }
            )
    return found


def decision(found: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: for which functions a functional refresh pays, and by how much at best and at worst."""
    best = max(found, key=lambda row: row["ratio"])
    worst = min(found, key=lambda row: row["ratio"])
    names = sorted({row["function"] for row in found if row["ratio"] > 1.0})
    where = (
        f"A functional refresh pays for {', '.join(names)}"
        if names
        else "A functional refresh pays for none of these functions"
    )
    return (
        f"{where}: a plain refresh with the polynomial takes {best['ratio']:.2f} of its time at best ({best['kind']}, "
        f"{best['function']}) and {worst['ratio']:.2f} at worst ({worst['kind']}, {worst['function']}), each with just as many levels of "
        "other work as the functional one leaves."
    )


def show(record: Mapping[str, Any]) -> Sequence[Block]:
    """Kinds, errors by function, and the comparison under the sentence of the decision."""
    kinds, found = record["metrics"]["kinds"], record["metrics"]["comparisons"]
    blocks: list[Block] = [
        Table(
            caption="One refresh on one thread; processor seconds a value and level: of a real ciphertext, by levels between refreshes",
            columns=(
                "kind",
                "slots",
                "wall s",
                "CPU s",
                "levels",
                "between",
                "s a value and level",
                "keys GB",
                "matrices GB: by the model, seen",
                "peak GB",
            ),
            rows=[
                (
                    kind["name"],
                    kind["slots"],
                    kind["wall_s"],
                    kind["cpu_s"],
                    f"{kind['level_before']} → {kind['level_after']}",
                    kind["levels"],
                    kind["cpu_s"] / kind["values"] / kind["levels"],
                    kind["key_bytes"] / 1e9,
                    f"{kind['matrix_bytes'] / 1e9:.2f}, {kind['matrix_bytes_seen'] / 1e9:.2f}",
                    kind["peak_gb"],
                )
                for kind in kinds
            ],
        ),
        Table(
            caption="Errors against the exact function, in bits of its largest value: worst / mean slot, and what the simulator predicts",
            columns=("kind", "function", "depth", "worst / mean", "predicted", "of the fit alone"),
            rows=[
                (
                    kind["name"],
                    case["name"],
                    case["depth"],
                    f"{case['worst_bits']:.1f} / {case['mean_bits']:.1f}",
                    f"{case['predicted_worst_bits']:.1f} / {case['predicted_mean_bits']:.1f}",
                    f"{-math.log2(case['fit_error']):.1f}" if case.get("fit_error") else "exact",
                )
                for kind in kinds
                for case in kind["cases"]
            ],
        ),
    ]
    if found:
        blocks.append(
            Table(
                caption=decision(found),
                columns=(
                    "kind",
                    "function",
                    "functional s",
                    "levels left",
                    "plain + polynomial s",
                    "levels left",
                    "same work, plain s",
                    "ratio",
                ),
                rows=[
                    (
                        row["kind"],
                        row["function"],
                        row["functional_s"],
                        row["functional_levels"],
                        row["plain_s"],
                        row["plain_levels"],
                        row["same_work_s"],
                        row["ratio"],
                    )
                    for row in found
                ],
            )
        )
    return blocks
