"""Live self-knowledge: type a problem, watch a model predict how it will go and then solve it G times.

Sampling runs in a thread that never prints: it sets widget traits, and what goes wrong is said in the panel. Texts from
readers and models are escaped wherever they get into HTML. It measures one problem; what many problems say together is
the business of `awareness`.
"""

from __future__ import annotations

import html
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, display

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.engines import Engine, engine_of
from masa_lib.lessons import environment
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import button
from masa_lib.lessons.widgets.self_view import EMPTY, figure, headline, page
from masa_lib.method import rollouts
from masa_lib.method.rollouts import Ask
from masa_lib.models import loading
from masa_lib.tasks import problems
from masa_lib.tasks.problem_rows import Problem

#: solutions sampled between two looks at the stop button, and between two drawings
CHUNK = 8
#: held-out problems among which "draw a problem" draws
DRAWN = 240
PATIENCE = 3.0  # seconds that a reset waits for the running rollouts
#: the method whose predictions are read
READS = {"method": "masa-read"}
_STYLE = {"description_width": "9em"}


class Halted(Exception):
    """The reader pressed stop."""


def ask(problem: Problem, engine: Engine, tokenizer: Any, config: Config, *, solutions: int, predictions: int,
        attempt: int = 0, told: Callable[[pd.DataFrame], Any] = lambda table: None,
        halted: Callable[[], bool] = lambda: False) -> pd.DataFrame:
    """Predict a problem M times (or read the belief about it), then solve it G times, CHUNK by CHUNK.

    Args:
        problem: with its answer, or an empty one.
        engine: who samples.
        tokenizer: of the model.
        config: wording, caps, temperature of the evaluation, seed; whether its method reads.
        solutions: G.
        predictions: M.
        attempt: another one gives other rollouts.
        told: is given all rollouts so far after the predictions and after each chunk.
        halted: whether to stop, looked at between chunks and whenever a rollout is finished.

    Returns:
        A row a rollout, as `rollouts.sample` gives them; a belief is a row of a stream of its own, `belief`.

    Raises:
        Halted: on demand; what was sampled has been told.
        EngineError: the problem does not fit the model's context.
    """
    def watch(finished: int = 0, tokens: int = 0) -> None:
        if halted():
            raise Halted

    limits, parts = config.sampling, []
    asks = [Ask("meta", 0, problem, (limits.meta_tokens,) * predictions)]
    asks += [Ask("solution", 0, problem, (limits.solution_tokens,) * min(CHUNK, solutions - first))
             for first in range(0, solutions, CHUNK)]
    for number, wanted in enumerate(asks):
        watch()
        sample = partial(rollouts.sample, engine=engine, tokenizer=tokenizer, config=config,
                         seed=[config.seed, attempt, number], temperature=config.evaluation.temperature, progress=watch)
        reads = wanted.stream == "meta" and configs.reads(config)
        part = _belief(problem, engine, tokenizer, config, sample) if reads else sample([wanted])
        parts.append(part.assign(member=part["member"] + max(number - 1, 0) * CHUNK))
        told(pd.concat(parts, ignore_index=True))
    return pd.concat(parts, ignore_index=True)


def _belief(problem: Problem, engine: Engine, tokenizer: Any, config: Config,
            sample: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """The belief about a problem as a row that fits under its rollouts."""
    (belief,), _ = rollouts.believe([problem], engine=engine, tokenizer=tokenizer, config=config, sample=sample)
    row = {"stream": "belief", "member": 0, "text": "", "length": 0, "answer": problem.answer, "correct": pd.NA,
           "notions": None, "parse_error": None, "predicted_pass_rate": pd.NA, "predicted_length": pd.NA,
           "belief": belief.probabilities}
    return pd.DataFrame([row]).astype({"correct": "boolean", "predicted_pass_rate": "Int64",
                                       "predicted_length": "Int64"})


class SelfKnowledge:
    """Controls, a figure and the texts; `ask` and `start` do what the button does, at once or in a thread.

    Args:
        choices: by a name for the reader, a folder with weights, or None for the config's own model.
        config: model, wording, caps and temperature; the source of "draw a problem".
        problem: to begin with; None draws one.
        solutions: G.
        predictions: M.
        readers: the choices whose belief is read instead.

    Attributes:
        table: the rollouts of the last question so far, as `rollouts.sample` gives them.
        error: what went wrong, empty if nothing did.
    """

    def __init__(self, choices: Mapping[str, Path | None], config: Config, problem: Problem | None = None, *,
                 solutions: int = 32, predictions: int = 8, readers: Collection[str] = ()) -> None:
        self.choices, self.config, self.readers, self.error = dict(choices), config, frozenset(readers), ""
        self.table: pd.DataFrame | None = None
        self._first, self._halt, self._thread = (problem, solutions, predictions), threading.Event(), None
        self._loaded: tuple[str, Engine, Any] | None = None
        self._attempt, self._held_out, self._drawn = 0, problems.held_out(config.problems, DRAWN), Counter()
        self._filled: Problem | None = None
        levels = sorted({entry.level for entry in self._held_out})
        self._build(levels)
        self.reset()

    def draw(self) -> None:
        """Put the next held-out problem of the chosen level into the fields, with its answer."""
        level = self.level.value
        here = [entry for entry in self._held_out if entry.level == level]
        self._fill(here[self._drawn[level] % len(here)])
        self._drawn[level] += 1

    def reset(self) -> None:
        """Stop, and back to what the panel began with."""
        self.stop()
        self.wait(PATIENCE)
        problem, self.solutions.value, self.predictions.value = self._first
        self.model.index, self.level.index, self.error, self._attempt, self.table = 0, 0, "", 0, None
        self._drawn.clear()
        if problem is None:
            self.draw()
        else:
            self._fill(problem)
        self._draw(EMPTY)
        self.page.value, self.bar.value = "", 0
        self._say("Not asked yet.")

    def question(self) -> Problem:
        """What stands in the fields."""
        return Problem("asked", self.problem.value.strip(), self.answer.value.strip(), 0, "asked")

    def ask(self) -> pd.DataFrame | None:
        """Predict and solve, and return when it is done; the rollouts, or None where it went wrong or was stopped."""
        self._halt.clear()
        return self._answer()

    def _answer(self) -> pd.DataFrame | None:
        question, name = self.question(), self.model.value
        if not question.text:
            self.error = "Type a problem first, or draw one."
            self._say(self.error)
            return None
        self._attempt, self.error, self.table = self._attempt + 1, "", None
        self.go.disabled, self.halt.disabled, self.bar.value = True, False, 0
        config = configs.replace(self.config, READS if name in self.readers else {})
        self.bar.max = self.solutions.value + (1 if configs.reads(config) else self.predictions.value)
        try:
            self._say(f"{name} predicts and solves ...")
            engine, tokenizer = self._load(name)
            with loading.precision(self.config.model, loading.pick_device(self.config.model)):
                return ask(question, engine, tokenizer, config, solutions=self.solutions.value,
                           predictions=self.predictions.value, attempt=self._attempt - 1, told=self._show,
                           halted=self._halt.is_set)
        except Halted:
            self._say("Stopped. " + ("" if self.table is None else headline(self.table)))
        except Exception as error:  # in a thread nobody else would hear of it
            self.error = str(error) or type(error).__name__
            self._say(self.error)
        finally:
            self.go.disabled, self.halt.disabled = False, True
        return None

    def start(self) -> None:
        """Begin in a thread; a question that is being answered goes on, and this one is not asked."""
        if self._thread is None or not self._thread.is_alive():
            self._halt.clear()
            self._thread = threading.Thread(target=self._answer, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop as soon as a rollout is finished."""
        self._halt.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the thread, so many seconds at most; whether it is done."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def static(self) -> tuple[go.Figure, str]:
        """Figure and page of the last question, for a page without widgets; it is asked now if it was not yet."""
        table = self.ask() if self.table is None else self.table
        if table is None:
            raise RuntimeError(self.error)
        return figure(table, self.config), page(table)

    def _load(self, name: str) -> tuple[Engine, Any]:
        """The engine and tokenizer of a choice; one model is held at a time."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            model, tokenizer = loading.load(self.config.model, self.choices[name])
            self._loaded = name, engine_of(self.config, model, tokenizer), tokenizer
        return self._loaded[1:]

    def _show(self, table: pd.DataFrame) -> None:
        self.table, self.bar.value = table, len(table)
        self._say(headline(table))
        self.page.value = page(table)
        self._draw(table)

    def _draw(self, table: pd.DataFrame) -> None:
        with self.figure.batch_update():
            for old, trace in zip(self.figure.data, figure(table, self.config).data, strict=True):
                old.update({name: trace[name] for name in ("x", "y", "hovertemplate")})

    def _say(self, text: str) -> None:
        self.note.value = f"<span role='status'>{html.escape(text)}</span>"

    def _fill(self, problem: Problem) -> None:
        self._filled = problem
        self.problem.value, self.answer.value = problem.text, problem.answer

    def _typed(self, change: Any) -> None:
        """A drawn answer is not the answer of another text."""
        if self._filled is not None and change["new"] != self._filled.text:
            if self.answer.value == self._filled.answer:
                self.answer.value = ""
            self._filled = None

    def _chosen(self, change: Any) -> None:
        """A belief is read once, however many predictions were wanted."""
        self.predictions.disabled = change["new"] in self.readers

    def _build(self, levels: list[int]) -> None:
        self.model = widgets.Dropdown(options=list(self.choices), description="model", style=_STYLE)
        self.level = widgets.Dropdown(options=levels, description="level", style=_STYLE)
        self.problem = widgets.Textarea(description="problem", style=_STYLE,
                                        layout={"width": "auto", "height": "4.5em"})
        self.answer = widgets.Text(description="answer (optional)", style=_STYLE)
        self.solutions = widgets.IntSlider(8, 1, 64, description="G, solutions", style=_STYLE)
        self.predictions = widgets.IntSlider(8, 1, 32, description="M, predictions", style=_STYLE)
        self.bar = widgets.IntProgress(description="rollouts", style=_STYLE)
        self.drawer = button("draw a problem", self.draw, icon="random")
        self.go = button("predict and solve", self.start, icon="play")
        self.halt = button("stop", self.stop, icon="stop")
        self.back = button("reset", self.reset, icon="undo")
        self.halt.disabled = True
        self.note, self.page = widgets.HTML(layout={"min_height": "28px"}), widgets.HTML(
            layout={"height": "300px", "overflow": "auto"})
        self.figure = go.FigureWidget(figure(EMPTY, self.config))
        self.problem.observe(self._typed, "value")
        self.model.observe(self._chosen, "value")
        row = {"flex_flow": "row wrap"}
        self.box = widgets.VBox([
            widgets.HBox([self.model, self.level, self.drawer], layout=row), self.problem,
            widgets.HBox([self.answer, self.solutions, self.predictions], layout=row),
            widgets.HBox([self.go, self.halt, self.back, self.bar], layout=row), self.note, self.figure, self.page,
            Keys()])

    def _ipython_display_(self) -> None:
        if environment.STATIC:
            drawn, texts = self.static()
            display(drawn, HTML(f"<p>{self.note.value}</p>{texts}"))
        else:
            display(self.box)
