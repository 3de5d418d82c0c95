"""What the update asks, as a figure and as a small panel: pick a score, what becomes of it, and the problems.

The numbers are those of `masa_lib.lessons.update_asks`; the figure is built once (`blank`) and filled at a move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from masa_lib.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, TEMPLATE, VERMILLION
from masa_lib.config import Config
from masa_lib.lessons import update_asks
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import Panel, button
from masa_lib.lessons.widgets.reward_scenes import Recorded
from masa_lib.tasks.predictions import PASS_RATE_STEPS

WIDTH, HEIGHT = 840, 430  # pixels
OWN, MOST = "my own", 12  # a distribution that the reader makes, of shares up to this
MIDDLES = {"mode": ("triangle-down", VERMILLION), "median": ("square", BLUE), "mean": ("circle", GREEN)}
_EIGHTHS = np.arange(PASS_RATE_STEPS + 1)
_BETWEEN = _EIGHTHS[:-1] + 0.5


def blank() -> go.Figure:
    """The figure without numbers."""
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.36, 0.64], vertical_spacing=0.2,
                           subplot_titles=("Problems by true pass rate", "Push from an answer to the next"))
    figure.add_bar(x=_EIGHTHS, marker_color=GREY, showlegend=False, row=1, col=1,
                   hovertemplate="%{x} of 8 right: %{y:.0%} of the problems<extra></extra>")
    for name, (symbol, color) in MIDDLES.items():
        figure.add_scatter(y=[0], mode="markers", name=name, marker={"symbol": symbol, "size": 12, "color": color},
                           hovertemplate=f"{name}: %{{x:.1f}} of 8<extra></extra>", row=1, col=1)
    for color, name in ((BLUE, "up"), (VERMILLION, "down")):
        figure.add_bar(x=_BETWEEN, marker_color=color, name=f"push {name}", width=0.7, row=2, col=1,
                       hovertemplate="between %{x}: %{y:+.3f}<extra></extra>")
    for name, color, dash in (("hard problems", PURPLE, "dot"), ("easy problems", SKY, "dash")):
        figure.add_scatter(x=_BETWEEN, mode="lines+markers", name=name, line={"color": color, "dash": dash},
                           visible="legendonly", row=2, col=1, hovertemplate=f"{name}: %{{y:+.3f}}<extra></extra>")
    for name, symbol, color in (("the update comes to rest", "star", ORANGE), ("the reward pays most", "diamond-open",
                                                                               PURPLE)):
        figure.add_scatter(mode="markers", name=name, row=2, col=1, hovertemplate=f"{name}: %{{x}} of 8<extra></extra>",
                           marker={"symbol": symbol, "size": 15, "color": color, "line": {"width": 2, "color": color}})
    figure.update_layout(template=TEMPLATE, width=WIDTH, height=HEIGHT, barmode="overlay",
                         margin={"l": 60, "r": 180, "t": 30, "b": 44},
                         legend={"orientation": "v", "x": 1.02, "y": 1, "yref": "paper", "yanchor": "top"})
    figure.update_xaxes(range=[-0.6, 8.6], dtick=1, showticklabels=True)
    figure.update_xaxes(title_text="answer, of 8", row=2, col=1)
    figure.update_yaxes(title_text="share", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="advantage gained", row=2, col=1)
    return figure


def fill(figure: go.Figure, recorded: Recorded, groups: np.ndarray, config: Config) -> str:
    """Put the numbers of a setting into a figure of `blank`; returns what they say, in a sentence."""
    pushed, paid = update_asks.pushes(recorded, groups, config), update_asks.pays(recorded, groups, config)
    rest, best = update_asks.rests(pushed), [int(paid.idxmax())]
    shares = update_asks.eighths_of(recorded)[groups].value_counts(normalize=True).reindex(_EIGHTHS, fill_value=0.0)
    middles = update_asks.middles(recorded, groups)
    push = np.where(np.array(list(update_asks.signs(pushed))) == "0", 0.0, pushed["push"])
    contents = [(_EIGHTHS, shares.to_numpy()), *(([value], [1.15 * shares.max()]) for value in middles.values()),
                (_BETWEEN, push.clip(min=0)), (_BETWEEN, push.clip(max=0)),
                (_BETWEEN, pushed["hard"].to_numpy()), (_BETWEEN, pushed["easy"].to_numpy()),
                (rest, [0] * len(rest)), (best, [0])]
    for trace, (x, y) in zip(figure.data, contents, strict=True):
        trace.update(x=x, y=y)
    where = " or ".join(map(str, rest)) + " of 8" if rest else "nowhere: no value is pushed for all problems"
    said = ", ".join(f"{name} {value:.1f}" for name, value in middles.items())
    return f"Pass rates: {said}. The reward pays {best[0]} of 8 most; the update comes to rest at {where}."


def picture(recorded: Recorded, groups: np.ndarray, config: Config) -> go.Figure:
    """The filled figure for a page without widgets, with its sentence as the title."""
    figure = blank()
    said = fill(figure, recorded, groups, config).replace("; ", ";<br>")  # the whole is wider than the figure
    figure.update_layout(title={"text": said, "font": {"size": 13}}, margin_t=84, height=HEIGHT + 54)
    return figure


class UpdateAsks(Panel):
    """Menus for score, normalisation and problems, nine shares for problems of one's own, and the figure.

    Args:
        recorded: the groups (`reward_scenes.read`).

    Attributes:
        said: what the figure shows, in a sentence.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.recorded, self.distributions = recorded, update_asks.distributions(recorded)
        style, wide = {"description_width": "6.5em"}, {"width": "27em"}
        self.score = widgets.Dropdown(options=list(update_asks.SCORES), value=list(update_asks.SCORES)[1],
                                      description="score", style=style, layout=wide)
        self.normalised = widgets.Dropdown(options=list(update_asks.NORMALISED), description="divided by",
                                           style=style, layout=wide)
        self.problems = widgets.Dropdown(options=[*self.distributions, OWN], value="recorded, last third",
                                         description="problems", style=style, layout=wide)
        self.shares = [widgets.BoundedIntText(1, min=0, max=MOST, description=f"{rate} of 8",
                                              style={"description_width": "3em"}, layout={"width": "6.3em"})
                       for rate in _EIGHTHS]
        self.figure, self.note, self.said = go.FigureWidget(blank()), widgets.HTML(), ""
        self.box = self._arrange()
        self.initial = self.settings
        for control in (self.score, self.normalised, self.problems):
            control.observe(self._moved, "value")
        for share in self.shares:
            share.observe(self._own, "value")
        self.redraw()

    @property
    def settings(self) -> dict[str, Any]:
        """What is chosen, by name; `shares` count where the problems are the reader's own."""
        return {"score": self.score.value, "normalised": self.normalised.value, "problems": self.problems.value,
                "shares": tuple(share.value for share in self.shares)}

    def apply(self, settings: Mapping[str, Any]) -> None:
        """Set several controls and redraw once; keys as in `settings`."""
        with self._one_redraw():
            for share, value in zip(self.shares, settings.get("shares", ()), strict=False):
                share.value = value
            for name in {"score", "normalised", "problems"} & set(settings):
                getattr(self, name).value = settings[name]

    def reset(self) -> None:
        """Back to what the panel began with."""
        self.apply(self.initial)

    def redraw(self) -> None:
        """Compute and draw what is chosen; of a choice that means nothing, say why."""
        try:
            with self.figure.batch_update():
                self.said = fill(self.figure, self.recorded, self._groups(), self._config())
        except ValueError as error:
            self.said = str(error)
        self.note.value = f"<b>{self.said}</b>"

    def static(self) -> go.Figure:
        """The figure as it stands, for a page without widgets."""
        return picture(self.recorded, self._groups(), self._config())

    def _config(self) -> Config:
        return update_asks.setting(self.score.value, self.normalised.value)

    def _groups(self) -> np.ndarray:
        if self.problems.value == OWN:
            return update_asks.drawn(self.recorded, [share.value for share in self.shares])
        return self.distributions[self.problems.value]

    def _own(self, change: Any) -> None:
        """A share was changed: the problems are the reader's own now."""
        if not self._still:
            with self._one_redraw():
                self.problems.value = OWN

    def _arrange(self) -> widgets.Widget:
        row = {"flex_flow": "row wrap"}
        return widgets.VBox([
            widgets.HBox([self.score, self.normalised], layout=row),
            widgets.HBox([self.problems, button("Begin again", self.reset, tooltip="As at the beginning")], layout=row),
            widgets.HBox([widgets.Label("my own, shares:"), *self.shares], layout=row),
            self.note, self.figure, Keys()])
