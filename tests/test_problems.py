"""Problems: every source gives what it promises, the splits never meet, and a wrong source is one clear sentence."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from problem_files import plain_rows, texts, write_jsonl

from masa_lib.config import ProblemsConfig
from masa_lib.tasks import arithmetic
from masa_lib.tasks.data_sets import DATA_SETS
from masa_lib.tasks.gym import GYM_UNSTEADY
from masa_lib.tasks.problem_rows import ProblemError
from masa_lib.tasks.problems import ProblemPool, held_out, load_problems, sources

GYM = "reasoning-gym:chain_sum,gcd"


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


# wrong settings

@pytest.mark.parametrize(("source", "says"), [
    ("gsm8", "Did you mean gsm8k.*problems.source takes pocket, reasoning-gym.*deepscaler.*jsonl, .csv or .parquet"),
    ("notes.txt", "There is no source of problems 'notes.txt'"),
    ("prontoqa", "no source of problems here: `masa eval --harness`"),
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


def test_sources_lists_every_source_and_marks_what_was_never_fetched():
    rows = {row["name"]: row for row in sources()}
    ours = {name for name, entry in DATA_SETS.items() if entry.hub}
    assert {"pocket", "reasoning-gym:<task,task>", *ours} < set(rows) and not set(DATA_SETS) - ours & set(rows)
    assert all(rows[name]["fetched"] == "never" for name in ours)
    assert rows["gsm8k"] | {"what": ""} == {"name": "gsm8k", "what": "", "train": 7473, "evaluation": 1319,
                                            "columns": ("question", "answer"), "fetched": "never"}
