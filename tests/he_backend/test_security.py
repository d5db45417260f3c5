"""Limits are enforced on the secret's weight and on actual primes."""

import math

import pytest

from he_backend import security
from he_backend.base import ParamsError
from he_backend.params import Params


def params(**changes):
    return Params(**{"log_n": 16, "levels": 30, "scale_bits": 40, "first_bits": 46, "digits": 5, **changes})


@pytest.mark.parametrize(
    ("log_n", "secret", "bits"),
    [
        (14, "uniform", 438),
        (15, "uniform", 881),
        (16, "uniform", 1747),
        (15, "sparse192", 768),
        (16, "sparse192", 1550),
    ],
)
def test_limits(log_n, secret, bits):
    assert security.limit(params(log_n=log_n, secret=secret)) == bits


def test_accepts_what_fits():
    assert security.check(params()) == params().log_qp == 1546


@pytest.mark.parametrize(
    "changes",
    [{"levels": 36}, {"levels": 31, "secret": "sparse192"}, {"log_n": 15}, {"log_n": 14}],
    ids=["too deep", "too deep for a sparse secret", "ring too small", "ring much too small"],
)
def test_refuses_with_both_numbers(changes):
    p = params(**changes)
    with pytest.raises(ParamsError, match=rf"{p.log_qp}\.0 bits.*allows {security.limit(p)}"):
        security.check(p)


@pytest.mark.parametrize("changes", [{"log_n": 14, "secret": "sparse192"}, {"secret": "binary"}, {"log_n": 18}])
def test_what_has_no_table_is_refused(changes):
    with pytest.raises(ParamsError):
        security.check(params(**changes))


def test_actual_primes_count():
    big = [2**60 - 1] * 30  # 1800 bits, whatever the parameters say
    with pytest.raises(ParamsError, match="1800"):
        security.check(params(), moduli=big)


def test_insecure_needs_a_word():
    p = params(log_n=12, insecure=True)
    with pytest.raises(ParamsError, match="allow_insecure"):
        security.check(p)
    assert security.check(p, allow_insecure=True) > 0
    assert "INSECURE" in security.status(p)
    with pytest.raises(ParamsError):
        security.check(params(log_n=12), allow_insecure=True)  # the word does not make a claim of 128 bits true


def test_decryption_failure_is_monotone_and_zero_room_is_certain():
    p = params(first_bits=50)
    logs = [security.decryption_failure(p, bound=1.0, noise_bits=bits) for bits in (20, 44, 46, 48, 49.5)]
    assert logs == sorted(logs) and logs[0] < -1000
    assert security.decryption_failure(p, bound=512.0) == 0.0
    assert security.circuit_failure(p, [1.0, 512.0]) == 0.0
    assert security.circuit_failure(p, [1.0]) < -1000
    assert security.circuit_failure(p, [1.0], noise_bits=48.0) == logs[3] > -20
    assert security.decryption_failure(p, bound=1.0, noise_bits=-500.0) == -math.inf
    both = security.circuit_failure(p, [], refresh_log2=-39.0, refreshes=4)
    assert math.isclose(both, -37.0)


@pytest.mark.parametrize(
    ("log_n", "secret", "log2"),
    [(17, "uniform", -12), (16, "uniform", -39), (16, "sparse192", -22), (16, "encapsulated", -138)],
)
def test_refresh_failure(log_n, secret, log2):
    assert log2 - 1 < security.refresh_failure(log_n, secret) < log2 + 0.5


def test_refresh_failure_of_few_terms_is_exact():
    h, k = security.REFRESH["encapsulated"]  # the sum of 33 uniforms exceeds 16 only in a corner simplex of edge 1/2
    corner = (h + 1) * math.log2((h + 1) / 2 - k) - math.log2(math.factorial(h + 1))
    assert security.refresh_failure(16, "encapsulated") == pytest.approx(17 + corner)
    assert security.refresh_failure(10, "uniform") == -math.inf  # 2^-1700: no float
    with pytest.raises(ParamsError, match=r"dense.*encapsulated"):
        security.refresh_failure(16, "dense")


def test_refreshes_count_against_the_budget():
    p = params(first_bits=50)

    def request(secret, refreshes):
        one = security.refresh_failure(16, secret)
        return security.circuit_failure(p, [1.0], refresh_log2=one, refreshes=refreshes)

    assert security.check_failure(request("encapsulated", 1000)) == pytest.approx(-138.7 + math.log2(1000), abs=0.1)
    for secret in ("uniform", "sparse192"):
        with pytest.raises(ParamsError, match=r"2\^-[0-9.]+, the budget is 2\^-40\.0: .*encapsulated"):
            security.check_failure(request(secret, 1))
    assert security.check_failure(request("uniform", 8), budget=-36.0) == pytest.approx(-36.4, abs=0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("log_n", 14.0), ("levels", True), ("digits", "5"), ("insecure", 0), ("backend", None), ("secret", 1)],
        *[("log_n", 9), ("log_n", 18), ("log_n", 1 << 40)],
    ],
)
def test_a_field_of_another_type_or_size_is_named(field, value):
    with pytest.raises(ParamsError, match=field):
        Params.from_json({**params().to_json(), field: value})
