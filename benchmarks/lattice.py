"""What the known lattice attacks on ring-LWE with a small or sparse secret cost, in bits.

A ring-LWE sample is taken as N plain LWE samples, of which an attacker has as many as it wants (evaluation keys are
thousands). Every attack reduces a lattice with BKZ of block size beta and is minimised over beta; the hybrids also over the
number of guessed coordinates and the largest weight guessed there.

    usvp          one short vector in the embedding of Bai and Galbraith (ACISP 2014), which weighs the secret by
                  xi = sigma / sd(secret); success condition of Alkim et al. (USENIX 2016)
    dual          short vectors of the dual lattice make a distinguisher (Micciancio and Regev 2009; Espitau, Joux,
                  Kharchenko, INDOCRYPT 2020)
    dual-hybrid   the same with exhaustive search over guessed coordinates (Espitau, Joux, Kharchenko)
    dual-mitm     the same, the two halves of the guess met in the middle (Cheon, Hhan, Hong, Son, IEEE Access 2019)
    drop          primal hybrid: guess coordinates, mostly zeros, then one sieve for the close vector in the last eta
                  dimensions (Albrecht, Curtis, Wunderer, SAC 2019); "drop and solve" is its guess of weight 0
    primal-mitm   primal hybrid with Babai's nearest plane and a meet in the middle (Howgrave-Graham, CRYPTO 2007;
                  Wunderer 2019; Son and Cheon, WAHC 2019): the square root of the guesses, times the chance that the
                  two halves' roundings add up

Lattice reduction. A basis after BKZ follows the geometric series assumption (GSA): log |b*_i| falls by 2 ln delta a step, with
Chen's delta(beta) (thesis, 2013). A Z-shape is not modelled: where the line ends below xi, the true basis keeps vectors of length
xi there, and rounding at those succeeds only where the secret is zero, which is what a larger guess does. Cost models, log2 of operations:

    core      0.292 beta                                 one sieve, nothing else counted (Alkim et al.): a lower bound
    bdgl      0.292 beta + 16.4 + log2(8 d)              Becker, Ducas, Gama, Laarhoven (SODA 2016), 8 d calls
    matzov    gate counts fitted by MATZOV (2022, doi 10.5281/zenodo.6493704) to Albrecht et al. (ASIACRYPT 2020), with Ducas'
              dimensions for free and progressive sieving: the default of the public lattice-estimator (Albrecht, Player,
              Scott, 2015; github.com/malb/lattice-estimator)

Repetitions count as 1 / probability (the public estimator wants success in 99 of 100 cases: 2.2 bits more where a guess is
rarely right). Memory is free. Not here: BKW and algebraic attacks (they want many samples or tiny errors), quantum ones, May's
representation technique (CRYPTO 2021), and attacks on the structure of power-of-two cyclotomic rings (none known).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, gammaln

Array = NDArray[np.float64]

MIN_BETA, MAX_BETA = 60, 1800  # below, Chen's formula is off; above, security is beyond 500 bits
SIEVE_VECTORS = 0.2075  # one sieve in dimension beta leaves 2^(0.2075 beta) vectors, sqrt(4/3) times the shortest
TAIL = 4096  # last Gram-Schmidt norms that rounding can fail at; those before are far above sigma
MAX_GUESSED_WEIGHT = 96  # of a hybrid's guess: its search space is far above 2^200 then
MATZOV_SLOPE, MATZOV_CONSTANT = 0.29613500308205365, 20.387885985467914  # list decoding, classical
ENUMERATED = 40  # a close vector in so few dimensions costs less than rounding in the others
EARLY_ABORT = 10.0  # log2 operations a guess in the optimistic model: a wrong one fails at the last few dozen vectors


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One LWE problem. `weight` None: uniform ternary secret; otherwise that many entries of +-1, zeros else."""

    log_n: int
    log_q: float
    weight: int | None = None
    sigma: float = 3.19

    def __post_init__(self) -> None:
        if self.log_n < 9 or self.log_q <= 1 or not (self.weight is None or 0 < self.weight < self.n):
            raise ValueError(
                f"log2 N = {self.log_n}, log2 q = {self.log_q}, weight {self.weight}: need log2 N >= 9, log2 q > 1 and "
                f"a weight between 1 and N = {self.n}, or None for a uniform ternary secret"
            )

    @property
    def n(self) -> int:
        return 1 << self.log_n

    @property
    def deviation(self) -> float:
        """Standard deviation of a coefficient of the secret."""
        return math.sqrt(2 / 3 if self.weight is None else self.weight / self.n)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """log2 of the operations of one attack, and the choice of parameters that reaches it."""

    attack: str
    bits: float
    beta: int = 0
    dimension: int = 0
    guessed: int = 0
    guessed_weight: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "attack": self.attack,
            "bits": round(self.bits, 1) if self.bits < 1000 else None,
            "beta": self.beta,
            "dimension": self.dimension,
            "guessed": self.guessed,
            "guessed_weight": self.guessed_weight,
        }


@dataclass(frozen=True, kw_only=True)
class Model:
    """Cost of lattice reduction, log2 of operations; `name` as in the table above."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in ("core", "bdgl", "matzov"):
            raise ValueError(f"no cost model is called {self.name!r}; known are bdgl, core, matzov")

    def svp(self, beta: float) -> float:
        """One shortest vector in dimension `beta`."""
        if self.name == "core":
            return 0.292 * beta
        if self.name == "bdgl":
            return 0.292 * beta + 16.4
        free = max(0.0, beta * math.log(4 / 3) / math.log(beta / (2 * math.pi * math.e))) if beta > 20 else 0.0
        return self._sieve(beta - free)

    def bkz(self, beta: int, d: int) -> float:
        """BKZ-beta in dimension d."""
        if self.name == "core":
            return self.svp(beta)
        calls = 8 * d if self.name == "bdgl" else _PROGRESSIVE * max(d - beta, 1)
        return float(np.logaddexp2(self.svp(beta) + math.log2(calls), 3 * math.log2(d)))

    def short_vectors(self, beta: int, d: int) -> tuple[float, float, float]:
        """Short vectors after BKZ-beta: (cost, log2 of how many, length relative to the first basis vector).

        More cost in proportion. MATZOV sieve once more, in the dimension that costs as much as the reduction did (Guo and
        Johansson, ASIACRYPT 2021).
        """
        dim, last = beta, -math.inf
        if self.name == "matzov":
            free = beta * math.log(4 / 3) / math.log(beta / (2 * math.pi * math.e))
            dim = min(d, int(beta - free + math.log2(max(d - beta, 1) * _PROGRESSIVE) / MATZOV_SLOPE))
            last = self._sieve(dim)
        length = 0.5 * math.log(4 / 3) + (dim - 1) * (ln_delta(dim) - ln_delta(beta))
        return float(np.logaddexp2(self.bkz(beta, d), last)), SIEVE_VECTORS * dim, math.exp(length)

    @staticmethod
    def _sieve(dim: float) -> float:
        return MATZOV_SLOPE * dim + MATZOV_CONSTANT + math.log2(_PROGRESSIVE)


_PROGRESSIVE = 1 / (1 - 2**-MATZOV_SLOPE)  # sum over the smaller blocks that progressive sieving passes through


@lru_cache(maxsize=4096)
def ln_delta(beta: int) -> float:
    """ln of the root Hermite factor that BKZ-beta reaches (Chen 2013)."""
    return math.log(beta / (2 * math.pi * math.e) * (math.pi * beta) ** (1 / beta)) / (2 * (beta - 1))


@lru_cache(maxsize=65536)
def guesses(n: int, weight: int | None, zeta: int) -> tuple[Array, Array]:
    """(log2 of the search space, log2 of the chance that it holds the secret's part) for zeta guessed coordinates.

    One entry for each largest weight w = 0, 1, ... tried: all ternary vectors of at most w non-zeros; the chance is
    hypergeometric. A uniform secret has one entry: all 3^zeta vectors.
    """
    if weight is None:
        return np.array([zeta * math.log2(3)]), np.zeros(1)
    most = min(weight, zeta, MAX_GUESSED_WEIGHT)
    w = np.arange(most + 1, dtype=np.float64)
    spaces = _log2_choose(zeta, w) + w
    chances = _log2_choose(zeta, w) + _log2_choose(n - zeta, weight - w) - _log2_choose(n, np.array(weight))
    return np.logaddexp2.accumulate(spaces), np.minimum(0.0, np.logaddexp2.accumulate(chances))


def _log2_choose(n: int, k: Array) -> Array:
    """log2 of binomials n over k; -inf where k > n."""
    ln = gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)
    return np.asarray(np.where(k > n, -np.inf, ln / math.log(2)))


def usvp(x: Instance, model: Model) -> Cost:
    """The plain primal attack."""
    low, high = MIN_BETA, MAX_BETA
    while low < high:  # the smallest block size that reveals the secret
        mid = (low + high) // 2
        low, high = (low, mid) if _usvp_dimension(x, mid) else (mid + 1, high)
    costs = [
        Cost(attack="usvp", bits=model.bkz(beta, d), beta=beta, dimension=d)
        for beta in range(low, low + 16)  # a larger block needs a smaller dimension
        if (d := _usvp_dimension(x, beta))
    ]
    return min(costs, key=lambda cost: cost.bits, default=Cost(attack="usvp", bits=math.inf))


def _usvp_dimension(x: Instance, beta: int) -> int | None:
    """The smallest dimension d in which BKZ-beta finds (e, xi s, sigma): sigma sqrt(beta) <= |b*_{d-beta}|; None: none.

    ln |b*_{d-beta}| = (2 beta - d - 1) ln delta + (ln sigma + n ln xi + (d - n - 1) ln q) / d, so d solves a quadratic.
    """
    ln_q, slope = x.log_q * math.log(2), ln_delta(beta)
    b = slope * (2 * beta - 1) + ln_q - math.log(x.sigma) - 0.5 * math.log(beta)
    c = math.log(x.sigma) + x.n * math.log(x.sigma / x.deviation) - (x.n + 1) * ln_q
    root = b * b + 4 * slope * c
    if root < 0:
        return None
    return max(x.n + 1, beta + 1, math.ceil((b - math.sqrt(root)) / (2 * slope)))


def dual(x: Instance, model: Model) -> Cost:
    """The plain dual attack."""
    return replace(_search(lambda zeta, beta: _dual(x, model, zeta, beta, mitm=False), [0]), attack="dual")


def dual_hybrid(x: Instance, model: Model, *, mitm: bool = False, optimistic: bool = False) -> Cost:
    """The dual attack behind a guess; `optimistic`: meeting in the middle costs the square root, noise or not."""
    return _search(lambda zeta, beta: _dual(x, model, zeta, beta, mitm=mitm, optimistic=optimistic), _zetas(x))


def _dual(x: Instance, model: Model, zeta: int, beta: int, *, mitm: bool, optimistic: bool = False) -> Cost:
    """Dual (hybrid) attack with everything but the guessed weight fixed.

    A dual vector turns samples into one whose noise has the deviation s (in units of q); telling |S| guesses apart takes
    4 exp(4 pi^2 s^2) (ln |S| + 1) of them.
    """
    none = Cost(attack="dual-mitm" if mitm else "dual-hybrid", bits=math.inf)
    spaces, chances = guesses(x.n, x.weight, zeta)
    n, slope = x.n - zeta, ln_delta(beta)
    if x.weight is None:
        rest = np.array([x.deviation])
    else:  # what the guess has found is no longer in the lattice; with nothing left there is nothing to reduce
        rest = np.sqrt(np.maximum(x.weight - np.arange(len(spaces)), 1.0) / n)
    ln_c = np.log(rest / x.sigma) + x.log_q * math.log(2)
    d = np.maximum(n + 1, np.ceil(np.sqrt(n * ln_c / slope)))
    if d.min() <= beta:
        return none
    once, per_sieve, length = model.short_vectors(beta, int(d[0]))
    ln_s = np.minimum(math.log(length) + np.log(rest) + d * slope - ln_c * (d - n) / d, 3.0)
    s = np.exp(ln_s)
    if mitm and not optimistic:
        bits = _met(once, per_sieve, s, spaces / 2)
    else:
        count = 2 + 4 * (math.pi * s) ** 2 / math.log(2) + np.log2(spaces * math.log(2) + 1)
        bits = once + np.maximum(0.0, count - per_sieve)
        if zeta:
            bits = np.logaddexp2(bits, (spaces / 2 if mitm else spaces) + count + 1)
    bits = bits - chances
    w = int(np.argmin(bits))
    return replace(none, bits=float(bits[w]), beta=beta, dimension=int(d[w]), guessed=zeta, guessed_weight=w)


def _met(once: float, per_sieve: float, s_w: Array, table_w: Array) -> Array:
    """Reduction and a meet in the middle over 2 * 2^table halves, each hashed by the signs of m samples.

    All m noises stay within kappa s <= 1/4, or the attempt is repeated. A sample closer than that to one of the two places
    where a sign changes doubles the cells to look in, which happens with chance 4 kappa s. Pairs of halves that agree by
    accident, a share (2 kappa s)^m, are told apart as in the attack without a table.
    """
    check = 2 + 4 * (math.pi * s_w) ** 2 / math.log(2) + np.log2(2 * table_w * math.log(2) + 1)
    best: Array = np.full(len(s_w), np.inf)
    for share in (1.0, 1.5, 2.0, 3.0):
        m_w = np.maximum(1.0, share * (table_w + np.log2(table_w + 2)))
        reduction = once + np.maximum(0.0, np.maximum(np.log2(m_w), check) - per_sieve)
        for kappa in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
            width = np.clip(kappa * s_w, 1e-300, 0.25)
            look = table_w + 1 + np.log2(m_w) + m_w * np.log2(1 + 4 * width)
            wrong = 2 * table_w + m_w * np.log2(2 * width) + check
            within = m_w * math.log2(math.erf(kappa / 2**0.5))
            work = np.logaddexp2(np.logaddexp2(reduction, look), wrong) - within
            best = np.where(kappa * s_w <= 0.25, np.minimum(best, work), best)
    return best


def primal_hybrid(x: Instance, model: Model, *, mitm: bool = False, optimistic: bool = False) -> Cost:
    """Guess, then a close-vector search: by one sieve, or (`mitm`) by nearest plane over the square root of the guesses.

    `optimistic`: a guess costs 2^10 instead of d^2, and the roundings of two halves always add up.
    """
    return _search(lambda zeta, beta: _primal(x, model, zeta, beta, mitm=mitm, optimistic=optimistic), _zetas(x))


def _primal(x: Instance, model: Model, zeta: int, beta: int, *, mitm: bool, optimistic: bool) -> Cost:
    none = Cost(attack="primal-mitm" if mitm else "drop", bits=math.inf)
    spaces, chances = guesses(x.n, x.weight, zeta)
    tail, d = _profile(x, x.n - zeta, beta)
    if d <= beta:
        return none
    a_guess = EARLY_ABORT if optimistic else 2 * math.log2(d)
    ratio = np.exp(np.minimum(tail - math.log(x.sigma), 50.0))  # beyond, rounding never fails
    if mitm:
        success = _log2_rounded(ratio / math.sqrt(8)) + (0.0 if optimistic else _log2_sums(ratio / math.sqrt(2)))
        work = spaces / 2 + a_guess
    else:
        eta = _sieve_dimension(tail, x.sigma)
        if eta is None:
            return none
        success = _log2_rounded(ratio[: max(0, len(ratio) - eta)] / math.sqrt(8))
        work = spaces + np.logaddexp2(model.svp(eta) if eta > ENUMERATED else 0.0, a_guess)
    bits = np.logaddexp2(model.bkz(beta, d), work) - chances - success
    w = int(np.argmin(bits))
    return replace(none, bits=float(bits[w]), beta=beta, dimension=d, guessed=zeta, guessed_weight=w)


def _profile(x: Instance, n: int, beta: int) -> tuple[Array, int]:
    """(ln |b*_i| of the last `TAIL` vectors, dimension) after BKZ-beta for n unknowns, at the best number of samples."""
    slope, ln_xi = ln_delta(beta), math.log(x.sigma / x.deviation)
    fall = x.log_q * math.log(2) - ln_xi  # from q to xi
    d = max(n + 1, math.ceil(math.sqrt(n * fall / slope)))
    i = np.arange(max(0, d - TAIL), d, dtype=np.float64)
    return ln_xi + fall * (d - n) / d + (d - 1 - 2 * i) * slope, d


def _sieve_dimension(tail: Array, sigma: float) -> int | None:
    """The smallest eta for which the error is shorter than the Gaussian heuristic of the last eta vectors."""
    eta = np.arange(1, min(len(tail), MAX_BETA) + 1)
    volume = np.cumsum(tail[::-1])[: len(eta)]
    shortest = volume / eta + _ln_ball(len(eta))
    found = np.flatnonzero((math.log(sigma) + 0.5 * np.log(eta) <= shortest) & (eta >= 2))
    return int(eta[found[0]]) if len(found) else None


@lru_cache(maxsize=8)
def _ln_ball(most: int) -> Array:
    """-ln(volume of the unit ball) / eta for eta = 1 .. most."""
    eta = np.arange(1, most + 1, dtype=np.float64)
    return np.array([math.lgamma(e / 2 + 1) / e for e in eta]) - 0.5 * math.log(math.pi)


def _log2_rounded(x: Array) -> float:
    """log2 of the product of erf(x_i): nearest plane rounds each coordinate right."""
    return float(np.log2(np.maximum(erf(x), 1e-300)).sum())


def _log2_sums(x: Array) -> float:
    """log2 of the chance that the nearest planes of two halves add up to that of the sum (Son and Cheon, Lemma 4.2)."""
    parts = erf(x) - (1 - np.exp(-x * x)) / (x * math.sqrt(math.pi))
    return float(np.log2(np.maximum(parts, 1e-300)).sum())


def _zetas(x: Instance) -> list[int]:
    """Numbers of guessed coordinates to start the search from."""
    if x.weight is None:  # 3^zeta guesses
        return list(range(0, 129, 16))
    return [int(x.n * share) for share in np.linspace(0.0, 0.9, 10)]


def _search(cost: Callable[[int, int], Cost], zetas: list[int]) -> Cost:
    """The cheapest over guessed coordinates and block size: a grid, made finer around its best point until steps are small."""

    def over_beta(zeta: int) -> Cost:
        seen: dict[int, Cost] = {}
        low, high, step = MIN_BETA, MAX_BETA, 96
        while True:
            for beta in range(low, high + 1, step):
                if beta not in seen:
                    seen[beta] = cost(zeta, beta)
            best = min(seen, key=lambda beta: seen[beta].bits)
            if step == 1:
                return seen[best]
            low, high, step = max(MIN_BETA, best - step), min(MAX_BETA, best + step), max(1, step // 4)

    tried = {zeta: over_beta(zeta) for zeta in zetas}
    step = zetas[1] - zetas[0] if len(zetas) > 1 else 0
    while step > max(1, zetas[-1] // 500):
        step //= 2
        best = min(tried, key=lambda zeta: tried[zeta].bits)
        for zeta in (best - step, best + step):
            if zeta >= 0 and zeta not in tried:
                tried[zeta] = over_beta(zeta)
    return min(tried.values(), key=lambda found: found.bits)


ATTACKS: dict[str, Callable[[Instance, Model], Cost]] = {
    "usvp": usvp,
    "dual": dual,
    "dual-hybrid": dual_hybrid,
    "dual-mitm": lambda x, model: dual_hybrid(x, model, mitm=True),
    "drop": primal_hybrid,
    "primal-mitm": lambda x, model: primal_hybrid(x, model, mitm=True),
}
OPTIMISTIC: dict[str, Callable[[Instance, Model], Cost]] = {
    "dual-mitm": lambda x, model: dual_hybrid(x, model, mitm=True, optimistic=True),
    "primal-mitm": lambda x, model: primal_hybrid(x, model, mitm=True, optimistic=True),
}
