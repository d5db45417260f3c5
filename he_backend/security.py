"""128-bit limits on the modulus, weight-aware, and the chance that noise wraps the modulus at an output.

The limits are on log2(Q·P), the largest modulus under which anything is published (evaluation keys are):

    ring      uniform ternary    ternary, Hamming weight 192
    2^12            109          -
    2^13            218          -
    2^14            438          -
    2^15            881          768
    2^16           1747          1550
    2^17           3523          -

Uniform: the homomorphic encryption standard (Albrecht et al., eprint 2019/939; Bossuat et al., eprint 2024/463),
classical attacks. Weight 192: our own estimate, sigma = 3.19, method in `benchmarks/lattice.py`, every figure in
`benchmarks/results/security-estimate.json` (`polyformer bench run security`), discussed in `benchmarks/NOTES-security.md`. Bits at
the limit, in the stricter of two cost models (MATZOV):

    ring, log2(QP)    usvp    dual   dual hybrid   dual + mitm   drop and solve   primal + mitm
    2^15,  768       145.0   145.9         136.6         129.4            137.6           131.8
    2^16, 1550       144.8   145.9         137.0         129.4            137.9           132.0

All attacks stay above 128 up to 777 and 1570; the limits keep below. With the meet in the middle's overheads left out (a bound, no
known attack) the figures at the limits are 126.4 and 127.7. The uniform rows have 125.5 to 127.9 in the same model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .base import ParamsError
from .params import Params

LIMITS: dict[str, dict[int, int]] = {
    "uniform": {12: 109, 13: 218, 14: 438, 15: 881, 16: 1747, 17: 3523},
    "sparse192": {15: 768, 16: 1550},
}
ERROR_STD = 3.19  # of the discrete Gaussian in every fresh ciphertext and key
# log2 of a coefficient's noise that no circuit amplified, generously: a rescale leaves about 2^6 to 2^8 (the secret's norm
# over sqrt(12)), an encryption less than 2^11, and key switching adds less than that again.
FRESH_NOISE_BITS = 20.0
# secret during a refresh -> (its weight, None: uniform ternary; the bound K on the overflow that OpenFHE's sine is fitted to)
REFRESH: dict[str, tuple[int | None, int]] = {"uniform": (None, 512), "sparse192": (192, 28), "encapsulated": (32, 16)}
EXACT_TERMS = 64  # sums of more uniforms are taken as Gaussian
FAILURE_BUDGET = -40.0  # log2 of the failure probability of one request above which it is refused


def limit(params: Params) -> int:
    """The largest log2(Q·P) with 128-bit classical security, in bits.

    Raises:
        ParamsError: no limit is known for this ring and secret.
    """
    table = LIMITS.get(params.secret)
    if table is None:
        raise ParamsError(f"secret {params.secret!r} has no security table; known are {', '.join(sorted(LIMITS))}")
    if params.log_n not in table:
        raise ParamsError(
            f"no 128-bit limit is known for N=2^{params.log_n} with a {params.secret} secret; "
            f"known rings: {', '.join(f'2^{n}' for n in sorted(table))}"
        )
    return table[params.log_n]


def check(params: Params, *, allow_insecure: bool = False, moduli: Sequence[int] | None = None) -> float:
    """Refuse parameters below 128 bits; returns log2(Q·P).

    Args:
        allow_insecure: accept `params.insecure` rings, which are for tests and protect nothing.
        moduli: the actual primes of Q and P, once a library has chosen them; without them the sizes asked for count.

    Raises:
        ParamsError: above the limit, or an insecure ring that nobody asked for.
    """
    log_qp = math.log2(math.prod(moduli)) if moduli else float(params.log_qp)
    if params.insecure:
        if not allow_insecure:
            raise ParamsError(
                f"{params.name} is a test-size ring that protects nothing; allow it explicitly (allow_insecure=True, "
                "`--insecure` on the command line) or compile for 128 bits"
            )
        return log_qp
    most = limit(params)
    if log_qp > most:
        over = math.ceil((log_qp - most) / params.scale_bits)
        raise ParamsError(
            f"{params.name} has log2(QP) = {log_qp:.1f} bits; 128-bit security at N=2^{params.log_n} with a "
            f"{params.secret} secret allows {most}: use about {over} level(s) fewer, more digits (now {params.digits}), "
            "or a larger ring"
        )
    return log_qp


def status(params: Params, moduli: Sequence[int] | None = None) -> str:
    """One line for reports: what protects this circuit."""
    log_qp = check(params, allow_insecure=True, moduli=moduli)
    if params.insecure:
        return f"INSECURE test ring N=2^{params.log_n}, log2(QP)={log_qp:.0f}: protects nothing"
    return f"128-bit classical: N=2^{params.log_n}, log2(QP)={log_qp:.0f} of {limit(params)} allowed, {params.secret} secret"


def decryption_failure(params: Params, *, bound: float, noise_bits: float = FRESH_NOISE_BITS) -> float:
    """log2 of the chance that noise wraps the first modulus at an output, if values stay within the calibrated ranges.

    Decryption is right when every coefficient of scale * message + noise is below q_0 / 2 in magnitude. The message's
    coefficients are at most scale * bound, because the canonical embedding's infinity norm bounds the coefficients'. The
    noise's are taken as sub-Gaussian, each a sum of many independent terms: P(|X| > t) <= 2 exp(-t^2 / 2 sigma^2), and a
    union bound over N coefficients gives the result. A message above `bound` wraps without any noise; that is not in it.

    Args:
        bound: largest |slot| of the output, with the compiler's margin.
        noise_bits: log2 of the noise's standard deviation per coefficient at the output.

    Returns:
        log2(probability), at most 0; 0 where the message alone does not fit.
    """
    room = 2.0 ** (params.first_bits - 1) - 2.0**params.scale_bits * bound
    if room <= 0:
        return 0.0
    ratio = room / 2.0**noise_bits
    if ratio > 1e150:  # its square is no float any more
        return -math.inf
    return min(0.0, params.log_n + 1 - ratio * ratio / 2 / math.log(2))


def circuit_failure(
    params: Params,
    output_bounds: Sequence[float],
    *,
    noise_bits: float = FRESH_NOISE_BITS,
    refresh_log2: float = 0.0,
    refreshes: int = 0,
) -> float:
    """log2 of a union bound on the failure probability of one request; see `decryption_failure` for what it covers.

    Args:
        output_bounds: largest |slot| of each output ciphertext.
        noise_bits: log2 of the noise's standard deviation per coefficient, at the noisiest output.
        refresh_log2: log2 of one refresh's failure probability, see `refresh.failure_log2` (0 refreshes: unused).
    """
    logs = [decryption_failure(params, bound=b, noise_bits=noise_bits) for b in output_bounds]
    if refreshes:
        logs.append(refresh_log2 + math.log2(refreshes))
    top = max(logs, default=-math.inf)
    if top == -math.inf:
        return top
    return min(0.0, top + math.log2(sum(2.0 ** max(x - top, -1000.0) for x in logs)))


def refresh_failure(log_n: int, secret: str) -> float:
    """log2 of the chance that one refresh fails because a coefficient's overflow leaves the interval of the sine.

    Raising the modulus leaves q_0 I(X) on top of the message; a coefficient of I is a sum of h + 1 values uniform in
    [-1/2, 1/2] for a secret of weight h (Bossuat et al., EUROCRYPT 2021), and it must stay within K. Union bound over N
    coefficients, both signs. Few terms: the sum's own (Irwin-Hall) distribution, exactly; many: Gaussian of variance
    (h + 1) / 12, 2 N Q(K / sqrt((h + 1) / 12)), which is above it.

    Args:
        secret: "uniform", "sparse192", or "encapsulated" (weight 32 while the modulus is raised, whatever it is otherwise).

    Raises:
        ParamsError: no refresh is known with this secret.
    """
    if secret not in REFRESH:
        raise ParamsError(f"secret {secret!r} has no refresh; known are {', '.join(sorted(REFRESH))}")
    weight, bound = REFRESH[secret]
    terms = (round((2 << log_n) / 3) if weight is None else weight) + 1
    if terms > EXACT_TERMS:
        tail = 0.5 * math.erfc(bound / math.sqrt(terms / 6))
        return min(0.0, log_n + 1 + math.log2(tail)) if tail else -math.inf
    # 2^n n! P(S > K) = sum over j of (-1)^j C(n, j) (n - 2 K - 2 j)^n for n terms: whole numbers
    left = terms - 2 * bound
    volume = sum((-1) ** j * math.comb(terms, j) * (left - 2 * j) ** terms for j in range((left + 1) // 2))
    return log_n + 1 + math.log2(volume) - terms - math.log2(math.factorial(terms))


def check_failure(log2: float, *, budget: float = FAILURE_BUDGET) -> float:
    """Refuse a request that fails too often; `log2` is `circuit_failure`'s, and is returned.

    Raises:
        ParamsError: above the budget.
    """
    if log2 > budget:
        raise ParamsError(
            f"one request fails with probability 2^{log2:.1f}, the budget is 2^{budget:.1f}: use fewer refreshes, a sparse "
            "secret while refreshing (encapsulated), or a larger first modulus"
        )
    return log2
