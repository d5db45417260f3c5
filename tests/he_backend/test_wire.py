"""Frames survive a round trip, and nothing malformed or foreign gets past them."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from he_backend import container, wire
from he_backend.base import HEError, ManifestError, WireError

MODULI = ((1 << 45) + 1, (1 << 39) - 7, (1 << 40) - 87)
EXPECTED = wire.Expected(
    format="request",
    circuit_sha256="ab" * 32,
    key_id="key-00000001",
    log_n=5,
    moduli=MODULI,
    scale=2.0**40,
    parts={("x", 0): 2, ("x", 1): 1},
)


def ciphertexts() -> dict[wire.Part, wire.Sealed]:
    rng = np.random.default_rng(7)
    limbs = [rng.integers(1, q, size=(2, 1, 32), dtype=np.uint64) for q in MODULI]
    return {
        p: wire.Sealed(np.concatenate(limbs[: level + 1], axis=1), 2.0**40 + 1) for p, level in EXPECTED.parts.items()
    }


FRAME = wire.dumps(EXPECTED, ciphertexts())


def rewrite(**changes: object) -> bytes:
    """The frame with other header fields."""
    header, arrays = container.loads(FRAME)
    return container.dumps({**header, **changes}, arrays)


def test_round_trip() -> None:
    read = wire.loads(FRAME, EXPECTED)
    for part, sealed in ciphertexts().items():
        np.testing.assert_array_equal(read[part].residues, sealed.residues)
        assert read[part].scale == sealed.scale


def test_a_residue_costs_as_many_bytes_as_its_prime() -> None:
    assert wire.ciphertext_bytes(MODULI, 2, 5) == 2 * 32 * (6 + 5 + 5)
    assert len(FRAME) < EXPECTED.max_bytes


@pytest.mark.parametrize("length", [0, 7, 15, 16, 100, len(FRAME) // 2, len(FRAME) - 64])
def test_truncated(length: int) -> None:
    with pytest.raises(WireError):
        wire.loads(FRAME[:length], EXPECTED)


def test_oversized() -> None:
    with pytest.raises(WireError, match="at most"):
        wire.loads(FRAME + bytes(EXPECTED.max_bytes), EXPECTED)


def test_oversized_header_is_not_parsed() -> None:
    with pytest.raises(WireError, match="at most"):
        wire.loads(container.MAGIC + struct.pack("<Q", wire.MAX_HEADER + 1) + FRAME[16:], EXPECTED)


@pytest.mark.parametrize(
    ("field", "value"),
    [("circuit_sha256", "cd" * 32), ("key_id", "key-00000002"), ("log_n", 6)],
)
def test_foreign_frame_is_a_difference_by_field(field: str, value: object) -> None:
    with pytest.raises(ManifestError) as caught:
        wire.loads(rewrite(**{field: value}), EXPECTED)
    ours = "key-…" if field == "key_id" else getattr(EXPECTED, field)
    assert caught.value.differences == {field: (ours, value)}
    assert EXPECTED.key_id not in str(caught.value), "who knows the id may remove the keys"


ROWS = [
    {"name": "x", "part": p, "level": level, "elements": 2, "scale": 2.0**40}
    for (_, p), level in EXPECTED.parts.items()
]
MALFORMED = {
    "no list": "x",
    "too few": ROWS[:1],
    "twice": [ROWS[0], ROWS[0]],
    "unknown name": [{**ROWS[0], "name": "y"}, ROWS[1]],
    "list as name": [{**ROWS[0], "name": []}, ROWS[1]],
    "other level": [{**ROWS[0], "level": 1}, ROWS[1]],
    "true is no level": [ROWS[0], {**ROWS[1], "level": True}],
    "three elements": [{**ROWS[0], "elements": 3}, ROWS[1]],
    "scale of another world": [{**ROWS[0], "scale": 2.0**20}, ROWS[1]],
    "no scale": [{**ROWS[0], "scale": float("nan")}, ROWS[1]],
    "extra field": [{**ROWS[0], "more": 1}, ROWS[1]],
}


@pytest.mark.parametrize("rows", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_entries(rows: object) -> None:
    with pytest.raises(WireError):
        wire.loads(rewrite(ciphertexts=rows), EXPECTED)


def test_residue_not_below_its_modulus() -> None:
    bad = ciphertexts()
    bad["x", 0].residues[0, 1, 3] = MODULI[1]
    with pytest.raises(WireError, match="below its modulus"):
        wire.loads(wire.dumps(EXPECTED, bad), EXPECTED)


@pytest.mark.parametrize("limbs", [slice(None), slice(1, 2)], ids=["all limbs", "one limb"])
def test_unencrypted_ciphertext(limbs: slice) -> None:
    bad = ciphertexts()
    bad["x", 1].residues[1, limbs] = 0
    with pytest.raises(WireError, match="zero `a` part"):
        wire.loads(wire.dumps(EXPECTED, bad), EXPECTED)


def test_sizes_beyond_any_array() -> None:
    text = json.dumps({"arrays": [{"name": "c0", "dtype": "uint8", "shape": [0, 10**30], "offset": 0}]}).encode()
    with pytest.raises(WireError):
        wire.loads(container.MAGIC + struct.pack("<Q", len(text)) + text + bytes(64), EXPECTED)


@given(st.integers(0, len(FRAME) - 1), st.integers(1, 255))
def test_one_mutated_byte_is_refused_or_harmless(at: int, flip: int) -> None:
    """Inside a residue a flip cannot be told from another ciphertext; all else must be an error of ours."""
    data = bytearray(FRAME)
    data[at] ^= flip
    try:
        read = wire.loads(bytes(data), EXPECTED)
    except HEError:
        return
    assert {p: r.residues.shape for p, r in read.items()} == {p: r.residues.shape for p, r in ciphertexts().items()}


@given(st.binary(max_size=400))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.loads(data, EXPECTED)
    with pytest.raises(WireError):
        wire.loads(FRAME[:16] + data, EXPECTED)


def test_a_writer_cannot_send_what_no_reader_takes() -> None:
    with pytest.raises(WireError, match="needs the ciphertexts"):
        wire.dumps(replace(EXPECTED, parts={("x", 0): 2}), ciphertexts())
    with pytest.raises(WireError, match="has residues"):
        wire.dumps(replace(EXPECTED, parts={("x", 0): 1, ("x", 1): 1}), ciphertexts())


@pytest.mark.parametrize("data", [b"", b"{", b"NaN", b'{"a": [-Infinity]}', b"[" * 100_000, b"\xff"])
def test_what_is_not_json(data: bytes) -> None:
    with pytest.raises(WireError, match="not JSON"):
        wire.parse_json(data)
