"""Problems: every source gives what it promises, the splits never meet, and a wrong source is one clear sentence."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from masa_lib.config import ProblemsConfig
from masa_lib.tasks import arithmetic
from masa_lib.tasks.data_sets import DATA_SETS
from masa_lib.tasks.gym import GYM_UNSTEADY
from masa_lib.tasks.problem_rows import ProblemError, without_instruction
from masa_lib.tasks.problems import ProblemPool, held_out, load_problems, sources

GYM = "reasoning-gym:chain_sum,gcd"
SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."


def texts(problems: list) -> list[str]:
    return [problem.text for problem in problems]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf8")
    return str(path)


def plain_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(start, start + count)]


def verl_row(text: str, truth: Any, **more: Any) -> dict[str, Any]:
    return {"data_source": "someone/contest", "prompt": [{"content": text, "role": "user"}], "ability": "math",
            "reward_model": {"ground_truth": truth, "style": "rule"}, "extra_info": {"index": 0}, **more}


@pytest.fixture
def local_file(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "sums.jsonl", plain_rows(80))


# the pocket source


def test_pool_of_the_pocket_source_is_balanced_over_levels_and_without_duplicates():
    pool = ProblemPool(ProblemsConfig(), seed=0)
    assert set(Counter(problem.level for problem in pool.problems).values()) == {960 // len(arithmetic.LEVELS)}
    assert len(set(texts(pool.problems))) == len({problem.id for problem in pool.problems}) == 960


def test_levels_beyond_the_pocket_models_reach_come_by_name_alone():
    assert {problem.level for problem in ProblemPool(ProblemsConfig(levels="1-18"), seed=0).problems} == {*range(1, 19)}
    assert {problem.level for problem in load_problems("pocket", "evaluation", 36, levels="11-13")} == {11, 12, 13}


def test_pocket_splits_have_no_text_in_common_whatever_the_seeds():
    train = texts(load_problems("pocket", "train", 1200, seed=0)) + texts(load_problems("pocket", "train", 600, seed=1))
    evaluation = texts(load_problems("pocket", "evaluation", 240, seed=0))
    assert not set(train) & set(evaluation)
    assert len(set(evaluation)) == 240


def test_fresh_stream_never_draws_a_held_out_problem():
    pool = ProblemPool(ProblemsConfig(pool=0), seed=0)
    assert pool.problems == [] and pool.note == ""
    fresh = pool.take(0, 600)
    assert not any(arithmetic.is_held_out(problem.text) for problem in fresh)
    assert len(set(texts(fresh))) > 500  # the lowest levels have few different problems


def test_levels_restrict_the_pocket_source():
    assert {problem.level for problem in load_problems("pocket", "train", 40, levels="3-5")} == {3, 4, 5}
    assert {problem.level for problem in held_out(ProblemsConfig(levels="7"), 5)} == {7}


def test_fewer_held_out_problems_are_the_first_of_more():
    assert held_out(ProblemsConfig(), 24) == held_out(ProblemsConfig(), 60)[:24]


def test_another_problem_seed_gives_other_problems_and_another_run_seed_another_order():
    pool = ProblemPool(ProblemsConfig(pool=60), seed=0)
    assert set(pool.problems) == set(ProblemPool(ProblemsConfig(pool=60), seed=1).problems)
    assert pool.take(0, 60) != ProblemPool(ProblemsConfig(pool=60), seed=1).take(0, 60)
    assert set(pool.problems) != set(ProblemPool(ProblemsConfig(pool=60, seed=1), seed=0).problems)


def test_asking_for_more_problems_than_a_level_has_is_an_error_that_says_what_to_change():
    with pytest.raises(ProblemError, match=r"level 1.*problems\.pool.*problems\.levels"):
        load_problems("pocket", "train", 5000, levels="1")


# the order of training


@pytest.mark.parametrize("config", [ProblemsConfig(pool=50), ProblemsConfig(pool=0), ProblemsConfig(GYM, pool=24),
                                    ProblemsConfig(GYM, pool=0)], ids=lambda config: f"{config.source}-{config.pool}")
def test_take_depends_on_the_cursor_alone(config: ProblemsConfig):
    pool = ProblemPool(config, seed=3)
    at_once = pool.take(0, 70)
    assert ProblemPool(config, seed=3).take(33, 20) == at_once[33:53]
    assert [pool.take(n, 1)[0] for n in (69, 0, 12)] == [at_once[69], at_once[0], at_once[12]]


def test_every_pass_over_a_pool_holds_each_problem_once_in_a_new_order():
    pool = ProblemPool(ProblemsConfig(pool=40), seed=0)
    passes = [pool.take(40 * n, 40) for n in range(3)]
    assert all(sorted(texts(one)) == sorted(texts(pool.problems)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_another_process_with_another_string_hashing_draws_the_same_problems():
    code = ("from masa_lib.tasks.problems import load_problems\n"
            f"for source in ('pocket', {GYM!r}):\n"
            "    print([p.id for p in load_problems(source, 'train', 24, seed=5)])")
    outputs = [subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True,
                              cwd=Path(__file__).parents[1], capture_output=True, check=True).stdout for seed in "12"]
    assert outputs[0] == outputs[1] != ""


def test_finite_source_without_pool_comes_back_in_passes_and_says_so(local_file: str):
    pool = ProblemPool(ProblemsConfig(local_file, pool=0), seed=0)
    size = len(pool.problems)
    assert f"{size} training problems" in pool.note and "come back" in pool.note
    assert sorted(texts(pool.take(0, size))) == sorted(texts(pool.take(size, size)))


def test_pool_larger_than_a_finite_source_says_how_many_there_are(local_file: str):
    pool = ProblemPool(ProblemsConfig(local_file), seed=0)
    assert f"{len(pool.problems)} training problems, not the 960" in pool.note
    assert ProblemPool(ProblemsConfig(local_file, pool=10), seed=0).note == ""


# reasoning-gym


def test_reasoning_gym_tasks_and_their_levels_take_turns_and_the_splits_are_disjoint():
    train, evaluation = (load_problems(GYM, split, 48, seed=0) for split in ("train", "evaluation"))
    assert Counter(problem.level for problem in train) == {1: 12, 2: 12, 3: 12, 4: 12}
    assert Counter(problem.id.partition("-")[0] for problem in train) == {"chain_sum": 24, "gcd": 24}
    assert not set(texts(train)) & set(texts(evaluation))
    assert len(set(texts(train))) == 48


def test_reasoning_gym_answers_belong_to_their_problems():
    for problem in load_problems("reasoning-gym:gcd", "train", 8):
        assert problem.answer == str(math.gcd(*map(int, re.findall(r"\d+", problem.text))))


def test_task_without_a_curriculum_has_level_1_only():
    problems = load_problems("reasoning-gym:gsm_symbolic", "train", 4)
    assert {problem.level for problem in problems} == {1}
    with pytest.raises(ProblemError, match="without a curriculum has level 1"):
        load_problems("reasoning-gym:gsm_symbolic", "train", 4, levels="2")


def test_a_reasoning_gym_task_takes_settings_and_each_mention_is_a_level_of_its_own():
    source = "reasoning-gym:chain_sum:max_terms=2:max_digits=1,gcd:max_value=9,chain_sum:min_terms=4:max_terms=4"
    problems = load_problems(source, "train", 12)
    assert {(problem.id.partition("-")[0], problem.level) for problem in problems} == {
        ("chain_sum", 1), ("gcd", 1), ("chain_sum", 2)}
    for problem in problems:
        numbers = re.findall(r"\d+", problem.text)
        assert len(numbers) == (4 if problem.level == 2 else 2)
        assert problem.level == 2 or all(len(number) == 1 for number in numbers)
    assert {problem.level for problem in load_problems(source, "train", 4, levels="2")} == {2}


@pytest.mark.parametrize(("source", "says"), [
    ("reasoning-gym:gcd:max_value", "settings as gcd:name=number"),
    ("reasoning-gym:gcd:max_valeu=9", "unexpected keyword argument 'max_valeu'"),
    ("reasoning-gym:chainsum", "Did you mean chain_sum"),
    ("reasoning-gym:", "problems.source takes"),
    ("reasoning-gym:rush_hour", "stores no answer for rush_hour"),
    ("reasoning-gym:knight_swap", "min_nodes must be >= 6"),
    (f"reasoning-gym:{min(GYM_UNSTEADY)}", "no run could be resumed"),
])
def test_unusable_reasoning_gym_task_is_refused_with_the_reason(source: str, says: str):
    with pytest.raises(ProblemError, match=says):
        ProblemPool(ProblemsConfig(source, pool=8), seed=0)


# local files


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


def test_copies_in_a_data_set_of_the_hub_are_one(hub):
    hub("minerva", {"test": [{"question": f"What is {n % 4} + 1?", "answer": str(n % 4 + 1)} for n in range(400)]})
    assert len(load_problems("minerva", "evaluation")) == 4


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


def test_instructions_are_cut_off_in_every_layout(tmp_path: Path, hub):
    rows = [verl_row("Find $x$." + SUFFIX, "7"), {"problem": "Find $x$." + SUFFIX, "answer": "7"}]
    for row in rows:
        assert texts(load_problems(write_jsonl(tmp_path / "x.jsonl", [row]), "train", undivided=True)) == ["Find $x$."]
    hub("minerva", {"test": [{"question": "Find $x$." + SUFFIX, "answer": "7"}]})
    assert texts(load_problems("minerva", "evaluation")) == ["Find $x$."]


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


# wrong settings


@pytest.mark.parametrize(("source", "says"), [
    ("gsm8", "Did you mean gsm8k.*problems.source takes pocket, reasoning-gym.*deepscaler.*jsonl, .csv or .parquet"),
    ("notes.txt", "There is no source of problems 'notes.txt'"),
    ("aime-2025", r"only there to evaluate on.*problems\.evaluation_source"),
])
def test_unusable_source_says_what_is_allowed(source: str, says: str):
    with pytest.raises(ProblemError, match=says):
        ProblemPool(ProblemsConfig(source), seed=0)


@pytest.mark.parametrize(("levels", "says"), [("9-2", "as 2-9"), ("hard", "as 2-9"), ("40", "pocket has the levels 1")])
def test_wrong_levels_are_refused(levels: str, says: str):
    with pytest.raises(ProblemError, match=says):
        ProblemPool(ProblemsConfig(levels=levels, pool=0), seed=0)


def test_generated_source_without_a_count_is_refused():
    with pytest.raises(ProblemError, match="say how many"):
        load_problems("pocket", "train")


# Hugging Face data sets: rows in the documented layout, and whole folders in it read through `datasets`

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


def test_sources_lists_every_source_and_marks_what_was_never_fetched():
    rows = {row["name"]: row for row in sources()}
    assert {"pocket", "reasoning-gym:<task,task>", *DATA_SETS} < set(rows)
    assert all(rows[name]["fetched"] == "never" for name in DATA_SETS)
    assert rows["gsm8k"] | {"what": ""} == {"name": "gsm8k", "what": "", "train": 7473, "evaluation": 1319,
                                            "columns": ("question", "answer"), "fetched": "never"}
