"""What one problem's rollouts say of a model: predictions or belief against what happened, in numbers and figures.

Pure functions on the table that `self_knowledge.ask` gives. Texts from readers and models are escaped wherever they get
into HTML. What many problems say together is the business of `awareness`.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from masa_lib import config as configs
from masa_lib.analysis.figures import BLUE, GREEN, GREY, ORANGE, TEMPLATE, VERMILLION, grid
from masa_lib.config import Config
from masa_lib.method import rollouts
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.tasks import grading
from masa_lib.tasks.predictions import PASS_RATE_STEPS

HEIGHT, WIDTH = 340, 860  # pixels
#: what there is before anything was asked
EMPTY = pd.DataFrame(columns=["stream", "text", "length", "correct", "answer", "notions", "parse_error",
                              "predicted_pass_rate", "predicted_length", "belief"])
#: rows of the lengths, from below: colour and mark
MARKS = {"not graded": (GREY, "circle-open"), "wrong": (VERMILLION, "x"), "right": (GREEN, "circle"),
         "predicted": (ORANGE, "diamond")}
EIGHTHS = np.arange(PASS_RATE_STEPS + 1)
#: three ways to turn the same predictions into advantages
WAYS = {"pass rate alone": {"reward.length_weight": 0.0, "reward.notion_weight": 0.0},
        "mean of the three parts": {}, "each part by itself": {"update.normalise_meta": "parts"}}
_PRE = "margin:0 0 4px;font-size:12px;white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere"


def verdicts(table: pd.DataFrame) -> pd.Series:
    """Of each solution: right, wrong, or not graded where the problem has no answer."""
    solved = solutions_of(table)
    graded = np.where(solved["correct"].fillna(False).astype(bool), "right", "wrong")
    return pd.Series(np.where(solved["answer"] == "", "not graded", graded), index=solved.index)


def shares(table: pd.DataFrame) -> np.ndarray:
    """How much falls on each of the nine pass rates, their sum 1: of the belief, or of the predictions that parse.

    All 0 where there is neither.
    """
    read = table.loc[table["stream"] == "belief", "belief"] if "belief" in table else ()
    if len(read):
        return np.asarray(read.iloc[0], dtype=float)
    said = predictions_of(table)["predicted_pass_rate"].dropna().astype(int).clip(0, PASS_RATE_STEPS)
    return np.bincount(said, minlength=len(EIGHTHS)) / max(len(said), 1)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Predicted against what happened, of one problem's rollouts so far; NaN where there is nothing yet.

    Returns:
        `predictions` (that parse), `predicted_pass_rate` (their mean, or that of a belief that was read) and
        `pass_rate` (0 to 1), `predicted_length` and `length`
        (tokens; the mean of the right solutions, of all where there is no answer), `agreement` (share of the solutions
        with the most frequent boxed answer).
    """
    meta, solved, found = predictions_of(table), solutions_of(table), verdicts(table)
    told = meta.dropna(subset=["predicted_pass_rate"])
    boxed = Counter(answer for answer in map(grading.extract_answer, solved["text"]) if answer)
    share = float((found == "right").mean()) if len(found) and (found != "not graded").all() else np.nan
    said = shares(table)
    return {"predictions": len(told),
            "predicted_pass_rate": float(said @ EIGHTHS) / PASS_RATE_STEPS if said.any() else np.nan,
            "pass_rate": share, "predicted_length": told["predicted_length"].astype(float).mean(),
            "length": solved.loc[found != "wrong", "length"].mean(),
            "agreement": max(boxed.values()) / len(solved) if boxed else np.nan}


def notions(table: pd.DataFrame) -> pd.DataFrame:
    """Predicted notions, the most named first: columns notion, predictions, right and wrong (solutions that have it).

    Solutions without a grade count as right.
    """
    meta, solved, found = predictions_of(table), solutions_of(table), verdicts(table)
    named = Counter(notion for said in meta["notions"].dropna() for notion in dict.fromkeys(said))
    rows = [{"notion": notion, "predictions": count, **{
        verdict: sum(_has(text, notion) for text in solved.loc[(found != "wrong") == (verdict == "right"), "text"])
        for verdict in ("right", "wrong")}} for notion, count in named.most_common()]
    return pd.DataFrame(rows, columns=["notion", "predictions", "right", "wrong"])


def _has(text: str, notion: str) -> bool:
    """Whether a notion stands in a text as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(notion)}(?!\w)", text, re.IGNORECASE) is not None


def figure(table: pd.DataFrame, config: Config) -> go.Figure:
    """Predicted pass rates, or the belief, beside the true one; predicted lengths beside those of the solutions."""
    drawn = make_subplots(1, 2, horizontal_spacing=0.18, subplot_titles=("Pass rate", "Length"))
    found = summary(table)
    meta, solved = predictions_of(table), solutions_of(table)
    _said(drawn, shares(table), found["pass_rate"], {"row": 1, "col": 1})
    marks = pd.concat([verdicts(table), pd.Series("predicted", meta.index)])
    lengths = solved["length"].astype(float).reindex(marks.index).fillna(meta["predicted_length"].astype(float))
    for place, (kind, (color, symbol)) in enumerate(MARKS.items()):
        x = lengths[marks == kind].dropna()
        drawn.add_scatter(x=x, y=place + np.random.default_rng(place).uniform(-0.25, 0.25, len(x)), mode="markers",
                          marker={"color": color, "symbol": symbol, "size": 8, "opacity": 0.7}, name=kind, row=1, col=2,
                          showlegend=False, hovertemplate=f"{kind}: %{{x}} tokens<extra></extra>")
    drawn.update_xaxes(title_text="of 8 solutions", range=[-0.6, 8.6], dtick=1, row=1, col=1)
    drawn.update_xaxes(title_text="tokens", range=[0, 1.03 * config.sampling.solution_tokens], row=1, col=2)
    drawn.update_yaxes(title_text="share of what it says", range=[0, 1.05], row=1, col=1)
    drawn.update_yaxes(tickvals=list(range(len(MARKS))), ticktext=list(MARKS), range=[-0.5, len(MARKS) - 0.5], row=1,
                       col=2)
    drawn.update_annotations(font_size=13)
    return drawn.update_layout(template=TEMPLATE, height=HEIGHT, width=WIDTH, margin={"t": 40, "b": 96},
                               uirevision="still")


def _said(drawn: go.Figure, said: np.ndarray, true: float, place: dict[str, int], legend: bool = True) -> None:
    """The nine shares as bars, and a line at the true pass rate where it is known."""
    drawn.add_bar(x=EIGHTHS, y=said, name="predicted", marker_color=ORANGE, showlegend=legend, **place,
                  hovertemplate="%{x} of 8: %{y:.0%}<extra></extra>")
    drawn.add_scatter(x=[PASS_RATE_STEPS * true] * 2 if true == true else [], y=[0, 1], mode="lines", name="true",
                      line={"color": BLUE, "width": 4}, showlegend=legend, **place,
                      hovertemplate=f"true pass rate {true:.2f}<extra></extra>")


def side_by_side(said: Mapping[str, Sequence[float]], true: Mapping[str, float], title: str) -> go.Figure:
    """What several models say of the same problem or problems, a panel a model, with a line at what is true.

    Args:
        said: of each model the nine shares (`shares`).
        true: of each model its pass rate, 0 to 1.
        title: of the figure.
    """
    titles = [f"{name}<br>says {np.dot(values, EIGHTHS) / PASS_RATE_STEPS:.2f}, is {true[name]:.2f}"
              for name, values in said.items()]
    drawn = grid(titles, columns=len(said), title=title, x="of 8 solutions", y="share", shared=True)
    for column, (name, values) in enumerate(said.items(), 1):
        _said(drawn, np.asarray(values, dtype=float), true[name], {"row": 1, "col": column}, column == 1)
    return drawn.update_xaxes(range=[-0.6, 8.6], dtick=2).update_yaxes(range=[0, 1.05]).update_layout(
        height=380, margin_t=88)


def under_each(table: pd.DataFrame, config: Config) -> dict[str, pd.DataFrame]:
    """The predictions of one problem with their rewards and advantages, by each of WAYS.

    Args:
        table: solutions and predictions of one problem.
        config: the settings that WAYS change.
    """
    found = {}
    for name, changes in WAYS.items():
        scored = table.copy()
        rollouts.score(scored, configs.replace(config, changes))
        found[name] = predictions_of(scored)
    return found


def nearest(predictions: pd.DataFrame, pass_rate: float) -> pd.Series:
    """Which predictions come nearest to a true pass rate (0 to 1); those that cannot be read never do."""
    error = (predictions["predicted_pass_rate"].astype(float) / PASS_RATE_STEPS - pass_rate).abs()
    return np.isclose(error, error.min()) & error.notna()


def pushes(table: pd.DataFrame, config: Config) -> go.Figure:
    """The advantage of each prediction of a problem over what it predicted, a panel each of WAYS.

    Stars are the predictions nearest to the truth (the line); the colour says whether the length was paid, too.
    """
    found = under_each(table, config)
    rate = float(solutions_of(table)["correct"].astype(float).mean())
    drawn = grid(list(found), columns=len(found), title="What pushes each prediction up or down",
                 x="predicted, of 8", y="advantage", shared=True)
    for column, part in enumerate(found.values(), 1):
        x = part["predicted_pass_rate"].astype(float) + np.linspace(-0.15, 0.15, len(part))
        near, paid = nearest(part, rate), part["reward_length"] > 0
        for kept, name, color in ((paid, "length paid", GREEN), (~paid, "length not paid", VERMILLION)):
            drawn.add_scatter(x=x[kept], y=part.loc[kept, "advantage"], mode="markers", name=name, legendgroup=name,
                              showlegend=column == 1, customdata=part.loc[kept, "predicted_pass_rate"], row=1,
                              col=column, hovertemplate="predicted %{customdata} of 8: advantage %{y:.2f}"
                                                        f", {name}<extra></extra>",
                              marker={"color": color, "size": np.where(near[kept], 16, 9), "opacity": 0.8,
                                      "symbol": np.where(near[kept], "star", "circle")})
        drawn.add_vline(x=PASS_RATE_STEPS * rate, line={"color": BLUE, "width": 3}, opacity=0.5, row=1, col=column)
        drawn.add_hline(y=0, line={"color": GREY, "width": 1, "dash": "dot"}, row=1, col=column)
    return drawn.update_xaxes(range=[-0.6, 8.6], dtick=2).update_layout(height=380)


def headline(table: pd.DataFrame) -> str:
    """What came of it, in a sentence or two of plain text."""
    found, count = summary(table), int((table["stream"] == "solution").sum())
    said = (f"Predicted: right {found['predicted_pass_rate']:.2f} of the time, {found['predicted_length']:.0f} tokens."
            if found["predictions"] else "No prediction could be read."
            if np.isnan(found["predicted_pass_rate"]) else
            f"Believed: right {found['predicted_pass_rate']:.2f} of the time (read, no prediction was written).")
    if not count:
        return said
    length = f" with {found['length']:.0f} tokens on average" if found["length"] == found["length"] else ""
    if found["pass_rate"] == found["pass_rate"]:
        return (f"{said} Happened: right {found['pass_rate']:.2f} of the time ({count} solutions)"
                + (f", right ones{length}." if length else "."))
    agree = f"; {found['agreement']:.0%} agree on one answer" if found["agreement"] == found["agreement"] else ""
    return f"{said} Happened: {count} solutions{length}{agree}. Without an answer nothing is graded."


def page(table: pd.DataFrame, count: int = 6) -> str:
    """The notions and the first texts of each stream as HTML, escaped."""
    said = notions(table).head(8)
    cells = "".join(f"<tr><td>{html.escape(row.notion[:60])}</td><td>{row.predictions}</td><td>{row.right}</td>"
                    f"<td>{row.wrong}</td></tr>" for row in said.itertuples())
    head = "<tr><th>predicted notion</th><th>predictions</th><th>right solutions</th><th>wrong solutions</th></tr>"
    none = "" if predictions_of(table).empty else "<p>No notion was predicted.</p>"
    first = f"<table>{head}{cells}</table>" if len(said) else none
    return first + texts(predictions_of(table).head(count)) + texts(solutions_of(table).head(count))


def texts(rows: pd.DataFrame) -> str:
    """What was written, a rollout a line, as HTML, escaped; in front of a solution stand its verdict and its length."""
    if rows.empty:
        return ""
    found, title = verdicts(rows), "Predictions" if len(predictions_of(rows)) else "Solutions"
    return f"<b>{title}</b>" + "".join(
        f"<pre style='{_PRE}'>{html.escape(_note(row, found.get(row.Index)))}{html.escape(row.text)}</pre>"
        for row in rows.itertuples())


def _note(row: Any, verdict: str | None) -> str:
    if verdict is None:
        return f"[cannot be read: {row.parse_error}] " if row.parse_error else ""
    return f"{verdict}, {row.length} tokens: "
