"""Where the data of a run came from. A run keeps its data, so that a path given later changes nothing: it has to be the same
data, wherever they lie by then.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from training.data import OWN_TEXT

OWN_NAME = "state of the union 1993-2019"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A path as it was given, and the SHA-256 of what is read there."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path | None, *, files: str = "*.txt") -> Source:
        """Return the source at a path, None for the text in this package; `files` is the pattern that is read of a folder.

        Raises:
            FileNotFoundError: there is nothing at the path.
        """
        place = OWN_TEXT if path is None else path
        if not place.exists():
            raise FileNotFoundError(f"no data at {place}: give the path that the run was started with")
        found = hashlib.sha256()
        for file in sorted(place.glob(files)) if place.is_dir() else [place]:
            name = file.relative_to(place).as_posix()  # "." of a single file: its own name tells nothing
            found.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        return cls(path=OWN_NAME if path is None else str(path), sha256=found.hexdigest())
