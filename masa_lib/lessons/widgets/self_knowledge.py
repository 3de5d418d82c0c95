"""Live self-knowledge: type a problem, watch a model predict how it will go and then solve it G times.

Sampling runs in a thread that never prints: it sets widget traits, and what goes wrong is said in the panel. Texts from
readers and models are escaped wherever they get into HTML. It measures one problem; what many problems say together is
the business of `awareness`.
"""

from __future__ import annotations

import html
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, display
from plotly.subplots import make_subplots

from masa_lib.analysis.figures import BLUE, GREEN, GREY, ORANGE, TEMPLATE, VERMILLION
from masa_lib.config import Config
from masa_lib.engines import Engine, engine_of
from masa_lib.lessons import environment
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import button
from masa_lib.method import rollouts
from masa_lib.method.rollouts import Ask, predictions_of, solutions_of
from masa_lib.models import loading
from masa_lib.tasks import grading, problems
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problems import Problem

#: solutions sampled between two looks at the stop button, and between two drawings
CHUNK = 8
#: held-out problems among which "draw a problem" draws
DRAWN = 240
HEIGHT, WIDTH = 340, 860  # pixels
PATIENCE = 3.0  # seconds that a reset waits for the running rollouts
#: what there is before anything was asked
EMPTY = pd.DataFrame(columns=["stream", "text", "length", "correct", "answer", "notions", "parse_error",
                              "predicted_pass_rate", "predicted_length"])
#: rows of the lengths, from below: colour and mark
MARKS = {"not graded": (GREY, "circle-open"), "wrong": (VERMILLION, "x"), "right": (GREEN, "circle"),
         "predicted": (ORANGE, "diamond")}
_STYLE = {"description_width": "9em"}
_PRE = "margin:0 0 4px;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere"


class Halted(Exception):
    """The reader pressed stop."""


def ask(problem: Problem, engine: Engine, tokenizer: Any, config: Config, *, solutions: int, predictions: int,
        attempt: int = 0, told: Callable[[pd.DataFrame], Any] = lambda table: None,
        halted: Callable[[], bool] = lambda: False) -> pd.DataFrame:
    """Predict a problem M times, then solve it G times, CHUNK by CHUNK.

    Args:
        problem: with its answer, or an empty one.
        engine: who samples.
        tokenizer: of the model.
        config: wording, caps, temperature of the evaluation, seed.
        solutions: G.
        predictions: M.
        attempt: another one gives other rollouts.
        told: is given all rollouts so far after the predictions and after each chunk.
        halted: whether to stop, looked at between chunks and whenever a rollout is finished.

    Returns:
        A row a rollout, as `rollouts.sample` gives them.

    Raises:
        Halted: on demand; what was sampled has been told.
        EngineError: the problem does not fit the model's context.
    """
    def watch(finished: int) -> None:
        if halted():
            raise Halted

    limits, parts = config.sampling, []
    asks = [Ask("meta", 0, problem, (limits.meta_tokens,) * predictions)]
    asks += [Ask("solution", 0, problem, (limits.solution_tokens,) * min(CHUNK, solutions - first))
             for first in range(0, solutions, CHUNK)]
    for number, wanted in enumerate(asks):
        watch(0)
        part = rollouts.sample([wanted], engine, tokenizer, config, seed=[config.seed, attempt, number],
                               temperature=config.evaluation.temperature, progress=watch)
        parts.append(part.assign(member=part["member"] + max(number - 1, 0) * CHUNK))
        told(pd.concat(parts, ignore_index=True))
    return pd.concat(parts, ignore_index=True)


def verdicts(table: pd.DataFrame) -> pd.Series:
    """Of each solution: right, wrong, or not graded where the problem has no answer."""
    solved = solutions_of(table)
    graded = np.where(solved["correct"].fillna(False).astype(bool), "right", "wrong")
    return pd.Series(np.where(solved["answer"] == "", "not graded", graded), index=solved.index)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Predicted against what happened, of one problem's rollouts so far; NaN where there is nothing yet.

    Returns:
        `predictions` (that parse), `predicted_pass_rate` and `pass_rate` (0 to 1), `predicted_length` and `length`
        (tokens; the mean of the right solutions, of all where there is no answer), `agreement` (share of the solutions
        with the most frequent boxed answer).
    """
    meta, solved, found = predictions_of(table), solutions_of(table), verdicts(table)
    told = meta.dropna(subset=["predicted_pass_rate"])
    boxed = Counter(answer for answer in map(grading.extract_answer, solved["text"]) if answer)
    share = float((found == "right").mean()) if len(found) and (found != "not graded").all() else np.nan
    return {"predictions": len(told),
            "predicted_pass_rate": told["predicted_pass_rate"].astype(float).mean() / PASS_RATE_STEPS,
            "pass_rate": share, "predicted_length": told["predicted_length"].astype(float).mean(),
            "length": solved.loc[found != "wrong", "length"].mean(),
            "agreement": max(boxed.values()) / len(solved) if boxed else np.nan}


def notions(table: pd.DataFrame) -> pd.DataFrame:
    """Predicted notions, the most named first: columns notion, predictions, right and wrong (solutions that have it).

    Solutions without a grade count as right.
    """
    meta, solved, found = predictions_of(table), solutions_of(table), verdicts(table)
    named = Counter(notion for said in meta["notions"].dropna() for notion in dict.fromkeys(said))
    rows = [{"notion": notion, "predictions": count, **{
        verdict: sum(_has(text, notion) for text in solved.loc[(found != "wrong") == (verdict == "right"), "text"])
        for verdict in ("right", "wrong")}} for notion, count in named.most_common()]
    return pd.DataFrame(rows, columns=["notion", "predictions", "right", "wrong"])


def _has(text: str, notion: str) -> bool:
    """Whether a notion stands in a text as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(notion)}(?!\w)", text, re.IGNORECASE) is not None


def figure(table: pd.DataFrame, config: Config) -> go.Figure:
    """Predicted pass rates beside the true one, predicted lengths beside those of the solutions."""
    drawn = make_subplots(1, 2, horizontal_spacing=0.18, subplot_titles=("Pass rate", "Length"))
    found = summary(table)
    meta, solved = predictions_of(table), solutions_of(table)
    said = meta["predicted_pass_rate"].dropna().astype(int).clip(0, PASS_RATE_STEPS)
    counts = said.value_counts().reindex(range(PASS_RATE_STEPS + 1), fill_value=0)
    drawn.add_bar(x=counts.index, y=counts, name="predicted", marker_color=ORANGE, row=1, col=1,
                  hovertemplate="%{y} predictions of %{x} of 8<extra></extra>")
    known = found["pass_rate"] == found["pass_rate"]
    drawn.add_scatter(x=[PASS_RATE_STEPS * found["pass_rate"]] * 2 if known else [], y=[0, max(1, counts.max())],
                      mode="lines", name="true", line={"color": BLUE, "width": 4}, row=1, col=1,
                      hovertemplate=f"true pass rate {found['pass_rate']:.2f}<extra></extra>")
    marks = pd.concat([verdicts(table), pd.Series("predicted", meta.index)])
    lengths = solved["length"].astype(float).reindex(marks.index).fillna(meta["predicted_length"].astype(float))
    for place, (kind, (color, symbol)) in enumerate(MARKS.items()):
        x = lengths[marks == kind].dropna()
        drawn.add_scatter(x=x, y=place + np.random.default_rng(place).uniform(-0.25, 0.25, len(x)), mode="markers",
                          marker={"color": color, "symbol": symbol, "size": 8, "opacity": 0.7}, name=kind, row=1, col=2,
                          showlegend=False, hovertemplate=f"{kind}: %{{x}} tokens<extra></extra>")
    drawn.update_xaxes(title_text="of 8 solutions", range=[-0.6, 8.6], dtick=1, row=1, col=1)
    drawn.update_xaxes(title_text="tokens", range=[0, 1.03 * config.sampling.solution_tokens], row=1, col=2)
    drawn.update_yaxes(title_text="predictions", rangemode="tozero", row=1, col=1)
    drawn.update_yaxes(tickvals=list(range(len(MARKS))), ticktext=list(MARKS), range=[-0.5, len(MARKS) - 0.5], row=1,
                       col=2)
    drawn.update_annotations(font_size=13)
    return drawn.update_layout(template=TEMPLATE, height=HEIGHT, width=WIDTH, margin={"t": 40, "b": 96},
                               uirevision="still")


def headline(table: pd.DataFrame) -> str:
    """What came of it, in a sentence or two of plain text."""
    found, count = summary(table), int((table["stream"] == "solution").sum())
    said = (f"Predicted: right {found['predicted_pass_rate']:.2f} of the time, {found['predicted_length']:.0f} tokens."
            if found["predictions"] else "No prediction could be read.")
    if not count:
        return said
    length = f" with {found['length']:.0f} tokens on average" if found["length"] == found["length"] else ""
    if found["pass_rate"] == found["pass_rate"]:
        return f"{said} Happened: right {found['pass_rate']:.2f} of the time ({count} solutions), right ones{length}."
    agree = f"; {found['agreement']:.0%} agree on one answer" if found["agreement"] == found["agreement"] else ""
    return f"{said} Happened: {count} solutions{length}{agree}. Without an answer nothing is graded."


def page(table: pd.DataFrame, texts: int = 6) -> str:
    """The notions and the first texts of each stream as HTML, escaped."""
    said = notions(table).head(8)
    cells = "".join(f"<tr><td>{html.escape(row.notion[:60])}</td><td>{row.predictions}</td><td>{row.right}</td>"
                    f"<td>{row.wrong}</td></tr>" for row in said.itertuples())
    head = "<tr><th>predicted notion</th><th>predictions</th><th>right solutions</th><th>wrong solutions</th></tr>"
    parts = [f"<table>{head}{cells}</table>" if len(said) else "<p>No notion was predicted.</p>"]
    found = verdicts(table)
    for stream, title in (("meta", "Predictions"), ("solution", "Solutions")):
        rows = table[table["stream"] == stream].head(texts)
        parts.append(f"<b>{title}</b>" + "".join(
            f"<pre style='{_PRE}'>{html.escape(_note(row, found.get(row.Index)))}{html.escape(row.text)}</pre>"
            for row in rows.itertuples()))
    return "".join(parts)


def _note(row: Any, verdict: str | None) -> str:
    if verdict is None:
        return f"[cannot be read: {row.parse_error}] " if row.parse_error else ""
    return f"{verdict}, {row.length} tokens: "


class SelfKnowledge:
    """Controls, a figure and the texts; `ask` and `start` do what the button does, at once or in a thread.

    Args:
        choices: by a name for the reader, a folder with weights, or None for the config's own model.
        config: model, wording, caps and temperature; the source of "draw a problem".
        problem: to begin with; None draws one.
        solutions: G.
        predictions: M.

    Attributes:
        table: the rollouts of the last question so far, as `rollouts.sample` gives them.
        error: what went wrong, empty if nothing did.
    """

    def __init__(self, choices: Mapping[str, Path | None], config: Config, problem: Problem | None = None, *,
                 solutions: int = 32, predictions: int = 8) -> None:
        self.choices, self.config, self.error = dict(choices), config, ""
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
        self.bar.max = self.solutions.value + self.predictions.value
        try:
            self._say(f"{name} predicts and solves ...")
            engine, tokenizer = self._load(name)
            with loading.precision(self.config.model, loading.pick_device(self.config.model)):
                return ask(question, engine, tokenizer, self.config, solutions=self.solutions.value,
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

    def _build(self, levels: list[int]) -> None:
        wide = {"width": "100%"}
        self.model = widgets.Dropdown(options=list(self.choices), description="model", style=_STYLE)
        self.level = widgets.Dropdown(options=levels, description="level", style=_STYLE)
        self.problem = widgets.Textarea(description="problem", style=_STYLE, layout=wide | {"height": "4.5em"})
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
