"""Synthetic tasks of in-context recall: what the answer is stands only in the window, never in the weights.

    induction    n distinct symbols in random order, then m + 1 consecutive ones of them again from a random place on:
                 after each repeated symbol the next one is asked (Olsson et al. 2022, arXiv 2209.11895)
    key_value    n pairs of a distinct key and a value, then m of the keys: after each its value is asked, which then
                 follows (associative recall, as in Arora et al. 2023, arXiv 2312.04927)
    few_shot     pairs of an item and a label; a map of items to labels is drawn anew for each window, items repeat:
                 the label is asked after every item, so place s has seen s examples

A window is T + 1 tokens, inputs and targets one apart; targets that are not asked are -100. Tokens: 0 is unused, then
the symbols (or keys, items), then the values (or labels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data import IGNORE

TASKS = ("induction", "key_value", "few_shot")


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """One of the tasks above: `symbols` in all, `shown` of them (n; for few_shot the pairs), `asked` questions (m),
    `answers` values or labels.
    """

    kind: str
    symbols: int
    shown: int
    asked: int = 1
    answers: int = 0

    def __post_init__(self) -> None:
        if self.kind not in TASKS:
            raise ValueError(f"unknown recall task {self.kind!r}; known: {', '.join(TASKS)}")
        if self.kind != "few_shot" and self.shown > self.symbols:
            raise ValueError(f"shown is {self.shown}, but only {self.symbols} symbols are distinct; lower it")
        if self.kind != "induction" and self.answers < 2:
            raise ValueError(f"answers is {self.answers}; {self.kind} needs at least 2, or nothing is asked")
        if self.kind != "few_shot" and not 1 <= self.asked < self.shown + (self.kind == "key_value"):
            raise ValueError(f"asked is {self.asked}, shown is {self.shown}; ask at least 1 and no more than is shown")

    @property
    def vocab(self) -> int:
        return 1 + self.symbols + self.answers

    @property
    def length(self) -> int:
        """T, the inputs of a window."""
        if self.kind == "induction":
            return self.shown + self.asked
        return 2 * self.shown - 1 if self.kind == "few_shot" else 2 * (self.shown + self.asked) - 1

    @property
    def chance(self) -> float:
        """Accuracy of a guess that knows the task and has not read the window."""
        return 1 / (self.symbols if self.kind == "induction" else self.answers)

    def ceiling(self) -> list[float]:
        """Return the best expected accuracy at each question: below 1 only for items that have not been shown yet."""
        if self.kind != "few_shot":
            return [1.0] * self.asked
        unseen = [(1 - 1 / self.symbols) ** s for s in range(self.shown)]
        return [1 - u + u * self.chance for u in unseen]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, int64 [count, T]."""
        rows = {"induction": self._induction, "key_value": self._key_value, "few_shot": self._few_shot}
        tokens, asked_at = rows[self.kind](count, generator)
        targets = torch.full_like(tokens[:, 1:], IGNORE)
        targets[:, asked_at] = tokens[:, 1:][:, asked_at]
        return tokens[:, :-1].contiguous(), targets

    def _distinct(self, count: int, g: torch.Generator) -> Tensor:
        """Return rows of `shown` distinct symbols."""
        return torch.rand(count, self.symbols, generator=g).argsort(1)[:, : self.shown] + 1

    def _induction(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        shown = self._distinct(count, g)
        first = torch.randint(0, self.shown - self.asked, (count, 1), generator=g)
        again = shown.gather(1, first + torch.arange(self.asked + 1))
        return torch.cat([shown, again], 1), torch.arange(self.shown, self.shown + self.asked)

    def _key_value(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        keys = self._distinct(count, g)
        values = torch.randint(0, self.answers, keys.shape, generator=g) + 1 + self.symbols
        order = torch.rand(keys.shape, generator=g).argsort(1)[:, : self.asked]
        k = torch.cat([keys, keys.gather(1, order)], 1)
        v = torch.cat([values, values.gather(1, order)], 1)
        return torch.stack([k, v], 2).flatten(1), 2 * torch.arange(self.shown, self.shown + self.asked)

    def _few_shot(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(0, self.answers, (count, self.symbols), generator=g)
        items = torch.randint(0, self.symbols, (count, self.shown), generator=g)
        tokens = torch.stack([items + 1, label.gather(1, items) + 1 + self.symbols], 2).flatten(1)
        return tokens, 2 * torch.arange(self.shown)


class RecallSampler:
    """Draws batches of a task without end; the whole state is one generator."""

    def __init__(self, task: RecallTask, *, batch: int, seed: int) -> None:
        self.task, self.size = task, batch
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.task.draw(self.size, self.generator)
