"""How far the rollouts of a step, or of an evaluation, are: a bar in the terminal, and a file for who watches a run.

One object shows both, so that a panel says what the terminal says. The file is no record: it is replaced while a
training lives, goes when that ends, and a training whose file cannot be written goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from masa_lib import crash_safe_files as files

PROGRESS = "progress.json"
#: seconds between two writings
EVERY = 1.0


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


class RolloutBar:
    """A context that is called with newly finished rollouts and newly sampled tokens (`engines.Watch`).

    Args:
        total: rollouts, at most.
        said: what the bar is called.
        delay: seconds before the bar shows itself.
        folder: of the run, for the file; None writes none.
        step: see `Progress`.
        evaluates: likewise.
    """

    def __init__(self, total: int, said: str, delay: float = 0.0, folder: Path | None = None, step: int = 0,
                 evaluates: bool = False) -> None:
        self._bar = tqdm(total=total, desc=said, unit="rollout", leave=False, delay=delay)
        self._folder, self._now = folder, Progress(os.getpid(), step, evaluates, total)
        self._began = self._written = time.monotonic()

    def __enter__(self) -> RolloutBar:
        self._write()
        return self

    def __call__(self, rollouts: int, tokens: int) -> None:
        """Show that so many more are there."""
        now = time.monotonic()
        self._now = dataclasses.replace(self._now, done=self._now.done + rollouts, tokens=self._now.tokens + tokens,
                                        seconds=now - self._began)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self._now.tokens / max(self._now.seconds, 1e-9):,.0f} tokens/s", refresh=False)
        self._bar.update(rollouts)
        if now - self._written >= EVERY:
            self._write()

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._now = dataclasses.replace(self._now, over=True)
        self._write()

    def _write(self) -> None:
        """Replace the file whole, without waiting for the disk."""
        self._written = time.monotonic()
        if self._folder:
            path = self._folder / PROGRESS
            with contextlib.suppress(OSError):
                path.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(self._now)), encoding="utf8")
                path.with_suffix(".tmp").replace(path)
