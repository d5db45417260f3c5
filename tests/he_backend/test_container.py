"""Files of circuits and client specifications: same bytes every time, and hostile bytes give a WireError."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from he_backend import container
from he_backend.base import WireError
from he_backend.circuit import Circuit, ClientSpec, Signature, pack, unpack
from tests.he_backend.small_circuit import TEST_PARAMS, mlp

kinds = st.sampled_from(sorted(container.DTYPES))
arrays = st.dictionaries(
    st.text(min_size=1, max_size=8),
    kinds.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))),
    max_size=4,
)


@given(arrays, st.dictionaries(st.text(max_size=5).filter(lambda k: k != "arrays"), st.integers(), max_size=4))
def test_round_trip(table, header):
    data = container.dumps(header, table)
    again, loaded = container.loads(data)
    assert again == header and set(loaded) == set(table)
    for name, array in table.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array, equal_nan=array.dtype.kind == "f")
    assert container.dumps(again, loaded) == data


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(WireError):
        container.loads(data)


@given(st.data())
def test_mutated_bytes_never_raise_anything_else(data):
    good = bytearray(container.dumps({"format": "x"}, {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(3)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for raw in (bytes(good), bytes(good[:cut])):
        with contextlib.suppress(WireError):
            container.loads(raw)


def raw(table, body=b"\0" * 64):
    text = json.dumps({"arrays": table}).encode()
    return container.MAGIC + struct.pack("<Q", len(text)) + text + body


ROW = {"name": "a", "dtype": "float64", "shape": [2], "offset": 0}
HOSTILE = {
    "object dtype": {**ROW, "dtype": "object"},
    "huge": {**ROW, "shape": [1 << 62, 1 << 62]},
    "negative": {**ROW, "shape": [-1]},
    "negative offset": {**ROW, "offset": -8},
    "past the end": {**ROW, "offset": 56},
    "fraction": {**ROW, "shape": [1.5]},
    "no shape": {"name": "a", "dtype": "float64", "offset": 0},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tables_are_refused(case):
    with pytest.raises(WireError):
        container.loads(raw([HOSTILE[case]]))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(WireError, match="no JSON number"):
        container.loads(container.dumps({"error_bound": number}, {}))


@pytest.fixture
def circuit():
    return mlp(TEST_PARAMS)


def test_a_circuit_and_its_specification_survive_their_files(circuit, tmp_path):
    assert circuit.save(tmp_path / "c") == circuit.sha256
    again = Circuit.load(tmp_path / "c")
    assert str(again) == str(circuit) and again.sha256 == circuit.sha256 and again.keys == circuit.keys
    spec = again.spec()
    spec.save(tmp_path / "s")
    loaded = ClientSpec.load(tmp_path / "s")
    assert loaded == spec and loaded.circuit_sha256 == circuit.sha256
    assert set(loaded.arrays) == {"features"}  # no weights


def test_a_specification_is_not_a_circuit(circuit, tmp_path):
    circuit.spec().save(tmp_path / "s")
    with pytest.raises(WireError, match="client-spec"):
        Circuit.load(tmp_path / "s")


def edit(path, change):
    header, table, _ = container.read(path)
    change(header)
    container.write(path, header, table)


EDITS = {
    "unknown kind": lambda h: h["ops"][1].update(kind="exec"),
    "argument from the future": lambda h: h["ops"][1].update(args=[3]),
    "wrong number": lambda h: h["ops"][1].update(id=7),
    "no params": lambda h: h.pop("params"),
    "array is gone": lambda h: h.update(client_arrays=["nowhere"]),
    "another version": lambda h: h.update(version=99),
}


@pytest.mark.parametrize("case", EDITS)
def test_malformed_circuits_are_refused(circuit, tmp_path, case):
    circuit.save(tmp_path / "c")
    edit(tmp_path / "c", EDITS[case])
    with pytest.raises(WireError):
        Circuit.load(tmp_path / "c")


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_pack_and_unpack(rows, columns, seed):
    rng = np.random.default_rng(seed)
    tensor = rng.normal(size=(rows, columns))
    slots = 64
    layout = np.full((2, slots), -1, dtype=np.int32)
    places = rng.permutation(2 * slots)[: rows * columns]
    layout.reshape(-1)[places] = np.arange(rows * columns)
    signature = Signature(name="x", shape=(rows, columns), layout="l", factor=0.5, bound=1.0, level=1)
    packed = pack(tensor, signature, layout)
    assert packed.shape == (2, slots) and not packed[layout < 0].any()
    np.testing.assert_allclose(unpack(packed, signature, layout), tensor)
    with pytest.raises(WireError, match="shape"):
        pack(tensor[:, :-1], signature, layout)
