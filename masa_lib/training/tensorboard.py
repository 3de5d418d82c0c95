"""A run's metrics as TensorBoard events, for those who watch many runs: `tensorboard --logdir runs`.

The events are a copy of the records. Each life of a run writes them anew from its first step, so that nothing is there
twice and nothing of a step that was dropped is left.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Mapping
from numbers import Real
from typing import Any

from masa_lib import crash_safe_files as files
from masa_lib.runs.folder import Run, RunError


class Board:
    """The event files of a run, in its folder `tensorboard`; what the run has recorded so far goes in first."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._advice = run.path / "tensorboard", f"`masa resume {run.path}`"
        with files.writing(self._folder, self._advice):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = SummaryWriter(str(self._folder), purge_step=0)  # a page that is open forgets what it had
        for kind, rows in (("train", run.metrics()), ("evaluation", run.evaluations())):
            for row in rows.to_dict("records"):
                self._put(kind, row)
        self._flush()

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Write the finite numbers of a row at its `step`, as `train/accuracy` where `kind` is `train`."""
        self._put(kind, row)
        self._flush()

    def close(self) -> None:
        """End the writer's thread."""
        self._writer.close()

    def _put(self, kind: str, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, Real) and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, row["step"])

    def _flush(self) -> None:
        with files.writing(self._folder, self._advice):
            self._writer.flush()


def open_board(run: Run) -> Board | None:
    """The board of a run as `record.tensorboard` wants it; None for no board.

    Raises:
        RunError: a board is asked for and the package is missing.
    """
    wanted = run.config.record.tensorboard
    there = importlib.util.find_spec("tensorboard") is not None
    if wanted == "on" and not there:
        raise RunError("record.tensorboard is on, but the package tensorboard is missing: `pip install tensorboard` "
                       "brings it, and record.tensorboard=off does without.")
    return Board(run) if there and wanted != "off" else None
