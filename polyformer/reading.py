"""How a client turns a text into the token ids of a model, and what its outputs mean: plain data that travels with a model.

A language model reads the end of a prompt and is padded on the left; a classifier reads the beginning of a text and is
padded on the right. A released tokenizer has its own marks ([CLS], <s>) and its own id for "nothing here", so that neither may be
taken for granted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SIDES = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What stands in metadata under `reading`; the defaults are those of a model that says nothing.

    Args:
        pad: id that fills a short text up.
        side: on which the padding stands; what is too long loses its tokens on that side.
        special: whether the tokenizer adds its own marks.
        classes: names of the outputs; () for a language model, whose outputs are tokens.
    """

    pad: int = 0
    side: str = "left"
    special: bool = False
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"unknown side {self.side!r}; known: {', '.join(SIDES)}")

    def window(self, ids: Sequence[int], length: int) -> list[int]:
        """Return exactly `length` ids: cut or padded."""
        if self.side == "left":
            kept = list(ids)[-length:]
            return [self.pad] * (length - len(kept)) + kept
        kept = list(ids)[:length]
        return kept + [self.pad] * (length - len(kept))

    def read(self, tokenizer: Any, text: str, length: int) -> list[int]:
        """Return the window of a text.

        Args: `tokenizer` of the tokenizers library, without padding and truncation.
        """
        if self.side == "right":
            tokenizer.enable_truncation(length)  # which keeps the marks at the end
        ids = tokenizer.encode(text, add_special_tokens=self.special).ids
        tokenizer.no_truncation()
        return self.window(ids, length)

    def metadata(self) -> dict[str, str]:
        """Return the entry of an ONNX file, from where it comes to the client's specification."""
        return {"reading": json.dumps(asdict(self))}

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Reading:
        """Return what `metadata` says, or the defaults."""
        if "reading" not in metadata:
            return cls()
        values = json.loads(metadata["reading"])
        return cls(**{**values, "classes": tuple(values.get("classes", ()))})
