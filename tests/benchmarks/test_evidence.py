"""README's picture of the evidence from training."""

from __future__ import annotations

from pathlib import Path

from benchmarks import evidence, records


def test_every_panel_is_drawn_from_its_record() -> None:
    found = records.latest()
    assert evidence.PANELS.keys() <= found.keys()
    for ax in evidence.drawn(found).axes:
        assert ax.has_data(), ax.get_title(loc="left")


def test_a_missing_record_leaves_its_place_empty(tmp_path: Path) -> None:
    drawing = evidence.drawn({})
    for name, ax in zip(evidence.PANELS, drawing.axes, strict=True):
        assert not ax.has_data()
        assert ax.texts[0].get_text() == f"no record of {name}"
    evidence.write({}, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000
