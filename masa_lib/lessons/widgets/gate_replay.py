"""The gate replay: set gate, cap and M, and see what they would have dropped, cut, lost and saved in recorded runs.

A panel over `gate_trials.account` and `replay.gate_curve`, which hold the arithmetic; this file draws and has controls.
It says nothing of what a model becomes whose training was gated.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from masa_lib import config as configs
from masa_lib.analysis.figures import BLUE, GREEN, GREY, ORANGE, SKY, TEMPLATE, VERMILLION
from masa_lib.config import Config
from masa_lib.lessons import gate_trials, replay
from masa_lib.lessons.replay import PHASES, Groups
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import Panel, button

#: columns of the account that add up to all recorded solution tokens and the predictions, by how they are drawn
TOKENS = {"solutions": ("solutions", GREEN), "rechecks": ("re-checks", SKY), "predictions": ("predictions", ORANGE)}
#: what became of a group, and how its dot looks: marks differ as well as colours
FATES = {"kept, has a signal": (GREEN, "circle"), "kept, has none": (GREY, "circle-open"),
         "dropped, has none": (BLUE, "square"), "dropped, has a signal": (VERMILLION, "x")}
TITLES = ("Rule, all thresholds", "Tokens", "Every recorded group")
AXES = {"signal": "predicted chance of a signal", "v1": "spread of the predictions",
        "v2": "spread, where the mean is 0 or 1"}
#: of the page of numbers: column of the account, what it is called, its form
NUMBERS = (("dropped", "groups dropped", ".1%"), ("precision", "precision", ".2f"), ("recall", "recall", ".2f"),
           ("signal_lost", "signal lost", ".1%"), ("right_cut", "right solutions cut", ".1%"),
           ("predictions", "predictions cost", ".1%"), ("tokens_saved", "tokens saved, net", "+.1%"),
           ("gain", "signal per token", ".2f"))
HEIGHT, WIDTH = 430, 860  # pixels
_STYLE = {"description_width": "11em"}
_STEP = {"signal": 0.05, "v1": 0.0125, "v2": 0.0125}
_MOST = {"signal": 1.0, "v1": 0.5, "v2": 0.5}


def presets(groups: Groups) -> dict[str, dict[str, Any]]:
    """Settings by dotted key: the recommended ones (the library's defaults), the paper's two, and predictions alone."""
    default, members = Config(), groups.rates_PM.shape[1]
    recommended = {key: configs.get(default, key) for key in gate_trials.KEYS} | {"gate.predictions": members}
    return {"recommended": recommended,
            "paper, version 1": recommended | {"gate.rule": "v1", "gate.std": 0.1, "cap.multiplier": 2.0},
            "paper, version 2": recommended | {"gate.rule": "v2", "gate.std": 0.1, "cap.multiplier": 1.5},
            "gate and cap off": recommended | {"gate.threshold": 0.0, "cap.multiplier": 0.0}}


def fates(groups: Groups, config: Config, phase: str) -> pd.DataFrame:
    """A row a group of a phase: `score` of the config's rule, true `rate`, and its `fate` (of FATES)."""
    here = groups.phases_FP[PHASES.index(phase)] > 0
    score, signal = gate_trials.scores(groups, config)[0][here], groups.signal_P[here]
    dropped = score < gate_trials.threshold(config)
    names = np.array(list(FATES), dtype=object)
    return pd.DataFrame({"score": np.where(np.isfinite(score), score, np.nan),
                         "rate": groups.right_PG[here].mean(axis=1), "fate": names[2 * dropped + (dropped == signal)]})


def figure(groups: Groups, config: Config, phase: str) -> go.Figure:
    """The three panels: the rule's curve with the setting on it, the token account, and every group.

    Args:
        groups: recorded.
        config: gate, cap and M.
        phase: of PHASES.
    """
    drawn = make_subplots(1, 3, subplot_titles=TITLES, horizontal_spacing=0.1, column_widths=[0.34, 0.24, 0.42])
    row = gate_trials.account(groups, config).loc[phase]
    _draw_curve(drawn, groups, config, phase, row)
    _draw_tokens(drawn, row)
    _draw_groups(drawn, groups, config, phase)
    drawn.update_layout(template=TEMPLATE, height=HEIGHT, width=WIDTH, barmode="stack", margin={"t": 48, "b": 110},
                        uirevision="still")
    drawn.update_annotations(font_size=13)
    return drawn


def _draw_curve(drawn: go.Figure, groups: Groups, config: Config, phase: str, row: pd.Series) -> None:
    curve = replay.gate_curve(groups, config.gate.rule, predictions=config.gate.predictions)
    curve = curve[curve["phase"] == phase].dropna(subset=["precision", "recall"])
    place = {"row": 1, "col": 1, "showlegend": False}
    drawn.add_scatter(x=[0, 1], y=[row["flat"]] * 2, mode="lines", line={"color": GREY, "dash": "dot"}, **place,
                      hovertemplate="dropping at random: precision %{y:.2f}<extra></extra>")
    drawn.add_scatter(x=curve["recall"], y=curve["precision"], mode="lines+markers", line={"color": BLUE},
                      marker={"size": 5}, customdata=curve["threshold"], **place,
                      hovertemplate="threshold %{customdata:.3g}: precision %{y:.2f}, recall %{x:.2f}<extra></extra>")
    setting = curve.iloc[:0] if row[["recall", "precision"]].isna().any() else row.to_frame().T
    drawn.add_scatter(x=setting["recall"], y=setting["precision"], mode="markers", **place,
                      marker={"size": 14, "color": VERMILLION, "symbol": "diamond"},
                      hovertemplate="your setting: precision %{y:.2f}, recall %{x:.2f}<extra></extra>")
    drawn.update_xaxes(range=[-0.03, 1.03], title_text="recall", row=1, col=1)
    drawn.update_yaxes(range=[0, 1.03], title_text="precision", row=1, col=1)


def _draw_tokens(drawn: go.Figure, row: pd.Series) -> None:
    for name, (label, color) in TOKENS.items():
        drawn.add_bar(x=["without", "with"], y=[100.0 if name == "solutions" else 0.0, 100 * row[name]], name=label,
                      marker_color=color, row=1, col=2,
                      hovertemplate=f"{label}, %{{x}} the setting: %{{y:.1f}}<extra></extra>")
    drawn.update_yaxes(range=[0, 160], title_text="percent of all solutions", row=1, col=2)


def _draw_groups(drawn: go.Figure, groups: Groups, config: Config, phase: str) -> None:
    table, limit, rule = fates(groups, config, phase), gate_trials.threshold(config), config.gate.rule
    moved = np.random.default_rng(0).uniform(-0.03, 0.03, len(table))
    for fate, (color, symbol) in FATES.items():
        part = table[table["fate"] == fate].dropna()
        drawn.add_scatter(x=part["score"], y=part["rate"] + moved[part.index], mode="markers", name=fate,
                          marker={"color": color, "symbol": symbol, "size": 7, "opacity": 0.7}, row=1, col=3,
                          customdata=part["rate"],
                          hovertemplate=f"{fate}: score %{{x:.2f}}, pass rate %{{customdata:.2f}}<extra></extra>")
    drawn.add_scatter(x=[limit, limit], y=[-0.1, 1.1], mode="lines", line={"color": VERMILLION, "dash": "dash"}, row=1,
                      col=3, showlegend=False, hovertemplate=f"threshold {limit:.3g}<extra></extra>")
    drawn.update_xaxes(range=[-0.03 * _MOST[rule], 1.03 * _MOST[rule]], title_text=AXES[rule], row=1, col=3)
    drawn.update_yaxes(range=[-0.08, 1.08], title_text="true pass rate", row=1, col=3)


def numbers(row: pd.Series) -> str:
    """One phase of the account as a line of HTML; what nothing was measured of is said."""
    cells = "".join(f"<td style='padding:0 14px 0 0;text-align:left'>{html.escape(label)}<br><b>"
                    + (format(row[name], form) if np.isfinite(row[name]) else "none") + "</b></td>"
                    for name, label, form in NUMBERS)
    return f"<table role='status' style='line-height:1.4'><tr>{cells}</tr></table>"


def options(config: Config) -> str:
    """The setting as options of `masa train`, for masa-efficient."""
    unused = "gate.std" if config.gate.rule == "signal" else "gate.threshold"
    said = " ".join(f"{key}={configs.get(config, key):.6g}" if isinstance(configs.get(config, key), float)
                    else f"{key}={configs.get(config, key)}" for key in gate_trials.KEYS if key != unused)
    return f"masa train --method masa-efficient --set {said}"


class GateReplay(Panel):
    """Controls, figure and numbers; every control can be set from code, too (`apply`).

    Args:
        groups: recorded, of one run or `gate_trials.pooled` of several.
        settings: what the panel begins with and resets to, by dotted key; the recommended ones by default.

    Attributes:
        config: the setting as a config.
        row: its account in the phase that is shown.
        controls: by dotted key, and `threshold` for the rule's own threshold.
    """

    def __init__(self, groups: Groups, settings: Mapping[str, Any] | None = None) -> None:
        self.groups, self.presets = groups, presets(groups)
        self.initial = self.presets["recommended"] | dict(settings or {})
        self.config = configs.replace(groups.config, self.initial)
        self.row = pd.Series(dtype=float)
        self.phase = widgets.Dropdown(options=PHASES, value=PHASES[2], description="part of the training", style=_STYLE)
        self.controls = self._controls()
        self.page, self.command = widgets.HTML(layout={"height": "52px"}), widgets.Textarea(
            description="as options", disabled=True, layout={"width": "100%", "height": "4em"})
        self.figure = go.FigureWidget(figure(groups, self.config, self.phase.value))
        self.box = self._arrange()
        for control in (*self.controls.values(), self.phase):
            control.observe(self._moved, "value")
        self.apply(self.initial)

    def apply(self, settings: Mapping[str, Any]) -> None:
        """Set several settings by dotted key and redraw once.

        Raises:
            ConfigError: an unknown key or a value that is not allowed; nothing is changed.
            ReplayError: a rule that cannot be replayed; nothing is changed.
        """
        wanted = configs.replace(self.config, settings)
        rule, limit = wanted.gate.rule, gate_trials.threshold(wanted)
        members = wanted.gate.predictions or self.groups.rates_PM.shape[1]
        with self._one_redraw():
            for key in ("gate.rule", "gate.recheck", "cap.aggregate", "cap.multiplier"):
                self.controls[key].value = configs.get(wanted, key)
            self.controls["gate.predictions"].value = members
            self._scale(rule)
            self.controls["threshold"].value = limit

    def reset(self) -> None:
        """Back to what the panel began with."""
        with self._one_redraw():
            self.phase.value = PHASES[2]
            self.apply(self.initial)

    def static(self) -> go.Figure:
        """The figure as it stands, for a page without widgets."""
        return figure(self.groups, self.config, self.phase.value)

    def redraw(self) -> None:
        """Take the controls' values and show what comes of them."""
        values = {key: control.value for key, control in self.controls.items()}
        limit = values.pop("threshold")
        key = "gate.threshold" if values["gate.rule"] == "signal" else "gate.std"
        self.config = configs.replace(self.config, values | {key: limit})
        self.row = gate_trials.account(self.groups, self.config).loc[self.phase.value]
        self.page.value, self.command.value = numbers(self.row), options(self.config)
        new = self.static()
        with self.figure.batch_update():
            for old, trace in zip(self.figure.data, new.data, strict=True):
                old.update({name: trace[name] for name in ("x", "y", "customdata", "hovertemplate")})
            self.figure.layout.xaxis3.update(range=new.layout.xaxis3.range, title_text=new.layout.xaxis3.title.text)

    def _moved(self, change: Any) -> None:
        if not self._still and change["owner"] is self.controls["gate.rule"]:
            with self._one_redraw():
                self._scale(change["new"])
                self.controls["threshold"].value = gate_trials.threshold(configs.replace(
                    self.config, {"gate.rule": change["new"]}))
        else:
            super()._moved(change)

    def _scale(self, rule: str) -> None:
        """The threshold's slider in the unit of a rule."""
        slider = self.controls["threshold"]
        slider.min, slider.max, slider.step = 0.0, _MOST[rule], _STEP[rule]

    def _controls(self) -> dict[str, Any]:
        most = self.groups.rates_PM.shape[1]

        def about(text: str, key: str) -> dict[str, Any]:
            return {"description": text, "tooltip": configs.settings()[key].doc, "style": _STYLE}

        return {
            "gate.rule": widgets.Dropdown(options=list(AXES), **about("gate: rule", "gate.rule")),
            "threshold": widgets.FloatSlider(0.4, min=0.0, max=1.0, step=0.05, readout_format=".3f",
                                             **about("gate: threshold", "gate.threshold")),
            "gate.predictions": widgets.IntSlider(most, 1, most, **about("M, predictions", "gate.predictions")),
            "gate.recheck": widgets.FloatSlider(0.1, min=0.0, max=1.0, step=0.05,
                                                **about("share re-checked", "gate.recheck")),
            "cap.aggregate": widgets.Dropdown(options=list(replay.AGGREGATES),
                                              **about("cap: of the M", "cap.aggregate")),
            "cap.multiplier": widgets.FloatSlider(2.0, min=0.0, max=3.0, step=0.05,
                                                  **about("cap: times (0: none)", "cap.multiplier"))}

    def _arrange(self) -> widgets.Widget:
        buttons = [*(button(name, functools.partial(self.preset, name)) for name in self.presets),
                   button("reset", self.reset)]
        grid = {"grid_template_columns": "repeat(auto-fit, minmax(24em, 1fr))", "grid_gap": "4px 16px"}
        return widgets.VBox([widgets.HBox([widgets.Label("Presets:"), *buttons], layout={"flex_flow": "row wrap"}),
                             widgets.GridBox([self.phase, *self.controls.values()], layout=grid),
                             self.page, self.figure, self.command, Keys()])
