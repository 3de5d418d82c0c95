"""Data sets of the hub: rows in the documented layout, and whole folders in it read through `datasets`."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from problem_files import SUFFIX, texts, write_jsonl

from masa_lib.config import ProblemsConfig
from masa_lib.tasks.data_sets import DATA_SETS
from masa_lib.tasks.problem_rows import ProblemError
from masa_lib.tasks.problems import ProblemPool, held_out, load_problems

MATH_SOLUTION = "First $\\boxed{3}$ is tempting, but the answer is $\\boxed{\\frac{1}{\\sqrt{2}}}$."
ARC_ROW = {"id": "x", "question": "Which?", "choices": {"text": ["Shade", "Food", "Air"], "label": ["1", "2", "3"]},
           "answerKey": "2"}
GPQA_ROW = {"Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y",
            "Incorrect Answer 3": "z", "Explanation": "because"}
ROWS = {
    "deepscaler": ({"problem": "P?", "answer": "-\\frac{2}{3}", "solution": "long"}, ("P?", "-\\frac{2}{3}", 1)),
    "math": ({"problem": "P?", "level": "Level 5", "type": "Algebra", "solution": MATH_SOLUTION},
             ("P?", "\\frac{1}{\\sqrt{2}}", 5)),
    "math-500": ({"problem": "P?", "solution": "s", "answer": "p - q", "subject": "Algebra", "level": 2,
                  "unique_id": "test/algebra/1.json"}, ("P?", "p - q", 2)),
    "gsm8k": ({"question": "P?", "answer": "It is 5*2=<<5*2=10>>10.\n#### 1,010"}, ("P?", "1010", 1)),
    "aime-2024": ({"id": 60, "problem": "P?", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
                  ("P?", "204", 1)),
    "aime-2025": ({"problem": "P?", "answer": "70", "id": "0"}, ("P?", "70", 1)),
    "amc23": ({"id": 0, "question": "P?", "answer": 27.0, "url": "u"}, ("P?", "27", 1)),
    "minerva": ({"question": "P?", "answer": "1.6e-19"}, ("P?", "1.6e-19", 1)),
    "olympiadbench": ({"question": "P?", "final_answer": ["$3$", "$\\frac{1}{2}$"]}, ("P?", "3, \\frac{1}{2}", 1)),
    "arc-challenge": (ARC_ROW, ("Which?\nA) Shade\nB) Food\nC) Air", "B", 1)),
}


def verl_row(text: str, truth: Any, **more: Any) -> dict[str, Any]:
    return {"data_source": "someone/contest", "prompt": [{"content": text, "role": "user"}], "ability": "math",
            "reward_model": {"ground_truth": truth, "style": "rule"}, "extra_info": {"index": 0}, **more}


@pytest.mark.parametrize("name", ROWS)
def test_row_of_a_data_set_becomes_text_answer_and_level(name: str):
    row, expected = ROWS[name]
    assert set(DATA_SETS[name].columns) <= set(row)
    assert DATA_SETS[name].read(row, random.Random(0)) == expected


def test_gpqa_shuffles_its_options_by_seed_and_the_letter_follows_the_right_one():
    read = DATA_SETS["gpqa-diamond"].read
    results = [read(GPQA_ROW, random.Random(seed)) for seed in range(20)]
    for text, letter, _ in results:
        assert f"\n{letter}) right" in text
        assert sorted(line[3:] for line in text.split("\n")[1:]) == ["right", "x", "y", "z"]
    assert {letter for _, letter, _ in results} == set("ABCD")
    assert results[0] == read(GPQA_ROW, random.Random(0))


def test_row_without_an_answer_in_the_expected_place_reads_as_empty():
    row = {"problem": "P?", "solution": "none", "level": "Level ?"}
    assert DATA_SETS["math"].read(row, random.Random(0)) == ("P?", "", 0)
    assert DATA_SETS["deepscaler"].read({"problem": "P?", "answer": None}, random.Random(0))[1] == ""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins on disk for data sets of the hub, in their layout; `datasets` itself reads them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def add(name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
        entry, folder = DATA_SETS[name], tmp_path / name
        (folder / "data").mkdir(parents=True)
        for split, rows in splits.items():
            pd.DataFrame(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {entry.config or 'default'}\n"
                                          f"  data_files:\n{files}---\n", encoding="utf8")
        monkeypatch.setitem(DATA_SETS, name, dataclasses.replace(entry, hub=str(folder)))
    return add


def test_data_set_with_splits_of_its_own_end_to_end(hub):
    rows = [{"question": f"What is {n} + 1?", "answer": f"Easy.\n#### {n + 1}"} for n in range(30)]
    hub("gsm8k", {"train": rows[:20], "test": rows[20:]})
    config = ProblemsConfig("gsm8k", pool=8)
    assert len(ProblemPool(config, 0).problems) == 8
    assert sorted(texts(held_out(config, 100))) == sorted(row["question"] for row in rows[20:])
    assert load_problems("gsm8k", "train")[3] == dataclasses.replace(
        load_problems("gsm8k", "train", levels="1")[3], id="gsm8k-train-3", answer="4", level=1, source="gsm8k")


def test_data_set_with_one_split_is_divided_unless_another_is_evaluated_on(hub):
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "solution": ""} for n in range(100)]
    rows[7]["answer"] = ""  # a few published rows have none
    hub("deepscaler", {"train": rows})
    hub("aime-2024", {"train": [ROWS["aime-2024"][0]]})
    train, evaluation = load_problems("deepscaler", "train"), load_problems("deepscaler", "evaluation")
    assert len(train) + len(evaluation) == 99 and evaluation and not set(texts(train)) & set(texts(evaluation))
    config = ProblemsConfig("deepscaler", evaluation_source="aime-2024", pool=0)
    assert len(ProblemPool(config, 0).problems) == 99
    assert [(problem.text, problem.answer) for problem in held_out(config, 10)] == [("P?", "204")]


@pytest.mark.parametrize(("name", "split", "row"), [("arc-challenge", "test", ARC_ROW),
                                                    ("gpqa-diamond", "train", GPQA_ROW),
                                                    ("olympiadbench", "test", ROWS["olympiadbench"][0]),
                                                    ("math", "test", ROWS["math"][0])])
def test_nested_columns_and_named_configs_end_to_end(hub, name: str, split: str, row: dict):
    hub(name, {split: [row]})
    [problem] = load_problems(name, "evaluation", seed=4)
    assert (problem.text, problem.answer, problem.level) == DATA_SETS[name].read(row, random.Random(f"4/{name}/0"))


def test_data_set_laid_out_otherwise_names_the_column_or_the_row(hub):
    hub("minerva", {"test": [{"problem": "P?", "answer": "1"}]})
    with pytest.raises(ProblemError, match=r"minerva .* has no column 'question'; it has problem, answer"):
        load_problems("minerva", "evaluation")
    hub("arc-challenge", {"test": [ARC_ROW, ARC_ROW | {"answerKey": "9"}]})
    with pytest.raises(ProblemError, match="Row 1 of the data set arc-challenge"):
        load_problems("arc-challenge", "evaluation")


def test_data_set_that_cannot_be_loaded_names_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(DATA_SETS, "amc23", dataclasses.replace(DATA_SETS["amc23"], hub=str(tmp_path / "nowhere")))
    with pytest.raises(ProblemError, match=r"The data set amc23 .*nowhere, split test.* cannot be loaded"):
        load_problems("amc23", "evaluation")


def test_copies_in_a_data_set_of_the_hub_are_one(hub):
    hub("minerva", {"test": [{"question": f"What is {n % 4} + 1?", "answer": str(n % 4 + 1)} for n in range(400)]})
    assert len(load_problems("minerva", "evaluation")) == 4


def test_instructions_are_cut_off_in_every_layout(tmp_path: Path, hub):
    rows = [verl_row("Find $x$." + SUFFIX, "7"), {"problem": "Find $x$." + SUFFIX, "answer": "7"}]
    for row in rows:
        assert texts(load_problems(write_jsonl(tmp_path / "x.jsonl", [row]), "train", undivided=True)) == ["Find $x$."]
    hub("minerva", {"test": [{"question": "Find $x$." + SUFFIX, "answer": "7"}]})
    assert texts(load_problems("minerva", "evaluation")) == ["Find $x$."]
