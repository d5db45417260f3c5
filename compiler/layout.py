"""Layouts: maps from tensor index to slot. A layout knows no op.

A slot is position * T + token: tokens lie side by side, so that a shift of features is a rotation by a multiple of T. There
are P = slots / T positions. A *feature map* says which feature each position holds, int array [P], -1 for none:

    periodic   position p holds feature p mod F': all features, then all again. Sums over features, and folds over the copies,
               are cyclic: every slot gets the full sum and nothing has to be masked.
    heads      [channel i][spare copy][shift copy b][head h]: the channels of a head lie outermost, so that the sum of a score
               over them is cyclic too, without mask and without spreading the result (two rotations trees and a level saved);
               copy b holds the key shifted by b tokens, which does T / B products of queries and keys instead of T.

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
    """The geometry of attention in one ciphertext.

    tokens T, heads H, channels dk of a head, positions P; `shifts` B copies hold shifted keys, T / B ciphertexts hold all scores.
    """

    tokens: int
    heads: int
    channels: int
    positions: int

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "channels"):
            if (n := getattr(self, name)) != power_of_two(n):
                raise UnsupportedOpError(
                    f"attention with {n} {name}: the layout wants a power of two; pad to {power_of_two(n)}"
                )
        if self.heads * self.channels > self.positions:
            raise UnsupportedOpError(
                f"{self.heads} heads of {self.channels} channels need {self.heads * self.channels} positions of {self.tokens} "
                f"tokens; a ciphertext has {self.positions}. Take a larger ring, fewer tokens or a narrower model"
            )

    @property
    def copies(self) -> int:
        return self.positions // (self.heads * self.channels)

    @property
    def shifts(self) -> int:
        return min(self.copies, self.tokens)

    @property
    def ciphertexts(self) -> int:
        return self.tokens // self.shifts

    @property
    def slots(self) -> int:
        return self.positions * self.tokens

    @property
    def head(self) -> np.ndarray:
        """[P] head of each position."""
        return np.arange(self.positions) % self.heads

    @property
    def copy(self) -> np.ndarray:
        """[P] shift copy b of each position."""
        return np.arange(self.positions) // self.heads % self.shifts

    @property
    def channel(self) -> np.ndarray:
        """[P] channel of each position."""
        return np.arange(self.positions) // (self.heads * self.copies)

    @property
    def feature(self) -> np.ndarray:
        """[P] feature h * dk + i of each position: the feature map of queries, keys and values."""
        return self.head * self.channels + self.channel

    @property
    def channel_steps(self) -> list[int]:
        """Rotations of a cyclic sum over the channels."""
        stride = self.heads * self.copies * self.tokens
        return [stride << k for k in range((self.channels - 1).bit_length())]

    @property
    def copy_steps(self) -> list[int]:
        """Rotations of a sum over the shift copies; complete in copy 0, and everywhere for what is equal in all channels."""
        stride = self.heads * self.tokens
        return [stride << k for k in range((self.shifts - 1).bit_length())]

    def score_layout(self, part: int) -> np.ndarray:
        """[slots] flat index into scores [H, T, T]: ciphertext `part` holds key t - (b + B part), modulo T."""
        head, token, shift = self.per_slot(part)
        return (head * self.tokens + token) * self.tokens + (token - shift) % self.tokens

    def per_slot(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head, token and token shift of each slot, each [slots]."""
        token = np.tile(np.arange(self.tokens), self.positions)
        shift = np.repeat(self.copy, self.tokens) + self.shifts * part
        return np.repeat(self.head, self.tokens), token, shift


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
