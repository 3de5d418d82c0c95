"""What the training panel shows of a run: six live curves in one figure, one sampled problem, the changed settings.

Pure functions from data frames to a figure and to HTML, so that they can be tested and used without widgets. Texts that
a model wrote are escaped. The figure keeps its traces in one order, so that a panel can renew the numbers in place.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from masa_lib.analysis import figures
from masa_lib.analysis.awareness import correlation
from masa_lib.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from masa_lib.config import Config
from masa_lib.crash_safe_files import Lines, RunError
from masa_lib.errors import brief
from masa_lib.runs import parquet
from masa_lib.runs.folder import BELIEFS, EVALUATIONS, METRICS, Run, checked_rows, frame
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: recorded steps whose problems are dots of the scatter, and at most how many solutions of a problem are shown
RECENT, SHOWN = 5, 4
#: changes of settings that are marked, and characters of a text that are shown, at most
MARKS, LONGEST = 50, 20_000
#: pixels; a live figure does not find out how wide the page is, and in a narrower one the legends run into each other
HEIGHT, WIDTH = 900, 860
#: the panels over steps: title, unit of y, and its lines as (name, column of the metrics, colour)
CURVES = (
    ("Accuracy", "accuracy", (("training batch", "accuracy", GREEN),)),
    ("Rewards by part", "reward", (("solution", "reward_solution", GREEN), ("difficulty", "reward_difficulty", ORANGE),
                                   ("length", "reward_length", SKY), ("notion", "reward_notion", PURPLE))),
    ("Groups without signal, gated problems", "share", (
        ("solutions", "zero_variance_solution", GREEN), ("predictions", "zero_variance_meta", ORANGE),
        ("gated", "dropped", BLUE), ("cut", "stopped", VERMILLION))),
    ("Tokens of a step", "tokens", (("to solve", "tokens_solution", GREEN), ("to predict", "tokens_meta", ORANGE),
                                    ("to read", "tokens_read", PURPLE), ("re-checks", "tokens_recheck", SKY))),
    ("Seconds of a step", "seconds", (("generate", "seconds_generate", GREEN), ("grade", "seconds_grade", ORANGE),
                                      ("update", "seconds_update", PURPLE))))
SHARES = ("accuracy", "reward", "share")
#: the scatter's place among the panels, and the panels side by side
SCATTER, COLUMNS = 2, 2
#: bottom and top of the three rows of panels, shares of the height
ROWS = ((0.76, 1.0), (0.38, 0.62), (0.0, 0.24))
PRE = "white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 8px 0;font-size:12px;line-height:1.35"


@dataclass(frozen=True)
class Records:
    """What a run has recorded so far; `rollouts` are those of its last RECENT recorded steps.

    `beliefs`: the rows of its last RECENT steps' beliefs, see `gather.belief_record`; none where nothing is read.
    """

    config: Config
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    rollouts: pd.DataFrame
    changes: Sequence[Mapping[str, Any]]
    beliefs: Sequence[Mapping[str, Any]] = ()


def read(folder: str | Path) -> Records:
    """The records of the run in a folder; see `Reader`."""
    return Reader(folder).read()


class Reader:
    """Reads a run again and again while it grows: of the metrics only what is new, of the rollouts only new steps.

    Attributes:
        lines: the metrics' file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.lines = Path(folder), Lines(Path(folder) / METRICS)
        self._metrics, self._steps, self._rollouts = nothing_measured(), None, pd.DataFrame()
        self._belief_lines, self._beliefs = Lines(self.folder / BELIEFS), []

    def read(self) -> Records:
        """What the run has recorded by now.

        Raises:
            RunError: there is no run, it is being written anew just now, or its records are not those of a training.
        """
        run = Run.open(self.folder)
        anew = self._read_metrics(run)
        before = self._metrics
        drawn = {name for _, _, curves in CURVES for _, name, _ in curves}
        drawn |= {"seconds_total", "loss", "entropy", "logp_gap", "updates"}
        parquet.check_columns(before, f"{run.path / METRICS}", numbers=sorted(drawn & set(before)))
        evaluations = run.evaluations()
        parquet.check_columns(evaluations, f"{run.path / EVALUATIONS}", numbers=sorted({"accuracy"} & set(evaluations)))
        self._read_rollouts(run, anew)
        self._read_beliefs(run)
        return Records(run.config, before, evaluations, self._rollouts, run.changes(), self._beliefs)

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

    def _read_beliefs(self, run: Run) -> None:
        if run.is_packed or self._belief_lines.path.with_suffix(".parquet").exists():  # recorded: it does not grow
            table = run.beliefs() if len(run.beliefs()) else pd.DataFrame(columns=["step"])
            last = table[table["step"].isin(sorted(table["step"].unique())[-RECENT:])]
            self._beliefs = [{"step": int(step), **part.drop(columns="step").to_dict("list")}
                             for step, part in last.groupby("step")]
            return
        anew, rows = self._belief_lines.look()
        rows = checked_rows(self._belief_lines.path, rows[-RECENT:])
        self._beliefs = [*([] if anew else self._beliefs), *rows][-RECENT:]

    def _read_rollouts(self, run: Run, anew: bool) -> None:
        steps = run.rollout_steps()[-RECENT:]
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


def belief_points(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The same of beliefs that were read, for the problems that were rolled out, with each one's nine probabilities.

    Raises:
        RunError: a row is not one of beliefs.
    """
    points = []
    for row in rows:
        try:
            for problem, belief, right, solutions in zip(row["problems"], row["beliefs"], row["right"],
                                                         row["solutions"], strict=True):
                if solutions:
                    shares = np.asarray(belief, dtype=float).reshape(PASS_RATE_STEPS + 1)
                    shares = shares / shares.sum()
                    points.append({"step": row["step"], "problem": str(problem), "belief": shares,
                                   "predicted": float(shares @ np.arange(PASS_RATE_STEPS + 1)) / PASS_RATE_STEPS,
                                   "actual": float(right) / float(solutions)})
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{BELIEFS} has a row at step {row['step']} that is not one of beliefs ({brief(error)}). "
                           "Repair or remove that line; nothing was changed.") from error
    return pd.DataFrame(points, columns=["step", "problem", "belief", "predicted", "actual"])


def figure(records: Records) -> go.Figure:
    """Six panels: accuracy, rewards, predicted against true, groups without signal, tokens, seconds.

    Dotted vertical lines mark the steps from which changed settings hold; the marks at the top name them.
    """
    points = belief_points(records.beliefs) if records.beliefs else problem_points(records.rollouts)
    r = correlation(points["predicted"], points["actual"])
    titles = [title for title, _, _ in CURVES]
    titles.insert(SCATTER, "Predicted and true pass rate: " + ("r undefined" if math.isnan(r) else f"r = {r:z.2f}"))
    drawn = figures.grid(titles, title="", x="training step", y="", columns=COLUMNS, height=HEIGHT)
    steps = records.metrics.set_index("step") if len(records.metrics) else pd.DataFrame()
    places = [place for place in range(len(titles)) if place != SCATTER]
    for place, (_, unit, lines) in zip(places, CURVES, strict=True):
        where = {"row": place // COLUMNS + 1, "col": place % COLUMNS + 1}
        for name, column, color in lines:
            figures.trend(drawn, steps.get(column), name, color, where)
        drawn.update_xaxes(range=[0, max(records.config.steps, 2) + 0.5], title_text="training step", **where)
        drawn.update_yaxes(title_text=unit, **where, **({"range": [-0.03, 1.03]} if unit in SHARES else
                                                        {"rangemode": "tozero"}))
    _held_out(drawn, records.evaluations)
    _scatter(drawn, points)
    _marks(drawn, records.changes)
    return _arrange(drawn)


def _held_out(drawn: go.Figure, evaluations: pd.DataFrame) -> None:
    shown = evaluations.reindex(columns=["step", "accuracy"]).iloc[figures.thinned(len(evaluations))]
    drawn.add_scatter(x=shown["step"], y=shown["accuracy"], mode="lines+markers", name="held out", row=1, col=1,
                      line={"color": BLUE, "width": 2.5}, marker={"size": 8, "symbol": "square"},
                      hovertemplate="held out, step %{x}: %{y:.3f}<extra></extra>")


def _scatter(drawn: go.Figure, points: pd.DataFrame) -> None:
    """The dots of the last recorded steps, the newest step's on top, over the diagonal.

    Under them, where beliefs are read, each problem's nine probabilities, as large as they are likely: before a
    training they stand in a column, and it opens to the diagonal.
    """
    where = {"row": SCATTER // COLUMNS + 1, "col": SCATTER % COLUMNS + 1}
    drawn.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot", "width": 1},
                      hoverinfo="skip", showlegend=False, name="diagonal", **where)
    whole = points if "belief" in points else points.iloc[:0].assign(belief=[])
    shares = np.concatenate([*whole["belief"], np.empty(0)])
    answers = np.tile(np.arange(PASS_RATE_STEPS + 1) / PASS_RATE_STEPS, len(whole))
    drawn.add_scatter(x=answers, y=whole["actual"].repeat(PASS_RATE_STEPS + 1), mode="markers", name="belief",
                      marker={"color": PURPLE, "size": 26 * np.sqrt(shares), "opacity": 0.15, "line": {"width": 0}},
                      text=[f"{share:.0%}" for share in shares], showlegend=len(whole) > 0, **where,
                      hovertemplate="belief %{text} in %{x:.3f}, true %{y:.2f}<extra></extra>")
    newest = points["step"] == points["step"].max()
    for name, part, color, size, symbol in (("steps before", points[~newest], GREY, 6, "circle-open"),
                                            ("newest step", points[newest], ORANGE, 9, "diamond")):
        drawn.add_scatter(x=part["predicted"], y=part["actual"], mode="markers", name=name,
                          marker={"color": color, "size": size, "symbol": symbol, "opacity": 0.8}, **where,
                          text=[f"step {step}: {html.escape(text[:60])}"
                                for step, text in zip(part["step"], part["problem"], strict=True)],
                          hovertemplate="%{text}<br>predicted %{x:.2f}, true %{y:.2f}<extra></extra>")
    drawn.update_xaxes(range=[-0.05, 1.05], title_text="predicted pass rate", **where)
    drawn.update_yaxes(range=[-0.05, 1.05], title_text="true pass rate", **where)


def _marks(drawn: go.Figure, changes: Iterable[Mapping[str, Any]]) -> None:
    """A dotted line before the first step of each change, and a mark that names it when hovered."""
    held = [change for change in changes if change["changes"]]
    held = [held[place] for place in figures.thinned(len(held), MARKS)]
    steps = [change["step"] - 0.5 for change in held]
    drawn.add_scatter(x=steps, y=[1.0] * len(steps), mode="markers", name="setting changed", row=1, col=1,
                      marker={"symbol": "triangle-down", "size": 11, "color": VERMILLION}, showlegend=bool(held),
                      text=[html.escape(change_text(change)) for change in held],
                      hovertemplate="%{text}<extra></extra>")
    for axis in drawn.select_xaxes():
        if axis.title.text == "training step":
            number = axis.plotly_name.removeprefix("xaxis")
            for step in steps:
                drawn.add_shape(type="line", x0=step, x1=step, y0=0, y1=1, xref=f"x{number}", yref=f"y{number} domain",
                                line={"dash": "dot", "width": 1.5, "color": VERMILLION})


def _arrange(drawn: go.Figure) -> go.Figure:
    """A legend of its own for each panel, between its title and the panel."""
    for trace in drawn.data:
        trace.legend = "legend" + trace.xaxis.removeprefix("x")
    for place, (axis, title) in enumerate(zip(drawn.select_xaxes(), drawn.layout.annotations, strict=True)):
        number, low, high = axis.plotly_name.removeprefix("xaxis"), *ROWS[place // COLUMNS]
        drawn.layout[f"yaxis{number}"].domain, title.y = (low, high), high
        drawn.layout[f"legend{number}"] = {"x": axis.domain[0], "y": high, "yref": "paper", "xanchor": "left",
                                           "yanchor": "bottom", "orientation": "h", "font": {"size": 11},
                                           "itemwidth": 30, "bgcolor": figures.CLEAR}
    drawn.update_annotations(yshift=24).update_xaxes(title_font_size=12).update_yaxes(title_font_size=12)
    return drawn.update_layout(margin={"l": 56, "r": 16, "t": 56, "b": 48}, width=WIDTH, title_text=None,
                               uirevision="live")


def change_text(change: Mapping[str, Any]) -> str:
    """A row of the run's changes in words."""
    if "refused" in change:
        return f"refused: {change['refused'][:LONGEST]}"
    return f"from step {change['step']}: " + ", ".join(
        f"{key} = {value if isinstance(value, int | float | str) else brief(value)}"
        for key, value in change["changes"].items())[:LONGEST]


def changes_html(changes: Iterable[Mapping[str, Any]]) -> str:
    """The changed settings as a list."""
    rows = "".join(f"<li>{html.escape(change_text(change))}</li>" for change in changes)
    return f"<ul style='margin:0'>{rows}</ul>" if rows else "No setting was changed during this run."


def sample_html(rollouts: pd.DataFrame, number: int = 0) -> str:
    """One problem of the newest recorded step: the question, a prediction of it, and some of its solutions.

    Args:
        rollouts: of a run.
        number: which of the step's problems; counted round.
    """
    if rollouts.empty:
        return "No rollouts are recorded yet."
    step = rollouts["step"].max()
    newest = rollouts[rollouts["step"] == step]
    groups = sorted(newest["group"].unique())
    group = newest[newest["group"] == groups[number % len(groups)]]
    solved, said = (group[group["stream"] == stream] for stream in ("solution", "meta"))
    head = f"Step {step}, problem {number % len(groups) + 1} of {len(groups)}: {group['problem'].iloc[0]}"
    parts = [_block(f"{head} (answer: {group['answer'].iloc[0]})", "")]
    for row in said.head(1).itertuples():
        parts.append(_block(f"One of {len(said)} predictions, reward {row.reward:.2f}", row.text))
    right = int(solved["correct"].fillna(False).sum())
    title = f"Solutions: {right} of {len(solved)} right" if len(solved) else "Gated: it was not solved in this step."
    parts.append(_block(title, "\n".join(f"{'right' if row.correct else 'wrong'}, {row.length} tokens: {row.text}"
                                         for row in solved.head(SHOWN).itertuples())))
    return "".join(parts)


def _block(title: str, text: str) -> str:
    title, text = html.escape(title[:LONGEST]), html.escape(text[:LONGEST])
    return f"<b>{title}</b>" + (f"<pre style='{PRE}'>{text}</pre>" if text else "<br>")
