"""What each primitive costs on this machine, at each level: the table that the compiler predicts from.

Times are CPU time of the thread that runs the primitive (`time.thread_time`), so that other people's jobs on the machine
count little; the median of the repeats, after one warm-up. With two threads at once a primitive takes longer, because
memory is shared: `ms_2_threads` holds that, and is what a run on two cores should be predicted from. A library whose binding
keeps the interpreter's lock (TenSEAL's) has no such figure: there a second thread waits, which its processor time does not show.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from he_backend import keys, refresh
from he_backend.params import Params

from . import memory

COSTS = Path(__file__).parent / "costs"
TERMS = 4  # of the weighted sums that are timed; the table holds the time of one term
Table = dict[str, dict[int, float]]


def measure(
    params: Params,
    levels: Sequence[int] | None = None,
    *,
    repeats: int = 3,
    two_threads: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    allow_insecure: bool = False,
) -> dict[str, Any]:
    """Time every primitive of a backend.

    Args:
        levels: those to measure (default: all); the levels between are interpolated linearly and listed in "interpolated".
        two_threads: on two threads at once, too.

    Returns:
        The record: machine, cpu, versions, params, created, threads, load, ms and ms_2_threads {primitive: {level: ms}}. A
        level is that of the first argument. weighted_sum is one term; names ending in _extended are modulo P·Q; load_key is one
        rotation key for that level, keygen one key at any level.
    """
    module = keys.backend(params.backend)
    client = module.Client(params, allow_insecure=allow_insecure)
    evaluator = module.Evaluator(params, key_id=client.key_id, allow_insecure=allow_insecure)
    wanted = sorted(set(range(params.levels + 1)) if levels is None else {*levels, 0, params.levels}, reverse=True)
    evaluator.load_key("relin", 0, params.levels, client.make_key("relin", 0, params.levels))
    evaluator.load_key("rotation", 1, params.levels, client.make_key("rotation", 1, params.levels))
    one: Table = {}
    two: Table = {}
    with ThreadPoolExecutor(2) as pool:
        for i, level in enumerate(wanted):
            for name, (run, share) in _primitives(client, evaluator, level).items():
                one.setdefault(name, {})[level] = _time(run, repeats) / share
                if two_threads:
                    both = list(pool.map(lambda _, run=run: _time(run, repeats), range(2)))
                    two.setdefault(name, {})[level] = max(both) / share
            if progress:
                progress(i + 1, len(wanted), f"level {level}")
    evaluator.close()
    missing = [level for level in range(params.levels + 1) if level not in wanted]
    return {
        **_machine(params),
        "threads": [1, 2] if two_threads else [1],
        "repeats": repeats,
        "interpolated": missing,
        "ms": _filled(one, params.levels),
        **({"ms_2_threads": _filled(two, params.levels)} if two_threads else {}),
    }


def measure_refresh(
    params: Params, *, repeats: int, progress: Callable[[int, int, str], None], allow_insecure: bool = False
) -> dict[str, Any]:
    """Time a refresh of every slot count at hand: `params` says which period repeats.

    Returns:
        A record as `measure` does, whose only row is the refresh, at the level that it wants.
    """
    with refresher(params, progress=progress, allow_insecure=allow_insecure) as ready:
        at = params.refresh_input
        values = np.tile(
            np.random.default_rng(0).uniform(-1, 1, params.refresh_period), params.slots // params.refresh_period
        )
        a = ready.send(values, level=at)
        ms = _time(lambda: ready.evaluator.refresh(a), repeats)
    progress(1, 1, "refresh")
    return {**_machine(params), "threads": [1], "repeats": repeats, "ms": {"refresh": {str(at): round(ms, 1)}}}


@dataclass(frozen=True, kw_only=True)
class Refresher:
    """A client and an evaluator with all keys and matrices of a refresh.

    matrix_bytes  by which the process grew when the matrices were encoded; 0 where the system does not tell
    """

    client: Any
    evaluator: Any
    matrix_bytes: int

    def send(self, values: np.ndarray, *, level: int) -> Any:
        """A slot vector as the evaluator's ciphertext."""
        residues = self.client.export_ciphertext(self.client.encrypt(values, level=level))
        return self.evaluator.import_ciphertext(residues, level=level)


@contextmanager
def refresher(
    params: Params, *, progress: Callable[[int, int, str], None], allow_insecure: bool = False
) -> Iterator[Refresher]:
    """Make and load every key of a refresh, and encode its matrices; closed after the block."""
    module = keys.backend(params.backend)
    client = module.Client(params, allow_insecure=allow_insecure)
    evaluator = module.Evaluator(params, key_id=client.key_id, allow_insecure=allow_insecure)
    try:
        wanted = list(refresh.keys(params))
        for i, (kind, k, level) in enumerate(wanted):
            evaluator.load_key(kind, k, level, client.make_key(kind, k, level))
            progress(i + 1, len(wanted) + 1, f"{kind} key")
        before = memory.resident_gb() or 0.0
        evaluator.prepare(refresh=True)
        progress(len(wanted) + 1, len(wanted) + 1, "matrices")
        grown = max(0.0, (memory.resident_gb() or 0.0) - before)
        yield Refresher(client=client, evaluator=evaluator, matrix_bytes=int(1e9 * grown))
    finally:
        evaluator.close()


def _machine(params: Params) -> dict[str, Any]:
    """What every table says of where it comes from."""
    return {
        "machine": platform.node(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **_versions("numpy", params.backend)},
        "params": params.to_json(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clock": "thread CPU time, median",
        "load": os.getloadavg()[0],
    }


def _primitives(client: Any, ev: Any, level: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """name -> (call, how many primitives one call is) at a level."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, ev.slots)
    residues = client.export_ciphertext(client.encrypt(x, level=level))
    a = ev.import_ciphertext(residues, level=level)
    b = ev.import_ciphertext(client.export_ciphertext(client.encrypt(x, level=level)), level=level)
    plain = ev.encode(x, level=level, scale=ev.scale)
    squared = ev.scale * ev.scale
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "encode": (lambda: ev.encode(x, level=level, scale=ev.scale), 1),
        "encrypt": (lambda: client.encrypt(x, level=level), 1),
        "decrypt": (lambda: client.decrypt(a), 1),
        "export_ciphertext": (lambda: ev.export_ciphertext(a), 1),
        "import_ciphertext": (lambda: ev.import_ciphertext(residues, level=level), 1),
        "add": (lambda: ev.add(a, b), 1),
        "sub": (lambda: ev.sub(a, b), 1),
        "add_plain": (lambda: ev.add_plain(a, plain), 1),
        "add_scalar": (lambda: ev.add_scalar(a, 0.5, scale=ev.scale), 1),
        "rotate": (lambda: ev.rotate(a, 1), 1),
    }
    if level > 0:  # a product at level 0 has no level left to rescale with
        product = ev.mul(a, b)
        term = ev.mul_plain(a, plain)
        calls |= {
            "mul_plain": (lambda: ev.mul_plain(a, plain), 1),
            "mul_scalar": (lambda: ev.mul_scalar(a, 0.5, scale=ev.scale), 1),
            "weighted_sum": (lambda: ev.weighted_sum([(a, plain)] * TERMS), TERMS),
            "mul": (lambda: ev.mul(a, b), 1),
            "square": (lambda: ev.square(a), 1),
            "relinearize": (lambda: ev.relinearize(product), 1),
            "rescale": (lambda: ev.rescale(term), 1),
            "drop": (lambda: ev.drop(a, level=level - 1), 1),
            "encode_degree_2": (lambda: ev.encode(x, level=level, scale=squared), 1),
        }
    if "hoisting" in ev.capabilities:
        digits = ev.hoist(a)
        calls |= {"hoist": (lambda: ev.hoist(a), 1), "rotate_hoisted": (lambda: ev.rotate_hoisted(a, digits, 1), 1)}
    if "double_hoisting" in ev.capabilities:
        wide = ev.rotate_extended(a, digits, 1)
        wide_plain = ev.encode(x, level=level, scale=ev.scale, extended=True)
        calls |= {
            "rotate_extended": (lambda: ev.rotate_extended(a, digits, 1), 1),
            "extend": (lambda: ev.extend(a), 1),
            "mod_down": (lambda: ev.mod_down(wide), 1),
            "add_extended": (lambda: ev.add(wide, wide), 1),
            "encode_extended": (lambda: ev.encode(x, level=level, scale=ev.scale, extended=True), 1),
            "weighted_sum_extended": (lambda: ev.weighted_sum([(wide, wide_plain)] * TERMS), TERMS),
        }
    body = client.make_key("rotation", 1, level)
    calls["load_key"] = (lambda: _load_once(ev, level, body), 1)
    if level == ev.params.levels:  # libraries make a key for the whole chain, then it is cut: the level changes little
        calls["keygen"] = (lambda: client.make_key("rotation", 1, level), 1)
    return calls


def _load_once(ev: Any, level: int, body: Any) -> None:
    other = type(ev)(ev.params, allow_insecure=ev.params.insecure)
    other.load_key("rotation", 1, level, body)
    other.close()


def _time(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of CPU time of this thread; quick calls are repeated until they fill 5 ms."""
    start = time.thread_time()
    run()
    first = max(time.thread_time() - start, 1e-7)
    inner = max(1, round(0.005 / first))
    samples = []
    for _ in range(repeats if first < 1.0 else 1):
        start = time.thread_time()
        for _ in range(inner):
            run()
        samples.append((time.thread_time() - start) / inner)
    return statistics.median(samples) * 1000


def _filled(table: Table, top: int) -> dict[str, dict[str, float]]:
    """All levels from the first measured one up, interpolated between neighbours; keys as JSON wants them."""
    out = {}
    for name, row in table.items():
        known = sorted(row)
        levels = range(0 if len(known) == 1 else known[0], top + 1)
        values = np.interp(list(levels), known, [row[k] for k in known])
        out[name] = {str(level): round(float(v), 4) for level, v in zip(levels, values, strict=True)}
    return out


def save(record: dict[str, Any], folder: Path = COSTS) -> Path:
    """Write benchmarks/costs/<cpu>-<params>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", record["cpu"].lower()).strip("-")
    path = folder / f"{slug}-{Params.from_json(record['params']).name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}
