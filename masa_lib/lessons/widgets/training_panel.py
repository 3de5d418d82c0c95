"""The training panel: choose, start, watch and steer a training that runs in a process of its own.

The panel only reads and writes files: the run's folder, and in it the control file (see `live_control`). So the kernel
never waits for the training, closing the page stops nothing, and a panel on the same folder finds the run again. A
thread looks at the folder every second; it sets widget traits and does nothing else. What is drawn comes from
`training_view`.
"""

from __future__ import annotations

import contextlib
import html
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets as widgets
import plotly.graph_objects as go

from masa_lib import config as configs
from masa_lib.analysis import health
from masa_lib.analysis.costs import totals
from masa_lib.config import Config
from masa_lib.errors import MasaError
from masa_lib.lessons import environment
from masa_lib.lessons.widgets import ghost as ghosts
from masa_lib.lessons.widgets import knobs, training_records
from masa_lib.lessons.widgets import training_view as view
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.knobs import LIVE, OPEN_GATE, TABS, acts
from masa_lib.lessons.widgets.panel import button
from masa_lib.models import memory, tiers
from masa_lib.runs import live_control
from masa_lib.runs.folder import CHANGES, EVALUATIONS, METRICS, READINGS, ROLLOUTS, Run, is_run

#: what a run is given so that there is something to see; `settings` go before it
RECORD = {"evaluation.read_every": 1, "record.rollouts_every": 2, "record.checkpoint_every": 10}
SETUP = {"model.name": "model", "problems.source": "problems", "method": "method", "sampling.engine": "engine",
         "steps": "budget, steps", "seed": "seed"}
#: what each button does, and the states of a run in which it can be pressed
BUTTONS = {
    "start": ("play", "train in a process of its own", ("new",)),
    "pause": ("pause", "wait after the running step", ("running",)),
    "step": ("step-forward", "do one more step, then wait", ("paused",)),
    "go on": ("forward", "end the pause", ("pausing", "paused")),
    "stop": ("stop", "end after the running step, with a checkpoint", ("running", "pausing", "paused")),
    "resume": ("refresh", "go on from the last checkpoint", ("stopped", "failed", "killed"))}
#: redraws of a recorded run that is played from its beginning to its end, at most, and milliseconds between two
FRAMES, MILLISECONDS = 40, 400
#: between two looks at the folder
SECONDS = 1.0
PRE = "margin:0;font-size:12px;line-height:1.35;white-space:pre-wrap;word-break:normal"


class TrainingPanel:
    """A panel over one run's folder; show it as the last line of a cell. Of several over one folder the newest watches.

    Args:
        out: the run's folder; a run that is there is found again, whether it trains or not.
        settings: dotted keys to begin with; what they leave open has the defaults of the model's tier.
        handed: a config file whose settings a new run begins with, too, such as the reward lab's "Use in training"
            writes; the panel says so, and a button takes them back. Nothing where there is no such file.
        ghost: recorded runs of one arm, a seed each, whose accuracy by tokens is drawn behind that of this run.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """

    _newest: ClassVar[dict[str, TrainingPanel]] = {}

    def __init__(self, out: str | Path = "runs/panel", settings: Mapping[str, Any] | None = None,
                 handed: str | Path | None = None, ghost: Sequence[str | Path] = ()) -> None:
        self._ghost_paths, self._ghost, self._ghost_on = tuple(ghost), None, ()
        self._began = time.monotonic()  # when this panel saw the run begin to load
        self._own = self.settings = RECORD | dict(settings or {})
        self.state, self.process = "", None
        self.records = training_records.nothing(tiers.config(self.settings))
        self.reader = training_records.Reader(out)
        self._seen, self._problem, self._filling, self._planned = None, 0, False, 0
        self._taken: tuple[str, dict[str, Any]] = ("", {})  # a file's name, and the settings that it handed over
        self._guard = threading.RLock()
        self._build(str(out))
        self._fill(self.records.config)
        self._listen()
        self.refresh()
        if handed and self.state == "new":
            self._take(Path(handed))
        self._newest[str(out)] = self
        threading.Thread(target=self._watch, daemon=True).start()

    # What it looks like.

    def _build(self, out: str) -> None:
        self.out = widgets.Text(out, description="folder", continuous_update=False,
                                **knobs.shared("where the run is kept"))
        self.setup = {key: knobs.fixed(key, label) for key, label in SETUP.items()}
        self.knobs = {key: knobs.knob(key) for key in LIVE}
        self.choosing = widgets.Checkbox(True, indent=True, description="gate: choose problems", **{
            name: value for name, value in knobs.shared("").items() if name != "tooltip"}, tooltip=(
                "on: roll out the problems that the belief says have a signal; off: all, as grpo does"))
        self.buttons = {name: knobs.icon_button(name, icon, about) for name, (icon, about, _) in BUTTONS.items()}
        self.reset_button = knobs.icon_button("reset knobs", "undo", "as the run began")
        self.next_button = knobs.icon_button("next problem", "arrow-right",
                                             "another problem of the newest recorded step")
        self.progress = widgets.IntProgress(0, 0, 1, layout=widgets.Layout(width="180px"))
        self.status, self.message, self.memory = knobs.text("28px"), knobs.text("28px"), knobs.text("88px")
        self.meter = knobs.text("110px")
        self.shown = widgets.IntSlider(0, 0, 1, description="show step", continuous_update=False,
                                       **knobs.shared("look at a finished run as it was after a step"))
        self.play = widgets.Play(0, 0, 1, interval=MILLISECONDS, show_repeat=False)
        self.replay = widgets.HBox([self.shown, self.play], layout=widgets.Layout(display="none"))
        self.handed, self.back_button = widgets.HTML(), button("without these", self.give_back, tooltip=(
            "begin with the settings of the cell and of the model's tier alone"))
        self.handed_row = widgets.HBox([self.back_button, self.handed],
                                       layout=widgets.Layout(display="none", flex_flow="row wrap"))
        self.changes, self.sample = knobs.text("90px"), knobs.text("260px")
        self.figure = go.FigureWidget(view.figure(self.records))
        self.pages = {title: knobs.columns([knob for key, knob in self.knobs.items()
                                            if key.partition(".")[0] in sections]) for title, sections in TABS.items()}
        self.pages["Belief"].children = (self.choosing, *self.pages["Belief"].children)
        self.tabs = widgets.Tab()
        self.fixed = widgets.Accordion(
            [widgets.VBox([knobs.columns([*self.setup.values(), self.out]), self.memory])],
            titles=("What is trained, fixed before the first step; memory plan",))
        self.more = widgets.Accordion([widgets.VBox([self.changes, self.next_button, self.sample])],
                                      titles=("Changed settings, and a problem with its solutions",), selected_index=0)
        self.box = widgets.VBox([
            self.handed_row, self.fixed,
            widgets.HBox([*self.buttons.values(), self.reset_button, self.progress],
                         layout=widgets.Layout(flex_flow="row wrap")),
            self.status, self.message, self.tabs, self.replay, self.meter, self.figure, self.more, Keys()])

    def _listen(self) -> None:
        acts = (self.start, self.pause, self.step, self.go_on, self.stop, self.resume)
        for pressed, act in zip(self.buttons.values(), acts, strict=True):
            pressed.on_click(lambda _, act=act: act())
        self.reset_button.on_click(lambda _: self.reset())
        self.next_button.on_click(lambda _: self.next_problem())
        self.out.observe(lambda _: self._turn_to_folder(), "value")
        for key, widget in self.setup.items():
            widget.observe(lambda change, key=key: self._chosen(key), "value")
        for key, widget in self.knobs.items():
            widget.observe(lambda change, key=key: self._turned({key: change["new"]}), "value")
        self.choosing.observe(lambda change: self._choose(change["new"]), "value")
        widgets.jslink((self.play, "value"), (self.shown, "value"))
        self.shown.observe(lambda _: self._show_step(), "value")

    def _repr_mimebundle_(self, **more: Any) -> dict[str, Any]:
        """The panel; where a page without widgets is made (`environment.STATIC`), a picture of the run instead."""
        if not environment.STATIC:
            return self.box._repr_mimebundle_(**more)
        if self.records.metrics.empty:
            return {"text/plain": "In a live notebook, the training panel opens here."}
        return view.figure(self.records, self._ghost)._repr_mimebundle_(**more)

    # What the buttons and the knobs do.

    def start(self) -> None:
        """Train with what is chosen."""
        self._launch(lambda: live_control.start(self.out.value, self.chosen()))

    def resume(self) -> None:
        """Go on with a run that was stopped or killed."""
        self._launch(lambda: live_control.resume(self.out.value))

    def pause(self) -> None:
        """Let the training wait after the running step."""
        self._order(live_control.pause, "It waits after the running step.")

    def step(self) -> None:
        """Let a paused training do one step."""
        self._order(live_control.step, "One step, then it waits again.")

    def go_on(self) -> None:
        """End a pause."""
        self._order(live_control.proceed, "")

    def stop(self) -> None:
        """End the training after the running step."""
        self._order(live_control.stop, "It stops after the running step (or evaluation), with a checkpoint.")

    def reset(self) -> None:
        """Turn all knobs back to how the run began, or is to begin."""
        first = self._first()
        changed = {key: value for key, knob in self.knobs.items() if (value := configs.get(first, key)) != knob.value}
        self._fill(first, changed)
        if changed:
            self._turned(changed)

    def _take(self, file: Path) -> None:
        """Begin with the settings of a file as well, and say which these are."""
        with self._telling(None):
            settings = configs.read(file) if file.is_file() else {}
            if settings:
                config = tiers.config(self._own | settings)
                self.settings = self._own | settings
                self._fill(config)
                self._taken = f"{file.parent.name}/{file.name}", settings
                self.handed_row.layout.display = "flex"
                self._offer(config)

    def _offer(self, config: Config) -> None:
        """Show the knobs that do something under the config's method, and say what of the settings handed over does."""
        for key, knob in self.knobs.items():
            knob.layout.display = None if acts(config, key) else "none"
        self.choosing.layout.display = None if acts(config, "belief.candidates") else "none"
        shown = [title for title, page in self.pages.items()
                 if any(knob.layout.display != "none" for knob in page.children)]
        if shown != list(self.tabs.titles):
            self.tabs.children, self.tabs.titles = [self.pages[title] for title in shown], shown
            self.tabs.selected_index = 0
        name, settings = self._taken
        listed = ", ".join(f"{key} = {value}" for key, value in settings.items())
        idle = ", ".join(key for key in settings if not acts(config, key))
        said = f" Nothing under the method {config.method}: {idle}." if idle else ""
        self.handed.value = html.escape(f"Begins with the settings of {name}: {listed}.{said}")

    def give_back(self) -> None:
        """Begin without the settings that a file handed over; the file stays as it is."""
        handed = set(self.settings) - set(self._own) | {key for key in self._own
                                                        if self.settings.get(key) != self._own[key]}
        self.settings, self.handed_row.layout.display = self._own, "none"
        model = {"model.name": self.setup["model.name"].value}
        self._fill(tiers.config(self._own | model), dict.fromkeys(handed))
        self._tell("Begins without them.")

    def next_problem(self) -> None:
        """Show another problem of the newest recorded step."""
        self._problem += 1
        self.sample.value = view.sample_html(self.records.rollouts, self._problem)

    def chosen(self) -> dict[str, Any]:
        """The settings of a new run that differ from the defaults of the model's tier, by dotted key."""
        found = self.settings | {key: widget.value for key, widget in (self.setup | self.knobs).items()}
        usual = tiers.config({"model.name": found["model.name"]})
        return {key: value for key, value in found.items() if key == "model.name" or configs.get(usual, key) != value}

    def _launch(self, begin: Callable[[], subprocess.Popen]) -> None:
        self._began = time.monotonic()
        with self._telling("Model and problems are loaded, then the held-out problems are solved once."):
            self.process = begin()
        self.refresh()

    def _order(self, order: Callable[[str], None], said: str) -> None:
        with self._telling(said):
            order(self.out.value)
        self.refresh()

    def _chosen(self, key: str) -> None:
        """Another model brings its tier's defaults; every choice brings another memory plan."""
        if not self._filling:
            if key == "model.name":
                with self._telling(""):
                    self._fill(tiers.config(self.settings | {key: self.setup[key].value}))
            if key == "method":
                self._offer(configs.replace(self._filled, {key: self.setup[key].value}))
            self._plan()

    def _turned(self, settings: Mapping[str, Any]) -> None:
        """Knobs were turned: before a run they are its settings, later a change from the next step on."""
        if not self._filling and self._run_exists():
            asked = ", ".join(f"{key} = {value}" for key, value in settings.items())
            with self._telling(f"Asked for, from the next step on: {asked}."):
                live_control.change(self.out.value, settings)

    def _choose(self, chooses: bool) -> None:
        """Open or close the gate of a method that reads: two knobs, one change."""
        if not self._filling:
            wanted = {key: configs.get(self._first(), key) for key in OPEN_GATE} if chooses else OPEN_GATE
            self._fill(configs.replace(self._filled, wanted), wanted)
            self._turned(wanted)

    def _first(self) -> Config:
        """The settings as the run began, or is to begin."""
        return self.records.config if self._run_exists() else tiers.config(
            self.settings | {"model.name": self.setup["model.name"].value})

    def _show_step(self) -> None:
        """Show a run that is not training as it was after a step."""
        with self._guard, self._telling(None):
            if not self._filling and self._run_exists() and self.state not in live_control.ALIVE:
                self.records = self.reader.read(self.shown.value)
                self._draw()
                self._say()

    def _turn_to_folder(self) -> None:
        with self._guard:
            self.state, self.process, self._seen, self.figure.data = "", None, None, ()
            self.records = training_records.nothing(tiers.config(self.settings))
            self.reader = training_records.Reader(self.out.value)
            self._draw()
            self._newest[self.out.value] = self
            self.refresh()

    # What it shows.

    def refresh(self) -> None:
        """Read the folder and show what is new."""
        with self._guard, self._telling(None):
            self._look()

    def _watch(self) -> None:
        while self._newest.get(self.out.value) is self:
            time.sleep(SECONDS)
            self.refresh()

    def _look(self) -> None:
        out = Path(self.out.value)
        state = live_control.state(out, self.process)
        if state == "failed" and not self._run_exists():
            self._tell(live_control.last_words(out))
            state, self.process = "new", None
        if state != self.state:
            self._turn_to_state(state)
        seen = [(path.stat().st_mtime_ns, path.stat().st_size) if (path := out / name).exists() else None
                for name in (METRICS, EVALUATIONS, READINGS, ROLLOUTS, CHANGES)]
        if self._run_exists() and seen != self._seen:
            self.records, self._seen = self.reader.read(), seen
            self._draw()
        self._say()

    def _turn_to_state(self, state: str) -> None:
        """Open and close the controls for a state of the run; a run that is new to the panel fills them in."""
        was, self.state = self.state, state
        for name, (_, _, states) in BUTTONS.items():
            self.buttons[name].disabled = state not in states
        self.back_button.disabled = state != "new"
        for widget in self.setup.values():
            widget.disabled = state != "new"
        for widget in (self.choosing, *self.knobs.values()):
            widget.disabled = state in ("starting", "finished")
        if not was or "new" in (was, state):
            self.fixed.selected_index = 0 if state == "new" else None
        self.replay.layout.display = "none" if state == "new" or state in live_control.ALIVE else "flex"
        self.out.disabled = state in live_control.ALIVE
        if not was:
            if self._run_exists():
                run = Run.open(self.out.value)
                self._fill(run.config_at(live_control.steps(run.path) + 1))
            self._plan().join()  # the first plan loads torch, which no other import should meet half-way

    def _draw(self) -> None:
        """Renew the figure: the numbers in place where the curves are the same as before."""
        self._find_ghost()
        drawn = view.figure(self.records, self._ghost)
        if [trace.name for trace in drawn.data] == [trace.name for trace in self.figure.data]:
            with self.figure.batch_update():
                for old, new in zip(self.figure.data, drawn.data, strict=True):
                    old.update(x=new.x, y=new.y, text=new.text, customdata=new.customdata, showlegend=new.showlegend)
                    if new.name == "belief":
                        old.marker.size = new.marker.size
                self.figure.layout.annotations = drawn.layout.annotations
                self.figure.layout.shapes = drawn.layout.shapes
                accuracy = f"xaxis{view.ACCURACY + 1}"
                self.figure.layout[accuracy].range = drawn.layout[accuracy].range
        else:
            self.figure.data = ()
            self.figure.add_traces(drawn.data)
            self.figure.layout = drawn.layout
        self.changes.value = view.changes_html(self.records.changes)
        self.sample.value = view.sample_html(self.records.rollouts, self._problem)
        self.meter.value = self._metered()
        self._set_slider()

    def _find_ghost(self) -> None:
        """The ghost on the problems of the newest evaluation; read again only where these are others."""
        if self._ghost_paths:
            tables = self.records.tables
            asked = tuple(tables[max(tables)]["problem_id"]) if tables else ()
            if self._ghost is None or asked != self._ghost_on:
                self._ghost, self._ghost_on = ghosts.read(self._ghost_paths, asked), asked

    def _metered(self) -> str:
        """What was spent by now, beside what the ghost had spent for as much."""
        if self.records.metrics.empty:
            return ""
        spent = totals(self.records.metrics)[list(ghosts.SHOWN)].iloc[-1]
        return ghosts.meter_html(ghosts.curve(self.records.metrics, self.records.evaluations), spent, self._ghost)

    def _set_slider(self) -> None:
        """Let the slider reach to the last step; while a run trains it stands there."""
        last = live_control.steps(self.out.value) if self._run_exists() else 0
        self._filling = True
        try:
            for one in (self.shown, self.play):
                one.max, one.step = max(last, 1), max(last // FRAMES, 1)
            if self.state in live_control.ALIVE or self.shown.value == 0:
                self.shown.value = last
        finally:
            self._filling = False

    def _say(self) -> None:
        steps, metrics = self.records.config.steps, self.records.metrics
        done = int(metrics["step"].max()) if len(metrics) else 0
        self.progress.max, self.progress.value = steps, done
        if self.state in live_control.ALIVE and not done:
            self.status.value = f"<b>{html.escape(self.state)}</b>: {self._loading()}"
            return
        speed = f", {metrics['seconds_total'].tail(5).mean():.1f} s a step" if "seconds_total" in metrics else ""
        why = Run.open(self.out.value).status["message"] if self.state in ("stopped", "failed") else ""
        why = " ".join(filter(None, (why, *health.troubles(metrics, self.records.config.model.precision))))
        said = html.escape(f": step {done} of {steps}{speed}. {why[:view.LONGEST]}")
        self.status.value = f"<b>{html.escape(self.state)}</b>{said}"

    def _loading(self) -> str:
        """What goes on before the first step is finished, and for how long."""
        seconds = f"{time.monotonic() - self._began:.0f} s"
        if self.state == "starting" or not self._run_exists():
            return f"model and problems are loaded, {seconds}."
        if self.records.evaluations.empty:
            return f"held-out problems are solved before the first step, {seconds}."
        return f"the first of {self.records.config.steps} steps, {seconds}."

    def _plan(self) -> threading.Thread:
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

    def _fill(self, config: Config, keys: Mapping[str, Any] | None = None) -> None:
        """Set the controls (of these keys, by default all) to a config, without acting on it."""
        self._filling = True
        try:
            for key, widget in (self.setup | self.knobs).items():
                if keys is None or key in keys:
                    value = configs.get(config, key)
                    if hasattr(widget, "max") and value > widget.max:
                        widget.max = value
                    widget.value = value
            if keys is None or set(keys) & set(OPEN_GATE):
                self.choosing.value = any(self.knobs[key].value != value for key, value in OPEN_GATE.items())
        finally:
            self._filling = False
        self._filled = config
        self._offer(configs.replace(config, {"method": self.setup["method"].value}))

    def _run_exists(self) -> bool:
        return is_run(self.out.value)

    @contextlib.contextmanager
    def _telling(self, said: str | None) -> Iterator[None]:
        """Say this (None: nothing new), or what went wrong instead: nobody sees an exception of a callback."""
        try:
            yield
        except Exception as error:
            self._tell(str(error) if isinstance(error, MasaError) else f"{type(error).__name__}: {error}")
        else:
            if said is not None:
                self._tell(said)

    def _tell(self, text: str) -> None:
        self.message.value = html.escape(text[:view.LONGEST])
