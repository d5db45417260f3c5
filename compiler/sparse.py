"""Any linear map between any two layouts: which rotations of which ciphertexts, and where their results are added up.

    y[j] = sum over ciphertexts c and rotations r of weights[c, r] * rotate(x[c], r), then y[j] += rotate(y[j], s) for s in folds

Every nonzero M[o, i] has to be met once at every slot that holds output o. A tensor may lie in several copies, and with folds a
slot may leave part of its sum to the copies that are folded onto it; so a nonzero can be met by several (ciphertext, rotation)
pairs, and the pairs that meet most are taken first: a greedy set cover, whose cost is at most ln(n) + 1 times the optimum
(Chvatal, A greedy heuristic for the set-covering problem, 1979). For dense and convolution weights in the layouts of `places` it
finds the generalised diagonals of Halevi and Shoup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from he_backend.base import UnsupportedOpError

from .layout import power_of_two
from .matvec import PlanCost

Plan = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
MOST_CANDIDATES = 12_000_000  # (nonzero, copy, fold) triples of one cover; beyond it a form is not tried
MOST_DIAGONALS = 4096  # of one pair of ciphertexts; beyond it a form is not tried
DENSE = 0.25  # share of nonzeros from which neighbouring rotations are tried first
STRIDES = 48  # giant-step strides that are tried


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one source ciphertext gives to one target ciphertext: weights [R, slots], plan as in `kernels.linear`."""

    source: int
    weights: np.ndarray
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class SparseMap:
    """A planned map: terms of every target ciphertext, the folds that follow, the layout [D, slots] of the result, seconds.

    clean tells whether unused slots of the result hold 0.
    """

    targets: tuple[tuple[Term, ...], ...]
    folds: tuple[int, ...]
    layout: np.ndarray
    clean: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """A candidate for the result: slots [D, slots] hold output indices (-1: none), of which the first `period` slots are
    summed over all copies by `folds`; `final` is the layout once they are, where it differs from `slots`.
    """

    slots: np.ndarray
    folds: tuple[int, ...] = ()
    period: int = 0
    final: np.ndarray | None = None


def places(outputs: int, source: np.ndarray, matrix: sp.csr_matrix, *, repeated: bool) -> Iterator[Place]:
    """Candidate layouts of a map's result, to be judged by cost.

    Args:
        outputs: elements of the result; source: [C, slots] layout of the argument; matrix: [outputs, inputs].
        repeated: only layouts that repeat with the next power of two, for readers that sum over features.
    """
    slots = source.shape[1]
    period = power_of_two(outputs)
    if period <= slots:
        tiled = np.arange(slots) % period
        tiled = np.where(tiled < outputs, tiled, -1)[None]
        steps = tuple(period << k for k in range((slots // period - 1).bit_length()))
        if steps:
            yield Place(slots=tiled, folds=steps, period=period)
        yield Place(slots=tiled)
        if repeated:
            return
        yield Place(slots=np.where(np.arange(slots) < outputs, np.arange(slots), -1)[None])
        if (dot := _dot_products(outputs, source)) is not None:
            yield dot
    else:
        parts = -(-outputs // slots)
        index = np.arange(parts * slots).reshape(parts, slots)
        yield Place(slots=np.where(index < outputs, index, -1))
    if not repeated and (anchored := _anchored(outputs, source, matrix)) is not None:
        yield Place(slots=anchored)


def _dot_products(outputs: int, source: np.ndarray) -> Place | None:
    """Output o in slot o q of a source that repeats with period q: one product, then sums over q neighbours."""
    slots = source.shape[1]
    period = 1
    while period < slots and not np.array_equal(np.roll(source[0], -period), source[0]):
        period *= 2
    if len(source) != 1 or outputs * period > slots or period == 1:
        return None
    spread = np.arange(slots) // period
    final = np.where((np.arange(slots) % period == 0) & (spread < outputs), spread, -1)
    steps = tuple(1 << k for k in range(period.bit_length() - 1))
    return Place(slots=np.where(spread < outputs, spread, -1)[None], folds=steps, final=final[None])


def _anchored(outputs: int, source: np.ndarray, matrix: sp.csr_matrix) -> np.ndarray | None:
    """Every output near the first input that it reads, so that windows of one shape share their rotations.

    Outputs with the same first input (the channels of a convolution) are moved apart by one offset for all of a rank: the
    furthest free blocks first.
    """
    slots = source.shape[1]
    where = np.full(matrix.shape[1], -1)
    for s in range(slots - 1, -1, -1):
        if source[0, s] >= 0:
            where[source[0, s]] = s  # the first slot of each input
    rows = np.diff(matrix.indptr) > 0
    if not rows.all():
        return None
    first = np.minimum.reduceat(matrix.indices, matrix.indptr[:-1])
    anchor = where[first]
    if (anchor < 0).any():
        return None
    order = np.argsort(anchor, kind="stable")
    _, counts = np.unique(anchor, return_counts=True)
    rank = np.empty(outputs, dtype=int)
    rank[order] = np.concatenate([np.arange(n) for n in counts])
    block = power_of_two(int(np.count_nonzero(where >= 0)))
    offsets = [b + k for k in range(block) for b in range(0, slots, block)] if block <= slots else list(range(slots))
    free = np.ones(slots, dtype=bool)
    target = np.full(slots, -1)
    for r in range(int(rank.max()) + 1):
        mine = np.flatnonzero(rank == r)
        for offset in offsets:
            at = (anchor[mine] + offset) % slots
            if free[at].all():
                free[at] = False
                target[at] = mine
                break
        else:
            return None
    return target[None]


def plan_sparse(
    matrix: sp.csr_matrix, source: np.ndarray, candidates: Sequence[Place] | Iterator[Place], cost: PlanCost
) -> SparseMap:
    """The cheapest of the candidates' plans for y = M x.

    Args:
        matrix: [outputs, inputs]; source: [C, slots] index of an input or -1.
        cost: predicted seconds of (diagonals, babies, giants, folds).

    Raises:
        UnsupportedOpError: a needed input lies nowhere in the source.
    """
    best: SparseMap | None = None
    for place in candidates:
        plan = _plan(matrix, source, place, cost, limit=best.seconds if best else float("inf"))
        if plan is not None and (best is None or plan.seconds < best.seconds):
            best = plan
    if best is None:
        raise UnsupportedOpError(f"no layout was found for a linear map of shape {matrix.shape}")
    return best


def _plan(matrix: sp.csr_matrix, source: np.ndarray, place: Place, cost: PlanCost, limit: float) -> SparseMap | None:
    targets = []
    seconds = 0.0
    for slots in place.slots:
        # A diagonal costs at least its product: no more of them than still beat the best form found.
        most = min(MOST_DIAGONALS * len(source), (limit - seconds) / max(cost(1, 0, 1, 0), 1e-12))
        terms = _cover(matrix, source, slots, place, most)
        if terms is None:
            return None
        planned = []
        for c, rotations, weights in terms:
            plan = baby_giant(rotations, cost)
            babies = len({b for _, row in plan for b, _ in row})
            seconds += cost(len(rotations), babies, len(plan), 0)
            planned.append(Term(source=c, weights=weights, plan=plan))
        seconds += cost(0, 0, 1, len(place.folds))
        if seconds >= limit:
            return None
        targets.append(tuple(planned))
    layout = place.slots if place.final is None else place.final
    clean = place.final is None
    return SparseMap(targets=tuple(targets), folds=place.folds, layout=layout, clean=clean, seconds=seconds)


def _cover(
    matrix: sp.csr_matrix, source: np.ndarray, target: np.ndarray, place: Place, most: float
) -> list[tuple[int, np.ndarray, np.ndarray]] | None:
    """(ciphertext, rotations [R], weights [R, slots]) that meet every nonzero once; None where that takes more than `most`."""
    count, slots = source.shape
    where = _locations(source, matrix.shape[1])
    if place.final is not None:  # dot products: the sum over the folded neighbours is one output
        return _cover_products(matrix, source, target)
    period = place.period if place.folds else slots
    used = np.flatnonzero(target[:period] >= 0)
    rows = matrix[target[used]].tocoo()
    slot, column, value = used[rows.row], rows.col, rows.data
    keep = value != 0.0
    slot, column, value = slot[keep], column[keep], value[keep]
    if slot.size == 0:
        return []
    if (where[column] < 0).all(axis=1).any():
        raise UnsupportedOpError("a linear map reads an element that lies in no slot")
    if count == 1 and value.size > DENSE * used.size * matrix.shape[1]:
        found = _neighbours(matrix, source[0], target, period, value.size, most)
        if found is not None:
            return found
    shifts = np.arange(0, slots, period)
    if slot.size * shifts.size * where.shape[1] > MOST_CANDIDATES:
        return None
    here = where[column]  # [n, copies]
    keys = here[:, None, :] // slots * slots + (here[:, None, :] - slot[:, None, None] - shifts[:, None]) % slots
    keys = np.where(here[:, None, :] >= 0, keys, count * slots).reshape(slot.size, -1).astype(np.int32)
    counts = np.bincount(keys.reshape(-1), minlength=count * slots + 1)
    order = np.argsort(keys, axis=None, kind="stable")  # the (nonzero, fold, copy) triples of each key lie together
    starts = np.concatenate([[0], np.cumsum(counts)])
    counts[count * slots] = 0  # where a copy is missing
    chosen: dict[int, np.ndarray] = {}
    left = np.ones(slot.size, dtype=bool)
    remaining = slot.size
    while remaining:
        key = int(np.argmax(counts))
        if len(chosen) + remaining / max(int(counts[key]), 1) > most:  # no key meets more than this one
            return None
        met, first = np.unique(order[starts[key] : starts[key + 1]] // keys.shape[1], return_index=True)
        column = order[starts[key] : starts[key + 1]][first] % keys.shape[1]
        met, column = met[left[met]], column[left[met]]
        weights = np.zeros(slots)
        weights[slot[met] + shifts[column // where.shape[1]]] = value[met]
        chosen[key] = weights
        left[met] = False
        remaining -= met.size
        counts = counts - np.bincount(keys[met].reshape(-1), minlength=counts.size)
        counts[count * slots] = 0
    found = []
    for c in range(count):
        mine = sorted(k for k in chosen if k // slots == c)
        if mine:
            found.append((c, np.array([k % slots for k in mine]), np.stack([chosen[k] for k in mine])))
    return found


def _neighbours(
    matrix: sp.csr_matrix, source: np.ndarray, target: np.ndarray, period: int, nonzeros: int, most: float
) -> list[tuple[int, np.ndarray, np.ndarray]] | None:
    """The same with rotations 0, 1, .., R - 1, R a power of two as small as can be: what a dense map between suited layouts needs."""
    slots = source.size
    rotations = power_of_two(-(-nonzeros // slots))
    dense = matrix.toarray()
    s = np.arange(slots)
    while rotations <= min(slots, most):
        held = source[(s[None] + np.arange(rotations)[:, None]) % slots]  # [R, slots]
        weights = np.where((held >= 0) & (target >= 0), dense[target, held], 0.0)
        pair = (s % period) * np.int64(matrix.shape[1]) + held
        row, slot = np.nonzero(weights)
        _, first = np.unique(pair[row, slot], return_index=True)
        if first.size == nonzeros:
            once = np.zeros_like(weights)
            once[row[first], slot[first]] = weights[row[first], slot[first]]
            return [(0, np.arange(rotations), once)]
        rotations *= 2
    return None


def _cover_products(
    matrix: sp.csr_matrix, source: np.ndarray, target: np.ndarray
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """One product: every slot multiplies the input that it holds by its weight for the output of its block."""
    held = source[0]
    use = (target >= 0) & (held >= 0)
    weights = np.zeros(target.size)
    weights[use] = np.asarray(matrix[target[use], held[use]]).reshape(-1)
    # An input that lies twice within a block would be counted twice.
    pair = target[use] * np.int64(matrix.shape[1]) + held[use]
    _, first = np.unique(pair, return_index=True)
    once = np.zeros(pair.size, dtype=bool)
    once[first] = True
    weights[np.flatnonzero(use)[~once]] = 0.0
    return [(0, np.array([0]), weights[None])]


def _locations(source: np.ndarray, inputs: int) -> np.ndarray:
    """[inputs, copies] c * slots + slot of every copy of an input, -1 where there are fewer."""
    flat = source.reshape(-1)
    at = np.flatnonzero(flat >= 0)
    order = at[np.argsort(flat[at], kind="stable")]
    index = flat[order]
    counts = np.bincount(index, minlength=inputs)
    rank = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    where = np.full((inputs, max(1, int(counts.max(initial=1)))), -1, dtype=np.int64)
    where[index, rank] = order
    return where


def baby_giant(rotations: np.ndarray, cost: PlanCost) -> Plan:
    """Cheapest split r = giant + baby, baby = r mod g, over the strides g that occur between the rotations."""
    strides = {1 << k for k in range(16)}
    gaps, counts = np.unique(np.abs(rotations[:64, None] - rotations[None, :64]), return_counts=True)
    often = gaps[np.argsort(-counts, kind="stable")][: STRIDES + 1]
    strides |= {int(g) for g in often if g > 0}
    best: tuple[float, int] = (float("inf"), 1)
    for stride in sorted(strides):
        babies, giants = len(np.unique(rotations % stride)), len(np.unique(rotations // stride))
        if (seconds := cost(len(rotations), babies, giants, 0)) < best[0]:
            best = seconds, stride
    groups: dict[int, list[tuple[int, int]]] = {}
    for row, r in enumerate(map(int, rotations)):
        groups.setdefault(r // best[1] * best[1], []).append((r % best[1], row))
    return tuple((g, tuple(terms)) for g, terms in sorted(groups.items()))


def input_layouts(inputs: int, outputs: int, slots: int) -> list[np.ndarray]:
    """Ways to pack a vector for its first map, each [C, slots]: repeated; and, for a folded map, every block of `period` slots
    holding its own share of the inputs, so that the copies are put to work: pow2(inputs) period / slots rotations suffice.
    """
    size, period = power_of_two(inputs), power_of_two(outputs)
    if size > slots:
        parts = -(-inputs // slots)
        index = np.arange(parts * slots).reshape(parts, slots)
        return [np.where(index < inputs, index, -1)]
    at = np.arange(slots)
    found = [at % size]
    if period < slots:
        share = max(1, size * period // slots)
        found.append((at // period * share + at % share) % size)
    return [np.where(f < inputs, f, -1)[None] for f in found]


def kron_linear(weight: np.ndarray, rows: int) -> sp.csr_matrix:
    """x [rows, in] @ weight [in, out], or row t @ weight[t], on flattened tensors, [rows * out, rows * in]."""
    if weight.ndim == 3:
        return sp.block_diag([sp.csr_matrix(own.T) for own in weight], format="csr")
    return sp.kron(sp.identity(rows, format="csr"), sp.csr_matrix(weight.T), format="csr")


def picking(index: np.ndarray, inputs: int) -> sp.csr_matrix:
    """y[o] = x[index[o]], [outputs, inputs]."""
    n = index.size
    return sp.csr_matrix((np.ones(n), (np.arange(n), index)), shape=(n, inputs))
