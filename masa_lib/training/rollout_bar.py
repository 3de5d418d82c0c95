"""How far the rollouts of a step, or of an evaluation, are: a bar in the terminal, and a file for who watches the run.

One object shows both, so that a panel says what the terminal says. A training whose file cannot be written goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

from tqdm.auto import tqdm

from masa_lib.runs.progress import PROGRESS, Progress

#: seconds between two writings
EVERY = 1.0


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
