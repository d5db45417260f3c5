"""A client and an evaluator of each backend on test-size rings, with keys at several levels."""

import functools
from types import SimpleNamespace

from he_backend import keys
from he_backend.params import Params

LEVELS = 5
RINGS = {
    "openfhe": Params(log_n=11, levels=LEVELS, scale_bits=40, first_bits=50, digits=3, insecure=True),
    "tenseal": Params(
        backend="tenseal", log_n=11, levels=LEVELS, scale_bits=40, first_bits=50, digits=LEVELS + 1, insecure=True
    ),
}
ROTATIONS = {1: LEVELS, 3: LEVELS, RINGS["openfhe"].slots - 2: LEVELS, 2: 2}  # rotation -> level of its key


def parties(name: str) -> SimpleNamespace:
    """A fresh client and evaluator with keys for ROTATIONS and for products at every level."""
    params, module = RINGS[name], keys.backend(name)
    client = module.Client(params, allow_insecure=True)
    evaluator = module.Evaluator(params, key_id=client.key_id, allow_insecure=True)
    evaluator.load_key("relin", 0, LEVELS, client.make_key("relin", 0, LEVELS))
    for k, level in ROTATIONS.items():
        evaluator.load_key("rotation", k, level, client.make_key("rotation", k, level))
    return SimpleNamespace(client=client, ev=evaluator, params=params, send=functools.partial(send, client, evaluator))


shared = functools.cache(parties)  # for tests that change nothing


def send(client, evaluator, values, level=LEVELS):
    """Encrypt and carry over to the evaluator, as residues like on the wire."""
    return evaluator.import_ciphertext(client.export_ciphertext(client.encrypt(values, level=level)), level=level)


def receive(pair, a, scale=None):
    """Carry back to the client and decrypt."""
    level = pair.ev.level(a)
    return pair.client.decrypt(pair.client.import_ciphertext(pair.ev.export_ciphertext(a), level=level), scale=scale)


def tolerance(params):
    """What a handful of primitives may be off by on values near 1: the scheme's errors grow with N and shrink with the scale."""
    return 256.0 * (1 << params.log_n) / 2.0**params.scale_bits
