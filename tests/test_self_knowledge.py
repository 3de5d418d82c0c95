"""Live self-knowledge: a question is sampled, summed up and shown, in a thread that can be stopped and never prints."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from small import small

from masa_lib.engines import make_engine
from masa_lib.lessons import environment
from masa_lib.lessons.widgets import self_knowledge, self_view
from masa_lib.lessons.widgets.self_knowledge import SelfKnowledge
from masa_lib.models import loading
from masa_lib.tasks.problem_rows import Problem

PROBLEM = Problem("p", "Start with 8. Add 8.", "16", 1, "test")
HOSTILE = "<img src=x onerror=alert(1)>"
SECONDS = 60  # that a thread may take on a slow machine


@pytest.fixture(scope="module")
def sampler() -> tuple:
    model, tokenizer = loading.load(small().model)
    return make_engine("transformers", model, tokenizer, batch=64), tokenizer


@pytest.fixture(scope="module")
def table(sampler: tuple) -> pd.DataFrame:
    return self_knowledge.ask(PROBLEM, *sampler, small(), solutions=12, predictions=3)


@pytest.fixture
def panel() -> SelfKnowledge:
    return SelfKnowledge({"one": None, "other": None}, small(), PROBLEM, solutions=12, predictions=3)


def rollout(stream: str, text: str = "", **more: object) -> dict[str, object]:
    row = {"stream": stream, "text": text, "length": 10, "answer": "16", "correct": pd.NA, "notions": None,
           "parse_error": None, "predicted_pass_rate": pd.NA, "predicted_length": pd.NA}
    return row | more


def made(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(list(rows)).astype({"correct": "boolean", "predicted_pass_rate": "Int64",
                                            "predicted_length": "Int64"})


def test_predictions_come_first_and_every_part_is_told(sampler: tuple) -> None:
    told: list[pd.DataFrame] = []
    whole = self_knowledge.ask(PROBLEM, *sampler, small(), solutions=12, predictions=3, told=told.append)
    assert [part["stream"].value_counts().to_dict() for part in told] == [
        {"meta": 3}, {"solution": 8, "meta": 3}, {"solution": 12, "meta": 3}]
    pd.testing.assert_frame_equal(told[-1], whole)
    assert whole.loc[whole["stream"] == "solution", "member"].tolist() == list(range(12))


def test_another_attempt_gives_other_rollouts_and_the_same_one_the_same(sampler: tuple, table: pd.DataFrame) -> None:
    again, other = (self_knowledge.ask(PROBLEM, *sampler, small(), solutions=12, predictions=3, attempt=attempt)
                    for attempt in (0, 1))
    assert again["text"].tolist() == table["text"].tolist()
    assert other["text"].tolist() != table["text"].tolist()


def test_the_summary_counts_what_was_predicted_and_what_happened() -> None:
    found = self_view.summary(made(
        rollout("meta", predicted_pass_rate=4, predicted_length=20, notions=["carry"]),
        rollout("meta", predicted_pass_rate=8, predicted_length=40, notions=["carry", "sign"]),
        rollout("meta", "?", parse_error="no JSON"),
        rollout("solution", r"A carry. \boxed{16}", correct=True, length=30),
        rollout("solution", r"\boxed{15}", correct=False, length=99),
        rollout("solution", r"\boxed{16}", correct=True, length=10),
        rollout("solution", "", correct=False)))
    assert found == {"predictions": 2, "predicted_pass_rate": 0.75, "pass_rate": 0.5, "predicted_length": 30,
                     "length": 20, "agreement": 0.5}


def test_what_a_model_says_is_shared_out_over_the_nine_pass_rates() -> None:
    said = made(rollout("meta", predicted_pass_rate=8), rollout("meta", predicted_pass_rate=0),
                rollout("meta", predicted_pass_rate=8), rollout("meta", "?", parse_error="no JSON"))
    assert self_view.shares(said).tolist() == pytest.approx([1 / 3, 0, 0, 0, 0, 0, 0, 0, 2 / 3])
    assert not self_view.shares(said.iloc[3:]).any()
    read = made(rollout("belief", belief=[0, 0, 0, 0, 0.5, 0, 0, 0, 0.5]), rollout("solution", correct=True))
    assert self_view.shares(read).tolist() == [0, 0, 0, 0, 0.5, 0, 0, 0, 0.5]
    assert self_view.summary(read)["predicted_pass_rate"] == 0.75
    assert self_view.headline(read).startswith("Believed: right 0.75 of the time")
    never = made(rollout("belief", belief=[1, *[0] * 8]), rollout("solution", correct=False))
    assert self_view.headline(never).endswith("Happened: right 0.00 of the time (1 solutions).")


def test_a_belief_is_read_where_the_method_reads_and_the_solutions_stay_the_same(sampler: tuple,
                                                                                  table: pd.DataFrame) -> None:
    whole = self_knowledge.ask(PROBLEM, *sampler, small(self_knowledge.READS), solutions=12, predictions=3)
    assert whole["stream"].value_counts().to_dict() == {"solution": 12, "belief": 1}
    assert self_view.shares(whole).sum() == pytest.approx(1)
    solved = [part.loc[part["stream"] == "solution", "text"].tolist() for part in (whole, table)]
    assert solved[0] == solved[1]


def test_the_panel_reads_the_belief_of_its_readers_alone() -> None:
    panel = SelfKnowledge({"writes": None, "reads": None}, small(), PROBLEM, solutions=3, predictions=2,
                          readers=["reads"])
    assert set(panel.ask()["stream"]) == {"meta", "solution"}
    panel.model.value = "reads"
    assert panel.predictions.disabled
    assert set(panel.ask()["stream"]) == {"belief", "solution"}
    assert panel.bar.value == panel.bar.max == 4
    assert "Believed" in panel.note.value


def graded() -> pd.DataFrame:
    """Half of the solutions are right; the nearest prediction names a length that no right solution has."""
    solved = [rollout("solution", correct=right, length=length) for right, length in ((True, 10), (False, 90))]
    said = [rollout("meta", predicted_pass_rate=rate, predicted_length=length, notions=["sum"])
            for rate, length in ((4, 50), (8, 10), (8, 10))]
    rows = made(*solved, *said)
    return rows.assign(group=0, problem="1 + 1", member=range(len(rows)))


def test_the_nearest_prediction_can_lose_by_its_other_parts_but_not_by_its_pass_rate() -> None:
    table = graded()
    found = self_view.under_each(table, small())
    near = self_view.nearest(found["pass rate alone"], 0.5)
    assert near.tolist() == [True, False, False]
    assert found["pass rate alone"]["advantage"].idxmax() == near[near].index[0]
    assert found["mean of the three parts"]["advantage"].iloc[0] < 0
    assert table.columns.isin(["reward", "advantage"]).sum() == 0  # the table itself is left alone


def test_the_figure_of_pushes_has_a_star_for_each_nearest_prediction() -> None:
    drawn = self_view.pushes(graded(), small())
    json.dumps(drawn.to_dict(), default=list, allow_nan=False)
    symbols = [symbol for trace in drawn.data for symbol in trace.marker.symbol]
    assert symbols.count("star") == len(self_view.WAYS) and symbols.count("circle") == 2 * len(self_view.WAYS)


def test_models_stand_side_by_side_with_what_they_say_and_what_is_true() -> None:
    drawn = self_view.side_by_side({"sure": [0] * 8 + [1], "unsure": [0.5] + [0] * 7 + [0.5]},
                                   {"sure": 0.0, "unsure": 0.25}, "Two")
    assert [note.text for note in drawn.layout.annotations[:2]] == ["sure<br>says 1.00, is 0.00",
                                                                    "unsure<br>says 0.50, is 0.25"]
    assert [trace.x[0] for trace in drawn.data if trace.name == "true"] == [0, 2]


def test_notions_are_looked_up_as_whole_words() -> None:
    found = self_view.notions(made(
        rollout("meta", notions=["carry", "carry", "x (y"]), rollout("meta", notions=["carry"]),
        rollout("solution", "Carry one.", correct=True), rollout("solution", "miscarry", correct=True),
        rollout("solution", "carry x (y", correct=False)))
    assert found.to_dict("records") == [{"notion": "carry", "predictions": 2, "right": 1, "wrong": 1},
                                        {"notion": "x (y", "predictions": 1, "right": 0, "wrong": 1}]


def test_without_an_answer_nothing_is_graded_but_agreement_is_shown() -> None:
    table = made(*(rollout("solution", rf"\boxed{{{value}}}", answer="", correct=False) for value in (3, 3, 3, 4)))
    assert set(self_view.verdicts(table)) == {"not graded"}
    found = self_view.summary(table)
    assert found["agreement"] == 0.75
    assert found["pass_rate"] != found["pass_rate"]
    said = self_view.headline(table)
    assert "75% agree on one answer" in said
    assert "No prediction could be read." in said


def test_hostile_texts_are_escaped(panel: SelfKnowledge) -> None:
    table = made(rollout("meta", HOSTILE, notions=[HOSTILE], parse_error=HOSTILE),
                 rollout("solution", HOSTILE, correct=False))
    shown = self_view.page(table)
    assert "<img" not in shown
    assert shown.count("&lt;img") == 4
    panel._say(HOSTILE)
    assert "<img" not in panel.note.value


def test_the_panel_answers_in_a_thread_and_prints_nothing(panel: SelfKnowledge,
                                                          capfd: pytest.CaptureFixture[str]) -> None:
    panel.start()
    panel.start()  # a second press is not a second question
    assert panel.wait(SECONDS)
    assert (panel.error, len(panel.table), panel.bar.value) == ("", 15, 15)
    assert "Predicted: right" in panel.note.value
    assert "Happened" in panel.note.value
    assert sum(panel.figure.data[0].y) == pytest.approx(1)
    assert capfd.readouterr() == ("", "")
    assert (panel.go.disabled, panel.halt.disabled) == (False, True)


def test_stop_keeps_what_is_there_and_another_question_can_follow(panel: SelfKnowledge,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    show = SelfKnowledge._show

    def show_and_stop(self: SelfKnowledge, table: pd.DataFrame) -> None:
        show(self, table)
        self.stop()

    monkeypatch.setattr(SelfKnowledge, "_show", show_and_stop)
    panel.start()
    assert panel.wait(SECONDS)
    assert set(panel.table["stream"]) == {"meta"}
    assert "Stopped. Predicted" in panel.note.value
    monkeypatch.setattr(SelfKnowledge, "_show", show)
    assert len(panel.ask()) == 15


def test_figures_can_be_sent_to_a_page_before_and_after_anything_is_known(panel: SelfKnowledge) -> None:
    for figure in (panel.figure, self_view.figure(self_view.EMPTY, panel.config)):
        json.dumps(figure.to_dict(), default=list, allow_nan=False)
    panel.ask()
    drawn = self_view.figure(panel.table, panel.config)
    json.dumps(drawn.to_dict(), default=list, allow_nan=False)
    lengths = {trace.name: sorted(trace.x) for trace in drawn.data if trace.name in self_view.MARKS}
    solved = panel.table[panel.table["stream"] == "solution"]
    for verdict, right in (("right", True), ("wrong", False)):
        assert lengths[verdict] == sorted(solved.loc[solved["correct"] == right, "length"])
    assert lengths["predicted"] == sorted(panel.table["predicted_length"].dropna())


def test_errors_are_said_in_the_panel(panel: SelfKnowledge, sampler: tuple) -> None:
    panel.problem.value = " "
    assert panel.ask() is None
    assert "Type a problem first, or draw one." in panel.note.value
    panel.problem.value = "7 + 7 " * 400
    panel.start()
    assert panel.wait(SECONDS)
    assert "the model&#x27;s context is" in panel.note.value
    assert panel.error.startswith("Request 0 needs")
    assert not panel.go.disabled


def test_drawn_problems_have_the_level_and_their_answer_until_the_text_changes(panel: SelfKnowledge) -> None:
    panel.level.value = 3
    panel.draw()
    first = panel.question()
    panel.draw()
    second = panel.question()
    assert first.text != second.text
    assert second.answer != ""
    panel.problem.value += " Add 1."
    assert panel.answer.value == ""
    panel.answer.value = "5"
    panel.problem.value += " Add 2."
    assert panel.answer.value == "5"


def test_reset_brings_the_beginning_back(panel: SelfKnowledge) -> None:
    first = panel.ask()
    panel.model.value, panel.problem.value, panel.solutions.value = "other", "1 + 1", 3
    panel.reset()
    assert panel.table is None
    assert panel.page.value == ""
    assert (panel.model.value, panel.question().text, panel.question().answer) == ("one", PROBLEM.text, "16")
    assert panel.ask()["text"].tolist() == first["text"].tolist()


def test_without_widgets_there_is_a_picture_and_the_texts(panel: SelfKnowledge,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(self_knowledge, "display", lambda *things: shown.extend(things))
    monkeypatch.setattr(environment, "STATIC", True)
    panel._ipython_display_()
    assert [type(entry).__name__ for entry in shown] == ["Figure", "HTML"]
    assert "Predicted: right" in shown[1].data
    monkeypatch.setattr(environment, "STATIC", False)
    panel._ipython_display_()
    assert shown[2] is panel.box
