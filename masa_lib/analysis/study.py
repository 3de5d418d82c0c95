"""A study: a grid of arms and seeds, described by a file, trained a few runs at a time in processes of their own.

What is finished is left alone and what is not is resumed, so that a study grows over days and outlives any kill. A
finished run is made compact, to be committed. How a run trains is the business of `masa train` and `masa resume`, what
came of it that of `compare`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import MasaError, brief
from masa_lib.models import tiers
from masa_lib.runs import live_control
from masa_lib.runs.folder import Run, is_run
from masa_lib.runs.stopping import Stop, Stopped

#: a run's output goes to LOGS/<study's folder>/<run>.log, outside of the record
LOGS = Path("runs/logs")
#: seconds between two looks at the processes
POLL = 0.5
#: keys of a study file and of one of its arms, with the types they take
STUDY = {"title": (str,), "out": (str,), "seeds": (int, str), "hours": (int, float), "arms": (dict,), "jobs": (int,),
         "threads": (int,), "settings": (dict,)}
ARM = {"about": (str,), "method": (str,), "seeds": (int, str), "settings": (dict,)}
#: seeds of an arm; more are a slip, and a list of them would not fit into the memory
MOST_SEEDS = 10_000
#: an arm's name is part of its runs' folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*", re.ASCII)
KINDS = {str: "a text", int: "a whole number above 0", float: "a number above 0", dict: "a table"}
#: a smoke run takes at most these, and its gate acts from the second step on
SMOKE = {"steps": 3, "model.threads": 1, "problems.pool": 24, "sampling.problems": 3, "sampling.solutions": 4,
         "sampling.predictions": 4, "gate.predictions": 4, "cloning.store": 2, "rivals.samples": 4,
         "evaluation.every": 2, "evaluation.problems": 4, "evaluation.samples": 2, "evaluation.final_problems": 4,
         "evaluation.final_samples": 2, "evaluation.predictions": 2, "record.rollouts_every": 1}


class StudyError(MasaError, RuntimeError):
    """Runs of a study failed or could not be committed; the message says which and what to do."""


@dataclass(frozen=True)
class Planned:
    """A run of a study: `changes` are the dotted settings, seed and method among them, that its command names."""

    arm: str
    path: Path
    changes: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """The config that the command gives."""
        return tiers.config(self.changes)

    @property
    def command(self) -> list[str]:
        """The arguments of `masa` that begin this run, or go on with it."""
        if is_run(self.path):
            return ["resume", str(self.path)]
        settings = {key: str(value).lower() if isinstance(value, bool) else value
                    for key, value in self.changes.items() if key not in ("method", "seed")}
        return ["train", "--method", self.changes["method"], "--seed", str(self.changes["seed"]), "--out",
                str(self.path), "--set", *(f"{key}={value}" for key, value in settings.items())]


@dataclass(frozen=True)
class Arm:
    """An arm: its name, one line on it, its seeds, and its dotted settings."""

    name: str
    about: str
    seeds: Sequence[int]
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What a study file says; `hours` is what all of it takes with `jobs` runs at a time."""

    title: str
    out: Path
    jobs: int
    hours: float
    arms: tuple[Arm, ...]

    def runs(self) -> list[Planned]:
        """All runs, seed by seed, so that the arms grow evenly."""
        return [Planned(arm.name, self.out / f"{arm.name}-s{seed}", {**arm.changes, "seed": seed})
                for seed in sorted({seed for arm in self.arms for seed in arm.seeds})
                for arm in self.arms if seed in arm.seeds]

    def select(self, only: Collection[str] = (), seeds: str | None = None, jobs: int | None = None) -> Study:
        """The study with these arms, with its seeds in a span such as `0-3`, with other jobs; else a ConfigError."""
        names = [arm.name for arm in self.arms]
        if unknown := [name for name in only if name not in names]:
            raise ConfigError(f"--only names {', '.join(unknown)}; the arms of this study are {', '.join(names)}.")
        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs is {jobs}; it takes a whole number of at least 1.")
        span = _seeds("--seeds", seeds) if seeds else None
        kept = [dataclasses.replace(arm, seeds=[seed for seed in arm.seeds if span is None or seed in span])
                for arm in self.arms if not only or arm.name in only]
        if not any(arm.seeds for arm in kept):
            raise ConfigError(f"No arm has a seed in --seeds {seeds}.")
        chosen = dataclasses.replace(self, arms=tuple(kept), jobs=jobs or self.jobs)
        share = len(chosen.runs()) / len(self.runs())
        return dataclasses.replace(chosen, hours=self.hours * share * self.jobs / chosen.jobs)


def load(path: str | Path) -> Study:
    """Read a study file (TOML) and check every arm's config; what is wrong is a ConfigError."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The study {path} cannot be read: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"The study {path} cannot be read: it nests too deep") from error
    where = f"The study {path}"
    table = _checked(where, tree, STUDY, {"jobs": 1, "threads": 1, "settings": {}})
    arms = tuple(_arm(f"{where}, arm {name}", name, entry, table) for name, entry in table["arms"].items())
    if not arms:
        raise ConfigError(f"{where} has no arms; describe one as [arms.NAME].")
    return Study(table["title"], Path(table["out"]), table["jobs"], table["hours"], arms)


def _arm(where: str, name: str, entry: Any, study: Mapping[str, Any]) -> Arm:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: the name is {name!r}; a name takes letters, digits and . _ + -, and begins with a "
                          "letter or a digit.")
    table = _checked(where, entry, ARM, {"method": name, "seeds": study["seeds"], "settings": {}})
    changes = {"model.threads": study["threads"], **configs.flatten(study["settings"]),
               **configs.flatten(table["settings"])}
    if wrong := [key for key in ("method", "seed") if key in changes]:
        raise ConfigError(f"{where}: {wrong[0]} is no entry of settings; method and seeds stand beside them.")
    changes["method"] = table["method"]
    try:
        tiers.config(changes)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Arm(name, table["about"], _seeds(where, table["seeds"]), changes)


def _checked(where: str, table: Any, kinds: Mapping[str, tuple[type, ...]],
             defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A table of a study file over its defaults, each key known and of its type."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is {brief(table)}; it takes a table.")
    for key, value in table.items():
        if key not in kinds:
            raise ConfigError(f"{where} has the key {brief(key)}; the keys are {', '.join(kinds)}.")
        low = type(value) in (int, float) and value <= 0 and key != "threads"  # 0 threads: torch's own choice
        if low or type(value) not in kinds[key]:
            wanted = " or ".join(KINDS[kind] for kind in kinds[key])
            raise ConfigError(f"{where}: {key} is {brief(value)}; it takes {wanted}.")
    whole = {**defaults, **table}
    if missing := [key for key in kinds if key not in whole]:
        raise ConfigError(f"{where} does not say its {', '.join(missing)}.")
    return whole


def _seeds(where: str, seeds: int | str) -> range:
    """A count of seeds from 0 on, or a span of seeds such as `100-103`, or a single one as text."""
    found = re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", f"0-{seeds - 1}" if isinstance(seeds, int) else seeds)
    span = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not 0 < len(span) <= MOST_SEEDS:
        raise ConfigError(f"{where}: seeds are {brief(seeds)}; they take a span such as 0-3, of {MOST_SEEDS} at most.")
    return span


def progress(planned: Planned) -> dict[str, Any]:
    """How far a run is: state, steps done of those planned, seconds of its steps and evaluations.

    The states are those of `folder.STATES`, `new` where it has not begun, `killed` where nobody is at a running or
    paused one. A folder with a run of other settings is a RunError.
    """
    config = planned.config
    row = {"arm": planned.arm, "run": planned.path.name, "state": "new", "steps": 0, "planned": config.steps,
           "seconds": 0.0}
    if not is_run(planned.path):
        return row
    run = Run.open(planned.path)
    for key in run.settings():  # those alone that the record knows
        said, recorded = configs.get(config, key), configs.get(run.config, key)
        if key in configs.PATHS:  # a record that has travelled holds their last parts
            said, recorded = configs.shared_name(said), configs.shared_name(recorded)
        if said != recorded:
            raise RunError(f"The run {run.path} is not the one that the study describes: its {key} is {recorded!r}, "
                           f"the study's {said!r}. Put the study file right, or delete that folder to train it anew.")
    state = run.status["state"]
    killed = state in ("running", "paused") and live_control.holder(run.path) is None
    tables = ((run.metrics(), "seconds_total"), (run.evaluations(), "seconds"))
    for table, key in tables:
        files.check_columns(table, f"The record of the run {run.path}", numbers=(key,) if len(table) else ())
    seconds = float(sum(table[key].sum() for table, key in tables if len(table)))
    return row | {"state": "killed" if killed else state, "steps": live_control.steps(run.path), "seconds": seconds}


def seconds_left(rows: Sequence[Mapping[str, Any]], jobs: int, hours: float) -> float:
    """Seconds until all runs are finished, by the seconds a step of the finished runs of the same arm.

    An arm without one takes the mean of the other arms, and all take `hours` where no run is finished.
    """
    table = pd.DataFrame(rows)
    finished = table[table["state"] == "finished"]
    rates = (finished["seconds"] / finished["steps"]).groupby(finished["arm"]).mean()
    other = rates.mean() if len(rates) else hours * 3600 * jobs / table["planned"].sum()
    return float(((table["planned"] - table["steps"]) * table["arm"].map(rates).fillna(other)).sum() / jobs)


def commit(path: Path, study: str) -> None:
    """Commit a run's folder and nothing else, unless that was done already; a StudyError holds what git says."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=path, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StudyError(f"{path} could not be committed: {' '.join((done.stderr or done.stdout).split())}")
        return done.stdout

    git("add", "--", ".")
    if git("diff", "--cached", "--name-only", "--", "."):
        git("commit", "--quiet", "--message", f"Record {path.name} of the study {study}", "--only", "--", ".")


def overview(study: Study) -> str:
    """What the study is and how far its runs are, as text."""
    rows = [progress(planned) for planned in study.runs()]
    left = tqdm.format_interval(seconds_left(rows, study.jobs, study.hours))
    return "\n".join([f"{study.title}: {len(rows)} runs, {study.jobs} at a time, about {study.hours:.1f} hours in all.",
                      *(f"  {arm.name}: {arm.about}" for arm in study.arms),
                      pd.DataFrame(rows).drop(columns="arm").to_string(index=False, float_format="%.0f"),
                      f"About {left} are left."])


def train(study: Study, commits: bool = False) -> None:
    """Train what a study lacks, with a progress bar; `commits`: also commit each finished record.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP ended it, and the running steps are checkpointed (a second signal: dropped).
        StudyError: runs failed or could not be committed; all others are finished.
        RunError: another process is at the study, or a run there is not the one described.
    """
    with files.writing(study.out, "set another `out` in the study file"):
        study.out.mkdir(parents=True, exist_ok=True)
    with files.lock(study.out / ".lock", f"The study {study.out}"):
        _Runner(study, commits).run()


def smoke(study: Study, changes: Mapping[str, Any]) -> str:
    """Train a few tiny steps of every arm's first seed in a temporary folder, to show that the study file works.

    Dotted settings in `changes` win over the study's and over the tiny ones. Returns the overview; raises as `train`.
    """
    def tiny(arm: Arm) -> Arm:
        own = {**arm.changes, **changes}
        config = tiers.config(own)
        small = {key: min(most, configs.get(config, key)) for key, most in SMOKE.items()}
        return dataclasses.replace(arm, seeds=arm.seeds[:1], changes={**own, **small, "gate.start": 1, **changes})

    with tempfile.TemporaryDirectory() as folder:
        small = dataclasses.replace(study, out=Path(folder) / f"{study.out.name}-smoke",
                                    arms=tuple(tiny(arm) for arm in study.arms if arm.seeds))
        train(small)
        return overview(small)


class _Runner:
    """Trains the runs of a study; the caller holds its lock. Runs go by their names."""

    def __init__(self, study: Study, commits: bool) -> None:
        self.study, self.commits = study, commits
        self.logs = LOGS / study.out.name
        self.runs = {planned.path.name: planned for planned in study.runs()}
        self.rows = {name: progress(planned) for name, planned in self.runs.items()}
        self.waiting = deque(self.runs)
        self.running: dict[str, subprocess.Popen | None] = {}  # None: a process that is not ours is at it
        self.failed: dict[str, str] = {}
        self.uncommitted: list[Path] = []

    def run(self) -> None:
        """Train until all runs are finished or have failed; see `train`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        steps = sum(row["planned"] for row in self.rows.values())
        with Stop() as stop, tqdm(total=steps, desc=str(self.study.out), mininterval=2, bar_format=(
                "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]")) as bar:
            try:
                while (self.waiting or self.running) and not stop.signal:
                    self._start()
                    time.sleep(POLL if self.running else 0)
                    self._collect(bar)
                    self._show(bar)
                self._pass_on(stop.signal)
            except BaseException:
                self._pass_on(stop.signal or signal.SIGTERM)
                raise
        if stop.signal:
            raise Stopped(f"Stopped: {self._finished()} of {len(self.runs)} runs are finished.", 128 + stop.signal)
        self._commit()
        faults = [*(f"{name} {fault}" for name, fault in self.failed.items()),
                  *(f"{path.name} is not committed" for path in self.uncommitted)]
        if faults:
            raise StudyError(f"{self._finished()} of {len(self.runs)} runs are finished, but {'; '.join(faults)}. The "
                             f"logs lie in {self.logs}; the same command tries again.")

    def _start(self) -> None:
        while self.waiting and len(self.running) < self.study.jobs:
            name = self.waiting.popleft()
            if self.rows[name]["state"] == "finished":
                self._finish(name)
            else:
                self.running[name] = None if live_control.holder(self.runs[name].path) else self._launch(name)

    def _launch(self, name: str) -> subprocess.Popen:
        command = self.runs[name].command
        with (self.logs / f"{name}.log").open("a", encoding="utf8") as log:
            print("masa", *command, file=log, flush=True)
            # In a group of its own, Ctrl-C reaches it through this process alone, once.
            return subprocess.Popen([sys.executable, "-m", "masa_lib.cli", *command], stdin=subprocess.DEVNULL,
                                    stdout=log, stderr=subprocess.STDOUT, process_group=0)

    def _collect(self, bar: tqdm) -> None:
        """See which processes have ended."""
        for name, process in list(self.running.items()):
            if process and process.poll() is None:
                continue
            del self.running[name]
            if live_control.holder(self.runs[name].path):
                self.running[name] = None
            elif process is None:
                self.waiting.appendleft(name)
                self.rows[name] = progress(self.runs[name])
            elif process.returncode == 0:
                self._finish(name)
            else:
                self.failed[name] = self._fault(name, process.returncode)
                bar.write(f"{name} {self.failed[name]}", file=sys.stderr)

    def _finish(self, name: str) -> None:
        """Make a finished record compact: no checkpoints, no TensorBoard copy, and the model of seed 0 alone.

        A packed one is as it should be.
        """
        planned = self.runs[name]
        if Run.open(planned.path).is_packed:
            return
        for part in ("checkpoints", "tensorboard", *(["model"] if planned.changes["seed"] else [])):
            shutil.rmtree(planned.path / part, ignore_errors=True)
        Run.open(planned.path).pack_beliefs()
        self.rows[name] = progress(planned)
        if self.commits:
            self.uncommitted.append(planned.path)
            self._commit()

    def _commit(self) -> None:
        """Commit what is not; a failure, as when another git is at work, is left to the next call."""
        for path in tuple(self.uncommitted):
            try:
                commit(path, self.study.out.name)
                self.uncommitted.remove(path)
            except StudyError as error:
                tqdm.write(str(error), file=sys.stderr)

    def _fault(self, name: str, code: int) -> str:
        text = (self.logs / f"{name}.log").read_text(encoding="utf8", errors="replace")
        last = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()][-1].rstrip(".")
        return f"{f'failed with exit code {code}' if code > 0 else f'was killed by signal {-code}'}: {last}"

    def _finished(self) -> int:
        return sum(row["state"] == "finished" for row in self.rows.values())

    def _show(self, bar: tqdm) -> None:
        for name in self.running:
            self.rows[name]["steps"] = live_control.steps(self.runs[name].path)
        rows = list(self.rows.values())
        left = tqdm.format_interval(seconds_left(rows, self.study.jobs, self.study.hours))
        bar.set_postfix_str(f"about {left} left, {self._finished()} of {len(rows)} runs finished, at "
                            f"{' '.join(self.running) or 'none'}", refresh=False)
        bar.update(sum(row["steps"] for row in rows) - bar.n)

    def _pass_on(self, number: int) -> None:
        """Send a signal to the processes and wait until they have ended."""
        processes = [process for process in self.running.values() if process]
        for process in processes:
            process.send_signal(number)
        for process in processes:
            process.wait()
