"""Writing a training down, step by step: its run folder, its trackers, and a warning where it goes wrong.

A training record is the same, whether our learner moves the weights or TRL does (`masa_lib.scaleout.worker`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pandas as pd

from masa_lib.analysis import health
from masa_lib.config import Config
from masa_lib.method import beliefs, gather, rollouts
from masa_lib.method.streams import solutions_of
from masa_lib.runs import progress
from masa_lib.runs.folder import Run
from masa_lib.runs.stopping import Stopped
from masa_lib.training.trackers import Trackers


class Recorder:
    """What is kept of each step.

    Args:
        run: the folder; None keeps nothing, and only watches over the metrics.
        precision: `model.precision`, by which some of them are judged.
    """

    def __init__(self, run: Run | None, precision: str) -> None:
        self.run, self._trackers, self._health = run, None, health.Watch(precision)

    def open(self) -> None:
        """Begin what `record.trackers` names, with what is recorded so far."""
        self._trackers = Trackers(self.run)

    def close(self) -> None:
        """End the trackers, and what was said of the running step."""
        if self.run:
            progress.forget(self.run.path)
        if self._trackers:
            self._trackers.close()

    def step(self, table: pd.DataFrame, metrics: dict[str, Any], config: Config) -> None:
        """Write a step down, and its rollouts where they are due."""
        step, every = metrics["step"], config.record.rollouts_every
        if self.run:
            if every and (step in (1, config.steps) or step % every == 0):
                self.run.write_rollouts(step, table.drop(columns=rollouts.TOKEN_COLUMNS, errors="ignore"))
            self.run.append_metrics(metrics)
        self._health.observe(metrics)
        if self._trackers:
            self._trackers.add("train", metrics)

    def evaluation(self, step: int, summary: dict[str, Any], table: pd.DataFrame) -> None:
        """Write an evaluation down."""
        if self.run:
            self.run.write_evaluation(step, summary, table)
        if self._trackers:
            self._trackers.add("evaluation", summary)


def belief_record(found: gather.Selection) -> dict[str, Any]:
    """What was believed of a step's candidates and how their groups went, compactly; empty where nothing was read.

    `beliefs`: thousandths. `right`, `solutions`: None, 0 for those that were not rolled out. `weight`: of those that
    were, one over their chance to be (0: not).
    """
    if not found.candidates or found.candidates[0].belief is None:
        return {}
    went = rollouts.outcomes(found.table)
    weights = solutions_of(found.table).groupby("group")["weight"].first()
    groups = range(len(found.candidates))
    return {"problems": [candidate.problem.id for candidate in found.candidates],
            "beliefs": [beliefs.thousandths(candidate.belief.probabilities) for candidate in found.candidates],
            "right": [int(went["right"][group]) if group in went.index else None for group in groups],
            "solutions": [int(went["solutions"].get(group, 0)) for group in groups],
            "weight": [float(weights.get(group, 0.0)) for group in groups]}


@contextlib.contextmanager
def status(run: Run) -> Iterator[None]:
    """What a run's status says inside, running, and behind: finished, stopped, or failed and why."""
    run.set_status("running")
    try:
        yield
    except BaseException as error:
        # torch.save answers an interruption with an error of its own.
        stopped = next((cause for cause in (error, error.__context__) if isinstance(cause, KeyboardInterrupt)), None)
        run.set_status("stopped" if stopped else "failed", str(stopped or error))
        if stopped:
            raise stopped from None
        raise
    run.set_status("finished")


def check_stop(signal: int, step: int) -> None:
    """End a training that a signal (0: none) stopped between two steps, its checkpoint written.

    Raises:
        Stopped: with the exit status of a program that the signal ended.
    """
    if signal:
        done = f"after step {step}, which is checkpointed" if step else "before the first step"
        raise Stopped(f"Stopped {done}.", 128 + signal)
