"""The training panel: choose, start, watch and steer a training that runs in a process of its own.

The panel only reads and writes files: the run's folder, and in it the control file (see `live_control`). So the kernel
never waits for the training, closing the page stops nothing, and a panel on the same folder finds the run again. A
thread looks at the folder every second; it sets widget traits and does nothing else. What is set stands in
`training_controls`, what is drawn in `live_figure` and `training_view`, what is said in `training_words`.
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

from masa_lib.analysis import doctor
from masa_lib.errors import MasaError
from masa_lib.lessons import environment
from masa_lib.lessons.widgets import knobs, training_records
from masa_lib.lessons.widgets import training_view as view
from masa_lib.lessons.widgets import training_words as words
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.live_figure import LiveFigure
from masa_lib.lessons.widgets.training_controls import Controls
from masa_lib.runs import live_control, progress
from masa_lib.runs.folder import Run, is_run
from masa_lib.runs.records import CHANGES, EVALUATIONS, METRICS, READINGS, ROLLOUTS

#: what a run is given so that there is something to see; `settings` go before it
RECORD = {"evaluation.read_every": 1, "record.rollouts_every": 2, "record.checkpoint_every": 10}
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
        self._began = time.monotonic()  # when this panel saw the run begin to load
        self.state, self.process = "", None
        self._seen, self._problem, self._sliding = None, 0, False
        self._guard = threading.RLock()
        self.status, self.message = knobs.text("44px"), knobs.text("28px")
        self.controls = Controls(RECORD | dict(settings or {}), self._turned, self._telling)
        self.records = training_records.nothing(self.controls.first())
        self.reader = training_records.Reader(out)
        self.live = LiveFigure(self.records, ghost)
        self._build(str(out))
        self._listen()
        self.refresh()
        if handed and self.state == "new":
            self.controls.take(Path(handed))
        self._newest[str(out)] = self
        threading.Thread(target=self._watch, daemon=True).start()

    # What it looks like.

    def _build(self, out: str) -> None:
        controls = self.controls
        self.out = widgets.Text(out, description="folder", continuous_update=False,
                                **knobs.shared("where the run is kept"))
        self.buttons = {name: knobs.icon_button(name, icon, about) for name, (icon, about, _) in BUTTONS.items()}
        self.next_button = knobs.icon_button("next problem", "arrow-right",
                                             "another problem of the newest recorded step")
        self.progress, self.within = (widgets.IntProgress(0, 0, 1, description=name, layout={"width": "190px"},
                                                          style={"description_width": "56px"})
                                      for name in ("steps", "rollouts"))
        self.shown = widgets.IntSlider(0, 0, 1, description="show step", continuous_update=False,
                                       **knobs.shared("look at a finished run as it was after a step"))
        self.play = widgets.Play(0, 0, 1, interval=MILLISECONDS, show_repeat=False)
        self.replay = widgets.HBox([self.shown, self.play], layout=widgets.Layout(display="none"))
        self.why = widgets.ToggleButton(description="Why is my reward flat?", icon="stethoscope", layout={
            "width": "auto"}, tooltip="what the records say of it (masa doctor); again: hide it, and then look anew")
        self.findings = widgets.HTML(layout={"max_height": "260px", "overflow": "auto", "width": "98%"})
        self.changes, self.sample = knobs.text("90px"), knobs.text("260px")
        self.fixed = widgets.Accordion(
            [widgets.VBox([knobs.columns([*controls.setup.values(), self.out]), controls.memory])],
            titles=("What is trained, fixed before the first step; memory plan",))
        self.more = widgets.Accordion([widgets.VBox([self.changes, self.next_button, self.sample])],
                                      titles=("Changed settings, and a problem with its solutions",), selected_index=0)
        wraps = widgets.Layout(flex_flow="row wrap")
        self.box = widgets.VBox([
            controls.handed_row, self.fixed,
            widgets.HBox([*self.buttons.values(), controls.reset_button, self.why], layout=wraps),
            widgets.HBox([self.progress, self.within], layout=wraps), self.status, self.message, self.findings,
            controls.tabs, self.replay, self.live.meter, self.live.figure, self.more, Keys()])

    def _listen(self) -> None:
        acts = (self.start, self.pause, self.step, self.go_on, self.stop, self.resume)
        for pressed, act in zip(self.buttons.values(), acts, strict=True):
            pressed.on_click(lambda _, act=act: act())
        self.next_button.on_click(lambda _: self.next_problem())
        self.why.observe(lambda change: self._explain(change["new"]), "value")
        self.out.observe(lambda _: self._turn_to_folder(), "value")
        widgets.jslink((self.play, "value"), (self.shown, "value"))
        self.shown.observe(lambda _: self._show_step(), "value")

    def _repr_mimebundle_(self, **more: Any) -> dict[str, Any]:
        """The panel; where a page without widgets is made (`environment.STATIC`), a picture of the run instead."""
        if not environment.STATIC:
            return self.box._repr_mimebundle_(**more)
        if self.records.metrics.empty:
            return {"text/plain": "In a live notebook, the training panel opens here."}
        return self.live.bundle(self.records)

    # What the buttons and the knobs do.

    def start(self) -> None:
        """Train with what is chosen."""
        self._launch(lambda: live_control.start(self.out.value, self.controls.chosen()))

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

    def next_problem(self) -> None:
        """Show another problem of the newest recorded step."""
        self._problem += 1
        self.sample.value = view.sample_html(self.records.rollouts, self._problem)

    def _launch(self, begin: Callable[[], subprocess.Popen]) -> None:
        self._began = time.monotonic()
        with self._telling("Model and problems are loaded, then the held-out problems are solved once."):
            self.process = begin()
        self.refresh()

    def _order(self, order: Callable[[str], None], said: str) -> None:
        with self._telling(said):
            order(self.out.value)
        self.refresh()

    def _turned(self, settings: Mapping[str, Any]) -> None:
        """Knobs were turned: before a run they are its settings, later a change from the next step on."""
        if self._run_exists():
            asked = ", ".join(f"{key} = {value}" for key, value in settings.items())
            with self._telling(f"Asked for, from the next step on: {asked}."):
                live_control.change(self.out.value, settings)

    def _explain(self, shows: bool) -> None:
        """Show what the run's records say of a reward that stays flat, or hide it."""
        self.findings.value = ""
        if shows:
            with self._telling(None):
                run = Run.open(self.out.value)
                self.findings.value = words.findings_html(doctor.examine(run), live_control.steps(run.path))

    def _show_step(self) -> None:
        """Show a run that is not training as it was after a step."""
        with self._guard, self._telling(None):
            if not self._sliding and self._run_exists() and self.state not in live_control.ALIVE:
                self.records = self.reader.read(self.shown.value)
                self._draw()
                self._say()

    def _turn_to_folder(self) -> None:
        with self._guard:
            self.state, self.process, self._seen, self.controls.began = "", None, None, None
            self.live.clear()
            self.records = training_records.nothing(self.controls.first())
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
        run = Run.open(self.out.value) if self._run_exists() else None
        self.controls.began = run.config if run else None
        self.controls.enable(state)
        for name, (_, _, states) in BUTTONS.items():
            self.buttons[name].disabled = state not in states
        self.why.disabled = not run
        if not run:
            self.why.value = False
        if not was or "new" in (was, state):
            self.fixed.selected_index = 0 if state == "new" else None
        alive = state in live_control.ALIVE
        self.replay.layout.display = "none" if state == "new" or alive else "flex"
        self.out.disabled = alive
        self.within.layout.visibility = "visible" if alive else "hidden"
        if not was:
            if run:
                self.controls.fill(run.config_at(live_control.steps(run.path) + 1))
            self.controls.plan().join()  # the first plan loads torch, which no other import should meet half-way

    def _draw(self) -> None:
        """Renew what the records show."""
        self.live.draw(self.records)
        self.changes.value = view.changes_html(self.records.changes)
        self.sample.value = view.sample_html(self.records.rollouts, self._problem)
        self._set_slider()

    def _set_slider(self) -> None:
        """Let the slider reach to the last step; while a run trains it stands there."""
        last = live_control.steps(self.out.value) if self._run_exists() else 0
        self._sliding = True
        try:
            for one in (self.shown, self.play):
                one.max, one.step = max(last, 1), max(last // FRAMES, 1)
            if self.state in live_control.ALIVE or self.shown.value == 0:
                self.shown.value = last
        finally:
            self._sliding = False

    def _say(self) -> None:
        self.progress.max, self.progress.value = self.records.config.steps, words.finished(self.records)
        now = progress.read(self.out.value) if self.state in live_control.ALIVE else None
        if now and now.process != live_control.holder(self.out.value):
            now = None  # of a process that was killed
        self.within.max, self.within.value = (max(now.total, 1), now.done) if now else (1, 0)
        why = Run.open(self.out.value).status["message"] if self.state in ("stopped", "failed") else ""
        self.status.value = words.status_html(self.state, self.records, now, time.monotonic() - self._began, why)

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
