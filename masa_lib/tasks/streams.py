"""Endless sources of problems: by kind and level, any number of them, each drawn again from its number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from masa_lib.tasks.problem_rows import Problem


@dataclass(frozen=True)
class Stream:
    """An endless source: `draw(slot, index)` gives (text, answer); the slots (kind, level) take turns."""

    slots: Sequence[tuple[str, int]]
    draw: Callable[[tuple[str, int], int], tuple[str, str]]

    def problem(self, slot: tuple[str, int], index: int, source: str) -> Problem:
        """The problem of a slot with this number; its id is made of the kind and the text's digest."""
        text, answer = self.draw(slot, index)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Problem(f"{slot[0]}-{digest}", text, answer, slot[1], source)
