"""The demo's trained model for benchmarks: that of an earlier run if there is one, since training takes minutes."""

from __future__ import annotations

from pathlib import Path

from .records import ROOT
from .registry import Settings

PLACES = (ROOT / "runs" / "demo" / "model", ROOT / "runs" / "bench" / "model")  # of `polyformer demo`; of a benchmark


def demo_model(settings: Settings, scratch: Path) -> Path:
    """Folder with the demo's polynomial model: of `polyformer demo`, of an earlier benchmark, else trained now and kept.

    Args:
        scratch: where a quick run trains its tiny model.
    """
    from training import Recipe, convert, train

    known = next((place for place in PLACES if (place / "polynomial.safetensors").exists()), None)
    if known is not None and not settings.quick:
        return known
    out = scratch / "model" if settings.quick else PLACES[-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    settings.progress(0, 2, "train")
    train(out, Recipe.quick() if settings.quick else Recipe.demo())
    settings.progress(1, 2, "convert")
    convert(out)
    return out
