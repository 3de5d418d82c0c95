"""`masa chat`: predictions, then solutions, in the terminal."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
from small import small

from masa_lib import DATA
from masa_lib.lessons import chat
from masa_lib.runs.folder import Run


def typed(*lines: str) -> Callable[[str], str]:
    """Someone who types these lines, and then ends the input."""
    left = iter(lines)

    def read(asked: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def test_a_sampling_model_is_asked_before_it_solves_each_problem_and_the_end_of_input_ends_the_talk() -> None:
    first, second = chat.chat(small(), None, None, 3, typed("Start with 7. Add 5.", "12", "Start with 1. Add 2.", ""))
    assert first.index("It expects to be right") < first.index("Its first solution") < first.index("Answers: ")
    assert "of 3." in first and "8/8" in first
    assert "Right" not in second


def test_the_belief_of_a_recorded_model_is_read_and_an_empty_line_ends_the_talk() -> None:
    run = Run.open(DATA / "runs" / "beliefs" / "masa-read-s0")
    step, weights = run.weights()
    (said,) = chat.chat(run.config_at(step), weights, run, 2, typed("Start with 7. Add 5.", "12", ""))
    assert "Right: 2 of 2." in said


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    table = pd.DataFrame({"stream": ["meta", "solution"], "text": ["x", "\x1b[2J\\boxed{\x07}\nso"], "length": [1, 9],
                          "correct": [None, False], "predicted_pass_rate": [None, None]})
    said = chat.said(table, "")
    assert "\x1b" not in said and "\x07" not in said and "?[2J" in said and "\nso" in said
    assert "None of its predictions could be read." in said


@pytest.mark.parametrize(("eighths", "mean"), [([8, 8], "100%"), ([0, 8], "50%")])
def test_the_mean_is_that_of_the_predictions(eighths: list[int], mean: str) -> None:
    table = pd.DataFrame({"stream": ["meta", "meta", "solution"], "text": ["", "", "none"], "length": [1, 1, 5],
                          "correct": [None, None, True], "predicted_pass_rate": [*eighths, None]})
    said = chat.said(table, "3")
    assert f"right {mean} of the time" in said and "no answer (1)" in said and "Right: 1 of 1." in said
