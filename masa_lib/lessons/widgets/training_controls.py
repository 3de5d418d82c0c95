"""The settings in the training panel: what is fixed before the first step, the knobs, and where they come from.

A new run begins with the settings of the cell, on top of the model's tier, and with those of a file that another panel
handed over, until these are given back. Nothing here knows a run: what a turned knob does is the panel's.
"""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.lessons.widgets import knobs
from masa_lib.lessons.widgets.knobs import LIVE, OPEN_GATE, TABS, acts
from masa_lib.lessons.widgets.panel import button
from masa_lib.models import memory, tiers

#: what is fixed before the first step, and its label
SETUP = {"model.name": "model", "problems.source": "problems", "method": "method", "sampling.engine": "engine",
         "steps": "budget, steps", "seed": "seed"}
PRE = "margin:0;font-size:12px;line-height:1.35;white-space:pre-wrap;word-break:normal"
Telling = Callable[[str | None], contextlib.AbstractContextManager[None]]


class Controls:
    """Controls for the settings of a training.

    Args:
        own: dotted keys to begin with; what they leave open has the defaults of the model's tier.
        turned: is told of knobs that somebody turned, values by dotted key.
        telling: a context that shows a text, or instead what went wrong inside.

    Attributes:
        setup: controls of what is fixed before the first step, by dotted key.
        knobs: controls of what may change while a run trains.
        choosing: opens and closes the gate of a method that reads.
        tabs: the knobs that act under the method; `memory` the memory plan; `handed_row` what was handed over.
        began: the settings that a run began with; None while it is to begin.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """

    def __init__(self, own: Mapping[str, Any], turned: Callable[[Mapping[str, Any]], None], telling: Telling) -> None:
        self._own = self._settings = dict(own)
        self._turned, self._telling = turned, telling
        self._taken: tuple[str, dict[str, Any]] = ("", {})  # a file's name, and the settings that it handed over
        self._filling, self._planned = False, 0
        self.began: Config | None = None
        self._build()
        self.fill(tiers.config(self._settings))
        self._listen()

    def _build(self) -> None:
        self.setup = {key: knobs.fixed(key, label) for key, label in SETUP.items()}
        self.knobs = {key: knobs.knob(key) for key in LIVE}
        self.choosing = widgets.Checkbox(True, indent=True, description="gate: choose problems", **knobs.shared(
            "on: roll out the problems that the belief says have a signal; off: all, as grpo does"))
        self.reset_button = knobs.icon_button("reset knobs", "undo", "as the run began")
        self.handed, self.back_button = widgets.HTML(), button("without these", self.give_back, tooltip=(
            "begin with the settings of the cell and of the model's tier alone"))
        self.handed_row = widgets.HBox([self.back_button, self.handed],
                                       layout=widgets.Layout(display="none", flex_flow="row wrap"))
        self._pages = {title: knobs.columns([knob for key, knob in self.knobs.items()
                                             if key.partition(".")[0] in sections]) for title, sections in TABS.items()}
        self._pages["Belief"].children = (self.choosing, *self._pages["Belief"].children)
        self.tabs, self.memory = widgets.Tab(), knobs.text("88px")

    def _listen(self) -> None:
        self.reset_button.on_click(lambda _: self.reset())
        for key, widget in self.setup.items():
            widget.observe(lambda change, key=key: self._chosen(key), "value")
        for key, widget in self.knobs.items():
            widget.observe(lambda change, key=key: self._tell({key: change["new"]}), "value")
        self.choosing.observe(lambda change: self._choose(change["new"]), "value")

    def chosen(self) -> dict[str, Any]:
        """The settings of a new run that differ from the defaults of the model's tier, by dotted key."""
        found = self._settings | {key: widget.value for key, widget in (self.setup | self.knobs).items()}
        usual = tiers.config({"model.name": found["model.name"]})
        return {key: value for key, value in found.items() if key == "model.name" or configs.get(usual, key) != value}

    def first(self) -> Config:
        """The settings as the run began, or is to begin."""
        return self.began or tiers.config(self._settings | {"model.name": self.setup["model.name"].value})

    def enable(self, state: str) -> None:
        """Open what can be set in a state of the run."""
        for widget in (*self.setup.values(), self.back_button):
            widget.disabled = state != "new"
        for widget in (self.choosing, *self.knobs.values()):
            widget.disabled = state in ("starting", "finished")

    def reset(self) -> None:
        """Turn all knobs back to how the run began, or is to begin."""
        first = self.first()
        changed = {key: value for key, knob in self.knobs.items() if (value := configs.get(first, key)) != knob.value}
        self.fill(first, changed)
        if changed:
            self._turned(changed)

    def take(self, file: Path) -> None:
        """Begin with the settings of a file as well, and say which these are; nothing where there is no such file."""
        with self._telling(None):
            settings = configs.read(file) if file.is_file() else {}
            if settings:
                config = tiers.config(self._own | settings)
                self._settings = self._own | settings
                self.fill(config)
                self._taken = f"{file.parent.name}/{file.name}", settings
                self.handed_row.layout.display = "flex"
                self._offer(config)

    def give_back(self) -> None:
        """Begin without the settings that a file handed over; the file stays as it is."""
        handed = [key for key, value in self._settings.items() if key not in self._own or self._own[key] != value]
        self._settings, self.handed_row.layout.display = self._own, "none"
        with self._telling("Begins without them."):
            self.fill(self.first(), handed)

    def fill(self, config: Config, keys: Collection[str] | None = None) -> None:
        """Set the controls (of these keys, by default all) to a config, without acting on it."""
        with self._still():
            for key, widget in (self.setup | self.knobs).items():
                if keys is None or key in keys:
                    value = configs.get(config, key)
                    if hasattr(widget, "max") and value > widget.max:
                        widget.max = value
                    widget.value = value
            if keys is None or set(keys) & set(OPEN_GATE):
                self.choosing.value = any(self.knobs[key].value != value for key, value in OPEN_GATE.items())
        self._filled = config
        self._offer(configs.replace(config, {"method": self.setup["method"].value}))

    def plan(self) -> threading.Thread:
        """Work out the memory plan, beside the kernel: a model of the hub may first have to be asked for its sizes."""
        self._planned = number = self._planned + 1
        self.memory.value = "The memory plan is worked out ..."

        def work() -> None:
            """Show the plan, unless another was asked for since."""
            try:
                text = memory.text(tiers.config(self.chosen()))
            except Exception as error:
                text = f"No memory plan: {error}"
            if number == self._planned:
                self.memory.value = f"<pre style='{PRE}'>{html.escape(text)}</pre>"

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _offer(self, config: Config) -> None:
        """Show the knobs that do something under the config's method, and say what of the settings handed over does."""
        for key, knob in self.knobs.items():
            knob.layout.display = None if acts(config, key) else "none"
        self.choosing.layout.display = None if acts(config, "belief.candidates") else "none"
        shown = [title for title, page in self._pages.items()
                 if any(knob.layout.display != "none" for knob in page.children)]
        if shown != list(self.tabs.titles):
            self.tabs.children, self.tabs.titles = [self._pages[title] for title in shown], shown
            self.tabs.selected_index = 0
        name, settings = self._taken
        listed = ", ".join(f"{key} = {value}" for key, value in settings.items())
        idle = ", ".join(key for key in settings if not acts(config, key))
        said = f" Nothing under the method {config.method}: {idle}." if idle else ""
        self.handed.value = html.escape(f"Begins with the settings of {name}: {listed}.{said}")

    def _chosen(self, key: str) -> None:
        """Another model brings its tier's defaults; every choice brings another memory plan."""
        if self._filling:
            return
        if key == "model.name":
            with self._telling(""):
                self.fill(tiers.config(self._settings | {key: self.setup[key].value}))
        if key == "method":
            self._offer(configs.replace(self._filled, {key: self.setup[key].value}))
        self.plan()

    def _tell(self, settings: Mapping[str, Any]) -> None:
        if not self._filling:
            self._turned(settings)

    def _choose(self, chooses: bool) -> None:
        """Open or close the gate of a method that reads: two knobs, one change."""
        if not self._filling:
            wanted = {key: configs.get(self.first(), key) for key in OPEN_GATE} if chooses else OPEN_GATE
            self.fill(configs.replace(self._filled, wanted), wanted)
            self._turned(wanted)

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Controls change inside without acting."""
        self._filling = True
        try:
            yield
        finally:
            self._filling = False
