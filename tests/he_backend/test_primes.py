"""The primes of a modulus, foretold."""

import pytest

from he_backend import keys, primes
from he_backend.params import Params

CHAINS = [(10, 5, 30, 36), (12, 6, 35, 41), (13, 4, 40, 46), (11, 9, 54, 60)]


@pytest.mark.parametrize("n", [2, 3, 37, 41, 97, 7919, (1 << 61) - 1], ids=str)
def test_primes(n: int) -> None:
    assert primes.is_prime(n)


@pytest.mark.parametrize("n", [0, 1, 4, 561, 3215031751, 3825123056546413051, (1 << 61) + 1], ids=str)
def test_composites_also_those_that_fool_few_bases(n: int) -> None:
    assert not primes.is_prime(n)


@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_openfhe_takes_these(shape: tuple[int, int, int, int]) -> None:
    log_n, levels, scale, first = shape
    params = Params(log_n=log_n, levels=levels, scale_bits=scale, first_bits=first, digits=2, insecure=True)
    module = keys.backend("openfhe")
    evaluator = module.Evaluator(params, allow_insecure=True)
    try:
        assert primes.moduli(params) == list(evaluator.moduli)
    finally:
        evaluator.close()
