"""`masa doctor`: five runs made to fail, each for its own reason, and one that is well."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small import small
from synthetic import STEPS, write_run

from masa_lib import DATA, cli
from masa_lib.analysis import doctor
from masa_lib.runs.folder import Run
from masa_lib.training.trainer import Trainer

BRIEF = {"steps": 2, "method": "grpo", "sampling.problems": 6, "problems.levels": "1-2", "record.checkpoint_every": 9}
Train = Callable[[Mapping[str, Any]], Run]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def trained(changes: Mapping[str, Any]) -> Run:
        config = small(BRIEF | dict(changes))
        run = Run.create(tmp_path / "run", config, "masa train")
        list(Trainer(config, run))
        return run

    return trained


def problems_file(folder: Path, rows: list[tuple[str, str]]) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{number}", "problem": problem, "answer": answer}) + "\n"
                            for number, (problem, answer) in enumerate(rows)), encoding="utf8")
    return str(path)


def advised(run: Run) -> dict[str, str]:
    return {finding.what: finding.advice for finding in doctor.examine(run) if finding.advice}


def test_problems_out_of_reach_are_said_to_be_so(train: Train) -> None:
    said = advised(train({"problems.levels": "18", "problems.pool": 12}))
    assert "out of reach" in said["groups all right, all wrong, mixed"]


def test_solutions_that_are_cut_off_are_said_to_be_so(train: Train) -> None:
    said = advised(train({"sampling.solution_tokens": 6}))
    assert "raise sampling.solution_tokens (now 6)" in said["solutions truncated"]


def test_steps_too_small_to_move_a_weight_are_said_to_be_so(train: Train) -> None:
    said = advised(train({"update.learning_rate": 1e-8}))
    assert "raise update.learning_rate" in said["a weight can have moved by"]


def test_answers_that_no_box_can_match_are_said_to_be_so(train: Train, tmp_path: Path) -> None:
    source = problems_file(tmp_path, [(f"Start with {n}. Add 2.", f"It is so. #### {n + 2}") for n in range(30)])
    said = advised(train({"problems.source": source, "problems.levels": ""}))
    assert "can never be matched" in said["answers that nothing can match"]


def test_problems_so_few_that_they_are_learned_by_heart_are_said_to_be_so(train: Train, tmp_path: Path) -> None:
    source = problems_file(tmp_path, [(f"Start with {n}. Add 2.", str(n + 2)) for n in range(8)])
    said = advised(train({"problems.source": source, "problems.levels": "", "steps": 3}))
    assert "learned by heart" in said["different problems"]


def test_a_recorded_run_that_learned_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    run = DATA / "runs" / "baseline" / "masa-s0"
    assert not advised(Run.open(run))
    assert cli.main(["doctor", str(run)]) == 0
    assert "Nothing here explains a flat reward." in capsys.readouterr().out


@pytest.mark.parametrize(("after", "said"), [
    ([0.3, 0.9, 0.2, 1.0], "0.50 before, 0.60 after step 20: +0.10 [+0.10, +0.10] on the same problems (moved)"),
    ([0.4, 0.6, 0.1, 0.9], "0.50 before, 0.50 after step 20: +0.00 [-0.26, +0.26] on the same problems (not shown")])
def test_held_out_accuracy_is_compared_problem_by_problem(tmp_path: Path, after: list[float], said: str) -> None:
    run = write_run(tmp_path / "run", "grpo", 0, {0: 0.5, STEPS: 0.6})
    for step, rates in ((0, [0.2, 0.8, 0.1, 0.9]), (STEPS, after)):
        run.write_evaluation(step, {"accuracy": 0.0}, pd.DataFrame({
            "problem_id": list("abcd"), "n": 10, "c": [round(10 * rate) for rate in rates]}))
    measured, = (found.measured for found in doctor.examine(run) if found.what == "held-out accuracy")
    assert measured.startswith(said)


def test_findings_are_rows_for_a_program_and_troubles_come_first(
        train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train({"sampling.solution_tokens": 6})
    assert cli.main(["doctor", str(run.path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    ill = [bool(row["advice"]) for row in rows]
    assert set(rows[0]) == {"what", "measured", "advice"} and ill == sorted(ill, reverse=True) and ill[0]
    assert "want something done" in doctor.text(run)


def test_a_run_without_a_finished_step_or_without_rollouts_says_so(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "empty", small(BRIEF), "masa train")
    assert [finding.measured for finding in doctor.examine(run)] == ["none finished"]
    run.append_metrics({"step": 1, "loss": 0.1, "accuracy": 0.5})
    assert "record.rollouts_every" in advised(run)["rollouts"]
