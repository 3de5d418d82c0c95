"""How far the rollouts of a step, or of an evaluation, are, as a file tells it to who watches a run.

The file is no record: `training.rollout_bar` replaces it while a training lives, and it goes when that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from masa_lib import crash_safe_files as files

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Of `total` rollouts, at most, `done` are finished, after `seconds`.

    `step`: the one that runs, counted from 1; of an evaluation (`evaluates`) the last one before it. `tokens`: sampled.
    `over`: all are sampled, and graded or learned from now. `process`: whose.
    """

    process: int
    step: int
    evaluates: bool
    total: int
    done: int = 0
    tokens: int = 0
    seconds: float = 0.0
    over: bool = False

    @property
    def left(self) -> float:
        """Seconds that the rest takes at the pace so far; NaN before the first is finished."""
        return self.seconds * (self.total - self.done) / self.done if self.done else math.nan


def read(folder: str | Path) -> Progress | None:
    """How far the run in a folder is; None where its file says nothing, or nothing that can be read."""
    try:
        found = Progress(**files.read_json(Path(folder) / PROGRESS))
    except (OSError, ValueError, TypeError):
        return None
    kinds = {entry.name: type(getattr(found, entry.name)) for entry in dataclasses.fields(Progress)}
    numbers = (found.process, found.step, found.total, found.done, found.tokens, found.seconds)
    if [name for name, kind in kinds.items() if kind.__name__ != Progress.__annotations__[name]] or not all(
            0 <= number < 10**12 for number in numbers):
        return None
    return found


def forget(folder: str | Path) -> None:
    """Remove the file."""
    with contextlib.suppress(OSError):
        (Path(folder) / PROGRESS).unlink(missing_ok=True)
