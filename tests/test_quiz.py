"""The quizzes of the notebooks: whole files, letters that exist, reasons kept back until an answer is right."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from masa_lib.lessons import quiz

FILES = sorted(quiz.FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_quiz_has_five_questions_whose_right_answer_is_an_option_and_does_not_stand_out(path: Path) -> None:
    asked = tomllib.loads(path.read_text(encoding="utf8"))["question"]
    assert len(asked) == 5
    for question in asked:
        assert set(question) == {"asks", "options", "right", "why"}
        assert 3 <= len(question["options"]) <= 4 and question["right"] in "abcd"[:len(question["options"])]
        assert len(set(question["options"])) == len(question["options"])
    assert len({question["right"] for question in asked}) > 1


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.toml").write_text("".join(
        f'[[question]]\nasks = "Q{number}?"\noptions = ["one", "two", "three"]\nright = "{right}"\n'
        f'why = "Reason {number}."\n' for number, right in ((1, "b"), (2, "c"))), encoding="utf8")
    monkeypatch.setattr(quiz, "FOLDER", tmp_path)
    quiz._questions.cache_clear()


@pytest.mark.usefixtures("two")
def test_questions_are_shown_with_their_options_and_without_their_answers() -> None:
    shown = quiz.questions("x")
    assert "**1. Q1?**" in shown and "* **b** two" in shown and "Reason" not in shown
    assert shown._repr_markdown_() == shown


@pytest.mark.usefixtures("two")
def test_a_reason_is_told_with_a_right_answer_alone() -> None:
    said = quiz.check("x", {1: " B ", 2: "a"})
    assert "1: right. Reason 1." in said and "2: not yet" in said and "Reason 2" not in said
    assert "1 of 2" in said
    assert "1: no answer yet" in quiz.check("x", {}) and "'e' is not one of a, b, c" in quiz.check("x", {2: "e"})


@pytest.mark.usefixtures("two")
def test_a_quiz_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(quiz.QuizError, match="no quiz 'y'; there are x"):
        quiz.questions("y")
