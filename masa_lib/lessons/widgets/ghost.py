"""The ghost of a training: recorded runs to race against, on the same held-out problems, and a meter of what both cost.

A ghost is read from records and never moves. Its accuracy is taken on the held-out problems of the run beside it, so
that problems cannot be the difference; which settings are is said. No cost is the cost: the meter shows four.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib.analysis.costs import COSTS, time_to_target, totals
from masa_lib.config import Config
from masa_lib.lessons.widgets.knobs import acts
from masa_lib.runs.folder import Run

#: the four costs, and what the meter calls them
SHOWN = {key: COSTS[key] for key in ("tokens", "read", "tokens_update", "seconds")}
#: settings that say how a run is watched, not what it learns
_WATCHING = ("record.", "evaluation.", "seed", "model.threads", "steps")


@dataclass(frozen=True)
class Ghost:
    """Recorded runs of one arm: `curve` is the mean over seeds, `seeds` has a row a seed and evaluated step.

    Both have the columns step, accuracy and those of SHOWN. `same`: whether all were measured on the problems asked
    for; if not, the accuracy is on the runs' own.
    """

    name: str
    config: Config
    seeds: pd.DataFrame
    same: bool

    @property
    def curve(self) -> pd.DataFrame:
        """Mean over the seeds, a row an evaluated step."""
        return self.seeds.groupby("step", as_index=False)[["accuracy", *SHOWN]].mean()


def read(paths: Sequence[str | Path], problems: Collection[str] = ()) -> Ghost:
    """The ghost of recorded runs, one a seed, with their accuracy on these held-out problems (ids; none: their own).

    Raises:
        RunError: one of them cannot be read.
    """
    runs = [Run.open(path) for path in paths]
    tables = [_curve(run, problems) for run in runs]
    seeds = pd.concat([table.assign(seed=run.config.seed) for run, (table, _) in zip(runs, tables, strict=True)])
    return Ghost(f"recorded {runs[0].config.method}", runs[0].config, seeds,
                 all(same for _, same in tables))


def curve(metrics: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """Held-out accuracy and costs so far: columns step, accuracy and those of SHOWN, a row an evaluation."""
    accuracy = evaluations.reindex(columns=["step", "accuracy"]).reset_index(drop=True)
    if metrics.empty:
        return accuracy.assign(**dict.fromkeys(SHOWN, 0.0))
    spent = totals(metrics)[list(SHOWN)]
    start = pd.DataFrame(0.0, index=[0], columns=list(SHOWN))
    return accuracy.join(pd.concat([start, spent]).reindex(accuracy["step"], method="ffill").reset_index(drop=True))


def _curve(run: Run, problems: Collection[str]) -> tuple[pd.DataFrame, bool]:
    found, wanted, same = curve(run.metrics(), run.evaluations()), set(problems), len(problems) > 0
    accuracy = []
    for step in found["step"] if wanted else ():
        table = run.evaluation_table(int(step))
        part = table[table["problem_id"].isin(wanted)]
        same = same and len(part) == len(wanted)
        accuracy.append((part["c"] / part["n"]).mean())
    return (found.assign(accuracy=accuracy) if same else found), same


def differences(config: Config, other: Config) -> dict[str, tuple[object, object]]:
    """The settings that act in one of two runs and differ: by key, the value here and there."""
    return {key: (configs.get(config, key), configs.get(other, key)) for key in configs.settings()
            if not key.startswith(_WATCHING) and configs.get(config, key) != configs.get(other, key)
            and (acts(config, key) or acts(other, key))}


def at_equal_accuracy(mine: pd.DataFrame, ghost: Ghost) -> pd.DataFrame | None:
    """What this run and its ghost had spent when each first was as accurate as this run is by now.

    The accuracy is the end of a rising (isotonic) fit, so that one lucky evaluation counts for little.

    Args:
        mine: of `curve`.
        ghost: to compare with.

    Returns:
        The rows `here` and `ghost`, columns those of SHOWN (infinite: never in the record) and accuracy; None while
        this run is no better than at its beginning, or than the ghost at its own.
    """
    from scipy import optimize

    if len(mine) < 2:
        return None
    reached = float(optimize.isotonic_regression(mine["accuracy"].to_numpy(dtype=float)).x[-1])
    theirs = ghost.curve
    if not reached > max(mine["accuracy"].iloc[0], theirs["accuracy"].iloc[0]):
        return None
    rows = {name: {cost: time_to_target(one["step"], one["accuracy"], one[cost], reached) for cost in SHOWN}
            for name, one in (("here", mine), ("ghost", theirs))}
    return pd.DataFrame(rows).T.assign(accuracy=reached)


def meter_html(mine: pd.DataFrame, spent: pd.Series, ghost: Ghost | None) -> str:
    """The meter: what this run has cost by now, in four costs, and what the ghost had paid for as much accuracy.

    Args:
        mine: of `curve`.
        spent: the costs by now, by the keys of SHOWN.
        ghost: to compare with, if any.
    """
    found = at_equal_accuracy(mine, ghost) if ghost is not None and len(mine) else None
    rows = [("this run, so far", spent)]
    said = "No step is finished yet." if not spent.any() else ""
    if ghost is not None and found is None and not said:
        said = "Not yet more accurate than at the beginning."
    if found is not None:
        rows = [(f"this run, up to {found['accuracy'].iloc[0]:.2f}", found.loc["here"]),
                (f"{ghost.name} ({_seeds(ghost)}), as accurate", found.loc["ghost"]),
                *(rows if spent["tokens"] > found.loc["here", "tokens"] else [])]
        said = "Held-out accuracy by a rising fit. Seconds are those of the machine that each was on."
    most = max([float(row["tokens"]) for _, row in rows if math.isfinite(row["tokens"])] + [1.0])
    head = "".join(f"<th style='text-align:right;padding:0 8px'>{name}</th>" for name in SHOWN.values())
    body = "".join(_row(name, row, most) for name, row in rows)
    return ("<table style='font-size:12px;line-height:1.4;border-spacing:0'><tr><th></th><th></th>"
            f"{head}</tr>{body}</table><span style='font-size:12px'>{said}</span>")


def _row(name: str, row: pd.Series, most: float) -> str:
    tokens = float(row["tokens"])
    width = round(150 * min(tokens, most) / most) if math.isfinite(tokens) else 150
    bar = f"<div style='height:11px;width:{width}px;background:{'#E69F00' if 'this' in name else '#7a7a7a'}'></div>"
    cells = "".join(f"<td style='text-align:right;padding:0 8px;white-space:nowrap'>{_number(row[cost])}</td>"
                    for cost in SHOWN)
    return (f"<tr><td style='white-space:nowrap;padding-right:8px'>{html.escape(name)}</td>"
            f"<td style='width:156px'>{bar}</td>{cells}</tr>")


def _seeds(ghost: Ghost) -> str:
    number = ghost.seeds["seed"].nunique()
    return "one seed" if number == 1 else f"mean of {number} seeds"


def _number(value: float) -> str:
    return "not in its record" if np.isinf(value) else "-" if math.isnan(value) else f"{value:,.0f}"
