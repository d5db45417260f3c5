"""Maps from tensor index to slot: what attention's geometry holds, and where."""

import numpy as np
import pytest

from compiler.layout import Heads
from he_backend.base import UnsupportedOpError

# tokens, heads, channels, positions -> groups, ranges, copies
GEOMETRIES = {
    "copies": ((16, 2, 4, 32), (1, 1, 4)),
    "just one ciphertext": ((8, 4, 8, 32), (1, 1, 1)),
    "groups of heads": ((16, 8, 8, 32), (2, 1, 1)),
    "ranges of channels": ((32, 1, 32, 16), (1, 2, 1)),
    "groups and ranges": ((32, 2, 32, 16), (2, 2, 1)),
    "d = 512, 128 tokens at N = 2^16": ((128, 8, 64, 256), (2, 1, 1)),
}


def geometry(name: str, *, merged: bool) -> tuple[Heads, tuple[int, int, int]]:
    (tokens, heads, channels, positions), counts = GEOMETRIES[name]
    return Heads(tokens=tokens, heads=heads, channels=channels, positions=positions, merged=merged), counts


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ciphertexts_of_queries_share_out_the_features(name):
    heads, (groups, ranges, copies) = geometry(name, merged=False)
    assert (heads.groups, heads.ranges, heads.copies) == (groups, ranges, copies)
    held, times = np.unique(np.concatenate(heads.features), return_counts=True)
    np.testing.assert_array_equal(held, np.arange(heads.heads * heads.channels))
    assert (times == copies).all()


@pytest.mark.parametrize("merged", [False, True], ids=["folded", "merged"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_score_has_its_slots(name, merged):
    heads, _ = geometry(name, merged=merged)
    layout = heads.layout
    assert layout.shape == (heads.groups * heads.scores, heads.slots)
    held, times = np.unique(layout, return_counts=True)
    np.testing.assert_array_equal(held, np.arange(heads.heads * heads.tokens**2))
    # Merged, no slot is spent on an equal score but in spare copies; folded, all channels hold the same.
    spare = heads.copies // heads.shifts
    assert (times == (spare if merged else spare * heads.width)).all()


def test_merged_scores_need_as_many_tokens_as_channels():
    with pytest.raises(UnsupportedOpError, match=r"16 channels .* 8 tokens"):
        Heads(tokens=8, heads=2, channels=16, positions=64, merged=True)


def test_heads_of_odd_sizes_are_named():
    with pytest.raises(UnsupportedOpError, match=r"3 heads.*pad to 4"):
        Heads(tokens=8, heads=3, channels=4, positions=64)
