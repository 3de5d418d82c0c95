"""What the training panel reads of a run: its records, again and again while they grow, and what they say of beliefs.

No drawing: that is `training_view`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib.analysis.awareness import correlation, within_level_correlation
from masa_lib.analysis.figures import thinned
from masa_lib.config import Config
from masa_lib.crash_safe_files import Lines, RunError
from masa_lib.errors import brief
from masa_lib.runs import parquet
from masa_lib.runs.folder import Run
from masa_lib.runs.records import EVALUATIONS, METRICS, READINGS, checked_rows, frame
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: recorded steps whose problems are dots where predictions are sampled
RECENT = 5
#: steps of which it is computed what is known, at most
POINTS = 60
#: columns of the metrics that are drawn, by the look of the panel
DRAWN = ("accuracy", "reward_solution", "reward_difficulty", "reward_length", "reward_notion", "zero_variance_solution",
         "zero_variance_meta", "dropped", "stopped", "tokens_solution", "tokens_meta", "tokens_read", "tokens_recheck",
         "seconds_generate", "seconds_grade", "seconds_update", "seconds_total", "loss", "entropy", "logp_gap",
         "updates")


@dataclass(frozen=True)
class Records:
    """What a run has recorded so far; `rollouts` are those of its last RECENT recorded steps.

    `tables`: the evaluations by step, a row a problem. `readings`: what was believed of the learning curve's problems
    between them, see `evaluation.read`; none where nothing is read.
    """

    config: Config
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    rollouts: pd.DataFrame
    changes: Sequence[Mapping[str, Any]]
    tables: Mapping[int, pd.DataFrame] = dataclasses.field(default_factory=dict)
    readings: Sequence[Mapping[str, Any]] = ()


def read(folder: str | Path, until: int | None = None) -> Records:
    """The records of the run in a folder; see `Reader`."""
    return Reader(folder).read(until)


class Reader:
    """Reads a run again and again while it grows: of the metrics only what is new, of the tables only new steps.

    Attributes:
        lines: the metrics' file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.lines = Path(folder), Lines(Path(folder) / METRICS)
        self._metrics, self._steps, self._rollouts = nothing_measured(), None, pd.DataFrame()
        self._reading_lines, self._readings, self._tables = Lines(self.folder / READINGS), [], {}

    def read(self, until: int | None = None) -> Records:
        """What the run has recorded by now.

        Args:
            until: show it as it was after this step; None: as it is.

        Raises:
            RunError: there is no run, it is being written anew just now, or its records are not those of a training.
        """
        run = Run.open(self.folder)
        anew = self._read_metrics(run)
        before = self._metrics
        parquet.check_columns(before, f"{run.path / METRICS}", numbers=sorted(set(DRAWN) & set(before)))
        evaluations = run.evaluations()
        parquet.check_columns(evaluations, f"{run.path / EVALUATIONS}", numbers=sorted({"accuracy"} & set(evaluations)))
        self._read_rollouts(run, anew, until)
        self._read_tables(run, evaluations, anew)
        if until is None:
            until = max([*before["step"], *evaluations["step"], 0])
        return Records(run.config, before[before["step"] <= until], evaluations[evaluations["step"] <= until],
                       self._rollouts, [row for row in run.changes() if row["step"] <= until],
                       {step: table for step, table in self._tables.items() if step <= until},
                       [row for row in self._readings if row["step"] <= until])

    def _read_metrics(self, run: Run) -> bool:
        """Read what is new; whether the metrics were written anew since the last look."""
        if run.is_packed:
            self._metrics = run.metrics()
            return False
        anew, rows = self.lines.look()
        before = nothing_measured() if anew else self._metrics
        if rows:
            new = frame(checked_rows(run.path / METRICS, rows))
            before = pd.concat([before, new], ignore_index=True) if len(before) else new
        self._metrics = before
        return anew

    def _read_tables(self, run: Run, evaluations: pd.DataFrame, anew: bool) -> None:
        """The tables of new evaluations, and new readings."""
        known = {} if anew else self._tables
        self._tables = {step: known[step] if step in known else run.evaluation_table(step)
                        for step in map(int, evaluations["step"])}
        if run.is_packed:
            table = run.readings()
            self._readings = [{"step": step} | rows.to_dict("list") for step, rows in table.set_index("step").groupby(
                "step")] if len(table) else []
        else:
            again, rows = self._reading_lines.look()
            self._readings = [*([] if again else self._readings), *checked_rows(self._reading_lines.path, rows)]

    def _read_rollouts(self, run: Run, anew: bool, until: int | None) -> None:
        steps = [step for step in run.rollout_steps() if until is None or step <= until][-RECENT:]
        if steps == self._steps and not anew:
            return
        table = run.rollouts(steps)
        if len(table):
            parquet.check_columns(
                table, f"A table in {run.path / 'rollouts'}", texts=("stream", "problem", "answer", "text"),
                numbers=("step", "group", "length", "correct", "reward", "predicted_pass_rate"))
            if table[["step", "group"]].isna().any(axis=None):
                raise RunError(f"A table in {run.path / 'rollouts'} does not say of each rollout which step and group "
                               "it is of. Restore it, or look at another run.")
        self._steps, self._rollouts = steps, table


def nothing_measured() -> pd.DataFrame:
    """The metrics of a run without a finished step."""
    return pd.DataFrame(columns=["step"])


def nothing(config: Config) -> Records:
    """The records of a run that is still to begin."""
    empty = pd.DataFrame(columns=["step"])
    return Records(config, empty, empty, pd.DataFrame(), ())


def problem_points(rollouts: pd.DataFrame) -> pd.DataFrame:
    """Mean prediction and pass rate of every problem that has both: columns step, group, problem, predicted, actual."""
    if rollouts.empty or rollouts["predicted_pass_rate"].isna().all():
        return pd.DataFrame(columns=["step", "group", "problem", "predicted", "actual"])
    rated = rollouts.assign(predicted=rollouts["predicted_pass_rate"].astype(float) / PASS_RATE_STEPS,
                            actual=rollouts["reward"].where(rollouts["stream"] == "solution"))
    points = rated.groupby(["step", "group"]).agg(problem=("problem", "first"), predicted=("predicted", "mean"),
                                                  actual=("actual", "mean"))
    points["predicted"] = points["predicted"].clip(0, 1)  # released mode takes any number
    return points.dropna().reset_index()


def held_out_points(records: Records) -> pd.DataFrame:
    """The beliefs about the problems of the newest evaluation, before the training (step 0) and by now.

    Returns:
        A row a problem and time: step, problem, level, belief (nine shares), predicted (their mean) and actual (the
        share of the newest evaluation's solutions that is right). Empty where nothing was read.

    Raises:
        RunError: a reading is not one of beliefs.
    """
    columns = ["step", "problem_id", "problem", "level", "belief", "predicted", "actual"]
    tables = [(step, table) for step, table in sorted(records.tables.items()) if "belief" in table]
    if not tables:
        return pd.DataFrame(columns=columns)
    truth = tables[-1][1]
    ends = {tables[0][0]: tables[0][1], tables[-1][0]: truth}
    rows = [believed(step, table["problem_id"], table["belief"]) for step, table in ends.items()]
    if records.readings and records.readings[-1]["step"] > tables[-1][0]:
        rows = [rows[0], _reading(records.readings[-1])]
    known = truth.assign(actual=truth["c"] / truth["n"])[["problem_id", "problem", "level", "actual"]]
    return pd.concat(rows).merge(known, on="problem_id", sort=False)[columns].sort_values("step", kind="stable")


def _reading(row: Mapping[str, Any]) -> pd.DataFrame:
    try:
        return believed(row["step"], row["problems"], row["beliefs"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{READINGS} has a row at step {row['step']} that is not one of beliefs ({brief(error)}). "
                       "Repair or remove that line; nothing was changed.") from error


def believed(step: int, problems: Iterable[str], beliefs: Iterable[Any]) -> pd.DataFrame:
    """Beliefs of one time: columns step, problem_id, belief (shares), predicted."""
    shares_PV = np.asarray([list(belief) for belief in beliefs], dtype=float).reshape(-1, PASS_RATE_STEPS + 1)
    shares_PV = shares_PV / shares_PV.sum(axis=1, keepdims=True)
    predicted = shares_PV @ np.arange(PASS_RATE_STEPS + 1) / PASS_RATE_STEPS
    return pd.DataFrame({"step": step, "problem_id": list(problems), "belief": [*shares_PV], "predicted": predicted})


def knowledge(records: Records) -> pd.DataFrame:
    """How much the held-out beliefs know, a row a step that was read or evaluated: r, r_within, entropy (nats).

    The truth of a step is the newest evaluation by then. Of many steps only POINTS, evenly spread.
    """
    found = {int(row["step"]): row for row in records.readings}
    rows = []
    steps = sorted({*found, *(step for step, table in records.tables.items() if "belief" in table)})
    for step in np.asarray(steps, dtype=int)[thinned(len(steps), POINTS)].tolist() if steps else ():
        truth = records.tables[max(at for at in records.tables if at <= step)]
        said = _reading(found[step]) if step in found else believed(step, truth["problem_id"], truth["belief"])
        both = said.merge(truth.assign(actual=truth["c"] / truth["n"])[["problem_id", "level", "actual"]],
                          on="problem_id")
        shares = np.stack([*both["belief"]])
        rows.append({"step": step, "r": correlation(both["predicted"], both["actual"]),
                     "r_within": within_level_correlation(both["predicted"], both["actual"], both["level"]),
                     "entropy": float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1).mean())})
    return pd.DataFrame(rows, columns=["step", "r", "r_within", "entropy"]).set_index("step")
