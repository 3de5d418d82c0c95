"""The reward lab: turn the knobs of the rewards, and watch what recorded predictions would have earned.

A panel of controls over `reward_scenes` (computation) and `reward_figures` (drawing). It holds no maths and trains
nothing; what it hands to a training is a table of settings by dotted key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
import tomli_w
import traitlets

from masa_lib import ROOT
from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.analysis.figures import GREEN, VERMILLION
from masa_lib.config import Config
from masa_lib.lessons.reward_tasks import TASKS
from masa_lib.lessons.widgets import reward_figures, reward_scenes
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import Panel, button
from masa_lib.lessons.widgets.reward_scenes import KEYS, Recorded, Scene

#: where "Use in training" writes, unless the panel is told what else to do
SETTINGS_FILE = ROOT / "runs" / "reward-lab.toml"
LABELS = {"reward.mode": "parser, rewards", "reward.pass_rate_weight": "pass rate weight",
          "reward.length_weight": "length weight", "reward.notion_weight": "notion weight",
          "reward.difficulty_mode": "difficulty", "reward.difficulty_base": "base b (kernel)",
          "reward.strict_length": "length: ends do not count", "reward.length_slack": "length: slack",
          "reward.notion_mode": "notions", "reward.exclude_problem_notions": "leave out the problem's notions",
          "update.normalise_meta": "advantages of"}
ORDER = ("reward.mode", "reward.pass_rate_weight", "reward.length_weight", "reward.notion_weight",
         "reward.difficulty_mode", "reward.difficulty_base", "update.normalise_meta", "reward.length_slack",
         "reward.strict_length", "reward.notion_mode", "reward.exclude_problem_notions")
FREE = "free play"  # the task that is none
MOST_WEIGHT, LEAST_BASE = 2.0, -6  # where the sliders end; of the base, a power of ten
_STYLE, _KNOBS = {"description_width": "9em"}, "312px"
_COPY = """
function render({ model, el }) {
  const button = document.createElement("button");
  button.className = "jupyter-widgets jupyter-button widget-button";
  const label = () => { button.textContent = "Copy as config"; };
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(model.get("text")); button.textContent = "Copied"; }
    catch { button.textContent = "Copy it from below"; }
    setTimeout(label, 2000);
  });
  label();
  el.append(button);
}
export default { render };
"""


class CopyButton(anywidget.AnyWidget):
    """A button that puts `text` on the reader's clipboard."""

    _esm = _COPY
    text = traitlets.Unicode().tag(sync=True)


class RewardLab(Panel):
    """Controls, figure and group table; every control can be set from code, too (`apply`, `select`).

    Args:
        recorded: groups to score (`reward_scenes.read`).
        settings: what the panel begins with and resets to, by dotted key; `ours` by default.
        use: takes the settings when "Use in training" is pressed and returns what to tell the reader; by default they
            are written to SETTINGS_FILE, which `masa train --config` reads.

    Attributes:
        scene: what the last setting makes of the groups.
        controls: the control of each setting, by dotted key.
    """

    def __init__(self, recorded: Recorded, settings: Mapping[str, Any] | None = None,
                 use: Callable[[dict[str, Any]], str] | None = None) -> None:
        self.recorded, self.use = recorded, use or write_settings
        self.presets = reward_scenes.presets(recorded.config)
        self.initial = self.presets["paper"] | dict(settings or self.presets["ours"])
        configs.replace(Config(), self.initial)  # refuses what no config takes
        self.scene: Scene | None = None
        self.controls = {key: _control(key) for key in KEYS}
        self.against = widgets.Dropdown(options=list(self.presets), value="paper", description="ranks against",
                                        style=_STYLE, layout={"width": "auto"})
        middle = int((recorded.groups["pass_rate"] - 0.5).abs().idxmin())
        self.group = widgets.IntSlider(middle, 0, len(recorded.groups) - 1, description="group shown",
                                       style=_STYLE, layout={"width": "auto"})
        self.task = widgets.Dropdown(options=[FREE, *TASKS], description="task", style={"description_width": "3em"},
                                     layout={"width": "24em"})
        self.goal = widgets.HTML()
        self.figure = go.FigureWidget(reward_figures.blank(recorded))
        self.page, self.note = widgets.HTML(layout={"height": "420px", "overflow": "auto"}), widgets.HTML()
        self.copy, self.config_text = CopyButton(), widgets.Textarea(
            description="config", layout={"width": "auto", "height": "13em"})
        self.box = self._arrange()
        for control in (*self.controls.values(), self.against):
            control.observe(self._moved, "value")
        self.group.observe(lambda change: self._show_group(), "value")
        self.task.observe(lambda change: self._begin_task(), "value")
        self.apply(self.initial)

    @property
    def settings(self) -> dict[str, Any]:
        """What is set now, by dotted key: for `config.replace`, or for a training panel."""
        return {key: control.value for key, control in self.controls.items()}

    @property
    def message(self) -> str:
        """What the panel last said to the reader, as HTML."""
        return self.note.value

    def apply(self, settings: Mapping[str, Any]) -> None:
        """Set several controls and redraw once; keys that the lab has no control for are left alone.

        Raises:
            ConfigError: an unknown key or a value that is not allowed; nothing is changed.
        """
        configs.replace(Config(), settings)
        with self._one_redraw():
            for key, value in settings.items():
                if key in self.controls:
                    if key.endswith("_weight"):
                        self.controls[key].max = max(MOST_WEIGHT, value)
                    self.controls[key].value = value

    def reset(self) -> None:
        """Back to what the panel began with."""
        with self._one_redraw():
            self.task.value = FREE
            self.against.value = "paper"
            self.apply(self.initial)

    def select(self, group: int) -> None:
        """Show one group, by its number."""
        self.group.value = group

    def toml(self) -> str:
        """The settings as a config file."""
        return as_toml(self.settings)

    def static(self) -> go.Figure:
        """The figure as it stands, for a page without widgets."""
        return reward_figures.picture(self.recorded, self.scene, self.group.value)

    def redraw(self) -> None:
        """Score everything under the present setting and show it; a setting that pays nothing is said, not drawn."""
        released, brier = (self.settings[key] == value for key, value in
                           (("reward.mode", "released"), ("reward.difficulty_mode", "brier")))
        for key, control in self.controls.items():
            control.disabled = ((released and key not in ("reward.mode", "update.normalise_meta"))
                                or (brier and key == "reward.difficulty_base"))
        try:
            self.scene = reward_scenes.scene(self.recorded, self.settings, self.presets[self.against.value])
        except ValueError as error:
            self._say(str(error))
            return
        self.copy.text = self.config_text.value = self.toml()
        self._say(f"Mean reward {self.scene.payments.sum(axis=1)['recorded']:.3f}. The best constant answer: "
                  f"{self.scene.answer}.")
        self._show_task()
        self._show_group()

    def _begin_task(self) -> None:
        """A task begins with the published setting."""
        if self.task.value == FREE:
            self._show_task()
        else:
            self.apply(self.presets["paper"])

    def _show_task(self) -> None:
        """The goal, what to turn, and how far the reader is; a screen reader says it when it changes."""
        task = TASKS.get(self.task.value)
        if not task:
            self.goal.value = ("<div>Turn what you like, or choose a task. <i>Tab</i> goes to the next knob, arrow "
                               "keys turn it.</div>")
            return
        said = task.verdict(self.scene, self.settings, self.presets["paper"])
        color = GREEN if said.startswith("Reached") else VERMILLION
        self.goal.value = (f"<div style='line-height:1.35'><b>Goal:</b> {task.goal} <b>Turn:</b> {task.turn}<br><span "
                           f"role='status' style='border-left:4px solid {color};padding-left:6px'><b>{said}</b></span>"
                           "</div>")

    def _show_group(self) -> None:
        with self.figure.batch_update():
            reward_figures.fill(self.figure, self.recorded, self.scene, self.group.value)
        config = configs.replace(Config(), self.settings)
        self.page.value = reward_figures.group_page(self.recorded, self.scene, config, self.group.value)

    def _hand_over(self) -> None:
        try:
            self._say(self.use(self.settings))
        except (OSError, files.RunError) as error:
            self._say(f"The settings were not handed over: {error}")

    def _say(self, text: str) -> None:
        self.note.value = f"<span>{reward_figures.html.escape(text)}</span>"

    def _arrange(self) -> widgets.Widget:
        buttons = [*(button(name, functools.partial(self.preset, name), tooltip=f"Preset: {name}")
                     for name in self.presets),
                   button("Reset", self.reset, tooltip="Back to the beginning"),
                   button("Use in training", self._hand_over, tooltip="Hand the settings to the training panel")]
        row = {"flex_flow": "row wrap"}
        knobs = widgets.VBox([widgets.HBox(buttons[:-1], layout=row), *(self.controls[key] for key in ORDER),
                              self.against, self.group, widgets.HBox([buttons[-1], self.copy], layout=row)],
                             layout={"width": _KNOBS, "flex": f"0 0 {_KNOBS}"})
        return widgets.VBox([
            widgets.HBox([self.task], layout=row), self.goal,
            widgets.HBox([knobs, self.figure], layout={"align_items": "flex-start"}), self.note, self.page,
            self.config_text, Keys()])


def as_toml(settings: Mapping[str, Any]) -> str:
    """Settings by dotted key as a config file, which `config.load` and `masa train --config` read."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section, {})[name] = value
    return tomli_w.dumps(tables)


def write_settings(settings: Mapping[str, Any], path: Path = SETTINGS_FILE) -> str:
    """Write settings as a config file, for `config.read`; returns what to tell the reader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, lambda part: part.write_text(as_toml(settings), encoding="utf8"))
    return (f"Written to {path.parent.name}/{path.name}. The training panel of notebook 04 begins with it, and so does "
            f"masa train --config {path.parent.name}/{path.name}.")


def _control(key: str) -> Any:
    """The control of a setting, made from the setting's own documentation and limits."""
    field = configs.settings()[key]
    about = {"description": LABELS[key], "tooltip": field.doc, "style": _STYLE, "layout": {"width": "auto"}}
    if field.choices:
        return widgets.Dropdown(options=list(field.choices), value=field.default, **about)
    if isinstance(field.default, bool):
        return widgets.Checkbox(field.default, **about | {"style": {"description_width": "initial"}})
    if key == "reward.difficulty_base":
        return widgets.FloatLogSlider(field.default, min=LEAST_BASE, max=0, step=0.05, readout_format=".3g", **about)
    return widgets.FloatSlider(field.default, min=0.0, max=field.le or MOST_WEIGHT, step=0.05, **about)
