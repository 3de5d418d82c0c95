"""Steering a training from outside: a small file in the run's folder that the training reads before each step.

Whoever steers (a panel, a notebook, a script) writes the file, whole and one at a time; the training only reads it. A
pause, a step and a stop are meant for one process and mean nothing to the next life of the run. Changed settings are a
numbered request: the training records it in the run with the step from which it holds, once, so that a resumed run
takes it over at the same step. Here is no drawing, and nothing that trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError, logger
from masa_lib.models import tiers
from masa_lib.runs.folder import LOCK, Run, is_run, last_step
from masa_lib.runs.stopping import Stop

CONTROL, LOG = "control.json", "train.log"
#: what may change while a run trains: settings, and whole sections of them
LIVE = ("reward.", "gate.", "cap.", "belief.", "prediction.score", "prediction.weight", "update.learning_rate",
        "update.meta_weight", "update.meta_entropy", "update.normalise_meta")
#: seconds between two looks at the file while a training is paused
LOOK = 0.1
#: states in which a process is at the run
ALIVE = ("starting", "running", "pausing", "paused", "stopping")


@dataclass(frozen=True)
class Control:
    """What is asked of a training.

    `process`: for whom `pause`, `until` and `stop` are meant. `pause`: wait once step `until` is finished. `stop`: end
    after the running step. `request`: number of the newest change of `settings` (dotted keys), 0 before the first.
    """

    process: int = 0
    pause: bool = False
    until: int = 0
    stop: bool = False
    request: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


def read(folder: str | Path) -> Control:
    """What is asked of the run in a folder; nothing where there is no file or none that can be read."""
    try:
        asked = Control(**files.read_json(Path(folder) / CONTROL))
        if not isinstance(asked.settings, dict) or any(
                type(getattr(asked, entry.name)) is not type(entry.default)
                for entry in dataclasses.fields(Control) if entry.name != "settings"):
            raise ValueError("a value has the wrong type")
        if not all(0 <= number < 10**9 for number in (asked.process, asked.until, asked.request)):
            raise ValueError("a number is out of range")
    except FileNotFoundError:
        return Control()
    except (OSError, ValueError, TypeError) as error:
        logger.warning("The control file of %s is left out, it cannot be read: %s", folder, error)
        return Control()
    return asked


def change(folder: str | Path, settings: Mapping[str, Any]) -> int:
    """Ask for other settings from the next step on; what was asked before and is not yet in force is kept.

    Returns:
        The request's number; `Run.changes` has a row with it once it is in force.

    Raises:
        ConfigError: a setting cannot change during a training, or not to this value.
        RunError: no run there.
    """
    run, asked = Run.open(folder), read(folder)
    run.check_writable()
    done = _last_request(run)
    wanted = {**(asked.settings if asked.request > done else {}), **settings}
    _check(run, steps(folder) + 1, wanted)
    number = max(asked.request, done) + 1
    _write(folder, dataclasses.replace(asked, request=number, settings=wanted))
    return number


def pause(folder: str | Path) -> None:
    """Let the training wait after the running step."""
    _order(folder, pause=True, until=0)


def proceed(folder: str | Path) -> None:
    """Let a paused training go on."""
    _order(folder, pause=False, until=0)


def step(folder: str | Path) -> None:
    """Let a paused training do one step."""
    _order(folder, pause=True, until=steps(folder) + 1)


def stop(folder: str | Path) -> None:
    """Let the training end after the running step, with a checkpoint."""
    _order(folder, stop=True)


def _order(folder: str | Path, **what: Any) -> None:
    """Write an order for the process that is at the run.

    Raises:
        RunError: none is.
    """
    process = holder(folder)
    if process is None:
        raise RunError(f"Nobody trains {folder} now, so there is nobody to steer; `masa resume {folder}` goes on.")
    asked = read(folder)
    if asked.process != process:
        asked = dataclasses.replace(asked, process=process, pause=False, until=0, stop=False)
    _write(folder, dataclasses.replace(asked, **what))


def _write(folder: str | Path, asked: Control) -> None:
    path = Path(folder) / CONTROL
    text = json.dumps(dataclasses.asdict(asked), indent=2) + "\n"
    with files.writing(path, "try again"):
        files.replace(path, lambda temporary: temporary.write_text(text, encoding="utf8"))


# The training's side.

def obey(run: Run, done: int, stop: Stop) -> Config:
    """Before a step: record requests, wait while paused, take note of a stop.

    Args:
        run: whose process calls this.
        done: finished steps.
        stop: told of a stop.

    Returns:
        The config in force in the next step.
    """
    config, waits = run.config_at(done + 1), False
    while done < config.steps:
        asked = read(run.path)
        if asked.request > _last_request(run):
            _record(run, done + 1, asked)
            config = run.config_at(done + 1)
        mine = asked.process == os.getpid()
        if mine and asked.stop:
            stop.ask()
        if stop.signal or not (mine and asked.pause and done >= asked.until):
            break
        if not waits:
            run.set_status("paused")
        waits = True
        time.sleep(LOOK)
    if waits:
        run.set_status("running")
    return config


def _record(run: Run, step: int, asked: Control) -> None:
    """Write a request into the run's changes, never before an older one: a resumed run takes them in this order."""
    step = max([step, *(row["step"] for row in run.changes())])
    try:
        _check(run, step, asked.settings)
        run.append_change(step, asked.settings, request=asked.request)
    except ConfigError as error:
        run.append_change(step, {}, request=asked.request, refused=str(error))


def _check(run: Run, step: int, settings: Mapping[str, Any]) -> None:
    fixed = [key for key in settings if not key.startswith(LIVE) and key in configs.settings()]
    if fixed:
        raise ConfigError(f"{fixed[0]} cannot change while a run trains; what can: {', '.join(LIVE)}. Start another "
                          "run with it.")
    configs.replace(run.config_at(step), settings)


def _last_request(run: Run) -> int:
    return max((row.get("request", 0) for row in run.changes()), default=0)


# Processes.

def start(out: str | Path, settings: Mapping[str, Any]) -> subprocess.Popen:
    """`masa train` in a process of its own, which outlives this one; what it prints goes to `train.log` in the folder.

    Args:
        out: of the new run.
        settings: dotted keys; what they leave open has the defaults of the model's tier.

    Raises:
        ConfigError: a setting is unknown or not allowed; nothing is started.
        RunError: a run is there already.
    """
    tiers.config(settings)
    if is_run(out):
        raise RunError(f"{out} holds a run already: resume it, or choose another folder.")
    sets = ["--set", *configs.assignments(settings)] if settings else []
    return _launch(Path(out), "train", "--out", str(out), *sets)


def resume(out: str | Path) -> subprocess.Popen:
    """`masa resume` in a process of its own; see `start`.

    Raises:
        RunError: no run there, or somebody trains it.
    """
    Run.open(out).check_writable()
    process = holder(out)
    if process is not None:
        raise RunError(f"Process {process} trains {out} already.")
    return _launch(Path(out), "resume", str(out))


def _launch(out: Path, *command: str) -> subprocess.Popen:
    """A command of `masa`, in a session of its own: what ends a notebook's kernel does not reach it."""
    with files.writing(out, "choose another folder"), contextlib.ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context((out / LOG).open("a", encoding="utf8"))
        return subprocess.Popen([sys.executable, "-m", "masa_lib.cli", *command], stdin=subprocess.DEVNULL, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True,
                                env=os.environ | {"TQDM_DISABLE": "1"})


def holder(folder: str | Path) -> int | None:
    """The number of the process that is at a run; None where nobody is.

    Only a lock that names a living process is probed, so that a probe is never in the way of one that begins.
    """
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, ValueError, OverflowError), files.reading(
            Path(folder) / LOCK), (Path(folder) / LOCK).open("rb") as file:
        process = int(file.read(20))
        if psutil.pid_exists(process):
            import fcntl  # Windows has none, and no process that is at a run

            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return process
    return None


def state(folder: str | Path, process: subprocess.Popen | None = None) -> str:
    """What becomes of a run: `new` (there is none), one of ALIVE, `stopped`, `failed`, `finished` or `killed`.

    Args:
        folder: of the run.
        process: what `start` or `resume` gave, if this process started it.
    """
    number = process.pid if process and process.poll() is None else holder(folder)
    if not is_run(folder):
        return "starting" if number else "failed" if process else "new"
    status, asked = Run.open(folder).status["state"], read(folder)
    if number is None:
        return "killed" if status in ("running", "paused") else status
    if status not in ("running", "paused"):
        return status if status == "finished" else "starting"
    if asked.process != number:
        return "running"
    if asked.stop:
        return "stopping"
    if asked.pause and steps(folder) >= asked.until:
        return status if status == "paused" else "pausing"
    return "running"


def wait(folder: str | Path, until: Callable[[str, int], bool], process: subprocess.Popen | None = None) -> str:
    """Wait until state and finished steps are as wanted, or nobody trains any more; returns the state."""
    while (found := state(folder, process)) in ALIVE and not until(found, steps(folder)):
        time.sleep(LOOK)
    return found


def steps(folder: str | Path) -> int:
    """Finished steps of a run."""
    return last_step(Path(folder))


def last_words(folder: str | Path) -> str:
    """The last line that a training printed: why it ended, where it could not begin."""
    log = Path(folder) / LOG
    try:
        with files.reading(log), log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**14, 0))
            lines = file.read().decode("utf8", "replace").split("\n")
    except FileNotFoundError:
        return f"There is no {LOG} in {folder}; was the folder removed?"
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
