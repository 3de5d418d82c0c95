"""A whole training: begun in a new folder or taken up again, with a progress bar, until its end or a signal."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from tqdm.auto import tqdm

from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.method import prompts
from masa_lib.runs.folder import Run
from masa_lib.training.checkpoint import read_state
from masa_lib.training.recorder import check_stop, status
from masa_lib.training.trainer import Trainer


def train(config: Config, out: str | Path, command: str) -> Run:
    """Train in a new run folder, with a progress bar.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP ended it; `resume` continues.
        RunError: the folder already holds a run.
        ModelError, ProblemError: model or problems cannot be loaded.
    """
    # Problems and model come first, so that a wrong name leaves no half-made run behind.
    with _loading():
        trainer = Trainer(config)
    trainer.run = trainer.recorder.run = Run.create(out, config, command)
    prompts.fix_date(trainer.tokenizer, trainer.run.started)  # the day may have changed while the model was loaded
    with trainer.run.lock():
        return _drive(trainer)


def resume(path: str | Path) -> Run:
    """Go on with a run from its last checkpoint; what it wrote after that is written again, on the CPU bit for bit.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP ended it; `resume` continues.
        RunError: no run there, another process is at it, or a finished run is to get longer without its checkpoints.
    """
    run = Run.open(path)
    with run.lock():
        status = run.status
        finished = status["state"] == "finished"
        if finished and status["step"] >= run.config_at(status["step"] + 1).steps:
            return run
        run.check_files()
        with _loading():
            found = run.resume_point(lambda step, folder: read_state(folder, step) and Trainer(
                run.config_at(step), run, folder))
            if finished and not found:
                raise RunError(f"The finished run {path} has no checkpoints left to go on from; train in another "
                               "folder.")
            trainer = found or Trainer(run.config_at(0), run)
        run.begin_again(trainer.step)
        run.rewind(found.step if found else -1)
        return _drive(trainer)


def _loading() -> tqdm:
    """A line for as long as model and problems are loaded, so that a first minute is not silent."""
    return tqdm(desc="Model and problems are loaded ...", bar_format="{desc}", leave=False)


def _drive(trainer: Trainer) -> Run:
    """Train to the end; the caller holds the run's lock."""
    run, stop = trainer.run, trainer.stop
    with status(run), contextlib.closing(trainer.recorder), stop:
        trainer.recorder.open()
        trainer.catch_up()  # before the bar, which then counts the seconds of steps alone
        with tqdm(total=trainer.config.steps, initial=trainer.step, desc=str(run.path), unit="step") as bar:
            for result in trainer:
                bar.update()
                shown = {key: result.metrics[key] for key in ("accuracy", "reward_meta")}
                bar.set_postfix({key: f"{value:.2f}" for key, value in shown.items() if math.isfinite(value)})
        if stop.signal:
            trainer.save_checkpoint()
        check_stop(stop.signal, trainer.step)
        trainer.save_model()
    return run
