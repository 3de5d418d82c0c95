"""Figures of predictions at work: how well calibrated they are, what gate and cap do with them, where tokens went.

In the template and with the helpers of `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from masa_lib.analysis.costs import COST
from masa_lib.analysis.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    SKY,
    STREAMS,
    SYMBOLS,
    arm_colors,
    arm_places,
    grid,
    trend,
)

GATE_PANELS = {"gate_precision": "precision of the gate", "gate_recall": "recall of the gate",
               "signal_lost": "share of signal lost", "dropped": "share of candidates dropped",
               "right_cut": "share of right solutions cut", "stopped": "share of solutions stopped"}


def calibration_curve(curve: pd.DataFrame) -> go.Figure:
    """The true pass rate over the predicted one, a line an arm, with intervals over seeds; dotted: as predicted.

    Args:
        curve: `compare.calibration_curve`.
    """
    figure = grid([""], title="Calibration of the predicted pass rate", x="predicted pass rate", y="true pass rate")
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot", "width": 1},
                       hoverinfo="skip", showlegend=False)
    for arm, place in arm_places(curve["arm"]).items():
        part = curve[curve["arm"] == arm]
        figure.add_scatter(x=part["predicted"], y=part["true"], name=arm, mode="lines+markers",
                           line={"color": PALETTE[place]}, marker={"size": 8, "symbol": SYMBOLS[place]},
                           error_y={"array": part["high"].clip(upper=1) - part["true"], "thickness": 1, "width": 3,
                                    "arrayminus": part["true"] - part["low"].clip(lower=0)},
                           customdata=part[["low", "high", "problems"]],
                           hovertemplate=f"{arm}: predicted %{{x:.3f}}, true %{{y:.3f}} (%{{customdata[0]:.3f}} to "
                                         "%{customdata[1]:.3f}), %{customdata[2]} problems<extra></extra>")
    return figure.update_yaxes(range=[-0.03, 1.03])


def predicted_and_true(steps: pd.DataFrame) -> go.Figure:
    """Mean predicted and mean true pass rate of the training batches over steps, a panel an arm, mean over seeds.

    Args:
        steps: columns arm, step, predicted_pass_rate, accuracy.
    """
    known = steps[steps["predicted_pass_rate"].notna()]
    arms = list(arm_colors(known["arm"]))
    figure = grid(arms, title="Predicted and true pass rate over training", x="training step", y="pass rate", columns=3,
                  shared=True)
    for number, arm in enumerate(arms):
        means = known[known["arm"] == arm].groupby("step")[["predicted_pass_rate", "accuracy"]].mean()
        place = {"row": number // 3 + 1, "col": number % 3 + 1}
        trend(figure, means["predicted_pass_rate"], "predicted", ORANGE, place)
        trend(figure, means["accuracy"], "true", GREEN, place)
    return figure.update_yaxes(range=[-0.03, 1.03])


def gate_over_steps(steps: pd.DataFrame) -> go.Figure:
    """What is measured of gate and cap over steps, a line an arm, mean over seeds.

    Args:
        steps: columns arm, step and those of GATE_PANELS that there are.
    """
    panels = [name for name in GATE_PANELS if name in steps and steps[name].any()]
    figure = grid([GATE_PANELS[name] for name in panels], title="Gate and cap over training", x="training step", y="",
                  columns=2)
    for arm, color in arm_colors(steps["arm"]).items():
        means = steps[steps["arm"] == arm].groupby("step")[panels].mean()
        for number, name in enumerate(panels):
            if means[name].any():
                trend(figure, means[name], arm, color, {"row": number // 2 + 1, "col": number % 2 + 1})
    return figure.update_yaxes(range=[-0.03, 1.03])


def token_shares(shares: pd.DataFrame) -> go.Figure:
    """Where the tokens to the target went: a bar an arm, its streams stacked, in percent of what grpo spends.

    Args:
        shares: index arm, columns those of COST, as shares of the reference's tokens to the target.
    """
    figure = grid([""], title="Where the tokens to the target went", x="percent of grpo's tokens to the target", y="",
                  height=220 + 40 * len(shares))
    for name in COST:
        label, color = STREAMS[name]
        if shares[name].any():
            figure.add_bar(y=shares.index, x=100 * shares[name], orientation="h", name=label, marker_color=color,
                           hovertemplate=f"%{{y}}, {label}: %{{x:.1f}} %<extra></extra>")
    figure.add_vline(100, line={"dash": "dot", "color": GREY, "width": 1})
    return figure.update_layout(barmode="stack", legend_traceorder="normal").update_yaxes(autorange="reversed")


def equal_costs(costs: pd.DataFrame, labels: Mapping[str, str]) -> go.Figure:
    """What arms cost at equal accuracy, a panel a denominator: right of the line an arm is cheaper than its reference.

    A full mark: the interval shows it; an open one: not shown to differ. An interval may leave the panel.

    Args:
        costs: columns arm, cost, mean, low, high (the reference's cost over the arm's; NaN: not recorded), bound,
            seeds and verdict, as `lessons.gate_trials.equal_costs` gives them.
        labels: the costs in order, and what they are called.
    """
    arms, places = list(dict.fromkeys(costs["arm"])), arm_places(costs["arm"])
    figure = grid(list(labels.values()), columns=len(labels), y="", x="ratio",
                  title="Cost at equal accuracy, grpo's over the arm's", height=230 + 34 * len(arms))
    for number, cost in enumerate(labels, 1):
        for row in costs[costs["cost"] == cost].itertuples():
            _interval(figure, row, PALETTE[places[row.arm]], number)
        figure.add_vline(1, line={"dash": "dot", "color": GREY, "width": 1.5}, row=1, col=number)
        figure.update_yaxes(categoryorder="array", categoryarray=arms[::-1], range=[-0.6, len(arms) - 0.4],
                            showticklabels=number == 1, row=1, col=number)
    return figure.update_xaxes(type="log", range=[-0.98, 0.72], tickvals=[0.125, 0.25, 0.5, 1, 2, 4],
                               ticktext=["⅛", "¼", "½", "1", "2", "4"]).update_layout(
        showlegend=False, margin={"b": 64})


def _interval(figure: go.Figure, row: Any, color: str, column: int) -> None:
    """A mark with its interval, or a word where nothing is recorded."""
    known, place = row.mean == row.mean, {"row": 1, "col": column}
    text = "" if known else "not recorded"
    bar = {"array": [row.high - row.mean], "arrayminus": [row.mean - row.low], "thickness": 2, "width": 5}
    figure.add_scatter(x=[row.mean if known else 1], y=[row.arm], mode="markers" if known else "text", text=[text],
                       marker={"size": 11, "color": color, "line": {"width": 2, "color": color},
                               "symbol": "circle" if row.verdict in ("cheaper", "dearer") else "circle-open"},
                       error_x=bar if known and row.low == row.low else None, **place,
                       hovertemplate=f"{row.arm}, {row.seeds} seeds: {row.bound} {row.mean:.2f} ({row.low:.2f} to "
                                     f"{row.high:.2f}), {row.verdict}<extra></extra>" if known else None,
                       hoverinfo=None if known else "skip")


def belief_shares(shares: Mapping[str, pd.DataFrame]) -> go.Figure:
    """The share of the chosen groups with right and wrong solutions, by third of the training, a bar a choice.

    Args:
        shares: by what the choice is called, `lessons.belief_replay.shares`.
    """
    figure = grid([""], title="What a choice would have met", x="", y="share with a signal", height=340)
    for (name, table), color in zip(shares.items(), (GREY, ORANGE, SKY, BLUE, GREEN), strict=False):
        part = table.drop(index="all")
        figure.add_bar(x=list(part.index), y=part["signal"], name=name, marker_color=color,
                       customdata=part[["known", "lots"]],
                       hovertemplate=f"{name}, %{{x}}: %{{y:.2f}}, known of %{{customdata[0]}} groups, "
                                     "%{customdata[1]} of them by lot<extra></extra>")
    return figure.update_yaxes(range=[0, 1])
