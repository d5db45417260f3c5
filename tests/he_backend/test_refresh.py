"""The refresh: what it needs from parameters alone against the library, and a circuit with one, three ways in two processes."""

import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from he_backend import keys, refresh, security
from he_backend.base import CapabilityError, LevelError, MissingKeyError, ParamsError, WireError
from he_backend.circuit import unpack
from he_backend.params import Params
from he_backend.scales import assign_scales
from he_backend.simulator import simulate, simulate_noise
from he_backend.trace import trace
from tests.he_backend.refreshing import REFRESHING, reference, refreshing
from tests.he_backend.running import ROOT
from tests.he_backend.small_circuit import WIDTH


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Keys on disk, a request, and the reply of a process that has nothing but the evaluation folder."""
    folder, circuit = tmp_path_factory.mktemp("refresh"), refreshing()
    spec = circuit.spec()
    circuit.save(folder / "circuit")
    manifest = keys.generate(spec, folder / "keys", allow_insecure=True)
    client = keys.open_client(spec, folder / "keys", allow_insecure=True)
    x = np.random.default_rng(3).uniform(-1, 1, WIDTH)
    slots = np.repeat(x, circuit.params.slots // WIDTH)
    level = circuit.inputs[0].level
    np.save(folder / "request.npy", client.export_ciphertext(client.encrypt(slots, level=level)))
    (folder / "keys" / "secret").rename(folder / "secret")
    command = ["circuit", "keys/evaluation", "request.npy", "reply.npz"]
    subprocess.run(
        [sys.executable, "-m", "tests.he_backend.refreshing", *(str(folder / part) for part in command)],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    reply = np.load(folder / "reply.npz")
    values = client.decrypt(client.import_ciphertext(reply["residues"], level=0), scale=float(reply["scale"]))
    return SimpleNamespace(
        circuit=circuit, folder=folder, manifest=manifest, client=client, x=x, values=values, seconds=reply["seconds"]
    )


def test_a_refresh_in_the_middle_three_ways(served):
    circuit, signature = served.circuit, served.circuit.outputs[0]
    expected = reference(served.x)
    clear = simulate(circuit, {"x": served.x}).outputs["y"]
    np.testing.assert_allclose(clear, expected, rtol=0, atol=1e-12)
    noisy = [simulate_noise(circuit, {"x": served.x}, seed=s)["y"] - expected for s in range(8)]
    predicted = math.sqrt(np.mean(np.square(noisy)))
    encrypted = unpack(served.values.reshape(1, -1), signature, circuit.client_arrays["features"])
    assert np.abs(encrypted - expected).max() < 6 * predicted < 2.0**-14
    everywhere = served.values - np.repeat(expected, circuit.params.slots // WIDTH)
    assert predicted / 8 < everywhere.std() < 2 * predicted  # the prediction is an error's size, not only a bound
    assert served.seconds > 0


def test_the_bundle_holds_each_key_at_the_level_of_its_use(served):
    files = {(f.kind, f.k): f.level for f in served.manifest.files}
    for kind, k, level in refresh.keys(REFRESHING):
        assert files[kind, k] >= level
    assert served.manifest.files[0].kind == "encapsulation"  # what takes most memory to make comes first
    low = [level for (kind, _), level in files.items() if kind == "rotation" and level <= REFRESHING.refresh_input]
    assert len(low) >= 5  # slots to coefficients works at the bottom only


def test_a_missing_or_low_key_is_named_before_the_library_is_asked(served):
    evaluator = keys.backend("openfhe").Evaluator(REFRESHING, allow_insecure=True)
    level = REFRESHING.refresh_input
    x = evaluator.import_ciphertext(
        served.client.export_ciphertext(served.client.encrypt(np.zeros(REFRESHING.slots), level=level)), level=level
    )
    with pytest.raises(MissingKeyError, match="relin key"):
        evaluator.refresh(x)
    with pytest.raises(LevelError, match=f"wants level {level}"):
        evaluator.refresh(evaluator.drop(x, level=level - 1))


def test_a_malformed_encapsulation_key_is_refused(served):
    evaluator = keys.backend("openfhe").Evaluator(REFRESHING, allow_insecure=True)
    name = keys.file_name("encapsulation", 0)
    body = bytearray((served.folder / "keys" / "evaluation" / name).read_bytes()[keys.HEADER :])
    with pytest.raises(WireError, match="bytes"):
        evaluator.load_key("encapsulation", 0, REFRESHING.levels, body[:-8])
    body[8 * REFRESHING.slots * 2 + 7] = 0xFF  # the second limb's first residue, its prime has 33 bits
    with pytest.raises(WireError, match="limb 1 has 1 of"):
        evaluator.load_key("encapsulation", 0, REFRESHING.levels, body)
    assert not evaluator.refresh_levels


BUDGETS = {
    "all slots": ((3, 3), 512),
    "remainders": ((2, 2), 512),
    "unequal": ((6, 7), 512),
    "period of half": ((4, 3), 256),
    "short period": ((3, 2), 64),
    "one matrix": ((1, 2), 16),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_keys_and_levels_are_those_that_openfhe_uses(case):
    from he_backend.openfhe_ring import KEY_MAPS, drop_keys, library, ring

    (encode, decode), period = BUDGETS[case]
    levels = encode + decode + 12
    params = replace(
        REFRESHING, levels=levels, digits=1, refresh_encode=encode, refresh_decode=decode, refresh_slots=period
    )
    o, cc = library(), ring(params, allow_insecure=True).cc
    secret = cc.KeyGen().secretKey
    with KEY_MAPS.write():
        cc.EvalBootstrapSetup([encode, decode], [0, 0], period, refresh.correction_factor(params), False, True)
        cc.EvalBootstrapKeyGen(secret, period)
        theirs = set(o.CryptoContext.GetExistingEvalAutomorphismKeyIndices(secret.GetKeyTag()))
        drop_keys(secret.GetKeyTag())
    m = 4 * params.slots
    assert {cc.FindAutomorphismIndex(k) for k in refresh.rotations(params)} | {m - 1, m - 2, m - 4} == theirs
    depth = o.CryptoContext.GetBootstrapDepth([encode, decode], o.SPARSE_ENCAPSULATED)
    assert params.refresh_output == levels - depth + decode


def test_a_periodic_vector_is_refreshed_with_fewer_keys():
    params = replace(REFRESHING, refresh_slots=16, levels=19, digits=7)
    module = keys.backend("openfhe")
    client = module.Client(params, allow_insecure=True)
    evaluator = module.Evaluator(params, allow_insecure=True)
    for kind, k, level in refresh.keys(params):
        evaluator.load_key(kind, k, level, client.make_key(kind, k, level))
    assert len(evaluator.key_levels) < len(refresh.rotations(REFRESHING))
    x, level = np.tile(np.random.default_rng(1).uniform(-1, 1, 16), params.slots // 16), params.refresh_input
    sent = evaluator.import_ciphertext(client.export_ciphertext(client.encrypt(x, level=level)), level=level)
    for _ in range(2):  # the second starts where the first one ends
        sent = evaluator.refresh(evaluator.drop(sent, level=level))
        assert evaluator.level(sent) == params.refresh_output == 6
    back = client.decrypt(client.import_ciphertext(evaluator.export_ciphertext(sent), level=6))
    np.testing.assert_allclose(back, x, rtol=0, atol=10 * refresh.error_std(params))
    evaluator.close()


def test_two_refreshes_of_one_context_need_two_processes():
    """The library would exchange the matrices of the first for those of the second."""
    module = keys.backend("openfhe")
    module.Client(REFRESHING, allow_insecure=True)
    with pytest.raises(CapabilityError, match="use another process"):
        module.Client(replace(REFRESHING, refresh_encode=2), allow_insecure=True)


REFUSED = {
    "uniform secret": ({"secret": "uniform"}, "sparse192"),
    "first modulus": ({"first_bits": 61}, "1 to 6 bits larger"),
    "no levels left": ({"levels": 16, "digits": 1}, "pays from 17 levels"),
    "half a budget": ({"refresh_decode": 0}, "must be 1 to 9"),
    "period": ({"refresh_slots": 48}, "power of two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_cannot_refresh_are_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ParamsError, match=message):
        replace(REFRESHING, **changes)


def test_a_trace_counts_the_refresh_and_drops_to_it():
    circuit = refreshing()
    found = trace(circuit)
    assert found.counts()["refresh", REFRESHING.refresh_input] == 1
    assert found.relin_level == refresh.relin_level(REFRESHING) > REFRESHING.refresh_output
    scales = assign_scales(found, [2**60, *[2**54 - 2**20] * REFRESHING.levels], 2.0**54)
    node = next(n for n in found.nodes if n.op == "refresh")
    assert scales.result[node.id] == scales.result[node.args[0]] != 2.0**54
    ops = [replace(op, level=op.level + (op.kind == "refresh")) for op in circuit.ops]
    with pytest.raises(LevelError, match="reaches level 4"):
        trace(replace(circuit, ops=tuple(ops)))


def test_who_cannot_refresh_says_so():
    circuit = refreshing()
    with pytest.raises(CapabilityError, match="refreshes nothing"):
        trace(circuit, capabilities=frozenset({"hoisting"}))
    plain = replace(REFRESHING, refresh_encode=0, refresh_decode=0)
    with pytest.raises(CapabilityError, match="has no refresh"):
        trace(replace(circuit, params=plain))
    with pytest.raises(CapabilityError, match="SEAL has no refresh"):
        keys.backend("tenseal").Evaluator(replace(REFRESHING, backend="tenseal"), allow_insecure=True)


def test_security_of_a_refreshing_ring():
    secure = Params(
        log_n=16,
        levels=20,
        scale_bits=54,
        first_bits=60,
        digits=6,
        secret="sparse192",
        refresh_encode=3,
        refresh_decode=3,
    )
    assert security.limit(secure) == 1550
    assert security.check(secure) == secure.log_qp == 60 + 20 * 54 + 4 * 60
    assert secure.refresh_output == 7
    with pytest.raises(ParamsError, match="1550"):
        security.check(replace(secure, levels=26))
    assert -139 < refresh.failure_log2(secure) < -136


MEASURED = """
import sys
from dataclasses import replace
from he_backend.openfhe_ring import ring
from tests.he_backend.refreshing import REFRESHING

def resident():
    return next(int(row.split()[1]) * 1024 for row in open("/proc/self/status") if row.startswith("VmRSS"))

made = ring(replace(REFRESHING, log_n=12, levels=20, digits=7), allow_insecure=True)
before = resident()
made.prepare_refresh()
print(resident() - before)
"""


def test_predicted_memory_of_the_matrices_is_what_the_library_takes():
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, check=True, timeout=120, capture_output=True, text=True
    )
    predicted = refresh.matrix_bytes(replace(REFRESHING, log_n=12, levels=20, digits=7))
    assert 0.8 * predicted < int(done.stdout) < 1.25 * predicted
