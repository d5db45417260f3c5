"""Key bundles: written one file at a time, resumed, checked, and never beside the server."""

import json
from dataclasses import replace

import numpy as np
import pytest

from he_backend import keys
from he_backend.base import ManifestError, WireError
from he_backend.keys import HEADER, SECRET_MAGIC
from he_backend.openfhe_backend import Evaluator
from tests.he_backend.small_circuit import TEST_PARAMS, mlp

SPEC = mlp(replace(TEST_PARAMS, log_n=10)).spec()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return folder, keys.generate(SPEC, folder, allow_insecure=True)


@pytest.fixture
def bundle(made, tmp_path):
    """A copy of the evaluation folder that a test may spoil."""
    for file in (made[0] / "evaluation").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def evaluator():
    return Evaluator(SPEC.params, allow_insecure=True)


def spoil(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_key_is_there_at_its_level(made):
    folder, manifest = made
    manifest.check(SPEC)
    assert {(f.kind, f.k, f.level) for f in manifest.files} == set(keys.wanted(SPEC))
    for f in manifest.files:
        assert f.bytes == HEADER + SPEC.params.key_bytes(f.level) == (folder / "evaluation" / f.name).stat().st_size
    assert sum(f.bytes for f in manifest.files) == keys.evaluation_bytes(SPEC)
    assert (folder / "secret").stat().st_mode & 0o777 == 0o700
    assert (folder / "secret" / "key.bin").stat().st_mode & 0o777 == 0o600


def test_load_gives_working_keys(made):
    ev = evaluator()
    seen = []
    manifest = keys.load(ev, made[0], progress=lambda done, total, name: seen.append((done, total)))
    assert seen[-1] == (len(manifest.files), len(manifest.files))
    assert ev.key_levels == {k % SPEC.params.slots: level for k, level in SPEC.keys.items()}
    client = keys.open_client(SPEC, made[0], allow_insecure=True)
    x = np.arange(SPEC.params.slots) / SPEC.params.slots
    k, level = next(iter(SPEC.keys.items()))
    a = ev.import_ciphertext(client.export_ciphertext(client.encrypt(x, level=level)), level=level)
    y = client.decrypt(client.import_ciphertext(ev.export_ciphertext(ev.rotate(a, k)), level=level))
    np.testing.assert_allclose(y, np.roll(x, -k), atol=1e-5)
    ev.close()


def test_interrupted_generation_goes_on_under_the_same_secret(made, tmp_path):
    class StopError(Exception):
        pass

    def stop(done, total, name):
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        keys.generate(SPEC, tmp_path, progress=stop, allow_insecure=True)
    secret = (tmp_path / "secret" / "key.bin").read_bytes()
    finished = {f.name: f.read_bytes() for f in (tmp_path / "evaluation").glob("*.key")}
    assert finished and not (tmp_path / "evaluation" / "manifest.json").exists()
    manifest = keys.generate(SPEC, tmp_path, allow_insecure=True)
    assert (tmp_path / "secret" / "key.bin").read_bytes() == secret
    assert all((tmp_path / "evaluation" / name).read_bytes() == data for name, data in finished.items())
    manifest.check(SPEC)
    assert manifest.key_id != made[1].key_id
    ev = evaluator()
    keys.load(ev, tmp_path)
    ev.close()


def test_another_circuit_wants_another_folder(made):
    with pytest.raises(ManifestError, match="circuit_sha256"):
        keys.generate(replace(SPEC, circuit_sha256="0" * 64), made[0], allow_insecure=True)


def test_differences_are_named_field_by_field(made):
    other = replace(SPEC, params=replace(SPEC.params, levels=4), keys={**SPEC.keys, 7: 2})
    with pytest.raises(ManifestError) as caught:
        made[1].check(other)
    assert caught.value.differences["params.levels"] == (4, 3)
    assert caught.value.differences["rotation 7 level"] == (2, "no key")


BROKEN = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "longer": lambda f: f.write_bytes(f.read_bytes() + b"\0"),
    "bit flipped": lambda f: f.write_bytes(f.read_bytes()[:-9] + bytes([f.read_bytes()[-9] ^ 1]) + f.read_bytes()[-8:]),
    "another key's header": lambda f: f.write_bytes(b"\0" * HEADER + f.read_bytes()[HEADER:]),
    "gone": lambda f: f.unlink(),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(bundle, case):
    BROKEN[case](bundle / "relin.key")
    ev = evaluator()
    with pytest.raises(WireError, match=r"relin\.key"):
        keys.load(ev, bundle)
    ev.close()


def path_escape(m):
    m["files"][0]["name"] = "../../etc/passwd"


def no_number(m):
    m["files"][0]["k"] = "1"


MALFORMED = {
    "not this format": lambda m: m.update(format="other"),
    "another version": lambda m: m.update(version=9),
    "path leaves the folder": path_escape,
    "number is text": no_number,
    "file twice": lambda m: m["files"].append(m["files"][0]),
    "key id": lambda m: m.update(key_id="../x"),
    "fields missing": lambda m: m.pop("files"),
    "size": lambda m: m["files"][0].update(bytes=1 << 39),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_manifests_are_refused(bundle, case):
    spoil(bundle, MALFORMED[case])
    ev = evaluator()
    with pytest.raises(WireError):
        keys.load(ev, bundle)
    ev.close()


def test_keys_of_other_parameters_are_refused(bundle):
    spoil(bundle, lambda m: m["params"].update(levels=4))
    with pytest.raises(ManifestError, match="levels"):
        keys.load(evaluator(), bundle)


def test_a_secret_key_is_found_under_any_name(made, tmp_path):
    assert keys.find_secret(made[0]) == made[0] / "secret" / "key.bin"
    assert keys.find_secret(made[0] / "evaluation") is None
    assert keys.find_secret(tmp_path / "nowhere") is None
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "holiday.jpg").write_bytes((made[0] / "secret" / "key.bin").read_bytes())
    assert keys.find_secret(tmp_path) == tmp_path / "deep" / "holiday.jpg"
    assert (tmp_path / "deep" / "holiday.jpg").read_bytes().startswith(SECRET_MAGIC)


def test_a_secret_key_is_found_below_secret_and_behind_links(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    (kept / "secret" / "old").mkdir(parents=True)
    folder.mkdir()
    (folder / "loop").symlink_to(folder)
    assert keys.find_secret(folder) is None
    (folder / "link").symlink_to(kept)
    assert keys.find_secret(folder) is None
    (kept / "secret" / "old" / "x").write_bytes(b"anything")
    assert keys.find_secret(folder) == folder / "link" / "secret" / "old" / "x"


def test_a_manifest_has_no_nan(bundle):
    spoil(bundle, lambda m: m.update(note=float("nan")))
    with pytest.raises(WireError, match="NaN"):
        keys.read_manifest(bundle)
