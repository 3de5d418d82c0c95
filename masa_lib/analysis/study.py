"""A study: a grid of arms and seeds, described by a file: `masa train` and `masa resume`, a few at a time.

What is finished is left alone and what is not is resumed, so that a study grows over days and outlives any kill. A
finished record is made compact. How a run trains is the business of these two commands, what came of it that of
`compare`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
import pydantic
from tqdm.auto import tqdm

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import MasaError, brief
from masa_lib.models import tiers
from masa_lib.runs import live_control, parquet, provenance
from masa_lib.runs.folder import Run, is_run
from masa_lib.runs.stopping import Stop, Stopped

#: seconds between two looks at the processes
POLL = 0.5
#: seeds of an arm; more are a slip, and a list of them would not fit into the memory
MOST_SEEDS = 10_000
#: an arm's name is part of its runs' folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*", re.ASCII)
T = TypeVar("T", bound=pydantic.BaseModel)
#: a smoke run takes at most these, and its gate acts from the second step on
SMOKE = {"steps": 3, "model.threads": 1, "problems.pool": 24, "sampling.problems": 3, "sampling.solutions": 4,
         "sampling.predictions": 4, "gate.predictions": 4,
         "evaluation.every": 2, "evaluation.problems": 4, "evaluation.samples": 2, "evaluation.final_problems": 4,
         "evaluation.final_samples": 2, "evaluation.predictions": 2, "record.rollouts_every": 1}


class StudyError(MasaError, RuntimeError):
    """Runs of a study failed; the message says which and what to do."""


@dataclass(frozen=True)
class Planned:
    """A run of a study: `changes` are the dotted settings, seed and method among them, that its command names."""

    path: Path
    changes: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """The config that the command gives."""
        return tiers.config(self.changes)


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
        return [Planned(self.out / f"{arm.name}-s{seed}", {**arm.changes, "seed": seed})
                for seed in sorted({seed for arm in self.arms for seed in arm.seeds})
                for arm in self.arms if seed in arm.seeds]

    def select(self, only: Collection[str] = (), seeds: str | None = None, jobs: int | None = None) -> Study:
        """The study with these arms, with its seeds in a span such as `0-3`, with other jobs; else a ConfigError."""
        names = [arm.name for arm in self.arms]
        if unknown := [name for name in only if name not in names]:
            raise ConfigError(f"--only names {', '.join(unknown)}; the arms of this study are {', '.join(names)}.")
        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs is {jobs}; it takes a whole number of at least 1.")
        wanted = span("--seeds", seeds) if seeds else None
        kept = [dataclasses.replace(arm, seeds=[seed for seed in arm.seeds if wanted is None or seed in wanted])
                for arm in self.arms if not only or arm.name in only]
        if not any(arm.seeds for arm in kept):
            raise ConfigError(f"No arm has a seed in --seeds {seeds}.")
        chosen = dataclasses.replace(self, arms=tuple(kept), jobs=jobs or self.jobs)
        share = len(chosen.runs()) / len(self.runs())
        return dataclasses.replace(chosen, hours=self.hours * share * self.jobs / chosen.jobs)


class _ArmTable(pydantic.BaseModel, strict=True, extra="forbid"):
    about: str
    method: str = ""
    seeds: int | str = 0
    settings: dict = {}


class _StudyTable(pydantic.BaseModel, strict=True, extra="forbid"):
    title: str
    out: str
    seeds: int | str
    hours: Annotated[float, pydantic.Field(gt=0)]
    arms: Annotated[dict, pydantic.Field(min_length=1)]
    jobs: Annotated[int, pydantic.Field(ge=1)] = 1
    threads: int = 1
    settings: dict = {}


def load(path: str | Path) -> Study:
    """Read a study file (TOML) and check every arm's config; what is wrong is a ConfigError."""
    where = f"The study {path}"
    table = _checked(where, _StudyTable, configs.toml(path, "study"))
    arms = tuple(_arm(f"{where}, arm {name}", name, entry, table) for name, entry in table.arms.items())
    return Study(table.title, Path(table.out), table.jobs, table.hours, arms)


def _arm(where: str, name: str, entry: Any, study: _StudyTable) -> Arm:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: the name is {name!r}; a name takes letters, digits and . _ + -, and begins with a "
                          "letter or a digit.")
    table = _checked(where, _ArmTable, entry)
    changes = {"model.threads": study.threads, **configs.flatten(study.settings), **configs.flatten(table.settings)}
    if wrong := [key for key in ("method", "seed") if key in changes]:
        raise ConfigError(f"{where}: {wrong[0]} is no entry of settings; method and seeds stand beside them.")
    changes["method"] = table.method or name
    try:
        tiers.config(changes)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Arm(name, table.about, span(where, table.seeds or study.seeds), changes)


def _checked(where: str, kind: type[T], table: Any) -> T:
    """A table of a study file, each key known and of its type."""
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
    key, value, known = ".".join(map(str, fault["loc"][:1])), brief(fault["input"]), ", ".join(kind.model_fields)
    said = {"missing": f" does not say its {key}; the keys are {known}",
            "extra_forbidden": f" has the key {brief(key)}; the keys are {known}"}.get(
                fault["type"], f"{': ' * bool(key)}{key} is {value}; {fault['msg'].replace('Input', 'it', 1)}")
    raise ConfigError(f"{where}{said}.")


def span(where: str, seeds: int | str) -> range:
    """A count of seeds from 0 on, or a span of seeds such as `100-103`, or a single one as text."""
    found = re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", f"0-{seeds - 1}" if isinstance(seeds, int) else seeds)
    listed = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not 0 < len(listed) <= MOST_SEEDS:
        raise ConfigError(f"{where}: seeds are {brief(seeds)}; they take a span such as 0-3, of {MOST_SEEDS} at most.")
    return listed


def progress(planned: Planned) -> dict[str, Any]:
    """How far a run is: state, steps done of those planned, seconds of its steps and evaluations.

    The states are those of `records.STATES`, `new` where it has not begun, `killed` where nobody is at a running or
    paused one. A folder with a run of other settings is a RunError.
    """
    config = planned.config
    row = {"run": planned.path.name, "state": "new", "steps": 0, "planned": config.steps, "seconds": 0.0}
    if not is_run(planned.path):
        return row
    run = Run.open(planned.path)
    for key in run.settings():  # those alone that the record knows
        said, recorded = configs.get(config, key), configs.get(run.config, key)
        if key in provenance.PATHS:  # a record that has travelled holds their last parts
            said, recorded = provenance.shared_name(said), provenance.shared_name(recorded)
        if said != recorded:
            raise RunError(f"The run {run.path} is not the one that the study describes: its {key} is {recorded!r}, "
                           f"the study's {said!r}. Put the study file right, or delete that folder to train it anew.")
    state = run.status["state"]
    killed = state in ("running", "paused") and live_control.holder(run.path) is None
    tables = ((run.metrics(), "seconds_total"), (run.evaluations(), "seconds"))
    for table, key in tables:
        parquet.check_columns(table, f"The record of the run {run.path}", numbers=(key,) if len(table) else ())
    seconds = float(sum(table[key].sum() for table, key in tables if len(table)))
    return row | {"state": "killed" if killed else state, "steps": live_control.steps(run.path), "seconds": seconds}


def overview(study: Study) -> str:
    """What the study is and how far its runs are, as text."""
    table = pd.DataFrame([progress(planned) for planned in study.runs()])
    left = study.hours * (1 - table["steps"].sum() / table["planned"].sum())
    return "\n".join([
        f"{study.title}: {len(table)} runs, {study.jobs} at a time, about {study.hours:.1f} hours in all.",
        *(f"  {arm.name}: {arm.about}" for arm in study.arms), table.to_string(index=False, float_format="%.0f"),
        f"About {left:.1f} hours are left."])


def train(study: Study) -> None:
    """Train what a study lacks, with a progress bar.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP ended it, with checkpoints (a second signal: without).
        StudyError: runs failed; all others are finished.
        RunError: another process is at the study, or a run there is not the one described.
    """
    with files.writing(study.out, "set another `out` in the study file"):
        study.out.mkdir(parents=True, exist_ok=True)
    with files.lock(study.out / ".lock", f"The study {study.out}"):
        rows = {planned.path: progress(planned) for planned in study.runs()}  # what is wrong is said before all work
        signals: list[int] = []
        with Stop() as stop, futures.ThreadPoolExecutor(study.jobs) as pool:
            works = {planned.path: pool.submit(_work, planned, signals) for planned in study.runs()}
            try:
                _watch(study, stop, works, rows)
                signals += [stop.signal] if stop.signal else []
                futures.wait(works.values())
            except BaseException:
                signals.append(stop.signal or signal.SIGTERM)
                raise
    ends = [work.result() for work in works.values()]
    faults = [fault for _, fault in ends if fault]
    finished = f"{sum(row['state'] == 'finished' for row, _ in ends)} of {len(rows)} runs are finished"
    if stop.signal:
        raise Stopped(f"Stopped: {finished}.", 128 + stop.signal)
    if faults:
        raise StudyError(f"{finished}, but {'; '.join(faults)}. {live_control.LOG} in a run's folder says more; the "
                         "same command tries again.")


def _watch(study: Study, stop: Stop, works: Mapping[Path, futures.Future], rows: dict[Path, dict[str, Any]]) -> None:
    """Show how far all is, until it is done, or a signal came; a work's own error is raised."""
    counted = {"total": sum(row["planned"] for row in rows.values()), "initial": sum(
        row["steps"] for row in rows.values())}
    waiting = set(works)
    with tqdm(**counted, desc=str(study.out), unit="step", mininterval=2) as bar:
        while waiting and not stop.signal:
            done, _ = futures.wait([works[path] for path in waiting], POLL, futures.FIRST_COMPLETED)
            for path in [path for path in waiting if works[path] in done]:
                waiting.remove(path)
                rows[path], fault = works[path].result()
                if fault:
                    bar.write(fault, file=sys.stderr)
            running = [path for path in works if path in waiting and works[path].running()]
            for path in running:
                rows[path]["steps"] = live_control.steps(path)
            bar.set_postfix_str(f"{len(works) - len(waiting)} of {len(works)} runs done, at "
                                f"{' '.join(path.name for path in running) or 'none'}", refresh=False)
            bar.update(sum(row["steps"] for row in rows.values()) - bar.n)


def _work(planned: Planned, signals: Sequence[int]) -> tuple[dict[str, Any], str]:
    """Finish a run and make it compact; returns its progress, and what went wrong with it.

    Args:
        planned: the run.
        signals: those that came; each is passed on, and after the first nothing is begun.
    """
    code = 0
    while not signals and live_control.holder(planned.path):  # somebody else is at it
        time.sleep(POLL)
    if not signals and progress(planned)["state"] != "finished":
        begun = is_run(planned.path)
        code = _wait(live_control.resume(planned.path) if begun else live_control.start(planned.path, planned.changes),
                     signals)
    row = progress(planned)
    if row["state"] == "finished":
        _compact(planned)
    elif code and not signals:
        how = f"failed with exit code {code}" if code > 0 else f"was killed by signal {-code}"
        return row, f"{planned.path.name} {how}: {live_control.last_words(planned.path).rstrip('.')}"
    return row, ""


def _wait(process: subprocess.Popen, signals: Sequence[int]) -> int:
    """The exit code of a process that is passed on the signals."""
    passed = 0
    while process.poll() is None:
        for number in signals[passed:]:
            process.send_signal(number)
            passed += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
    return process.returncode


def _compact(planned: Planned) -> None:
    """Drop of a finished record checkpoints, TensorBoard's copy, log, and the model but of seed 0."""
    run = Run.open(planned.path)
    if not run.is_packed:
        for part in ("checkpoints", "tensorboard", *(["model"] if planned.changes["seed"] else [])):
            shutil.rmtree(planned.path / part, ignore_errors=True)
        (planned.path / live_control.LOG).unlink(missing_ok=True)
        run.pack_beliefs()


def smoke(study: Study, changes: Mapping[str, Any], told: Callable[[Study], str] = overview) -> str:
    """Train a few tiny steps of every arm's first seed in a temporary folder, to show that the study file works.

    Dotted settings in `changes` win over the study's and over the tiny ones. Returns what is `told` of it; raises as
    `train`.
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
        return told(small)
