"""A run's metrics in TensorBoard, trackio or wandb, for those who watch many runs: `record.trackers` names them.

What a tracker gets is a copy of the records, their finite numbers alone, as `train/accuracy` or `evaluation/accuracy`.
Each life of a run tells it all anew from the first step, so that nothing of a step that was dropped is left.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import shutil
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from masa_lib import crash_safe_files as files
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run
from masa_lib.runs.provenance import shared

#: takes numbers by name and the step that they are of
Log = Callable[[Mapping[str, float], int], None]


class Trackers:
    """The trackers that a run's config names; what the run has recorded so far goes in first.

    Raises:
        RunError: a tracker is not installed.
    """

    def __init__(self, run: Run) -> None:
        with files.writing(run.path, f"`masa resume {run.path}`"):
            self._opened = [OPENS[name](run) for name in run.config.record.trackers.split()]
        if self._opened:
            told = [(kind, row) for kind, rows in (("train", run.metrics()), ("evaluation", run.evaluations()))
                    for row in rows.to_dict("records")]
            for kind, row in sorted(told, key=lambda entry: entry[1]["step"]):  # wandb takes steps in order alone
                self.add(kind, row)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Tell the finite numbers of a row at its `step`, as `train/accuracy` where `kind` is `train`."""
        numbers = {f"{kind}/{name}": value for name, value in row.items()
                   if name != "step" and isinstance(value, Real) and math.isfinite(value)}
        for log, _ in self._opened:
            log(numbers, int(row["step"]))

    def close(self) -> None:
        """End them."""
        for _, close in self._opened:
            close()


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RunError(f"record.trackers names {package}, which is not installed: `pip install {package}` brings it, "
                       "and record.trackers= does without.") from error


def _tensorboard(run: Run) -> tuple[Log, Callable[[], None]]:
    """Event files in the run's folder `tensorboard`: `tensorboard --logdir runs` shows them."""
    module, folder = _module("torch.utils.tensorboard", "tensorboard"), run.path / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    writer = module.SummaryWriter(str(folder), purge_step=0)  # a page that is open forgets what it had

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        with files.writing(folder, f"`masa resume {run.path}`"):
            writer.flush()

    return log, writer.close


def _logged(name: str, run: Run) -> tuple[Log, Callable[[], None]]:
    """A run of trackio or wandb, whose calls are the same."""
    module = _module(name, name)
    module.init(project="masa", name=run.path.name, config=dataclasses.asdict(shared(run.config)))
    return lambda numbers, step: module.log(dict(numbers), step=step), module.finish


#: by the name that `record.trackers` takes
OPENS = {"tensorboard": _tensorboard, "trackio": functools.partial(_logged, "trackio"),
         "wandb": functools.partial(_logged, "wandb")}
