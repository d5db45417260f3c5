"""Conformance: one table of cases, run by every backend against NumPy. What a backend lacks is listed here and nowhere else."""

import contextlib

import numpy as np
import pytest

from he_backend import keys, security
from he_backend.base import CapabilityError, HEError, LevelError, MissingKeyError, ParamsError, WireError
from he_backend.params import Params
from tests.he_backend.parties import LEVELS, RINGS, parties, receive, shared, tolerance

EXTENDED = ("hoist", "rotate_hoisted", "rotate_extended", "extend", "mod_down")
LACKS = {"openfhe": (), "tenseal": (*EXTENDED, "refresh")}


def times(ev, a, w, **kw):
    return ev.rescale(ev.mul_plain(a, ev.encode(w, level=ev.level(a), scale=float(ev.moduli[ev.level(a)]), **kw)))


def double_hoisted(ev, x, w):
    """w * rot(x, 1) + w * x in the extended basis, one mod-down."""
    plain = ev.encode(w, level=LEVELS, scale=float(ev.moduli[LEVELS]), extended=True)
    digits = ev.hoist(x)
    inner = ev.weighted_sum([(ev.rotate_extended(x, digits, 1), plain), (ev.extend(x), plain)])
    return ev.rescale(ev.mod_down(ev.add(inner, inner)))


# name: (on ciphertexts x, y and a plain vector w; on arrays). Results of ct-ct products carry scale s² / q.
CASES = {
    "add": (lambda ev, x, y, w: ev.add(x, y), lambda x, y, w: x + y),
    "sub": (lambda ev, x, y, w: ev.sub(x, y), lambda x, y, w: x - y),
    "add_plain": (
        lambda ev, x, y, w: ev.add_plain(x, ev.encode(w, level=LEVELS, scale=ev.scale)),
        lambda x, y, w: x + w,
    ),
    "add_scalar": (lambda ev, x, y, w: ev.add_scalar(x, -0.375, scale=ev.scale), lambda x, y, w: x - 0.375),
    "mul_plain": (lambda ev, x, y, w: times(ev, x, w), lambda x, y, w: x * w),
    "mul_plain zero": (lambda ev, x, y, w: times(ev, x, 0 * w), lambda x, y, w: 0 * x),
    "mul_scalar": (
        lambda ev, x, y, w: ev.rescale(ev.mul_scalar(x, 1 / 3, scale=float(ev.moduli[LEVELS]))),
        lambda x, y, w: x / 3,
    ),
    "mul": (lambda ev, x, y, w: ev.rescale(ev.relinearize(ev.mul(x, y))), lambda x, y, w: x * y),
    "square": (lambda ev, x, y, w: ev.rescale(ev.relinearize(ev.square(x))), lambda x, y, w: x * x),
    "products share a relinearisation": (
        lambda ev, x, y, w: ev.rescale(ev.relinearize(ev.sub(ev.mul(x, y), ev.square(y)))),
        lambda x, y, w: x * y - y * y,
    ),
    "3 and 2 elements": (
        lambda ev, x, y, w: ev.rescale(ev.relinearize(ev.add(ev.mul(x, y), ev.mul_scalar(x, 0.5, scale=ev.scale)))),
        lambda x, y, w: x * y + 0.5 * x,
    ),
    "scalar at degree 2": (
        lambda ev, x, y, w: ev.rescale(ev.add_scalar(ev.relinearize(ev.mul(x, y)), 2.25, scale=ev.scale**2)),
        lambda x, y, w: x * y + 2.25,
    ),
    "plain at degree 2": (
        lambda ev, x, y, w: ev.rescale(
            ev.add_plain(ev.relinearize(ev.mul(x, y)), ev.encode(w, level=LEVELS, scale=ev.scale**2))
        ),
        lambda x, y, w: x * y + w,
    ),
    "weighted_sum": (
        lambda ev, x, y, w: ev.rescale(
            ev.weighted_sum((a, ev.encode(w, level=LEVELS, scale=float(ev.moduli[LEVELS]))) for a in (x, y, y))
        ),
        lambda x, y, w: w * (x + 2 * y),
    ),
    "drop": (lambda ev, x, y, w: ev.drop(x, level=1), lambda x, y, w: x),
    "drop to 0": (lambda ev, x, y, w: ev.drop(x, level=0), lambda x, y, w: x),
    "rotate": (lambda ev, x, y, w: ev.rotate(x, 1), lambda x, y, w: np.roll(x, -1)),
    "rotate far": (lambda ev, x, y, w: ev.rotate(x, ev.slots - 2), lambda x, y, w: np.roll(x, 2)),
    "rotate low": (lambda ev, x, y, w: ev.rotate(ev.drop(x, level=1), 3), lambda x, y, w: np.roll(x, -3)),
    "key for level 2 at level 2": (
        lambda ev, x, y, w: ev.rotate(ev.drop(x, level=2), 2),
        lambda x, y, w: np.roll(x, -2),
    ),
    "key for level 2 at level 0": (
        lambda ev, x, y, w: ev.rotate(ev.drop(x, level=0), 2),
        lambda x, y, w: np.roll(x, -2),
    ),
    "rotate at degree 2": (
        lambda ev, x, y, w: ev.rescale(ev.rotate(ev.relinearize(ev.mul(x, y)), 1)),
        lambda x, y, w: np.roll(x * y, -1),
    ),
    "rotate_hoisted": (lambda ev, x, y, w: ev.rotate_hoisted(x, ev.hoist(x), 3), lambda x, y, w: np.roll(x, -3)),
    "rotate_extended": (
        lambda ev, x, y, w: ev.mod_down(ev.rotate_extended(x, ev.hoist(x), 1)),
        lambda x, y, w: np.roll(x, -1),
    ),
    "extend": (lambda ev, x, y, w: ev.mod_down(ev.extend(x)), lambda x, y, w: x),
    "double hoisting": (lambda ev, x, y, w: double_hoisted(ev, x, w), lambda x, y, w: 2 * w * (np.roll(x, -1) + x)),
}
NEEDS = {"rotate_hoisted", "rotate_extended", "extend", "double hoisting"}  # cases of the methods in EXTENDED
PRODUCTS = {"mul", "square", "products share a relinearisation", "3 and 2 elements", "scalar at degree 2"} | {
    "plain at degree 2",
    "rotate at degree 2",
}


@pytest.fixture(params=sorted(RINGS))
def pair(request):
    if missing := keys.backend(request.param).available():
        pytest.skip(missing)
    return shared(request.param)


def vectors(slots):
    rng = np.random.default_rng(7)
    return rng.uniform(-1, 1, (3, slots))


@pytest.mark.parametrize("case", CASES)
def test_primitive_equals_numpy(pair, case):
    if case in NEEDS and LACKS[pair.params.backend]:
        pytest.skip(f"{pair.params.backend} lacks it, see LACKS")
    x, y, w = vectors(pair.ev.slots)
    on_ciphertexts, on_arrays = CASES[case]
    result = on_ciphertexts(pair.ev, pair.send(x), pair.send(y), w)
    scale = pair.ev.scale**2 / pair.ev.moduli[LEVELS] if case in PRODUCTS else None
    np.testing.assert_allclose(
        receive(pair, result, scale), on_arrays(x, y, w), atol=4 * tolerance(pair.params), rtol=0
    )


def test_what_a_backend_lacks_is_listed(pair):
    lacks = LACKS[pair.params.backend]
    assert ("hoisting" in pair.ev.capabilities) == ("hoist" not in lacks)
    assert ("double_hoisting" in pair.ev.capabilities) == ("extend" not in lacks)
    assert ("bootstrap" in pair.ev.capabilities) == ("refresh" not in lacks)
    x = pair.send(np.zeros(pair.ev.slots))
    for name in lacks:
        with pytest.raises(CapabilityError):
            getattr(pair.ev, name)(x)


def test_operands_are_not_changed(pair):
    x, y, w = vectors(pair.ev.slots)
    a, b = pair.send(x), pair.send(y)
    before = pair.ev.export_ciphertext(a)
    plain = pair.ev.encode(w, level=LEVELS, scale=pair.ev.scale)
    pair.ev.weighted_sum([(a, plain), (b, plain), (a, plain)])
    pair.ev.add(a, b), pair.ev.rotate(a, 1), pair.ev.drop(a, level=1), pair.ev.mul(a, b), pair.ev.add_plain(a, plain)
    assert np.array_equal(before, pair.ev.export_ciphertext(a))


REFUSED = {
    "levels differ": (LevelError, lambda ev, x: ev.add(x, ev.drop(x, level=2))),
    "degrees differ": (LevelError, lambda ev, x: ev.add(x, ev.mul_scalar(x, 0.5, scale=ev.scale))),
    "product of a product": (LevelError, lambda ev, x: ev.mul(ev.mul(x, x), x)),
    "rescale without a product": (LevelError, lambda ev, x: ev.rescale(x)),
    "rescale at level 0": (LevelError, lambda ev, x: ev.rescale(ev.mul_scalar(ev.drop(x, level=0), 1e-3, scale=1.0))),
    "drop upwards": (LevelError, lambda ev, x: ev.drop(ev.drop(x, level=2), level=3)),
    "relinearise two elements": (LevelError, lambda ev, x: ev.relinearize(x)),
    "rotate three elements": (LevelError, lambda ev, x: ev.rotate(ev.mul(x, x), 1)),
    "no key": (MissingKeyError, lambda ev, x: ev.rotate(x, 5)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(pair, case):
    kind, act = REFUSED[case]
    if case == "rescale at level 0" and pair.params.backend == "tenseal":
        kind = HEError  # SEAL has no room for the product already
    with pytest.raises(kind):
        act(pair.ev, pair.send(np.full(pair.ev.slots, 0.5)))


def test_a_key_does_not_serve_above_its_level():
    pair = shared("openfhe")
    x = pair.ev.drop(pair.send(np.zeros(pair.ev.slots)), level=3)
    with pytest.raises(MissingKeyError, match="made for level 2"):
        pair.ev.rotate(x, 2)


def test_residues_from_an_enemy_are_refused(pair):
    good = pair.client.export_ciphertext(pair.client.encrypt(np.ones(pair.ev.slots), level=2))
    assert good.shape == (2, 3, 2 * pair.ev.slots) and good.dtype == np.uint64
    high = good.copy()
    high[1, 2, [5, 9]] = pair.ev.moduli[2]
    with pytest.raises(WireError, match=r"2 .*residues at or above"):
        pair.ev.import_ciphertext(high, level=2)
    for bad in (good[:1], good[:, :2], good[..., :-1], good.astype(np.float64)):
        with pytest.raises(WireError):
            pair.ev.import_ciphertext(bad, level=2)
    for level in (-1, 1, LEVELS + 1):
        with pytest.raises(WireError):
            pair.ev.import_ciphertext(good, level=level)
    assert np.array_equal(pair.ev.export_ciphertext(pair.ev.import_ciphertext(good, level=2)), good)


def test_malformed_keys_are_refused(pair):
    body = bytearray(memoryview(pair.client.make_key("rotation", 7, 2)).cast("B"))
    wrong = [b"", bytes(body[:-8]), bytes(body) + b"\0" * 8, b"\xff" * len(body)]
    for bad in wrong:
        with pytest.raises(WireError):
            pair.ev.load_key("rotation", 7, 2, bad)
    with pytest.raises(WireError):
        pair.ev.load_key("conjugation", 7, 2, bytes(body))
    assert 7 not in pair.ev.key_levels


@pytest.mark.parametrize("name", sorted(RINGS))
def test_two_clients_in_one_process_do_not_mix(name):
    one, two = parties(name), parties(name)
    x, y, _ = vectors(one.ev.slots)
    a, b = one.send(x), two.send(y)
    one.ev.close()
    with pytest.raises(MissingKeyError):
        one.ev.rotate(a, 1)
    limit = tolerance(two.params)
    np.testing.assert_allclose(receive(two, two.ev.rotate(b, 1)), np.roll(y, -1), atol=limit, rtol=0)
    np.testing.assert_allclose(receive(one, a), x, atol=limit, rtol=0)
    with contextlib.suppress(HEError):  # under the other's key there is nothing to see
        assert np.abs(receive(two, a) - x).max() > 1e3
    two.ev.close()


def test_a_saved_secret_key_decrypts(pair):
    module = keys.backend(pair.params.backend)
    x, _, _ = vectors(pair.ev.slots)
    again = module.Client(
        pair.params, secret=pair.client.secret_bytes(), key_id=pair.client.key_id, allow_insecure=True
    )
    residues = pair.client.export_ciphertext(pair.client.encrypt(x, level=1))
    np.testing.assert_allclose(
        again.decrypt(again.import_ciphertext(residues, level=1)), x, atol=tolerance(pair.params), rtol=0
    )


def test_scales_are_exact(pair):
    """Encoding at a scale that is off by 2^-10 changes the value by just that."""
    x, _, w = vectors(pair.ev.slots)
    off = 1 + 2.0**-10
    a = pair.ev.add_plain(pair.send(x), pair.ev.encode(w, level=LEVELS, scale=pair.ev.scale * off))
    np.testing.assert_allclose(receive(pair, a), x + off * w, atol=tolerance(pair.params), rtol=0)


def test_primes_are_those_of_the_parameters(pair):
    p = pair.params
    assert [q.bit_length() for q in pair.ev.moduli[:1]] == [p.first_bits]
    assert len(set(pair.ev.moduli)) == p.levels + 1 and all(q % (2 << p.log_n) == 1 for q in pair.ev.moduli)
    assert pair.ev.log_qp == pytest.approx(p.log_qp, abs=1.0)


def test_seal_says_by_how_many_levels_a_circuit_is_too_deep():
    deep = Params(backend="tenseal", log_n=16, levels=30, scale_bits=40, first_bits=50, digits=31)
    with pytest.raises(ParamsError, match=r"leave 19 levels .* wants 30 levels .* 11 too many"):
        keys.backend("tenseal").Client(deep)


@pytest.mark.parametrize("name", sorted(RINGS))
def test_insecure_rings_must_be_asked_for(name):
    with pytest.raises(ParamsError, match="protects nothing"):
        keys.backend(name).Evaluator(RINGS[name])


def test_digits_that_do_not_divide_the_chain_name_those_that_do():
    with pytest.raises(ParamsError, match=r"possible: \[1, 2, 3, 5"):
        keys.backend("openfhe").Client(
            Params(log_n=11, levels=8, scale_bits=40, first_bits=50, digits=4, insecure=True), allow_insecure=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RINGS))
def test_a_secure_ring_is_accepted_and_enforced(name):
    digits = {"openfhe": 2, "tenseal": 4}[name]
    p = Params(backend=name, log_n=14, levels=3, scale_bits=40, first_bits=50, digits=digits)
    client = keys.backend(name).Client(p)
    assert client.log_qp <= security.limit(p)


def test_a_prepared_evaluator_leaves_nothing_to_its_first_rotations(monkeypatch):
    from he_backend import openfhe_ring

    pair = parties("openfhe")
    x = pair.send(np.ones(pair.params.slots))
    pair.ev.prepare(refresh=False)
    monkeypatch.setattr(openfhe_ring.Ring, "load", None)
    monkeypatch.setattr(openfhe_ring.Ring, "mod_down_bias", None)
    for level in (x.level, x.level - 1):
        pair.ev.rotate(pair.ev.drop(x, level=level), 1)
    monkeypatch.undo()
    rows = pair.ev._ring.mod_down_bias
    for level in range(pair.params.levels + 1):
        found = pair.ev._ring.export(pair.ev._bias_at(level), level)
        assert np.array_equal(found, np.stack([rows[: level + 1]] * 2))
    pair.ev.close()


def test_a_rotation_takes_the_rings_lock_only_outside_the_key_maps(monkeypatch):
    """A loading client waits for the readers of the key maps under the ring's lock: a reader that wants it never ends."""
    from he_backend import openfhe_ring

    pair, load, readers = parties("openfhe"), openfhe_ring.Ring.load, []
    x = pair.send(np.ones(pair.params.slots))

    def watched(*args, **kw):
        readers.append(openfhe_ring.KEY_MAPS._readers)
        return load(*args, **kw)

    monkeypatch.setattr(openfhe_ring.Ring, "load", watched)
    pair.ev.rotate(x, 1)
    pair.ev._bias.clear()
    pair.ev.rotate_hoisted(x, pair.ev.hoist(x), 1)
    assert readers == [0, 0]
    pair.ev.close()
