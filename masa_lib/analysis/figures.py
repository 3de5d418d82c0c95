"""Plotly figures from data frames: one template, one colour an arm, the same words as the tables.

The colours are Okabe and Ito's and six that stay as far apart for colour-blind readers; backgrounds are transparent
and text and lines a middle grey, so that a figure reads on a light and on a dark page. Deliberately no files, and no
statistics of its own beyond means over seeds and moving averages: frames come from `compare.compare_runs` or from a
run's tables. Figures of gates and of what steers them are in `gate_figures`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from masa_lib.analysis.awareness import correlation
from masa_lib.analysis.compare import arm_rank, pass_at_k_interval
from masa_lib.analysis.costs import COST
from masa_lib.analysis.records import ENDS
from masa_lib.config import METHODS
from masa_lib.tasks.predictions import PASS_RATE_STEPS

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
PALETTE = (BLUE, VERMILLION, GREEN, "#5A87FF", ORANGE, SKY, "#695A5A", "#1E3CFF", PURPLE, "#3CF0C3",
           "#C3000F", "#A5B487")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "circle-open",
           "square-open", "diamond-open", "cross-open")
GREY, FAINT, CLEAR = "#7a7a7a", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)"
DASHES = {"before": "dash", "after": "solid"}
COSTS = {"step": ("training step", "training step"), "tokens": ("tokens", "tokens, all streams"),
         "seconds": ("time", "seconds of training")}
REWARDS = {"reward_solution": "solution", "reward_difficulty": "difficulty", "reward_length": "length",
           "reward_notion": "notion"}
ALIGNMENT = {"pass_rate_r": "r of the pass rate", "length_r": "r of the length",
             "pass_rate_mae": "mean error of the pass rate", "length_mae": "mean error of the length, tokens"}
STREAMS = dict(zip(COST, (("solutions", GREEN), ("re-checks", SKY), ("predictions", ORANGE),
                          ("the base model's solutions", "#695A5A")), strict=True))
SMOOTHING = 9
#: points of a curve that are drawn, at most: a page is no wider
POINTS = 1000
_AXIS = {"gridcolor": FAINT, "linecolor": GREY, "zeroline": False, "ticks": "outside", "tickcolor": FAINT,
         "title": {"standoff": 8}, "automargin": True}
TEMPLATE = go.layout.Template(layout={
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": GREY},
    "colorway": PALETTE, "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "xaxis": _AXIS, "yaxis": _AXIS,
    "modebar": {"bgcolor": CLEAR, "color": FAINT, "activecolor": GREY},
    "title": {"x": 0.01, "xanchor": "left", "font": {"size": 16}},
    "legend": {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    "margin": {"l": 60, "r": 24, "t": 72, "b": 96}, "hoverlabel": {"align": "left"}})


def arm_places(arms: Iterable[str]) -> dict[str, int]:
    """A place in PALETTE and SYMBOLS an arm, in drawing order: a method has its own, others take those left over."""
    ordered = sorted(set(arms), key=arm_rank)
    own = {method: place for place, method in enumerate([*METHODS][:len(PALETTE)])
           if method in {*ordered, "grpo", "masa", "masa-read"}}
    free = [place for place in range(len(PALETTE)) if place not in own.values()] or list(range(len(PALETTE)))
    others = [arm for arm in ordered if arm not in own]
    own |= {arm: free[number % len(free)] for number, arm in enumerate(others)}
    return {arm: own[arm] for arm in ordered}


def arm_colors(arms: Iterable[str]) -> dict[str, str]:
    """A colour an arm, in drawing order; up to twelve are told apart by colour-blind readers, too."""
    return {arm: PALETTE[place] for arm, place in arm_places(arms).items()}


def accuracy_curve(curves: pd.DataFrame, against: str = "step", target: float | None = None) -> go.Figure:
    """Held-out accuracy: a thin line a seed, a thick one for the mean over seeds.

    Args:
        curves: columns arm, seed, step, accuracy and `against`.
        against: step, tokens or seconds.
        target: the accuracy at which grpo's cost is read, to mark.
    """
    mark = "" if target is None else f" (dotted: grpo's target {target:.3f})"  # beside the line it would meet the dots
    figure = grid([""], title=f"Held-out accuracy by {COSTS[against][0]}{mark}", x=COSTS[against][1], y="accuracy")
    for arm, place in arm_places(curves["arm"]).items():
        rows, color = curves[curves["arm"] == arm], PALETTE[place]
        for seed, line in rows.groupby("seed"):
            line = line.iloc[thinned(len(line))]
            figure.add_scatter(x=line[against], y=line["accuracy"], mode="lines", opacity=0.35, legendgroup=arm,
                               line={"color": color, "width": 1}, showlegend=False,
                               hovertemplate=f"{arm}, seed {seed}: %{{y:.3f}} at %{{x:,.0f}}<extra></extra>")
        mean = rows[list({"step", "accuracy", against})].groupby("step").mean().reset_index()
        mean = mean.iloc[thinned(len(mean))]
        figure.add_scatter(x=mean[against], y=mean["accuracy"], mode="lines+markers", name=arm, legendgroup=arm,
                           line={"color": color, "width": 3}, marker={"size": 7, "symbol": SYMBOLS[place]},
                           hovertemplate=f"{arm}, mean: %{{y:.3f}} at %{{x:,.0f}}<extra></extra>")
    if target is not None:
        figure.add_hline(target, line={"dash": "dot", "color": GREY, "width": 1})
    return figure


def accuracy_by_level(problems: pd.DataFrame) -> go.Figure:
    """Mean pass rate of each level's held-out problems, before (dashed) and after training.

    Args:
        problems: columns arm, when (before, after), level, pass_rate.
    """
    figure = grid([""], title="Accuracy by level, before and after training", x="level", y="accuracy")
    for arm, color in arm_colors(problems["arm"]).items():
        for when in ENDS:
            rates = problems[(problems["arm"] == arm) & (problems["when"] == when)].groupby("level")["pass_rate"].mean()
            figure.add_scatter(x=rates.index, y=rates, name=f"{arm}, {when}", mode="lines+markers",
                               line={"color": color, "dash": DASHES[when], "width": 2.5 if when == "after" else 1.5},
                               hovertemplate=f"{arm}, {when}, level %{{x}}: %{{y:.3f}}<extra></extra>")
    return figure.update_xaxes(dtick=1).update_yaxes(range=[-0.02, 1.02])


def pass_at_k_curve(problems: pd.DataFrame) -> go.Figure:
    """Pass@k over the held-out problems before (dashed) and after training, with intervals over problems.

    Args:
        problems: columns arm, when, problem_id, n, c.
    """
    figure = grid([""], title="Pass@k, before and after training", x="k, samples a problem", y="pass@k")
    for arm, color in arm_colors(problems["arm"]).items():
        for when in ENDS:
            table = problems[(problems["arm"] == arm) & (problems["when"] == when)]
            ks = [2**power for power in range(12) if len(table) and 2**power <= table["n"].min()]
            mean, low, high = np.array([pass_at_k_interval(table, k) for k in ks]).reshape(-1, 3).T
            figure.add_scatter(x=ks, y=mean, name=f"{arm}, {when}", mode="lines+markers",
                               line={"color": color, "dash": DASHES[when]}, customdata=np.stack([low, high], axis=-1),
                               error_y={"array": high - mean, "arrayminus": mean - low, "thickness": 1, "width": 3},
                               hovertemplate=f"{arm}, {when}, pass@%{{x}}: %{{y:.3f}} "
                                             "(%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>")
    return figure.update_xaxes(type="log", tickvals=[2**power for power in range(12)])


def tokens_by_stream(steps: pd.DataFrame) -> go.Figure:
    """Tokens so far, mean over seeds: the streams that are cost stacked, prefill and update as lines.

    Args:
        steps: columns arm, step and those of COST, tokens_prefill, tokens_update of each step.
    """
    colors = arm_colors(steps["arm"])
    figure = grid(list(colors), title="Tokens by stream, cumulative", x="training step", y="tokens", columns=3,
                  shared=True)
    for number, arm in enumerate(colors):
        tokens = steps[steps["arm"] == arm].groupby("step").mean(numeric_only=True)
        for name, (stream, color) in (STREAMS | {"tokens_update": ("update", PURPLE),
                                                 "tokens_prefill": ("prefill", GREY)}).items():
            if not steps[name].any():
                continue
            total, fill = tokens[name].fillna(0).cumsum(), "one" if name in STREAMS else None
            total = total.iloc[thinned(len(total))]
            figure.add_scatter(x=total.index, y=total, stackgroup=fill, name=stream, legendgroup=stream, mode="lines",
                               line={"color": color, "width": 1 if fill else 2, "dash": None if fill else "dot"},
                               showlegend=number == 0, row=number // 3 + 1, col=number % 3 + 1,
                               hovertemplate=f"{arm}, {stream}: %{{y:.4s}} until step %{{x}}<extra></extra>")
    return figure


def seconds_by_phase(steps: pd.DataFrame) -> go.Figure:
    """Seconds of a whole run by phase, mean over seeds, a bar an arm.

    Args:
        steps: columns arm, seed and seconds_generate, seconds_grade, seconds_update, seconds_total of each step.
    """
    names = ["seconds_generate", "seconds_grade", "seconds_update", "seconds_total"]
    totals = steps.groupby(["arm", "seed"])[names].sum().groupby("arm").mean()
    totals = totals.loc[list(arm_colors(steps["arm"]))]
    totals["seconds_other"] = (totals.pop("seconds_total") - totals.sum(axis=1)).clip(lower=0)
    figure = grid([""], title="Seconds by phase", x="seconds of a run", y="", height=220 + 50 * len(totals))
    for name, color in zip(totals, (GREEN, ORANGE, PURPLE, GREY), strict=True):
        phase = name.removeprefix("seconds_")
        figure.add_bar(y=totals.index, x=totals[name], orientation="h", name=phase, marker_color=color,
                       hovertemplate=f"%{{y}}, {phase}: %{{x:.1f}} s<extra></extra>")
    return figure.update_layout(barmode="stack", legend_traceorder="normal").update_yaxes(autorange="reversed")


def predictions(problems: pd.DataFrame, measure: str = "pass_rate") -> go.Figure:
    """Mean prediction of each held-out problem against what came true: a row an arm, before and after training.

    Args:
        problems: `Comparison.problems`.
        measure: pass_rate, or length (actual: the mean over correct solutions).
    """
    actual = {"pass_rate": "pass_rate", "length": "correct_length"}[measure]
    labels = [html.escape(f"level {level}: {text[:60]}") for level, text in
              zip(problems["level"], problems["problem"].astype(str), strict=True)]
    points = pd.DataFrame({"arm": problems["arm"], "row": problems["arm"], "column": problems["when"], "label": labels,
                           "predicted": problems[f"predicted_{measure}"], "actual": problems[actual]})
    return prediction_panels(points, measure)


def beside_paper(paper: pd.DataFrame, problems: pd.DataFrame, measure: str = "pass_rate") -> go.Figure:
    """The points of the paper's Fig. 1a and 1b above those of our grpo and masa runs after training.

    Args:
        paper: columns arm, predicted, actual (`compare.paper_points`).
        problems: `Comparison.problems`.
        measure: pass_rate or length.
    """
    ours = problems[(problems["when"] == "after") & problems["arm"].isin(["grpo", "masa"])]
    actual = {"pass_rate": "pass_rate", "length": "correct_length"}[measure]
    ours = ours[["arm", f"predicted_{measure}", actual]].set_axis(["arm", "predicted", "actual"], axis=1)
    points = pd.concat([paper[["arm", "predicted", "actual"]].assign(row="paper"), ours.assign(row="ours")])
    return prediction_panels(points.assign(column=points["arm"], label=points["row"]), measure)


def prediction_panels(points: pd.DataFrame, measure: str, limit: int = 600) -> go.Figure:
    """Panels of predicted (x) against actual (y) with the diagonal (dotted), the regression line and r of all points.

    Args:
        points: columns arm (a panel's colour), row, column (its place), predicted, actual and label (hover text).
        measure: pass_rate or length.
        limit: points drawn, at most (a random sample of each panel; line and r are those of all).
    """
    colors = arm_colors(points["arm"])
    rows, columns = list(dict.fromkeys(points["row"])), list(dict.fromkeys(points["column"]))
    points = points.dropna(subset=["predicted", "actual"])
    panels = {(row, column): points[(points["row"] == row) & (points["column"] == column)]
              for row in rows for column in columns}
    r = {place: correlation(part["predicted"], part["actual"]) for place, part in panels.items()}
    heads = {place: ", ".join(place if len(rows) > 1 else place[1:]) for place in panels}
    titles = [f"{heads[place]}: " + ("r undefined" if math.isnan(r[place]) else f"r = {r[place]:z.2f}")
              for place in panels]
    kind = measure.replace("_", " ")
    unit = ", tokens" if measure == "length" else ""
    figure = grid(titles, columns=len(columns), title=f"Predicted against actual {kind}"
                  + ("" if len(rows) > 1 else f", {rows[0]}") + " (r of all points of a panel)",
                  x="predicted" if len(columns) > 3 else f"predicted {kind}{unit}", y=f"actual {kind}{unit}")
    for (row, column), part in panels.items():
        beside = pd.concat([panels[row, other] for other in columns])[["predicted", "actual"]]
        most = 1.0 if measure == "pass_rate" else float(beside.to_numpy().max(initial=1.0))
        place = {"row": rows.index(row) + 1, "col": columns.index(column) + 1}
        for axes in (figure.update_xaxes, figure.update_yaxes):
            axes(range=[-0.04 * most, 1.04 * most], **place)
        if len(part):
            drawn = part.sample(min(limit // len(panels), len(part)), random_state=0)
            _dots(figure, drawn, colors[drawn["arm"].iloc[0]], 0.006 * most, place)
            _lines(figure, part, most, place)
    figure.update_annotations(font_size=10 if len(columns) > 3 else 13)  # four panels leave little room
    return figure.update_layout(showlegend=False, margin={"b": 64})


def rewards_by_part(steps: pd.DataFrame) -> go.Figure:
    """Rewards of the training batches by part, mean over seeds, with a moving average; a panel an arm.

    Args:
        steps: columns arm, step, reward_solution, reward_difficulty, reward_length, reward_notion.
    """
    colors = arm_colors(steps["arm"])
    figure = grid(list(colors), title="Rewards by part", x="training step", y="reward", columns=3, shared=True)
    for number, arm in enumerate(colors):
        means = steps[steps["arm"] == arm].groupby("step").mean(numeric_only=True)
        for (name, part), color in zip(REWARDS.items(), (GREEN, ORANGE, SKY, PURPLE), strict=True):
            trend(figure, means.get(name), part, color, {"row": number // 3 + 1, "col": number % 3 + 1})
    return figure.update_yaxes(range=[-0.02, 1.02])


def alignment(steps: pd.DataFrame) -> go.Figure:
    """How far predictions and solutions of the training batches agree: r and mean absolute error, step by step.

    Args:
        steps: columns arm, step, pass_rate_r, length_r, pass_rate_mae, length_mae; mean over seeds.
    """
    figure = grid(list(ALIGNMENT.values()), columns=2, title="Alignment of the predictions during training",
                  x="training step", y="")
    for arm, color in arm_colors(steps["arm"]).items():
        means = steps[steps["arm"] == arm].groupby("step").mean(numeric_only=True)
        for place, name in enumerate(ALIGNMENT):
            trend(figure, means.get(name), arm, color, {"row": place // 2 + 1, "col": place % 2 + 1})
    return figure.update_yaxes(rangemode="tozero", row=2)


def probe(problems: pd.DataFrame, calibration: dict[str, Any]) -> go.Figure:
    """What an untrained model believes against what comes true: pass rate, length, and how often each pass rate.

    Args:
        problems: `awareness.problem_measures` of a probe's table.
        calibration: `awareness.calibration` of the pass rate, drawn as a line over the points.
    """
    believed = np.stack(problems["pass_rate_probabilities"]).mean(axis=0)
    true = np.bincount((problems["pass_rate"] * PASS_RATE_STEPS).round().astype(int),
                       minlength=PASS_RATE_STEPS + 1) / len(problems)
    measures = {"pass_rate": "pass_rate", "length": "mean_length"}
    r = [correlation(problems[f"predicted_{name}"], problems[actual]) for name, actual in measures.items()]
    figure = grid([*(f"{name.replace('_', ' ')}: " + ("r undefined" if math.isnan(value) else f"r = {value:z.2f}")
                      for name, value in zip(measures, r, strict=True)), "how often each pass rate"], columns=3,
                  title="What the model believes of its solutions, and what comes true", x="believed", y="true")
    labels = [html.escape(text[:60]) for text in problems["problem"]]
    for column, (name, actual) in enumerate(measures.items(), 1):
        part = pd.DataFrame({"predicted": problems[f"predicted_{name}"], "actual": problems[actual], "label": labels})
        most = 1.0 if name == "pass_rate" else float(part[["predicted", "actual"]].max().max())
        _dots(figure, part, SKY, 0.006 * most, {"row": 1, "col": column})
        _lines(figure, part, most, {"row": 1, "col": column})
    bins = pd.DataFrame(calibration["bins"])
    figure.add_scatter(x=bins["predicted"], y=bins["true"], mode="lines+markers", line={"color": VERMILLION}, row=1,
                       col=1, hovertemplate="bin: believed %{x:.3f}, true %{y:.3f}<extra></extra>")
    for shares, name, color in ((believed, "believed", SKY), (true, "true", GREEN)):
        figure.add_bar(x=np.arange(PASS_RATE_STEPS + 1), y=shares, name=name, marker_color=color, row=1, col=3,
                       hovertemplate=f"{name}: %{{y:.3f}} for %{{x}} of 8<extra></extra>")
    figure.update_xaxes(title_text="pass rate, eighths", row=1, col=3)
    figure.update_yaxes(title_text="share", row=1, col=3)
    return figure.update_traces(showlegend=False, selector={"type": "scatter"})


def grid(titles: Sequence[str], *, title: str, x: str, y: str, columns: int = 1, shared: bool = False,
         height: int = 0) -> go.Figure:
    """An empty figure in the template: a panel a title, at most `columns` side by side, axis titles at the edges."""
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = make_subplots(rows, columns, subplot_titles=titles, shared_yaxes="all" if shared else False,
                           vertical_spacing=0.26 / rows, horizontal_spacing=0.16 / columns)
    figure.update_layout(template=TEMPLATE, title_text=title, height=height or 140 + 250 * rows)  # two fit 768
    figure.update_annotations(font_size=13)
    return figure.update_xaxes(title_text=x, row=rows).update_yaxes(title_text=y, col=1)


def plain(text: str) -> str:
    """Text without tags; a break becomes a line's end."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br ?/?>", "\n", text)))


def thinned(count: int, most: int = POINTS) -> np.ndarray:
    """Places of at most so many of `count` points, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(int))


def trend(figure: go.Figure, values: pd.Series | None, name: str, color: str, place: dict[str, int],
          over: str = "step") -> None:
    """A faint line of the values and a strong one of their moving average; nothing where there are no values."""
    if values is None or values.isna().all():
        return
    smooth = values.rolling(SMOOTHING, center=True, min_periods=1).mean()
    shown = thinned(len(values))
    values, smooth = values.iloc[shown], smooth.iloc[shown]
    figure.add_scatter(x=values.index, y=values, mode="lines", line={"color": color, "width": 1}, opacity=0.3,
                       hoverinfo="skip", showlegend=False, legendgroup=name, **place)
    known = any(trace.name == name for trace in figure.data)
    figure.add_scatter(x=smooth.index, y=smooth, mode="lines", line={"color": color, "width": 2.5}, name=name,
                       legendgroup=name, showlegend=not known, customdata=values, **place,
                       hovertemplate=f"{name}, {over} %{{x}}: %{{customdata:.3f}} (average %{{y:.3f}})<extra></extra>")


def _dots(figure: go.Figure, drawn: pd.DataFrame, color: str, jitter: float, place: dict[str, int]) -> None:
    """The points of a panel, moved a little so that equal ones show; hovering gives the true values."""
    x, y = (drawn[["predicted", "actual"]] + np.random.default_rng(0).normal(0, jitter, (len(drawn), 2))).to_numpy().T
    figure.add_scatter(x=x.astype("float32"), y=y.astype("float32"), mode="markers", text=drawn["label"],
                       marker={"size": 5, "opacity": 0.5, "color": color}, **place,
                       customdata=drawn[["predicted", "actual"]].astype("float32"),
                       hovertemplate="%{text}<br>predicted %{customdata[0]:.3~g}, actual %{customdata[1]:.3~g}"
                                     "<extra></extra>")


def _lines(figure: go.Figure, part: pd.DataFrame, most: float, place: dict[str, int]) -> None:
    """The diagonal up to `most` (dotted) and, where predictions differ, the regression of actual on predicted."""
    figure.add_scatter(x=[0, most], y=[0, most], mode="lines", line={"color": GREY, "dash": "dot", "width": 1},
                       hoverinfo="skip", **place)
    if part["predicted"].nunique() > 1:
        slope, start = np.polyfit(part["predicted"], part["actual"], 1)
        reach = np.array([part["predicted"].min(), part["predicted"].max()])
        figure.add_scatter(x=reach, y=start + slope * reach, mode="lines", line={"color": GREY, "width": 3}, **place,
                           hovertemplate=f"regression line, slope {slope:.2f}<extra></extra>")
