"""Problems from files: every layout, two sides that share no problem, and what is said of bad ones."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from problem_files import SUFFIX, plain_rows, texts, write_jsonl

from masa_lib.config import ProblemsConfig
from masa_lib.tasks import arithmetic
from masa_lib.tasks.problem_rows import ProblemError, without_instruction
from masa_lib.tasks.problems import ProblemPool, held_out, load_problems


def verl_row(text: str, truth: Any, **more: Any) -> dict[str, Any]:
    return {"data_source": "someone/contest", "prompt": [{"content": text, "role": "user"}], "ability": "math",
            "reward_model": {"ground_truth": truth, "style": "rule"}, "extra_info": {"index": 0}, **more}


@pytest.fixture
def local_file(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "sums.jsonl", plain_rows(80))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_file_with_problem_and_answer_columns(tmp_path: Path, suffix: str):
    rows = [{"id": "a", "problem": " 6 x 7? ", "answer": "42", "level": 3},
            {"id": "b", "problem": "Half of 5?", "answer": "2.5", "level": 1}]
    path = str(tmp_path / f"own.{suffix}")
    if suffix == "jsonl":
        write_jsonl(Path(path), ["\ufeff" + json.dumps(rows[0]), "", json.dumps(rows[1]) + "\r", ""])
    elif suffix == "csv":
        pd.DataFrame(rows).to_csv(path, index=False, encoding="utf-8-sig")
    else:
        pd.DataFrame(rows).to_parquet(path)
    problems = load_problems(path, "evaluation", undivided=True)
    assert [(p.id, p.text, p.answer, p.level, p.source) for p in problems] == [
        ("a", "6 x 7?", "42", 3, path), ("b", "Half of 5?", "2.5", 1, path)]


def test_csv_cells_hold_commas_quotes_and_line_breaks_and_columns_beside_the_known_ones(tmp_path: Path):
    path = tmp_path / "own.CSV"
    path.write_text('note, answer,problem\r\n,"1,000","How much is ""M"",\nas a number?"\r\n\r\nx,7,3+4?\r\n')
    problems = load_problems(str(path), "train", undivided=True)
    assert [(p.text, p.answer, p.level) for p in problems] == [
        ('How much is "M",\nas a number?', "1,000", 1), ("3+4?", "7", 1)]


@pytest.mark.parametrize(("content", "says"), [
    ("problem,answer\nFind a, b,7\n", "Row 1 of .*own.csv has 3 cells where its header has 2; a text with a comma"),
    ('problem,answer\n"Find a,7\n', "Line 2 of .*own.csv is no CSV: unexpected end of data"),
    ("problem;answer\na?;7\n", r"own.csv has no column 'problem' \(it has problem;answer\)"),
    ("problem,answer\n", "own.csv is empty"), ("", "own.csv is empty"),
    ("problem,answer\na?,\n", "Row 1 of .*own.csv has an empty or unreadable answer"),
])
def test_a_csv_that_cannot_be_read_right_is_told_by_line_or_row(tmp_path: Path, content: str, says: str):
    (tmp_path / "own.csv").write_text(content)
    with pytest.raises(ProblemError, match=says):
        load_problems(str(tmp_path / "own.csv"), "train", undivided=True)


@pytest.mark.parametrize(("said", "level"), [
    ("Level ?", 0), ("?", 0), ("unknown", 0), ("n/a", 0), ("Level 5", 5), ("level 2", 2), ("3", 3), (4.0, 4),
    ("4.0", 4), (None, 1), ("", 1), (float("nan"), 1)])
def test_a_level_is_a_number_unknown_or_not_given(tmp_path: Path, said: Any, level: int):
    path = write_jsonl(tmp_path / "own.jsonl", [{"problem": "a?", "answer": 1, "level": said}])
    assert [p.level for p in load_problems(path, "train", undivided=True)] == [level]


def test_copies_of_a_problem_are_one_whatever_their_white_space_ids_and_instructions(tmp_path: Path):
    rows = [row | {"id": row["answer"]} for row in plain_rows(30)]
    copies = [row | {"problem": f"  {row['problem'].replace(' ', '  ')}{SUFFIX}", "id": f"copy {n} {row['id']}"}
              for n in range(3) for row in rows]
    path = write_jsonl(tmp_path / "sums.jsonl", rows + rows + copies)
    whole = load_problems(path, "train") + load_problems(path, "evaluation")
    assert sorted(texts(whole)) == sorted(row["problem"] for row in rows)
    pool = ProblemPool(ProblemsConfig(path, pool=20), 0)
    assert len(set(texts(pool.problems))) == 20 and re.search("120 of 150 rows of .* repeat a problem", pool.note)


def test_a_csv_row_ends_where_its_line_ends_and_nowhere_else(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_bytes("problem,answer\r\na\u2028b\x0cc?,1\r\n".encode())
    assert texts(load_problems(str(path), "train", undivided=True)) == ["a\u2028b\x0cc?"]


def test_a_held_out_problem_is_not_trained_on_in_another_spelling_of_its_white_space(tmp_path: Path):
    source = write_jsonl(tmp_path / "train.jsonl", plain_rows(10))
    other = write_jsonl(tmp_path / "test.jsonl", [{"problem": "What  is 3 +\n1?" + SUFFIX, "answer": 4}])
    pool = ProblemPool(ProblemsConfig(source, evaluation_source=other), 0)
    assert sorted(texts(pool.problems)) == sorted(row["problem"] for n, row in enumerate(plain_rows(10)) if n != 3)


def test_a_file_is_one_source_by_whatever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", plain_rows(80))
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    plain = ProblemsConfig("x.jsonl", pool=10)
    for name in ("./x.jsonl", "../" + tmp_path.name + "/x.jsonl", str(tmp_path / "x.jsonl"), "link.jsonl"):
        config = ProblemsConfig("x.jsonl", evaluation_source=name, pool=10)
        assert held_out(config, 100) == held_out(plain, 100)
        assert ProblemPool(config, 0).problems == ProblemPool(plain, 0).problems
    assert load_problems("./x.jsonl", "train", 10) == load_problems("x.jsonl", "train", 10)


def test_problems_that_do_not_fit_are_left_out_and_counted(local_file: str):
    pool = ProblemPool(ProblemsConfig(local_file, pool=20), 0)
    before = texts(pool.problems)
    said = pool.keep(lambda text: "7" not in text)
    short = [text for text in before if "7" not in text]
    assert texts(pool.problems) == short and len(pool.take(0, 50)) == 50
    assert f"{20 - len(short)} of 20 problems of {local_file} are left out" in said and "context" in said
    assert pool.keep(lambda text: True) == ""
    with pytest.raises(ProblemError, match="fits into the model's context"):
        pool.keep(lambda text: False)
    stream = ProblemPool(ProblemsConfig(pool=0), 0)
    assert stream.keep(lambda text: "x" not in text) == ""
    assert not any("x" in text for text in texts(stream.take(0, 200)))


def test_numbers_as_answers_become_text_and_missing_ids_and_levels_are_filled(tmp_path: Path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"problem": "a?", "answer": 27.0}, {"problem": "b?", "answer": -3},
                                                {"problem": "c?", "answer": ["1", "2"]}])
    problems = load_problems(path, "train", undivided=True)
    assert [(p.id, p.answer, p.level) for p in problems] == [("own-1", "27", 1), ("own-2", "-3", 1),
                                                             ("own-3", "1, 2", 1)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_verl_layout_without_its_instruction(tmp_path: Path, suffix: str):
    rows = [verl_row("Find $x$." + SUFFIX, "70"), verl_row("Find $y$.", "336^\\circ")]
    path = str(tmp_path / f"contest.{suffix}")
    if suffix == "jsonl":
        write_jsonl(Path(path), rows)
    else:
        pd.DataFrame(rows).to_parquet(path)
    problems = load_problems(path, "train", undivided=True)
    assert [(p.text, p.answer, p.source) for p in problems] == [
        ("Find $x$.", "70", "someone/contest"), ("Find $y$.", "336^\\circ", "someone/contest")]


def test_verl_ground_truth_with_question_and_target_as_the_published_files_have_it(tmp_path: Path):
    path = str(tmp_path / "contest.parquet")
    pd.DataFrame([verl_row("Find $x$.", {"question": "Find $x$.", "target": "70"}, id=0)]).to_parquet(path)
    [problem] = load_problems(path, "train", undivided=True)
    assert (problem.id, problem.answer) == ("0", "70")

BEHIND = [
    SUFFIX, SUFFIX.replace("'", "\u2019"), SUFFIX.replace("Let's", "Let us"),
    SUFFIX.replace("step by step", "step-by-step"),
    "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ' Let\'s think step by step and output the final answer after "####".',
    " Return your final response within \\boxed{}.", " Present the answer in LaTex format: \\boxed{Your answer}",
    " Put your answer in \\boxed{}.", "\nPlease box the final answer.",
    "\n\u8bf7\u9010\u6b65\u63a8\u7406\uff0c\u5e76\u628a\u6700\u7ec8\u7b54\u6848\u653e\u5728\\boxed{}\u4e2d\u3002",
    " Make sure to box your final answer: \\boxed{answer}.",
    "\nSolve step by step, answer in \\boxed{}.", "\nThink step by step.", " Please solve this problem step by step.",
    " Explain your reasoning step by step, then give the final answer in \\boxed{}.",
    " Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, for example "
    "<answer> (1 + 2) / 3 </answer>.",
    " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}.",
    '\n\nRemember to put your answer on its own line after "Answer:".', "\n\nLet's think step by step.\nAnswer:"]

BEFORE = [
    "Solve this math problem. Show your work and put the answer in \\boxed{}: ",
    "Work out the following problem. Your final answer should be in \\boxed{}.\n\n",
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step "
    "before answering.\n\n",
    "You must put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final "
    "answer will be extracted automatically by the \\boxed{} tag. This is the problem:\n",
    "Please reason step by step, and put your final answer within \\boxed{}.\nProblem: "]


@pytest.mark.parametrize("text", [f"Who wrote:{SUFFIX} Name him.", "Find $x$ if $x+1=3$.", "How much is $1.5 + 2$?"])
def test_instructions_of_other_trainings_are_cut_off_before_and_behind_a_problem(text: str):
    for before, behind in [*itertools.product(BEFORE, ["", BEHIND[-2]]), *itertools.product([""], BEHIND)]:
        assert without_instruction(before + text + behind) == text
    assert without_instruction("What is 2+3" + SUFFIX) == "What is 2+3"


@pytest.mark.parametrize("text", [
    "Find $a$. Put your answer in the form $a+b$.", "Find it. Express your answer in simplest form.",
    "A robot climbs the stairs step by step. How many steps are there?", "Solve $x+1=2$ step by step.",
    "What number belongs in $3 + \\boxed{} = 7$?", "What number goes in the box?",
    "What is the last line of the proof?",
    "Let's play a game. Please find the winner.", "Think of a number. Double it. What is the result?",
    "Replace each \\boxed{} by a digit so that the sum is right.", "What is the value of $\\boxed{3}+2$?",
    "What box has more than one solution:\n\\[4x - 9 = x + \\boxed{\\phantom{2}}?\\]",
    "What is the answer to 3 + \\boxed{} = 7?",
    "Let $\\boxed{N}$ count the divisors of $N$. Find the value of \\[\\boxed{\\boxed{11}\\times\\boxed{20}}\\]",
    "The answer to a riddle is $\\boxed{A}+3=7$. Find the value of $\\boxed{A}$.",
    "Please box the apples. How many boxes?", "The answer is 5. What is the question?"])
def test_what_a_problem_says_of_its_own_answer_stays(text: str):
    assert without_instruction(text) == text


def test_a_row_that_is_an_instruction_and_nothing_else_is_no_problem(tmp_path: Path):
    with pytest.raises(ProblemError, match=r"Row 1 of .* no usable text"):
        load_problems(write_jsonl(tmp_path / "x.jsonl", [{"problem": SUFFIX, "answer": 1}]), "train", undivided=True)


def test_verl_takes_the_last_user_message(tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4?"}]
    row = verl_row("", "7") | {"prompt": messages}
    assert texts(load_problems(write_jsonl(tmp_path / "c.jsonl", [row]), "train", undivided=True)) == ["3+4?"]


def test_file_is_divided_by_text_so_that_equal_texts_fall_on_one_side(tmp_path: Path):
    rows = plain_rows(400)
    path = write_jsonl(tmp_path / "sums.jsonl", rows + rows)
    train, evaluation = load_problems(path, "train"), load_problems(path, "evaluation")
    assert len(train) + len(evaluation) == 400
    assert not set(texts(train)) & set(texts(evaluation))
    assert 0.07 < len(evaluation) / 400 < 0.19


def test_evaluation_file_is_used_whole_and_its_texts_are_never_trained_on(tmp_path: Path):
    source = write_jsonl(tmp_path / "train.jsonl", plain_rows(30))
    other = write_jsonl(tmp_path / "test.jsonl", plain_rows(10, start=25))
    config = ProblemsConfig(source, evaluation_source=other, levels="1")
    assert len(held_out(config, 100)) == 10
    assert sorted(texts(ProblemPool(config, 0).problems)) == sorted(row["problem"] for row in plain_rows(25))


def test_evaluation_source_equal_to_the_source_is_its_evaluation_split(local_file: str):
    config = ProblemsConfig(local_file, evaluation_source=local_file)
    assert held_out(config, 100) == held_out(ProblemsConfig(local_file), 100)
    assert not set(texts(held_out(config, 100))) & set(texts(ProblemPool(config, 0).problems))


def test_evaluation_file_with_a_pocket_problem_keeps_it_out_of_the_generated_pool(tmp_path: Path):
    problem = load_problems("pocket", "train", 24)[0]
    other = write_jsonl(tmp_path / "test.jsonl", [{"problem": problem.text, "answer": problem.answer}])
    pool = ProblemPool(ProblemsConfig(evaluation_source=other, pool=24), seed=0)
    assert problem.text not in texts(pool.problems) and len(pool.problems) == 24
    fresh = ProblemPool(ProblemsConfig(pool=0), seed=0).take(0, 1)
    write_jsonl(Path(other), [{"problem": fresh[0].text, "answer": fresh[0].answer}])
    assert ProblemPool(ProblemsConfig(evaluation_source=other, pool=0), seed=0).take(0, 1) != fresh


@pytest.mark.parametrize(("rows", "says"), [
    ([], "own.jsonl is empty"),
    ([{"problem": "a?"}], r"own.jsonl has no column 'answer' \(it has problem\)"),
    ([{"question": "a?", "gold": 1}], "has no column 'problem'.*needs problem and answer, or prompt and reward_model"),
    ([{"prompt": "a?"}], "has no column 'reward_model'"),
    ([{"problem": "a?", "answer": 1}, {"problem": "b?"}], "Row 2 of .*own.jsonl has an empty or unreadable answer"),
    ([{"problem": "a?", "answer": " "}], "Row 1 of .* empty or unreadable answer in its column answer"),
    ([{"problem": "a?", "answer": float("nan")}], "Row 1 of .* empty or unreadable answer"),
    ([{"problem": "a?", "answer": {"x": 1}}], "Row 1 of .* empty or unreadable answer"),
    ([{"problem": ["a?"], "answer": 1}], "Row 1 of .* no usable text in its column problem"),
    ([{"problem": "a \ud800?", "answer": 1}], "Row 1 of .* no usable text in its column problem"),
    ([{"problem": "a?", "answer": 1, "level": "hard"}], "Row 1 of .* has the level 'hard'"),
    ([{"problem": "a?", "answer": 1}, "", '{"problem": '], "Row 3 of .*own.jsonl is no JSON"),
    (["[1, 2]"], "Row 1 of .* is no JSON object"),
    (["[" * 100_000], "Row 1 of .* is no JSON"),
    ([{"id": 7, "problem": "a?", "answer": 1}, {"id": "7", "problem": "b?", "answer": 2}],
     "Rows 1 and 2 of .* have the same id '7'"),
    ([verl_row("a?", "1") | {"prompt": []}], "Row 1 of .* no usable text in its column prompt"),
    ([verl_row("a?", None)], "Row 1 of .* answer in its column reward_model"),
])
def test_bad_file_is_one_sentence_that_names_file_and_column_or_row(tmp_path: Path, rows: list, says: str):
    with pytest.raises(ProblemError, match=says):
        load_problems(write_jsonl(tmp_path / "own.jsonl", rows), "train", undivided=True)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_missing_or_unreadable_file_names_the_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"own.{suffix}"
    with pytest.raises(ProblemError, match=rf"own.{suffix} cannot be read"):
        load_problems(str(path), "train")
    path.write_bytes(b"\xff\xfe no such layout")
    with pytest.raises(ProblemError, match=rf"own.{suffix} cannot be read"):
        load_problems(str(path), "train")


def test_file_too_small_to_divide_says_how_to_name_held_out_problems(tmp_path: Path):
    row = next(row for row in plain_rows(50) if not arithmetic.is_held_out(row["problem"]))
    with pytest.raises(ProblemError, match=r"evaluation split of .*own.jsonl is empty.*problems\.evaluation_source"):
        held_out(ProblemsConfig(write_jsonl(tmp_path / "own.jsonl", [row])), 5)


def test_levels_restrict_a_file_and_an_empty_choice_names_its_levels(tmp_path: Path):
    rows = [row | {"level": 1 + n % 3} for n, row in enumerate(plain_rows(60))]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    assert {problem.level for problem in load_problems(path, "train", levels="2-3")} == {2, 3}
    with pytest.raises(ProblemError, match=r"problems\.levels is '8'.*1, 2, 3"):
        load_problems(path, "train", levels="8")
