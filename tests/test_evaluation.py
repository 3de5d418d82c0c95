"""Held-out evaluation: the numbers, when it happens, and that training does not notice it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small import small, timeless

from masa_lib import crash_safe_files as files
from masa_lib.analysis import awareness
from masa_lib.config import Config
from masa_lib.engines import make_engine
from masa_lib.models import loading
from masa_lib.runs.folder import Run
from masa_lib.tasks.problems import ProblemPool, held_out
from masa_lib.training import evaluation
from masa_lib.training.drive import train
from masa_lib.training.trainer import Trainer

CONFIG = small({"problems.levels": "1-6"})


@pytest.fixture(scope="module")
def parts():
    """Held-out problems, engine and tokenizer."""
    model, tokenizer = loading.load(CONFIG.model)
    engine = make_engine("transformers", model, tokenizer, batch=512)
    return held_out(CONFIG.problems, 18), engine, tokenizer


def evaluate(parts, config: Config = CONFIG, **changes):
    return evaluation.evaluate(*parts, config, **({"samples": 4, "predictions": 3} | changes))


def test_one_row_a_problem_counts_what_was_right_how_long_and_what_was_predicted() -> None:
    table = pd.DataFrame({
        "group": [0, 0, 0, 1, 1, 1, 0, 0, 1, 1], "stream": ["solution"] * 6 + ["meta"] * 4,
        "problem_id": [*"aaabbb", *"aabb"], "level": [2, 2, 2, 5, 5, 5, 2, 2, 5, 5],
        "problem": ["1 + 1"] * 3 + ["11 + 11"] * 3 + ["1 + 1"] * 2 + ["11 + 11"] * 2,
        "correct": pd.array([True, False, True, False, False, False, None, None, None, None], dtype="boolean"),
        "length": [4, 9, 8, 1, 2, 6, 20, 20, 20, 20],
        "predicted_pass_rate": pd.array([None] * 6 + [8, 5, None, None], dtype="Int64"),
        "predicted_length": pd.array([None] * 6 + [7, 11, None, None], dtype="Int64")})
    first, second = evaluation.per_problem(table).to_dict("records")
    assert first == {"problem_id": "a", "level": 2, "problem": "1 + 1", "prompt_length": 5, "n": 3, "c": 2,
                     "mean_length": 7.0, "correct_length": 6.0, "predictions": [8, 5], "predicted_lengths": [7, 11],
                     "parsed": 1.0, "meta_samples": 2}
    assert (second["n"], second["c"], second["mean_length"], second["parsed"]) == (3, 0, 3.0, 0.0)
    assert np.isnan(second["correct_length"]) and second["predictions"] == [] and second["meta_samples"] == 2
    table.loc[6, "predicted_length"] = pd.NA  # released mode takes a pass rate alone
    assert evaluation.per_problem(table)["predicted_lengths"].tolist() == [[11], []]


def test_the_summary_is_that_of_the_table(parts) -> None:
    summary, table = evaluate(parts, step=7)
    rate = table["c"] / table["n"]
    assert (summary["step"], summary["problems"], summary["samples"]) == (7, 18, 4)
    assert (table["n"] == 4).all() and (table["meta_samples"] == 3).all()
    assert summary["accuracy"] == pytest.approx(rate.mean()) and 0 < rate.mean() < 1
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]
    assert summary["mean_length"] == pytest.approx(table["mean_length"].mean())
    assert summary["parse_rate"] == pytest.approx(table["parsed"].mean())
    assert {key: summary[key] for key in awareness.meta_awareness(table)} == awareness.meta_awareness(table)
    assert summary["tokens"] > 4 * table["mean_length"].sum()
    assert table["problem_id"].tolist() == [problem.id for problem in parts[0]]


def test_without_predictions_nothing_is_said_about_them(parts) -> None:
    summary, table = evaluate(parts, predictions=0)
    assert "pass_rate_r" not in summary and summary["tokens"] == round(4 * table["mean_length"].sum())
    assert table["parsed"].isna().all() and not table["predictions"].map(len).any()


def test_an_evaluation_repeats_itself_and_another_step_or_seed_samples_anew(parts) -> None:
    _, table = evaluate(parts)
    pd.testing.assert_frame_equal(evaluate(parts)[1], table)
    assert not evaluate(parts, step=1)[1]["mean_length"].equals(table["mean_length"])
    assert not evaluate(parts, small({"seed": 1}))[1]["mean_length"].equals(table["mean_length"])


def test_the_temperature_is_the_evaluations_own(parts) -> None:
    _, table = evaluate(parts, small({"evaluation.temperature": 1e-4, "sampling.temperature": 1.0}))
    assert set(table["c"]) == {0, 4}
    assert table["predictions"].map(lambda found: len(set(found)) <= 1).all()


def test_a_model_is_evaluated_as_a_runs_first_evaluation_does_it() -> None:
    trainer = Trainer(CONFIG)
    expected = trainer.evaluate()
    summary, table = evaluation.evaluate_model(CONFIG)
    assert timeless(summary) == timeless(expected)
    assert len(table) == CONFIG.evaluation.final_problems


def test_a_checkpoint_is_evaluated_with_its_own_weights(tmp_path: Path) -> None:
    run = train(small({"steps": 1, "update.learning_rate": 0.3}), tmp_path / "run", "masa train")
    _, weights = run.latest_checkpoint()
    summary, _ = evaluation.evaluate_model(run.config, weights)
    before, _ = evaluation.evaluate_model(run.config)
    assert before["accuracy"] > 0 and summary["accuracy"] == 0  # such a step destroys the model


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five steps with an evaluation after every other one."""
    config = small({"steps": 5, "evaluation.every": 2})
    return train(config, tmp_path_factory.mktemp("evaluated") / "run", "masa train")


def test_the_first_and_the_last_evaluation_are_thorough_and_those_between_are_not(evaluated: Run) -> None:
    rows = evaluated.evaluations()
    assert rows["step"].tolist() == [0, 2, 4, 5]
    assert rows["problems"].tolist() == [5, 4, 4, 5]
    assert rows["samples"].tolist() == [3, 2, 2, 3]
    assert [evaluated.evaluation_table(step)["meta_samples"].iloc[0] for step in rows["step"]] == [2, 0, 0, 2]
    assert rows["parse_rate"].isna().tolist() == [False, True, True, False]
    curve = evaluated.evaluation_table(2)["problem_id"].tolist()
    assert evaluated.evaluation_table(0)["problem_id"].tolist()[:4] == curve


def test_no_problem_is_both_trained_on_and_held_out(evaluated: Run) -> None:
    pool = {problem.text for problem in ProblemPool(evaluated.config.problems, 0).problems}
    assert set(evaluated.rollouts()["problem"]) <= pool
    assert not pool & set(evaluated.evaluation_table(0)["problem"])


def test_a_step_result_carries_the_evaluation_that_was_due() -> None:
    found = [result.evaluation for result in Trainer(small({"steps": 3, "evaluation.every": 2}))]
    assert found[0] is None
    assert (found[1]["step"], found[1]["problems"]) == (2, 4)
    assert (found[2]["step"], found[2]["problems"]) == (3, 5)


def test_training_does_not_notice_evaluations(evaluated: Run) -> None:
    silent = small({"steps": 5, "evaluation.every": 0, "evaluation.predictions": 0})
    metrics = [timeless(result.metrics) for result in Trainer(silent)]
    recorded = [timeless(row) for row in evaluated.metrics().to_dict("records")]
    assert recorded == metrics


def test_looking_at_held_out_beliefs_is_recorded_for_each_step_and_changes_no_number_of_the_training(
        tmp_path: Path) -> None:
    config = {"method": "masa-read", "steps": 2, "evaluation.problems": 3, "record.rollouts_every": 0}
    runs = [train(small(config | {"evaluation.read_every": every}), tmp_path / str(every), "masa train")
            for every in (0, 1)]
    plain, looked = ([timeless(row) for row in run.metrics().to_dict("records")] for run in runs)
    assert plain == looked and not (runs[0].path / "readings.jsonl").exists()
    rows = files.read_lines(runs[1].path / "readings.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    last = runs[1].evaluation_table(2).head(3)  # of the last evaluation's problems, the learning curve's come first
    assert rows[-1]["problems"] == last["problem_id"].tolist()
    assert rows[-1]["beliefs"] == [list(belief) for belief in last["belief"]]
    runs[1].rewind(1)
    assert [row["step"] for row in files.read_lines(runs[1].path / "readings.jsonl")] == [1]


def test_methods_that_sample_their_predictions_have_no_beliefs_to_look_at(tmp_path: Path) -> None:
    run = train(small({"steps": 1, "evaluation.read_every": 1}), tmp_path / "run", "masa train")
    assert not (run.path / "readings.jsonl").exists()
