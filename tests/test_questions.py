"""The twenty questions of a finisher: each names the cells that answer it, and they are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
QUESTIONS = re.findall(r"^\| (\d+) \| (.+) \| \[\w+\]\(\.\./notebooks/(\w+\.ipynb)\)((?: `[\w-]+`,?)+) \|$",
                       (ROOT / "docs" / "questions.md").read_text(encoding="utf8"), re.MULTILINE)


def test_there_are_twenty_questions_on_all_notebooks_but_the_last_appendix() -> None:
    assert [int(number) for number, *_ in QUESTIONS] == list(range(1, 21))
    assert len({text for _, text, *_ in QUESTIONS}) == 20
    wanted = {path.name for path in NOTEBOOKS.glob("*.ipynb")} - {"appendix_b_scale_out.ipynb"}
    assert {name for _, _, name, _ in QUESTIONS} >= wanted


@pytest.mark.parametrize(("name", "cells"), [row[2:] for row in QUESTIONS], ids=[row[0] for row in QUESTIONS])
def test_the_cells_that_answer_a_question_exist(name: str, cells: str) -> None:
    there = {cell["id"] for cell in json.loads((NOTEBOOKS / name).read_text(encoding="utf8"))["cells"]}
    assert set(re.findall(r"`([\w-]+)`", cells)) <= there
