"""The gate replay: change what masa-read's gate knows and how it chooses, and see what it would have met in records.

A panel over `belief_replay`, which holds the arithmetic; this file draws and has controls. It says nothing of what a
model becomes whose training was gated so.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from masa_lib import config as configs
from masa_lib.analysis.figures import BLUE, GREY, ORANGE, TEMPLATE
from masa_lib.lessons import belief_replay
from masa_lib.lessons.belief_replay import KEYS, KNOWS, Recorded
from masa_lib.lessons.replay import PHASES
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import Panel, button

TITLES = ("Chosen groups with a signal", "Expected against met")
#: of the line of numbers: column of the shares, what it is called, its form
NUMBERS = (("signal", "chosen: with a signal", ".0%"), ("dropped", "left out", ".0%"),
           ("precision", "left out: without a signal", ".0%"), ("own", "of the run's choice, kept", ".0%"),
           ("known", "chosen groups known", ".0f"), ("lots", "of them by lot", ".0f"))
#: by preset, what the gate knows, and whether the belief has to earn its say
PRESETS = {"as trained": (KNOWS[0], True), "belief alone": ("belief", True), "history alone": ("history", True),
           "by lot": ("nothing", True), "trusted at once": (KNOWS[0], False)}
HEIGHT, WIDTH = 380, 820  # pixels
_STYLE = {"description_width": "11em"}


def figure(mine: pd.DataFrame, own: pd.DataFrame, everything: pd.DataFrame, expected: pd.DataFrame) -> go.Figure:
    """Two panels: what a choice met, by third, and whether the expected chances come true.

    Args:
        mine: `belief_replay.shares` of the setting.
        own: those of the run's own choice.
        everything: those of a choice by lot.
        expected: `belief_replay.expected` of the setting.
    """
    drawn = make_subplots(1, 2, subplot_titles=TITLES, horizontal_spacing=0.12, column_widths=[0.56, 0.44])
    for name, shares, color in (("all candidates", everything, GREY), ("the run's choice", own, BLUE),
                                ("your gate", mine, ORANGE)):
        part = shares.loc[list(PHASES[:3])]
        drawn.add_bar(x=list(PHASES[:3]), y=part["signal"], name=name, marker_color=color, row=1, col=1,
                      customdata=part[["known", "lots"]],
                      hovertemplate=f"{name}, %{{x}}: %{{y:.2f}}, known of %{{customdata[0]}} groups, "
                                    "%{customdata[1]} of them by lot<extra></extra>")
    drawn.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"}, showlegend=False,
                      hoverinfo="skip", row=1, col=2)
    drawn.add_scatter(x=expected["chance"], y=expected["signal"], mode="lines+markers", line={"color": ORANGE},
                      marker={"size": 8}, showlegend=False, customdata=expected["known"], row=1, col=2,
                      hovertemplate="expected %{x:.2f}, met %{y:.2f}, %{customdata} groups<extra></extra>")
    drawn.update_yaxes(range=[0, 1], title_text="share with a signal", row=1, col=1)
    drawn.update_yaxes(range=[0, 1.03], title_text="share with a signal", row=1, col=2)
    drawn.update_xaxes(range=[0, 1.03], title_text="expected chance of a signal", row=1, col=2)
    drawn.update_annotations(font_size=13)
    return drawn.update_layout(template=TEMPLATE, height=HEIGHT, width=WIDTH, margin={"t": 48, "b": 100},
                               uirevision="still")


def numbers(row: pd.Series) -> str:
    """The whole training as a line of HTML; what nothing is known of is said."""
    cells = "".join(f"<td style='padding:0 14px 0 0;text-align:left'>{html.escape(label)}<br><b>"
                    + (format(row[name], form) if np.isfinite(row[name]) else "none") + "</b></td>"
                    for name, label, form in NUMBERS)
    return f"<table role='status' style='line-height:1.4'><tr>{cells}</tr></table>"


class GateReplay(Panel):
    """Controls, figure and numbers; every control can be set from code, too (`apply`).

    Args:
        runs: of masa-read, recorded (`belief_replay.read_beliefs`).
        settings: what the panel begins with and resets to, by dotted key (`belief_replay.KEYS`); the first run's own.

    Attributes:
        shares: what is known of the choice, by third and in all (`belief_replay.shares`).
        controls: by dotted key, and `knows` and `trusted`.
    """

    def __init__(self, runs: Sequence[Recorded], settings: Mapping[str, Any] | None = None) -> None:
        self.runs = list(runs)
        own = {key: configs.get(runs[0].config, key) for key in KEYS}
        self.initial = own | {"knows": KNOWS[0], "trusted": True} | dict(settings or {})
        self.presets = {name: self.initial | {"knows": knows, "trusted": trusted}
                        for name, (knows, trusted) in PRESETS.items()}
        chosen = belief_replay.choices(self.runs, own)
        self.own, self.everything = belief_replay.shares(chosen), belief_replay.shares(chosen.assign(chosen=True))
        self.shares, self.expected = self.own, belief_replay.expected(chosen)
        self.controls = self._controls()
        self.page, self.command = widgets.HTML(layout={"height": "52px"}), widgets.Textarea(
            description="as options", disabled=True, layout={"width": "auto", "height": "3em"})
        self.figure = go.FigureWidget(self.static())
        self.box = self._arrange()
        for control in self.controls.values():
            control.observe(self._moved, "value")
        self.apply(self.initial)

    def apply(self, settings: Mapping[str, Any]) -> None:
        """Set several controls by name and redraw once.

        Raises:
            ConfigError: an unknown setting or a value that is not allowed; nothing is changed.
        """
        configs.replace(self.runs[0].config, {key: value for key, value in settings.items()
                                              if key not in ("knows", "trusted")})
        with self._one_redraw():
            for key, value in settings.items():
                self.controls[key].value = value

    def reset(self) -> None:
        """Back to what the panel began with."""
        self.apply(self.initial)

    def static(self) -> go.Figure:
        """The figure as it stands, for a page without widgets."""
        return figure(self.shares, self.own, self.everything, self.expected)

    def redraw(self) -> None:
        """Take the controls' values and show what comes of them."""
        values = {key: control.value for key, control in self.controls.items()}
        knows, trusted = values.pop("knows"), values.pop("trusted")
        chosen = belief_replay.choices(self.runs, values, knows, trusted)
        self.shares, self.expected = belief_replay.shares(chosen), belief_replay.expected(chosen)
        self.page.value = numbers(self.shares.loc[PHASES[3]])
        method = {"history": "history", "nothing": "random"}.get(knows, "masa-read")
        self.command.value = f"masa train --method {method} --set " + " ".join(
            f"{key}={0.0 if key == 'belief.history' and knows == 'belief' else value:.6g}"
            for key, value in values.items())
        new = self.static()
        with self.figure.batch_update():
            for old, trace in zip(self.figure.data, new.data, strict=True):
                old.update({name: trace[name] for name in ("x", "y", "customdata")})

    def _controls(self) -> dict[str, Any]:
        def about(text: str, key: str) -> dict[str, Any]:
            return {"description": text, "tooltip": configs.settings()[key].doc, "style": _STYLE,
                    "continuous_update": False}

        return {
            "knows": widgets.Dropdown(options=KNOWS, description="the gate knows", style=_STYLE),
            "trusted": widgets.Checkbox(True, description="the belief has to earn its say", indent=False),
            "belief.places": widgets.FloatSlider(0.6, min=0.1, max=1.0, step=0.05,
                                                 **about("problems rolled out", "belief.places")),
            "belief.candidates": widgets.FloatSlider(3.0, min=1.0, max=6.0, step=0.5,
                                                     **about("candidates, times", "belief.candidates")),
            "belief.decay": widgets.FloatSlider(0.5, min=0.0, max=1.0, step=0.05,
                                                **about("history survives", "belief.decay")),
            "belief.history": widgets.FloatSlider(0.25, min=0.0, max=1.0, step=0.05,
                                                  **about("history counts", "belief.history"))}

    def _arrange(self) -> widgets.Widget:
        buttons = [*(button(name, functools.partial(self.preset, name)) for name in PRESETS),
                   button("reset", self.reset)]
        grid = {"grid_template_columns": "repeat(auto-fit, minmax(24em, 1fr))", "grid_gap": "4px 16px"}
        return widgets.VBox([widgets.HBox([widgets.Label("Presets:"), *buttons], layout={"flex_flow": "row wrap"}),
                             widgets.GridBox(list(self.controls.values()), layout=grid),
                             self.page, self.figure, self.command, Keys()])
