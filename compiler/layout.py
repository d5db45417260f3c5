"""Layouts: maps from tensor index to slot. A layout knows no op.

A slot is position * T + token: tokens lie side by side, so that a shift of features is a rotation by a multiple of T. There
are P = slots / T positions. A *feature map* says which feature each position holds, int array [P], -1 for none:

    periodic   position p holds feature p mod F': all features, then all again. Sums over features, and folds over the copies,
               are cyclic: every slot gets the full sum and nothing has to be masked.
    heads      [channel i][spare copy][shift copy b][head h]: the channels of a head lie outermost, so that sums over them and
               rotations by them are cyclic too, without mask and without spreading the result; copy b holds the key shifted
               by b tokens, which does T / B products of queries and keys instead of T.

A tensor that is wider than a ciphertext is cut by features into tiles, one ciphertext each. Tensors that are no [T, F] at all have
layouts without positions: any map from (ciphertext, slot) to element, see `sparse`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from he_backend.base import UnsupportedOpError


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def periodic(features: int, positions: int) -> np.ndarray:
    """Feature map [P] of period F' = next power of two.

    Raises:
        UnsupportedOpError: the tensor does not fit one ciphertext.
    """
    period = power_of_two(features)
    if period > positions:
        raise UnsupportedOpError(
            f"{features} features need {period} positions, a ciphertext has {positions}; take a larger ring or fewer tokens"
        )
    feature = np.arange(positions) % period
    return np.where(feature < features, feature, -1)


def feature_tiles(features: int, positions: int) -> list[np.ndarray]:
    """Feature maps [P] of the ciphertexts of a tensor: one that repeats, or as many as the features fill."""
    if power_of_two(features) <= positions:
        return [periodic(features, positions)]
    index = np.arange(-(-features // positions) * positions).reshape(-1, positions)
    return list(np.where(index < features, index, -1))


def held(feature: np.ndarray) -> np.ndarray:
    """The features that a map holds, ascending."""
    return np.unique(feature[feature >= 0])


def local(feature: np.ndarray, features: np.ndarray) -> np.ndarray:
    """A feature map counted within the features that it holds."""
    return np.where(feature >= 0, np.searchsorted(features, np.maximum(feature, 0)), -1)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The geometry of attention.

    tokens T, heads H, channels dk of a head, positions P of a ciphertext. A ciphertext holds whole heads, as many as fit; of a head
    that is wider than a ciphertext it holds a range of channels. Queries, keys and values are one ciphertext for each of
    `groups` x `ranges`, the ranges of a group side by side; scores are `scores` ciphertexts for each group.

    merged tells how scores lie. Else a ciphertext holds the scores of `shifts` token shifts, equal in all channels; merged, the
    channel counts shifts too, so that there are as many scores as slots and dk times fewer ciphertexts.
    """

    tokens: int
    heads: int
    channels: int
    positions: int
    merged: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "channels"):
            if (n := getattr(self, name)) != power_of_two(n):
                raise UnsupportedOpError(
                    f"attention with {n} {name}: the layout wants a power of two; pad to {power_of_two(n)}"
                )
        if self.merged and self.width > self.tokens:
            raise UnsupportedOpError(
                f"merged scores of {self.width} channels count as many shifts; {self.tokens} tokens have fewer"
            )

    @property
    def group(self) -> int:
        """Heads of a ciphertext."""
        return min(self.heads, max(1, self.positions // self.channels))

    @property
    def width(self) -> int:
        """Channels of a head in one ciphertext."""
        return min(self.channels, self.positions)

    @property
    def groups(self) -> int:
        return self.heads // self.group

    @property
    def ranges(self) -> int:
        return self.channels // self.width

    @property
    def copies(self) -> int:
        return self.positions // (self.group * self.width)

    @property
    def shifts(self) -> int:
        """Copies B that hold shifted keys."""
        return min(self.copies, self.tokens // self.width if self.merged else self.tokens)

    @property
    def reach(self) -> int:
        """Token shifts in one ciphertext of scores."""
        return self.shifts * self.width if self.merged else self.shifts

    @property
    def scores(self) -> int:
        """Ciphertexts of the scores of one group."""
        return self.tokens // self.reach

    @property
    def slots(self) -> int:
        return self.positions * self.tokens

    @property
    def head(self) -> np.ndarray:
        """[P] head of each position, counted within its group."""
        return np.arange(self.positions) % self.group

    @property
    def copy(self) -> np.ndarray:
        """[P] shift copy b of each position."""
        return np.arange(self.positions) // self.group % self.shifts

    @property
    def channel(self) -> np.ndarray:
        """[P] channel of each position, counted within its range."""
        return np.arange(self.positions) // (self.group * self.copies)

    def feature(self, part: int = 0) -> np.ndarray:
        """[P] feature h * dk + i of each position: the feature map of ciphertext `part` of queries, keys and values."""
        group, piece = divmod(part, self.ranges)
        return (group * self.group + self.head) * self.channels + piece * self.width + self.channel

    @property
    def features(self) -> list[np.ndarray]:
        """The feature maps of all ciphertexts of queries, keys and values."""
        return [self.feature(part) for part in range(self.groups * self.ranges)]

    @property
    def channel_stride(self) -> int:
        """Rotation by one channel."""
        return self.group * self.copies * self.tokens

    @property
    def channel_steps(self) -> list[int]:
        """Rotations of a cyclic sum over the channels."""
        return [self.channel_stride << k for k in range((self.width - 1).bit_length())]

    @property
    def copy_steps(self) -> list[int]:
        """Rotations of a sum over the shift copies; complete in copy 0, and everywhere for what is equal in all channels."""
        stride = self.group * self.tokens
        return [stride << k for k in range((self.shifts - 1).bit_length())]

    @property
    def layout(self) -> np.ndarray:
        """[groups * scores, slots] flat index into scores [H, T, T] of each ciphertext of scores."""
        rows = []
        for group in range(self.groups):
            for part in range(self.scores):
                head, token, shift = self.per_slot(group, part)
                rows.append((head * self.tokens + token) * self.tokens + (token - shift) % self.tokens)
        return np.stack(rows)

    def per_slot(self, group: int, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head, query and token shift of each slot of a ciphertext of scores, each [slots]; the key is query - shift, modulo T."""
        token = np.tile(np.arange(self.tokens), self.positions)
        shift = self.copy + (self.shifts * self.channel if self.merged else 0) + self.reach * part
        return np.repeat(group * self.group + self.head, self.tokens), token, np.repeat(shift, self.tokens)


def from_features(feature: np.ndarray, tokens: int, features: int) -> np.ndarray:
    """Feature map [P] -> layout [slots] of a tensor [T, F]."""
    index = np.arange(tokens)[None, :] * features + feature[:, None]
    return np.where(feature[:, None] >= 0, index, -1).reshape(-1)


def to_features(layout: np.ndarray, tokens: int, features: int) -> np.ndarray | None:
    """Layout [slots] of a tensor [T, F] -> feature map [P], or None if it is not of this kind."""
    grid = layout.reshape(-1, tokens)
    feature = np.where(grid[:, 0] >= 0, grid[:, 0] % features, -1)
    return feature if np.array_equal(from_features(feature, tokens, features), layout) else None


def broadcast_index(shape: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
    """Flat indices into a tensor of `shape` for every element of `target` that it broadcasts to, [size of target]."""
    index = np.arange(int(np.prod(shape))).reshape(shape)
    return np.broadcast_to(index, target).reshape(-1)


def constant_slots(const: np.ndarray, shape: tuple[int, ...], layout: np.ndarray) -> np.ndarray:
    """A broadcast constant in a layout: [ciphertexts, slots], 0 where the layout is unused."""
    flat = np.broadcast_to(const, shape).reshape(-1)
    return np.where(layout >= 0, flat[np.maximum(layout, 0)], 0.0)
