"""What a run can go on from: its checkpoints, its trained model, and the way back to one of them.

Within a step the trainer writes rollouts, metrics, evaluation and checkpoint, in this order. A process killed anywhere
leaves at most things that are newer than its last checkpoint; `rewind` drops exactly those, and the next life of the
run writes them again. Nothing here knows what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib.crash_safe_files import RunError, logger
from masa_lib.runs.records import EVALUATIONS, LINES, METRICS, Records

T = TypeVar("T")


class CheckpointError(RunError):
    """A checkpoint is not one that this training can go on from; the message says what is wrong with it."""


class Checkpoints(Records):
    """A run's checkpoints and its trained model; see `folder.Run`."""

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint; delete the oldest beyond `record.checkpoints_kept`, but not the best (`keep_best`).

        Args:
            step: the finished step.
            write: fills the folder that it is given. `torch.save` should get an open file from it rather than a path:
                only then does a full disk come out as what it is.
        """
        target = self._save_folder(self._checkpoint(step), write)
        held, record = self._checkpoint_steps(), self.config_at(step).record
        best = self.best_step(held) if record.keep_best else None
        for old in held[record.checkpoints_kept:]:
            if old != best:
                shutil.rmtree(self._checkpoint(old))
        return target

    @property
    def model(self) -> Path:
        """The folder of the trained model, which `from_pretrained` loads; not every run has one."""
        return self.path / "model"

    def save_model(self, write: Callable[[Path], None]) -> Path:
        """Write the trained model; `write` fills its folder."""
        return self._save_folder(self.model, write)

    def _save_folder(self, target: Path, write: Callable[[Path], None]) -> Path:
        self.check_writable()
        with self._writing(target):
            if target.parent != self.path:
                target.parent.mkdir(exist_ok=True)  # not the run's folder: it may have been removed meanwhile
            folders.replace_folder(target, write, sealed=True)
        return target

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint, None before the first; see `take_up`."""
        return self.take_up(lambda step, folder: (step, folder))

    def take_up(self, use: Callable[[int, Path], T], before: int = 10**15) -> T | None:
        """What `use` makes of the step and folder of the newest checkpoint that is whole and that it can use.

        Args:
            use: raises a CheckpointError at one that it cannot use; it is then left out with a note, as a broken one.
            before: checkpoints of this step and later ones are left out.

        Returns:
            What `use` gave; None before the first checkpoint.

        Raises:
            RunError: there are checkpoints and none can be used (starting over would lose what the run recorded), or
                one may not be read (which is no reason to go back to an older one).
        """
        faults = []
        for step in (step for step in self._checkpoint_steps() if step < before):
            fault = folders.fault(self._checkpoint(step))
            if not fault:
                try:
                    return use(step, self._checkpoint(step))
                except CheckpointError as error:
                    fault = str(error)
            faults.append(f"step {step}: {fault}")
            logger.warning("The checkpoint %s is broken and left out: %s.", self._checkpoint(step), fault)
        if faults:
            raise RunError(f"No checkpoint of the run {self.path} is whole ({'; '.join(faults)}). Its metrics and "
                           "rollouts are untouched; restore a checkpoint, or train in another folder.")
        return None

    def resume_point(self, use: Callable[[int, Path], T]) -> T | None:
        """What `use` makes of the newest checkpoint to which the metrics lead without a gap; see `take_up`.

        Raises:
            RunError: see `take_up`; or steps are missing in front of every checkpoint.
        """
        steps, held = {row["step"] for row in self._rows(METRICS)}, self._checkpoint_steps()
        missing = next(step for step in range(1, len(steps) + 2) if step not in steps)
        if held and held[0] >= missing:
            older = [step for step in held if step < missing]
            if not older:
                raise RunError(f"{METRICS} of the run {self.path} lacks step {missing}, and no checkpoint is older: "
                               "restore that file, or train in another folder. Nothing was changed.")
            logger.warning("%s of the run %s lacks step %d: it goes on from the checkpoint of step %d, and trains "
                           "again what follows.", METRICS, self.path, missing, older[0])
        return self.take_up(use, missing)

    def best_step(self, among: Collection[int] | None = None) -> int | None:
        """The step with the highest held-out accuracy, the first of several; `among` these, or all that trained."""
        accuracy = {row["step"]: row["accuracy"] for row in self._rows(EVALUATIONS)
                    if row["step"] > 0 and row.get("accuracy") is not None and (among is None or row["step"] in among)}
        return max(sorted(accuracy), key=accuracy.__getitem__, default=None)

    def weights(self, which: str = "last") -> tuple[int, Path]:
        """Step and folder of weights: `last`, the newest checkpoint, or `best`, that of the highest held-out accuracy.

        A run whose checkpoints are gone still has its trained model, which then is the last.

        Raises:
            RunError: there is none.
        """
        if which == "best":
            whole = [step for step in self._checkpoint_steps() if not folders.fault(self._checkpoint(step))]
            if (best := self.best_step(whole)) is None:
                raise RunError(f"No checkpoint of the run {self.path} is of a step that was evaluated; take the last.")
            return best, self._checkpoint(best)
        if found := self.latest_checkpoint():
            return found
        if (self.model / folders.MANIFEST).exists():
            return self.status["step"], self.model
        raise RunError(f"The run {self.path} has neither a checkpoint nor a trained model" + (
            "; the study was packed without it." if self.is_packed else
            f" yet; go on with it with `masa resume {self.path}`."))

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` (-1: everything but the changes), and what was left half written.

        A process killed here leaves the rest to the next call: checkpoints go first, the newest before the older, so
        that a checkpoint never outlives the records that lead up to it.
        """
        self.check_writable()
        records = {name: self._rows(name) for name in LINES}
        with self._writing(self.path):
            for newer in self._checkpoint_steps():
                if newer > step:
                    shutil.rmtree(self._checkpoint(newer))
            for name, rows in records.items():
                if not (rows or (self.path / name).exists()):
                    continue
                kept = b"".join(files.line(row) for row in rows if row["step"] <= step)
                files.replace(self.path / name, lambda file, kept=kept: file.write_bytes(kept))
            for shard in self.path.glob("*/step-*.parquet"):
                number = shard.stem.removeprefix("step-")
                if number.isdecimal() and int(number) > step:
                    shard.unlink()
            for left in [*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def _checkpoint_steps(self) -> list[int]:
        with files.reading(self.path / "checkpoints"), contextlib.suppress(FileNotFoundError):
            found = os.listdir(self.path / "checkpoints")  # glob takes a folder that may not be read for an empty one
            names = [name.removeprefix("step-") for name in found if name.startswith("step-")]
            return sorted((int(name) for name in names if re.fullmatch(r"[0-9]{6,15}", name)), reverse=True)
        return []
