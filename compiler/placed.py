"""What lowering passes around: where a tensor is, and the program that comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from he_backend.circuit import Op, Signature
from he_backend.container import Arrays

from .layout import Heads

INPUT, OUTPUT = "x", "y"  # names of what a request sends and of the reply, in every circuit


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a tensor is: one op id a ciphertext, layout [ciphertexts, slots], factor; `clean` if unused slots hold 0.

    unused is what unused slots hold instead, in the tensor's units, where they are known to hold one number for a form to make 0 of.
    heads is set for tensors in attention's layout; `scores` tells those of [1, H, T, T] from queries, keys and values.
    """

    ops: tuple[int, ...]
    layout: np.ndarray
    factor: float
    clean: bool = True
    unused: float | None = None
    heads: Heads | None = None
    scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A circuit without levels and parameters yet; steps and states as in `Circuit`.

    free  ops whose stored size belongs to a form (passes/forms.py): they need not be small enough for a refresh
    """

    ops: tuple[Op, ...]
    arrays: Arrays
    client_arrays: Arrays
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    tensors: Mapping[int, tuple[str, int]]  # op id -> (graph tensor, ciphertext) that it holds
    steps: int = 0
    states: tuple[Signature, ...] = ()
    free: frozenset[int] = frozenset()
