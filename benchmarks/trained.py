"""The demo's trained model for benchmarks: that of an earlier run of the same recipe if there is one, since training takes
minutes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from .records import ROOT
from .registry import Settings

if TYPE_CHECKING:
    from training import Recipe

RUNS = ROOT / "runs"


def demo_model(settings: Settings, scratch: Path) -> Path:
    """Folder with the polynomial model of today's demo recipe: of `polyformer demo`, of an earlier benchmark, else trained now
    and kept.

    Args:
        scratch: where a quick run trains its tiny model.
    """
    from training import Recipe, convert, train

    recipe = Recipe.quick() if settings.quick else Recipe.demo()
    of_demo, own = RUNS / "demo" / "model", RUNS / "bench" / f"model-{fingerprint(recipe)}"
    known = next((place for place in (of_demo, own) if holds(place, recipe)), None)
    if known is not None and not settings.quick:
        return known
    out = scratch / "model" if settings.quick else own
    out.parent.mkdir(parents=True, exist_ok=True)
    settings.progress(0, 2, "train")
    train(out, recipe)
    settings.progress(1, 2, "convert")
    convert(out)
    return out


def holds(place: Path, recipe: Recipe) -> bool:
    """Whether a folder has the polynomial model of this recipe; `polyformer demo --quick` leaves another one."""
    from training.folder import Folder

    folder = Folder(place)
    return folder.has("polynomial") and folder.recipe() == recipe


def fingerprint(recipe: Recipe) -> str:
    """Tells folders of recipes apart: a folder refuses a run of another recipe."""
    return hashlib.sha256(recipe.to_json().encode()).hexdigest()[:8]
