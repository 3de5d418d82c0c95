"""The folder of a run: what was asked for, on what machine, what came out, and enough of it to go on after a crash.

Within a step the trainer writes rollouts, metrics, evaluation and checkpoint, in this order. A process killed anywhere
leaves at most things that are newer than its last checkpoint; `rewind` drops exactly those, and the next life of the
run writes them again. Nothing here knows what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from masa_lib import __version__
from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError, logger
from masa_lib.errors import brief
from masa_lib.runs import packed, parquet
from masa_lib.runs.provenance import environment, file_digests

CONFIG, ENVIRONMENT, STATUS, LOCK = "config.toml", "environment.json", "status.json", ".lock"
#: the paths that the config names by their last part, kept beside it for this computer: not a part of the record
PLACES = ".places.json"
METRICS, CHANGES, EVALUATIONS, ROLLOUTS = "metrics.jsonl", "changes.jsonl", "evaluations.jsonl", "rollouts.jsonl"
BELIEFS, READINGS = "beliefs.jsonl", "readings.jsonl"
RECORDS = (CONFIG, METRICS, CHANGES, EVALUATIONS, ROLLOUTS, BELIEFS, READINGS, "rollouts", "evaluations",
           "checkpoints")
STATES = ("running", "paused", "finished", "stopped", "failed")
T = TypeVar("T")


class CheckpointError(RunError):
    """A checkpoint is not one that this training can go on from; the message says what is wrong with it."""


class Run:
    """A run's folder; make one with `Run.create` or `Run.open`, and hold `lock` while writing to it.

    Attributes:
        path: the folder.
        config: as the run began.
        is_packed: whether it is a part of a packed study, which is only read (`PackedRun`).
    """

    is_packed = False

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path, self.config = Path(path), config

    @classmethod
    def create(cls, path: str | Path, config: Config, command: str) -> Run:
        """Start a run in a new folder; `command` is what the user typed.

        Raises:
            RunError: the folder already holds a run, or cannot be written.
        """
        if packed.holds(path):
            raise RunError(f"There is a run {path} already, in the packed study; choose another folder with --out.")
        run = cls(path, config)
        with run._writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            held = [name for name in RECORDS if (run.path / name).exists()]
            if held:
                raise RunError(f"The folder {path} already holds a run ({held[0]} is there). Go on with it with "
                               f"`masa resume {path}`, or choose another folder with --out.")
            run._write_json(ENVIRONMENT, environment(config, command))
            run._write_json(STATUS, {"state": "running", "step": 0, "message": ""})
            run._write_places()
            with run._writing(run.path / CONFIG):  # last: this file says that there is a run
                files.replace(run.path / CONFIG, lambda temporary: configs.save(configs.shared(config), temporary))
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder, or the packed run `<study>/<name>`; where there are both, the folder.

        Raises:
            RunError: there is none, or its config cannot be read.
        """
        if not is_run(path):
            raise RunError(f"There is no run in {path}: it has no {CONFIG}. Start one with `masa train --out {path}`.")
        run = (cls if _is_folder(path) else PackedRun)(path, Config())
        try:
            run.config = configs.replace(configs.replace(Config(), run.settings()), run._places())
        except ConfigError as error:
            version = run.told("versions").get("masa", __version__)
            other = "" if version == __version__ else f"masa_lib {version} wrote it, and this is {__version__}: "
            raise RunError(f"The run {path} cannot be opened: {other}{error}") from error
        return run

    def settings(self) -> dict[str, Any]:
        """What the record of the config names, by dotted key, in today's settings."""
        return configs.read(self.path / CONFIG)

    def recorded_settings(self) -> dict[str, Any]:
        """The nested settings as they were recorded, those that are gone since among them."""
        return tomllib.loads((self.path / CONFIG).read_text(encoding="utf8"))

    def check_writable(self) -> None:
        """Refuse, with a RunError, to write to a run that is only read."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RunError: another process holds it; the message says which. Or the run is only read.
        """
        self.check_writable()
        with contextlib.ExitStack() as stack:
            with self._writing(self.path / LOCK):
                stack.enter_context(files.lock(self.path / LOCK, f"The run {self.path}"))
            yield

    # Status and settings.

    @property
    def status(self) -> dict[str, Any]:
        """`{"state": one of STATES, "step": the last one, "message": text}`, as last written."""
        try:
            found = self._told(STATUS)
        except OSError as error:
            raise RunError(f"The status of the run {self.path} cannot be read from {STATUS}: {error}") from error
        except ValueError:  # an empty file is what a machine without power may leave
            step = last_step(self.path)
            done = step >= self.config_at(step + 1).steps
            return {"state": "finished" if done else "stopped", "step": step, "message": f"{STATUS} cannot be read."}
        if not (isinstance(found, dict) and found.get("state") in STATES and _is_step(found.get("step"))
                and isinstance(found.get("message"), str)):
            raise RunError(f"The status of the run {self.path} cannot be read from {STATUS}: it takes a state "
                           f"({', '.join(STATES)}), a step and a message, not {brief(found)}.")
        return found

    def set_status(self, state: str, message: str = "") -> None:
        """Replace the status by one of STATES, at the step of the last metrics."""
        if state not in STATES:
            raise ValueError(f"The state of a run is {state!r}; it takes one of {', '.join(STATES)}.")
        self._write_json(STATUS, {"state": state, "step": last_step(self.path), "message": message})

    # The machines that a run was on.

    @property
    def environment(self) -> dict[str, Any]:
        """What `environment` said when the run began, and `lives`: the same of each resume; empty if unreadable."""
        try:
            found = self._told(ENVIRONMENT)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def told(self, name: str) -> dict[str, Any]:
        """A table of the environment; empty where there is none."""
        found = self.environment.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def started(self) -> datetime.date:
        """The day on which the run began (UTC); today where that is not known."""
        try:
            return datetime.datetime.fromisoformat(self.environment["time"]).date()
        except (KeyError, TypeError, ValueError):
            return datetime.datetime.now(datetime.UTC).date()

    def begin_again(self, step: int) -> None:
        """Record another life of the run, which goes on from a step: when, on what, with which versions.

        Raises:
            RunError: a file of problems is not what it was when the run began; nothing is recorded.
        """
        self.check_writable()
        self.check_files()
        told, here = self.environment, environment(self.config, f"masa resume {self.path}")
        new = [key for key in configs.settings() if key not in self.settings()]
        if new:
            logger.warning("The config of the run %s is of another version of masa_lib; what it does not name has "
                           "its present default: %s.", self.path, ", ".join(new))
        life = {"step": step, **{key: here[key] for key in ("command", "time", "git", "versions", "hardware")}}
        lives = told.get("lives", [])
        self._write_json(ENVIRONMENT, told | {"lives": [*(lives if isinstance(lives, list) else []), life]})

    def check_files(self) -> None:
        """Refuse, with a RunError, to go on with a file of problems that is not what it was when the run began."""
        told = self.told("files")
        for key, digest in file_digests(self.config).items():
            if told.get(key, digest) != digest:
                raise RunError(f"{key} of the run {self.path} was edited since the run began: "
                               f"{configs.get(self.config, key)} has the SHA-256 {digest[:12]}, not "
                               f"{str(told[key])[:12]}. Restore it, or train with it in another folder.")

    def append_change(self, step: int, changes: Mapping[str, Any], **more: Any) -> None:
        """Record settings changed live: dotted keys to values, in force from `step` on; `more` is kept beside them.

        Raises:
            ConfigError: a key or value is not allowed; nothing is recorded.
        """
        configs.check_live(changes)
        configs.replace(self.config_at(step), changes)
        self._append(CHANGES, {"step": step, "changes": dict(changes), **more})

    def changes(self) -> list[dict[str, Any]]:
        """The live changes by step: `[{"step": 31, "changes": {"update.learning_rate": 5e-5}}, ...]`."""
        rows = self._rows(CHANGES)
        if wrong := [row for row in rows if not (isinstance(row.get("changes"), dict)
                                                 and _is_step(row.get("request", 0))
                                                 and isinstance(row.get("refused", ""), str))]:
            raise RunError(f"{self.path / CHANGES} holds {brief(wrong[0])}, which is no change of settings. Repair or "
                           "remove that line; nothing was changed.")
        return [row | {"changes": configs.current(row["changes"])} for row in sorted(rows, key=lambda row: row["step"])]

    def config_at(self, step: int) -> Config:
        """The config in force at a step: the initial one with every change up to it."""
        config = self.config
        for change in self.changes():
            if change["step"] <= step:
                config = configs.replace(config, change["changes"])
        return config

    # Metrics, rollouts, evaluations.

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Record a finished step; `row` has its number as `step`. NaN is written as null."""
        self._append(METRICS, row)

    def metrics(self) -> pd.DataFrame:
        """One row a finished step; null reads as NaN."""
        return frame(self._rows(METRICS))

    def append_beliefs(self, row: Mapping[str, Any]) -> None:
        """Record what was believed of a step's candidates; see `gather.belief_record`."""
        self._append(BELIEFS, row)

    def append_reading(self, row: Mapping[str, Any]) -> None:
        """Record what is believed of held-out problems after a step; see `evaluation.read`."""
        self._append(READINGS, row)

    def beliefs(self) -> pd.DataFrame:
        """One row a candidate and step: what was believed of it (thousandths) and how its group went."""
        table = (self.path / BELIEFS).with_suffix(".parquet")
        if table.exists():
            return parquet.read([table])
        return self._exploded(BELIEFS)

    def readings(self) -> pd.DataFrame:
        """One row a held-out problem and step at which beliefs were read: what was believed of it (thousandths)."""
        return self._exploded(READINGS)

    def pack_beliefs(self) -> None:
        """Keep what was believed as a table, a sixth of the size, once the run is finished."""
        table = self.beliefs()
        if len(table):
            table = table.astype({"right": "Int16", "solutions": "int16", "weight": "float32"})
            parquet.write((self.path / BELIEFS).with_suffix(".parquet"), table)
            (self.path / BELIEFS).unlink(missing_ok=True)

    def write_rollouts(self, step: int, table: pd.DataFrame) -> None:
        """Record the whole groups of a step, one row a rollout."""
        self._write_table("rollouts", step, table)
        self._append(ROLLOUTS, {"step": step, "rows": len(table)})

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts were recorded."""
        return sorted({row["step"] for row in self._rows(ROLLOUTS)})

    def rollouts(self, steps: Iterable[int] | None = None) -> pd.DataFrame:
        """The rollouts of the steps asked for, of all recorded ones by default.

        Raises:
            RunError: a step was not recorded, or its shard is missing or broken.
        """
        recorded = self.rollout_steps()
        wanted = recorded if steps is None else list(steps)
        for step in wanted:
            if step not in recorded:
                raise RunError(f"The run {self.path} recorded no rollouts of step {step}; it has those of "
                               f"{', '.join(map(str, recorded)) or 'no step'}. record.rollouts_every sets how often.")
        return self._tables("rollouts", wanted) if wanted else pd.DataFrame()

    def write_evaluation(self, step: int, summary: Mapping[str, Any], table: pd.DataFrame) -> None:
        """Record an evaluation: its summary as a line, its table with one row a problem. Step 0 is before training."""
        self._write_table("evaluations", step, table)
        self._append(EVALUATIONS, {"step": step, **summary})

    def evaluations(self) -> pd.DataFrame:
        """One summary an evaluated step; of a step evaluated twice, the last one."""
        rows = {row["step"]: row for row in self._rows(EVALUATIONS)}
        return frame([rows[step] for step in sorted(rows)])

    def evaluation_table(self, step: int) -> pd.DataFrame:
        """The evaluation of a step, one row a problem.

        Raises:
            RunError: its table is missing or broken.
        """
        return self._tables("evaluations", [step])

    # Checkpoints.

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
            files.replace_folder(target, write, sealed=True)
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
            fault = files.fault(self._checkpoint(step))
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
            whole = [step for step in self._checkpoint_steps() if not files.fault(self._checkpoint(step))]
            if (best := self.best_step(whole)) is None:
                raise RunError(f"No checkpoint of the run {self.path} is of a step that was evaluated; take the last.")
            return best, self._checkpoint(best)
        if found := self.latest_checkpoint():
            return found
        if (self.model / files.MANIFEST).exists():
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
        records = {name: self._rows(name) for name in (METRICS, EVALUATIONS, ROLLOUTS, BELIEFS, READINGS)}
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

    # Where things are, how they are read and how they are written.

    def _told(self, name: str) -> Any:
        return files.read_json(self.path / name)

    def _tables(self, kind: str, steps: list[int]) -> pd.DataFrame:
        return parquet.read([self._table(kind, step) for step in steps])

    def _places(self) -> dict[str, str]:
        return _places(self.path / PLACES)

    def _table(self, kind: str, step: int) -> Path:
        return self.path / kind / f"step-{step:06d}.parquet"

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def _checkpoint_steps(self) -> list[int]:
        with files.reading(self.path / "checkpoints"), contextlib.suppress(FileNotFoundError):
            found = os.listdir(self.path / "checkpoints")  # glob takes a folder that may not be read for an empty one
            names = [name.removeprefix("step-") for name in found if name.startswith("step-")]
            return sorted((int(name) for name in names if re.fullmatch(r"[0-9]{6,15}", name)), reverse=True)
        return []

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return checked_rows(self.path / name, files.read_lines(self.path / name))

    def _exploded(self, name: str) -> pd.DataFrame:
        """The rows of lists in a file of lines, one row an entry."""
        rows = pd.DataFrame(self._rows(name))
        lists = [column for column in rows.columns if column != "step"]
        try:
            return rows.explode(lists, ignore_index=True) if lists else rows
        except ValueError as error:
            raise RunError(f"{self.path / name} has a row whose lists are not of one length ({error}). Repair or "
                           "remove that line; nothing was changed.") from error

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Say in one sentence why a write failed: a full disk, the system's reason, or that the folder is gone."""
        try:
            with files.writing(path, f"`masa resume {self.path}`" if (self.path / CONFIG).exists() else "start again"):
                yield
        except RunError as error:
            if path == self.path or self.path.is_dir():
                raise
            raise RunError(f"The folder of the run {self.path} was removed while the run was written; what it held is "
                           "gone. Put it back, or start again in another folder.") from error

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self.check_writable()
        with self._writing(self.path / name):
            files.append_line(self.path / name, row)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.check_writable()
        text = json.dumps(content, indent=2) + "\n"
        with self._writing(self.path / name):
            files.replace(self.path / name, lambda temporary: temporary.write_text(text, encoding="utf8"))

    def _write_places(self) -> None:
        """Keep the paths that the config does not tell, so that the run goes on here: for this computer alone."""
        known = configs.shared(self.config)
        places = {key: configs.get(self.config, key) for key in configs.PATHS
                  if configs.get(self.config, key) != configs.get(known, key)}
        if places:
            self._write_json(PLACES, places)
        else:  # what a create that was killed left there
            (self.path / PLACES).unlink(missing_ok=True)

    def _write_table(self, kind: str, step: int, table: pd.DataFrame) -> None:
        self.check_writable()
        with self._writing(self._table(kind, step)):
            parquet.write(self._table(kind, step), table)


class PackedRun(Run):
    """A run of a packed study (`packed`): its path, `<study>/<name>`, is no folder, and it is only read."""

    is_packed = True

    def __init__(self, path: str | Path, config: Config) -> None:
        super().__init__(path, config)
        self._study, self._name = packed.PackedStudy(self.path.parent), self.path.name

    def check_writable(self) -> None:
        """Refuse to write; see `Run.check_writable`."""
        raise RunError(f"The run {self.path} is a part of the packed study {self.path.parent}, which is read and never "
                       "written to; train in another folder.")

    def settings(self) -> dict[str, Any]:
        """What the record of the config names, by dotted key, in today's settings."""
        return configs.flatten(self.recorded_settings())

    def recorded_settings(self) -> dict[str, Any]:
        """The nested settings as they were recorded."""
        return self._study.config(self._name)

    def metrics(self) -> pd.DataFrame:
        """One row a finished step; null reads as NaN."""
        return self._frame(packed.METRICS)

    def evaluations(self) -> pd.DataFrame:
        """One summary an evaluated step."""
        return self._frame(packed.EVALUATIONS)

    def beliefs(self) -> pd.DataFrame:
        """One row a candidate and step; see `Run.beliefs`."""
        return self._study.table(packed.BELIEFS, self._name)

    def readings(self) -> pd.DataFrame:
        """One row a held-out problem and step; see `Run.readings`."""
        return self._study.table(packed.READINGS, self._name)

    def pack_beliefs(self) -> None:
        """Nothing: they are packed."""

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts were recorded."""
        return self._study.steps(packed.ROLLOUTS, self._name)

    @property
    def model(self) -> Path:
        """The folder of the trained model, which `from_pretrained` loads; not every run has one."""
        return self._study.model(self._name)

    def _frame(self, kind: str) -> pd.DataFrame:
        table = self._study.table(kind, self._name)
        if table.empty:
            return frame([])
        if "step" not in table or not (table["step"].diff().dropna() > 0).all():
            raise RunError(f"The {kind} of the run {self.path} do not say their steps in order. Restore the packed "
                           "study; nothing was changed.")
        return table

    def _rows(self, name: str) -> list[dict[str, Any]]:
        if name == CHANGES:
            rows = self._study.told(packed.CHANGES, self._name, [])
            if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                raise RunError(f"{self.path.parent / packed.CHANGES} holds {brief(rows)} for {self._name}, which are "
                               "no changes of settings.")
            return checked_rows(self.path / name, rows)
        table = self.metrics() if name == METRICS else self.evaluations()
        return [{key: value for key, value in row.items() if value == value} for row in table.to_dict("records")]

    def _told(self, name: str) -> Any:
        return self._study.told({STATUS: packed.STATUSES, ENVIRONMENT: packed.ENVIRONMENTS}[name], self._name, {})

    def _tables(self, kind: str, steps: list[int]) -> pd.DataFrame:
        table = {"evaluations": packed.PROBLEMS}.get(kind, kind)
        if missing := sorted(set(steps).difference(self._study.steps(table, self._name))):
            raise RunError(f"The packed study {self.path.parent} has no {kind} of step {missing[0]} of the run "
                           f"{self._name}. Restore it, or ask only for the steps that are there.")
        return self._study.table(table, self._name, steps)

    def _places(self) -> dict[str, str]:
        return {}


def _places(path: Path) -> dict[str, str]:
    try:
        found = files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(key in configs.PATHS and isinstance(value, str)
                                              for key, value in found.items()):
        raise RunError(f"{path} holds {brief(found)}; it takes a path for each of {', '.join(configs.PATHS)}.")
    return found


def is_run(path: str | Path) -> bool:
    """Whether there is a run, in a folder or packed; a RunError where this user may not look."""
    return _is_folder(path) or packed.holds(path)


def _is_folder(path: str | Path) -> bool:
    with files.reading(Path(path)):
        return (Path(path) / CONFIG).is_file()


def runs_in(study: str | Path, pattern: str = "*") -> list[Path]:
    """The paths of a study's runs, folders and packed ones, in order of their names.

    Args:
        study: the folder.
        pattern: of their names, as in a shell: `masa-s*`.
    """
    study = Path(study)
    names = {path.name for path in study.glob("*/") if _is_folder(path)} | set(packed.PackedStudy(study).runs)
    return [study / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def last_step(path: Path) -> int:
    """The step of the last metrics of a run, 0 without any; of a folder's file only the end is read."""
    if not _is_folder(path) and packed.holds(path):
        return max(packed.PackedStudy(path.parent).steps(packed.METRICS, path.name), default=0)
    row = files.last_row(path / METRICS)
    return checked_rows(path / METRICS, [row])[0]["step"] if row else 0


def checked_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one of a run's files of lines, each with its step; what is a number in one is a number in all.

    Raises:
        RunError: names what is wrong.
    """
    last, kinds = -1, {}
    for row in rows:
        if not _is_step(row.get("step")):
            raise RunError(f"{path} has a row whose step is {brief(row.get('step'))}; it takes a whole number from 0. "
                           "Repair or remove that line; nothing was changed.")
        if path.name == METRICS and row["step"] <= last:
            raise RunError(f"{path} has step {row['step']} behind step {last}; steps take their order. Repair or "
                           "remove that line; nothing was changed.")
        last = row["step"]
        if path.name not in (METRICS, EVALUATIONS):
            continue
        for name, value in row.items():
            number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
            if value is not None and kinds.setdefault(name, number) != number:
                raise RunError(f"{path} says at step {row['step']} that {brief(name)} is {brief(value)}, and a number "
                               "at another step. Repair or remove that line; nothing was changed.")
    return rows


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**9


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table, null as NaN."""
    filled = [{key: math.nan if value is None or value in (math.inf, -math.inf) else value
               for key, value in row.items()} for row in rows]
    return pd.DataFrame(filled) if filled else pd.DataFrame(columns=["step"])
