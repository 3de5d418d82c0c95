"""The folder of a run: what was asked for, on what machine, what came out, and enough of it to go on after a crash.

What it records is told by `records`, and what it goes on from by `checkpoints`; here it begins, is opened (as a folder,
or out of a packed study) and is held by one process.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from masa_lib import __version__
from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError, logger
from masa_lib.errors import brief
from masa_lib.runs import packed, records
from masa_lib.runs.checkpoints import Checkpoints
from masa_lib.runs.provenance import PATHS, environment, file_digests, shared
from masa_lib.runs.records import CHANGES, CONFIG, LINES, METRICS, STATUS, checked_rows, frame

ENVIRONMENT, LOCK = "environment.json", ".lock"
#: the paths that the config names by their last part, kept beside it for this computer: not a part of the record
PLACES = ".places.json"
RECORDS = (CONFIG, CHANGES, *LINES, "rollouts", "evaluations", "checkpoints")


class Run(Checkpoints):
    """A run's folder; make one with `Run.create` or `Run.open`, and hold `lock` while writing to it.

    Attributes:
        path: the folder.
        config: as the run began.
        is_packed: whether it is a part of a packed study, which is only read (`PackedRun`).
    """

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
                files.replace(run.path / CONFIG, lambda temporary: configs.save(shared(config), temporary))
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
        return configs.flatten(self.recorded_settings())

    def recorded_settings(self) -> dict[str, Any]:
        """The nested settings as they were recorded, those that are gone since among them."""
        return configs.toml(self.path / CONFIG, "config")

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

    # The paths of this computer.

    def _places(self) -> dict[str, str]:
        path = self.path / PLACES
        try:
            found = files.read_json(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict) or not all(key in PATHS and isinstance(value, str)
                                                  for key, value in found.items()):
            raise RunError(f"{path} holds {brief(found)}; it takes a path for each of {', '.join(PATHS)}.")
        return found

    def _write_places(self) -> None:
        """Keep the paths that the config does not tell, so that the run goes on here: for this computer alone."""
        known = shared(self.config)
        places = {key: configs.get(self.config, key) for key in PATHS
                  if configs.get(self.config, key) != configs.get(known, key)}
        if places:
            self._write_json(PLACES, places)
        else:  # what a create that was killed left there
            (self.path / PLACES).unlink(missing_ok=True)


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

    def recorded_settings(self) -> dict[str, Any]:
        """The nested settings as they were recorded."""
        return self._study.config(self._name)

    def metrics(self) -> pd.DataFrame:
        """One row a finished step; null reads as NaN."""
        return self._frame(packed.METRICS)

    def evaluations(self) -> pd.DataFrame:
        """One summary an evaluated step."""
        return self._frame(packed.EVALUATIONS)

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

    def _exploded(self, name: str) -> pd.DataFrame:
        return self._study.table(Path(name).stem, self._name)

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
    return records.last_step(path)
