"""Sequence mixers, y = A(x) x: one mixer, one class, one file. `load("power_softmax")` imports the file when asked for.

The interface is `Mixer`: `forward`, a slow `reference`, `matrix` with the `value` it acts on, the certificate
`degree`/`depth`, and `receptive_field`. The registry is the folder itself: file `power_softmax.py` holds class
`PowerSoftmax`.

    no division, a polynomial     pointwise (with a polynomial sigma), linear, gated_linear (fixed decay), polynomial_s6,
                                  hyena, hyena_nd
    one division                  power_softmax
    not polynomial, to compare    softmax, gated_linear (decay from data), mamba, mamba2, rwkv, griffin
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from polyformer.mixers.base import OPTIONS, Mixer

__all__ = ["Mixer", "load", "names", "unread"]


def names() -> list[str]:
    """Return the names of all mixers, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load(name: str) -> type[Mixer]:
    """Return the mixer class of a name; an unknown name lists the known ones."""
    if name not in names():
        raise ValueError(f"unknown mixer {name!r}; known: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))


def unread(layers: Sequence[str]) -> tuple[str, ...]:
    """Return the options of a config that no layer of a stack reads: the ones that must stay at their defaults, or the
    model would not be what its config says. A layer of a hybrid stack may leave unread what another one reads.
    """
    read = {option for name in layers for option in load(name).options}
    return tuple(option for option in OPTIONS if option not in read) if layers else ()
