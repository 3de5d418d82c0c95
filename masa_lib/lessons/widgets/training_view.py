"""What the training panel shows of a run: predicted against true, accuracy by tokens, four curves over steps.

Pure functions from data frames to a figure and to HTML, so that they can be tested and used without widgets. Texts that
a model wrote are escaped. The figure keeps its traces in one order, so that a panel can renew the numbers in place.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from masa_lib import config as configs
from masa_lib.analysis import figures
from masa_lib.analysis.awareness import correlation, within_level_correlation
from masa_lib.analysis.costs import totals
from masa_lib.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from masa_lib.config import Config
from masa_lib.errors import brief
from masa_lib.lessons.widgets import ghost as ghosts
from masa_lib.lessons.widgets.ghost import Ghost
from masa_lib.lessons.widgets.training_records import Records, held_out_points, knowledge, problem_points
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: solutions of a problem that are shown, at most
SHOWN = 4
#: changes of settings that are marked, and characters of a text that are shown, at most
MARKS, LONGEST = 50, 20_000
#: pixels; whole in a page of 768, and wide enough for the legends: a live figure does not find out how wide the page is
HEIGHT, WIDTH = 640, 860
#: the panels over steps: title, unit of y, and its lines as (name, column of the steps, colour)
_SIGNAL = ("Groups without signal, problems left out", "share", (
    ("solutions", "zero_variance_solution", GREEN), ("predictions", "zero_variance_meta", ORANGE),
    ("left out", "dropped", BLUE), ("cut", "stopped", VERMILLION)))
_TOKENS = ("Tokens of a step", "tokens", (("to solve", "tokens_solution", GREEN), ("to predict", "tokens_meta", ORANGE),
                                          ("to read", "tokens_read", PURPLE), ("re-checks", "tokens_recheck", SKY)))
_SAMPLED = (
    ("Rewards by part", "reward", (("solution", "reward_solution", GREEN), ("difficulty", "reward_difficulty", ORANGE),
                                   ("length", "reward_length", SKY), ("notion", "reward_notion", PURPLE))),
    ("Seconds of a step", "seconds", (("generate", "seconds_generate", GREEN), ("grade", "seconds_grade", ORANGE),
                                      ("update", "seconds_update", PURPLE))))
_READ = (("r of the held-out beliefs", "r", (("all problems", "r", PURPLE), ("within levels", "r_within", ORANGE))),
         ("Doubt of the held-out beliefs", "nats", (("entropy", "entropy", PURPLE),)))
SHARES = ("reward", "share")
#: the places of the dots and of the accuracy among the panels, and the panels side by side
SCATTER, ACCURACY, COLUMNS = 0, 1, 2
#: bottom and top of the three rows of panels, shares of the height
ROWS = ((0.6, 1.0), (0.305, 0.445), (0.0, 0.15))
#: by how much dots of one pass rate are spread so that they can be told apart, at most
SPREAD = 0.035
PRE = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;margin:2px 0 8px 0;font-size:12px;line-height:1.35"


def curves(config: Config) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """The panels over steps of a run: what is known where beliefs are read, else what is paid; no idle lines."""
    gated, idle = config.method not in ("grpo", "masa"), set()
    if not configs.samples_predictions(config):
        idle |= {"zero_variance_meta", "tokens_meta"}
    if config.method != "masa-efficient":
        idle |= {"stopped"}
    if not gated:
        idle |= {"dropped", "tokens_recheck"}
    panels = (*(_READ if configs.reads(config) else _SAMPLED), _SIGNAL, _TOKENS)
    return [(title, unit, [line for line in lines if line[1] not in idle]) for title, unit, lines in panels]


def figure(records: Records, ghost: Ghost | None = None) -> go.Figure:
    """Six panels: predicted against true and accuracy by tokens, below them four over steps (`curves`).

    Dotted vertical lines mark the steps from which changed settings hold; the marks at the top name them.
    """
    lines = curves(records.config)
    drawn = figures.grid([_title(records), "Held-out accuracy by tokens written", *(title for title, _, _ in lines)],
                         title="", x="training step", y="", columns=COLUMNS, height=HEIGHT)
    steps = records.metrics.set_index("step") if len(records.metrics) else pd.DataFrame()
    known = knowledge(records) if configs.reads(records.config) else pd.DataFrame()
    for place, (_, unit, parts) in enumerate(lines, 2):
        where = {"row": place // COLUMNS + 1, "col": place % COLUMNS + 1}
        for name, column, color in parts:
            if column in known:
                drawn.add_scatter(x=known.index, y=known[column], mode="lines+markers", name=name, **where,
                                  line={"color": color, "width": 2.5}, marker={"size": 4},
                                  hovertemplate=f"{name}, step %{{x}}: %{{y:.2f}}<extra></extra>")
            else:
                figures.trend(drawn, steps.get(column), name, color, where)
        drawn.update_xaxes(range=[0, max(records.config.steps, 2) + 0.5], title_text="training step", **where)
        drawn.update_yaxes(title_text=unit, **where, **(
            {"range": [-0.03, 1.03]} if unit in SHARES else {"range": [-1.05, 1.05]} if unit == "r" else
            {"rangemode": "tozero"}))
    _accuracy(drawn, records, ghost)
    _scatter(drawn, records)
    _marks(drawn, records)
    return _arrange(drawn)


def _title(records: Records) -> str:
    """The title of the dots: r, and what is left of it among problems of one level."""
    points = held_out_points(records) if configs.reads(records.config) else problem_points(records.rollouts)
    if configs.reads(records.config):
        points = points[points["step"] == points["step"].max()]
    r = correlation(points["predicted"], points["actual"])
    within = (within_level_correlation(points["predicted"], points["actual"], points["level"])
              if "level" in points else math.nan)
    said = "r undefined" if math.isnan(r) else f"r = {r:z.2f}"
    return f"Predicted and true pass rate: {said}" + ("" if math.isnan(within) else f", within levels {within:z.2f}")


def _accuracy(drawn: go.Figure, records: Records, ghost: Ghost | None) -> None:
    """Held-out accuracy over the tokens written so far, over that of recorded runs, each thin and their mean strong."""
    where = {"row": ACCURACY // COLUMNS + 1, "col": ACCURACY % COLUMNS + 1}
    mine = ghosts.curve(records.metrics, records.evaluations)
    written = totals(records.metrics)["tokens"] if len(records.metrics) else pd.Series([0.0])
    most = 1.25 * float(written.iloc[-1])
    if ghost is not None:
        whole, apart = ghost.curve, [ghost.seeds[ghost.seeds["seed"] == seed] for seed in ghost.seeds["seed"].unique()]
        most = max(most, float(whole["tokens"].iloc[min(2, len(whole) - 1)]))
        drawn.add_scatter(x=[x for one in apart for x in (*one["tokens"], None)], mode="lines", opacity=0.35,
                          y=[y for one in apart for y in (*one["accuracy"], None)], showlegend=False, hoverinfo="skip",
                          name="its seeds", line={"color": GREY, "width": 1}, **where)
        drawn.add_scatter(x=whole["tokens"], y=whole["accuracy"], mode="lines+markers", name=html.escape(ghost.name),
                          line={"color": GREY, "width": 2.5}, marker={"size": 6}, text=whole["step"], **where,
                          hovertemplate="recorded, step %{text}, %{x:,.0f} tokens: %{y:.3f}<extra></extra>")
    shown = mine.iloc[figures.thinned(len(mine))]
    drawn.add_scatter(x=shown["tokens"], y=shown["accuracy"], mode="lines+markers", name="this run",
                      line={"color": BLUE, "width": 3}, marker={"size": 8, "symbol": "square"}, text=shown["step"],
                      hovertemplate="step %{text}, %{x:,.0f} tokens: %{y:.3f}<extra></extra>", **where)
    batch = records.metrics.get("accuracy")
    if batch is not None and len(batch):
        figures.trend(drawn, batch.set_axis(written), "its batches", GREEN, where, "tokens")
        for trace in [trace for trace in drawn.data if trace.legendgroup == "its batches"]:
            trace.visible = "legendonly" if records.config.method in configs.CHOOSING else None
    drawn.update_xaxes(range=[0, max(most, 1)], title_text="tokens written", **where)
    drawn.update_yaxes(rangemode="tozero", title_text="accuracy", **where)


def _scatter(drawn: go.Figure, records: Records) -> None:
    """The dots over the diagonal: held-out problems where beliefs are read, else those of the last recorded steps.

    Under them, where beliefs are read, each problem's nine probabilities, as large as they are likely: before a
    training they stand in columns, and these open to the diagonal. Dots of one height are spread a little.
    """
    where = {"row": SCATTER // COLUMNS + 1, "col": SCATTER % COLUMNS + 1}
    drawn.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot", "width": 1},
                      hoverinfo="skip", showlegend=False, name="diagonal", **where)
    read = configs.reads(records.config)
    points = held_out_points(records) if read else problem_points(records.rollouts)
    newest = points["step"] == points["step"].max()
    spread = points["actual"] + (SPREAD * _apart(points["problem_id"]) if read else 0.0)
    whole, heights = (points[newest], spread[newest]) if read else (points.iloc[:0].assign(belief=[]), spread.iloc[:0])
    shares = np.concatenate([*whole["belief"], np.empty(0)])
    drawn.add_scatter(x=np.tile(np.arange(PASS_RATE_STEPS + 1) / PASS_RATE_STEPS, len(whole)), mode="markers",
                      y=heights.repeat(PASS_RATE_STEPS + 1), name="belief", text=[f"{share:.0%}" for share in shares],
                      marker={"color": PURPLE, "size": 22 * np.sqrt(shares), "opacity": 0.2, "line": {"width": 0}},
                      showlegend=len(whole) > 0, hovertemplate="belief %{text} in %{x:.3f}<extra></extra>", **where)
    names = ("before training", "now") if read else ("steps before", "newest step")
    for name, part, color, size, symbol in ((names[0], ~newest, GREY, 6, "circle-open"),
                                            (names[1], newest, ORANGE, 9, "diamond")):
        drawn.add_scatter(x=points["predicted"][part], y=spread[part], mode="markers", name=name,
                          marker={"color": color, "size": size, "symbol": symbol, "opacity": 0.8}, **where,
                          customdata=points["actual"][part],
                          text=[f"step {row.step}: {html.escape(str(row.problem)[:60])}"
                                for row in points[part].itertuples()],
                          hovertemplate="%{text}<br>predicted %{x:.2f}, true %{customdata:.2f}<extra></extra>")
    drawn.update_xaxes(range=[-0.05, 1.05], title_text="predicted pass rate", **where)
    drawn.update_yaxes(range=[-0.07, 1.07], title_text="true pass rate", **where)


def _apart(problems: pd.Series) -> np.ndarray:
    """A number from -1 to 1 a problem, the same at every time and as far as can be from its neighbours'."""
    places = pd.factorize(problems)[0]
    return 2 * ((places * 0.618034) % 1) - 1


def _marks(drawn: go.Figure, records: Records) -> None:
    """A dotted line before the first step of each change, and a mark that names it when hovered."""
    held = [change for change in records.changes if change["changes"]]
    held = [held[place] for place in figures.thinned(len(held), MARKS)]
    steps = [change["step"] - 0.5 for change in held]
    spent = totals(records.metrics)["tokens"] if len(records.metrics) else pd.Series(dtype=float)
    tokens = [float(spent[spent.index < step].max()) if len(spent[spent.index < step]) else 0.0 for step in steps]
    high = max([float(value) for trace in drawn.data if trace.name in ("this run", "its seeds")
                for value in trace.y if value is not None] + [0.1])
    drawn.add_scatter(x=tokens, y=[high] * len(steps), mode="markers", name="setting changed", showlegend=False,
                      row=ACCURACY // COLUMNS + 1, col=ACCURACY % COLUMNS + 1,
                      marker={"symbol": "triangle-down", "size": 11, "color": VERMILLION},
                      text=[html.escape(change_text(change)) for change in held],
                      hovertemplate="%{text}<extra></extra>")
    for axis in drawn.select_xaxes():
        number, places = axis.plotly_name.removeprefix("xaxis"), {"training step": steps, "tokens written": tokens}
        for place in places.get(axis.title.text, ()):
            drawn.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, xref=f"x{number}", yref=f"y{number} domain",
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
    drawn.update_annotations(yshift=20).update_xaxes(title={"font_size": 12, "standoff": 2}, tickfont_size=11)
    drawn.update_yaxes(title_font_size=12, tickfont_size=11, nticks=5)
    return drawn.update_layout(margin={"l": 56, "r": 16, "t": 44, "b": 40}, width=WIDTH, title_text=None,
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
