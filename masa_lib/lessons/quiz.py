"""The five questions at the end of a notebook: shown, and the answers checked with a reason each.

The questions lie beside this file, `quizzes/<notebook>.toml`, so that a notebook and its page show them alike:

    [[question]]
    asks = "What is a prediction scored against?"
    options = ["the dataset's answer", "the model's own rollouts", "a larger model's guess"]
    right = "b"
    why = "Self-alignment: the truth is the pass rate of the group that the model samples itself."

It imports nothing but the standard library, so that notebooks without torch can ask, too.
"""

from __future__ import annotations

import functools
import string
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa_lib.errors import MasaError

FOLDER = Path(__file__).parent / "quizzes"


class QuizError(MasaError, ValueError):
    """There is no quiz of this name."""


class Markdown(str):
    """A text that notebooks show as Markdown, and `print` as it is."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


@functools.cache
def _questions(notebook: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{notebook}.toml"
    if not path.is_file():
        there = ", ".join(sorted(other.stem for other in FOLDER.glob("*.toml")))
        raise QuizError(f"There is no quiz {notebook!r}; there are {there}.")
    return tomllib.loads(path.read_text(encoding="utf8"))["question"]


def questions(notebook: str) -> Markdown:
    """The questions of a notebook ("00" to "08", "a", "b") with their options a, b, c."""
    return Markdown("\n\n".join(f"**{number}. {question['asks']}**\n\n" + "\n".join(
        f"* **{letter}** {option}" for letter, option in zip(string.ascii_lowercase, question["options"], strict=False))
        for number, question in enumerate(_questions(notebook), 1)))


def check(notebook: str, answers: Mapping[int, str]) -> Markdown:
    """Which answers are right, and why; a question without an answer keeps its reason to itself.

    Args:
        notebook: as for `questions`.
        answers: by the question's number its option's letter, or "" where there is none yet.
    """
    asked = _questions(notebook)
    said = [_verdict(number, question, answers.get(number)) for number, question in enumerate(asked, 1)]
    right = sum(_letter(answers.get(number)) == question["right"] for number, question in enumerate(asked, 1))
    return Markdown("\n".join(f"* {sentence}" for sentence in said) + f"\n\n**{right} of {len(asked)} are right.**")


def _letter(answer: object) -> str:
    return str(answer or "").strip().lower()


def _verdict(number: int, question: dict[str, Any], answer: object) -> str:
    given, letters = _letter(answer), string.ascii_lowercase[:len(question["options"])]
    if not given:
        return f"{number}: no answer yet."
    if given not in letters:
        return f"{number}: {given!r} is not one of {', '.join(letters)}."
    return f"{number}: " + (f"right. {question['why']}" if given == question["right"] else "not yet; think again.")
