"""What a run writes down and reads back: status, settings changed live, metrics, rollouts, evaluations, beliefs.

Lines and tables alone: which folder that is, and who may write to it, is the business of `folder`. A file is checked
whenever it is read, as an editor or a machine without power may have been at it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import brief
from masa_lib.runs import parquet

CONFIG, STATUS, CHANGES = "config.toml", "status.json", "changes.jsonl"
METRICS, EVALUATIONS, ROLLOUTS, BELIEFS, READINGS = LINES = (
    "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "beliefs.jsonl", "readings.jsonl")
STATES = ("running", "paused", "finished", "stopped", "failed")


class Records:
    """The records in a run's folder; see `folder.Run`."""

    is_packed = False

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path, self.config = Path(path), config

    def check_writable(self) -> None:
        """Refuse, with a RunError, to write to a run that is only read."""

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
        if not (isinstance(found, dict) and found.get("state") in STATES and is_step(found.get("step"))
                and isinstance(found.get("message"), str)):
            raise RunError(f"The status of the run {self.path} cannot be read from {STATUS}: it takes a state "
                           f"({', '.join(STATES)}), a step and a message, not {brief(found)}.")
        return found

    def set_status(self, state: str, message: str = "") -> None:
        """Replace the status by one of STATES, at the step of the last metrics."""
        if state not in STATES:
            raise ValueError(f"The state of a run is {state!r}; it takes one of {', '.join(STATES)}.")
        self._write_json(STATUS, {"state": state, "step": last_step(self.path), "message": message})

    # Settings changed live.

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
                                                 and is_step(row.get("request", 0))
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
        """Record what was believed of a step's candidates; see `recorder.belief_record`."""
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

    # How they are read and written.

    def _told(self, name: str) -> Any:
        return files.read_json(self.path / name)

    def _tables(self, kind: str, steps: list[int]) -> pd.DataFrame:
        return parquet.read([self._table(kind, step) for step in steps])

    def _table(self, kind: str, step: int) -> Path:
        return self.path / kind / f"step-{step:06d}.parquet"

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

    def _write_table(self, kind: str, step: int, table: pd.DataFrame) -> None:
        self.check_writable()
        with self._writing(self._table(kind, step)):
            parquet.write(self._table(kind, step), table)


def last_step(folder: Path) -> int:
    """The step of the last metrics in a run's folder, 0 without any; only the end of the file is read."""
    row = files.last_row(folder / METRICS)
    return checked_rows(folder / METRICS, [row])[0]["step"] if row else 0


def checked_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one of a run's files of lines, each with its step; what is a number in one is a number in all.

    Raises:
        RunError: names what is wrong.
    """
    last, kinds = -1, {}
    for row in rows:
        if not is_step(row.get("step")):
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


def is_step(value: Any) -> bool:
    """Whether it is a whole number of steps."""
    return type(value) is int and 0 <= value < 10**9


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table, null as NaN."""
    filled = [{key: math.nan if value is None or value in (math.inf, -math.inf) else value
               for key, value in row.items()} for row in rows]
    return pd.DataFrame(filled) if filled else pd.DataFrame(columns=["step"])
