"""The controls of the training panel: one a setting, by its type and limits, and whether it does anything.

Deliberately no state: a control is built, shown or hidden here, and what turning it means is the panel's.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.gates.baselines import GATES
from masa_lib.models import tiers
from masa_lib.runs import live_control
from masa_lib.tasks import problems

LIVE = [key for key in configs.settings() if key.startswith(live_control.LIVE)]
#: the tabs of knobs, and the sections of settings that each has; a knob that does nothing under the method is hidden
TABS = {"Belief": ("prediction", "belief"), "Reward": ("reward",), "Update": ("update",), "Gate": ("gate",),
        "Cap and hint": ("cap",)}
#: what makes masa-read choose nothing: all problems of a step are rolled out, and no others are looked at
OPEN_GATE = {"belief.places": 1.0, "belief.candidates": 1.0}
#: what acts on predictions that are sampled alone
_SAMPLED = ("update.meta_weight", "update.meta_entropy", "update.normalise_meta", "sampling.shared_beginning",
            "sampling.predictions", "sampling.meta_tokens")


def acts(config: Config, key: str) -> bool:
    """Whether a setting of rewards, gates, caps, beliefs or the meta stream does anything under the config's method."""
    part, method = key.partition(".")[0], config.method
    if key == "reward.mode":  # solutions are graded by it, too
        return True
    if part == "reward" or key in _SAMPLED:
        return configs.samples_predictions(config)
    if part == "prediction":
        return configs.reads(config)
    if part == "belief":
        return method in configs.CHOOSING and (method != "random" or key == "belief.places")
    if key == "gate.window":
        return method not in ("grpo", "masa")
    if part == "gate" and method in GATES:
        return key in ("gate.places", "gate.candidates") or (method, key) == ("level-table", "gate.recheck")
    return method == "masa-efficient" if part in ("gate", "cap") else True


def shared(tooltip: str) -> dict[str, Any]:
    """What labelled controls have in common."""
    return {"tooltip": tooltip, "style": {"description_width": "115px"}, "layout": widgets.Layout(width="300px")}


def fixed(key: str, label: str) -> widgets.ValueWidget:
    """A control for what is fixed before the first step: a menu, a menu with free text, or a whole number."""
    field = configs.settings()[key]
    more = shared(field.doc) | {"description": label}
    if field.choices:
        return widgets.Dropdown(options=list(field.choices), **more)
    if isinstance(field.default, int):
        return widgets.BoundedIntText(min=field.ge, max=2**32 - 1, **more)
    names = [row["name"] for row in (tiers.table() if key == "model.name" else problems.sources())]
    return widgets.Combobox(options=[name for name in names if "<" not in name], continuous_update=False, **more)


def knob(key: str) -> widgets.ValueWidget:
    """A control for a setting that may change live, by its type and limits; it acts when a move ends."""
    field = configs.settings()[key]
    low, (section, _, name) = field.ge or 0, key.partition(".")
    more = shared(field.doc) | {"description": f"{'belief ' * (section == 'prediction')}{name.replace('_', ' ')}"}
    if field.choices:
        return widgets.Dropdown(options=list(field.choices), **more)
    if isinstance(field.default, bool):
        return widgets.Checkbox(indent=False, **more)  # beside an indent the longest label is cut off
    if isinstance(field.default, int):
        return widgets.BoundedIntText(min=low, max=10**6, continuous_update=False, **more)
    if field.le is not None and 0 < field.default < 0.005:  # a learning rate: a slider is too coarse
        return widgets.BoundedFloatText(min=low, max=field.le, step=field.default / 10, **more)
    high = field.le or max(4.0, 2 * field.default)
    step = 0.001 if field.gt is not None else 0.01
    return widgets.FloatSlider(min=low if field.gt is None else step, max=high, step=step,
                               readout_format=".3f" if step < 0.01 else ".2f", continuous_update=False, **more)


def icon_button(name: str, icon: str, about: str) -> widgets.Button:
    """A button of the panel's row."""
    return widgets.Button(description=name, icon=icon, tooltip=about,
                          layout=widgets.Layout(width="auto", min_width="88px"))


def text(height: str) -> widgets.HTML:
    """A place for text that does not grow."""
    return widgets.HTML(layout=widgets.Layout(height=height, overflow="auto", width="98%"))


def columns(children: list[widgets.Widget]) -> widgets.Widget:
    """Controls beside each other, as many as there is room for."""
    return widgets.GridBox(children, layout=widgets.Layout(grid_template_columns="repeat(auto-fill, 308px)"))
