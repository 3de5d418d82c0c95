"""Measures of accuracy, meta-awareness and cost, and the comparison of recorded runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import STEPS, evaluation_table, write_run

from masa_lib import config as configs
from masa_lib.analysis import awareness, compare, costs, intervals, report
from masa_lib.analysis.costs import COSTS
from masa_lib.analysis.records import AnalysisError
from masa_lib.runs.folder import Run

LINE = {0: 0.1, 10: 0.3, STEPS: 0.5}  # crosses 0.46 (base + 90 % of the gain) at step 18
EARLY = {0: 0.1, 10: 0.5, STEPS: 0.6}  # crosses 0.46 at step 9


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert compare.pass_at_k([n], [c], k)[0] == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_pass_at_k_refuses_more_draws_than_samples() -> None:
    with pytest.raises(AnalysisError, match=r"pass@5 needs 1 to n samples .* the smallest n here is 4"):
        compare.pass_at_k([8, 4], [1, 1], 5)


def test_mean_interval_is_the_t_interval() -> None:
    mean, low, high = intervals.mean_interval([1.0, 2.0, math.nan, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, 2.484, 2.484), abs=1e-3)


def test_mean_interval_of_one_value_has_no_ends() -> None:
    mean, low, high = intervals.mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_pass_at_k_interval_holds_the_mean_and_repeats() -> None:
    table = evaluation_table(0.3, 0.0)
    mean, low, high = compare.pass_at_k_interval(table, 4)
    assert low < mean < high
    assert mean == pytest.approx(compare.pass_at_k(table["n"], table["c"], 4).mean())
    assert (mean, low, high) == compare.pass_at_k_interval(table, 4)


def test_pass_at_k_interval_counts_a_problem_of_several_seeds_once() -> None:
    table = evaluation_table(0.3, 0.0)
    once, often = (compare.pass_at_k_interval(pd.concat([table] * seeds), 4) for seeds in (1, 5))
    assert often == pytest.approx(once)


def test_correlation_leaves_unknown_pairs_out() -> None:
    assert awareness.correlation([0, 1, 2, 9], [5, 4, 3, None]) == pytest.approx(-1.0)
    assert awareness.correlation(pd.array([0, 1, 2, None], dtype="Int64"), [1.0, 2.0, 3.0, 9.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [[3.0] * 4, [0.1 + 0.2] * 2 + [0.3] * 2, [1.0, 2.0, math.nan, math.nan]])
def test_correlation_is_undefined_for_a_constant_or_too_few_pairs(constant: list[float]) -> None:
    assert math.isnan(awareness.correlation(constant, [1.0, 2.0, 3.0, 4.0]))


def test_within_level_correlation_forgets_what_the_level_tells() -> None:
    level = np.repeat([1, 2, 3], 10)
    inside = np.tile(np.arange(10.0), 3)
    assert math.isnan(awareness.within_level_correlation(level, 100 * level + inside, level))
    assert awareness.correlation(-inside + 100 * level, inside + 100 * level) > 0.9
    assert awareness.within_level_correlation(-inside + 100 * level, inside + 100 * level, level) == pytest.approx(-1.0)


def test_meta_awareness_of_a_model_that_knows_and_of_one_that_does_not() -> None:
    knows = awareness.meta_awareness(evaluation_table(0.5, 1.0))
    assert min(knows["pass_rate_r"], knows["length_r"], knows["length_r_within"]) > 0.9
    assert knows["pass_rate_r_within"] > 0.8
    assert knows["pass_rate_mae"] < 0.07
    assert knows["length_mae"] < 0.51
    assert knows["length_all_mae"] == pytest.approx(3.0, abs=0.51)
    blind = awareness.meta_awareness(evaluation_table(0.5, 0.0))
    assert abs(blind["pass_rate_r"]) < 0.4
    assert blind["length_mae"] > 20


def test_meta_awareness_compares_lengths_with_correct_solutions_only() -> None:
    table = evaluation_table(0.5, 1.0).assign(mean_length=99.0)
    table.loc[0, ["c", "correct_length"]] = 0, np.nan
    assert awareness.meta_awareness(table)["length_r"] > 0.9
    assert math.isnan(awareness.meta_awareness(table)["length_all_r"])


def test_meta_awareness_gives_what_the_prompts_length_alone_tells() -> None:
    table = evaluation_table(0.5, 0.0)
    measures = awareness.meta_awareness(table.assign(prompt_length=100 - 10 * table["level"]))
    assert measures["r_prompt_length"] > 0.6
    assert math.isnan(measures["r_prompt_length_within"])


def test_meta_awareness_without_predictions_is_undefined() -> None:
    measures = awareness.meta_awareness(evaluation_table(0.5, 0.0, predictions=0))
    assert all(math.isnan(measures[name]) for name in ("pass_rate_r", "pass_rate_mae", "length_r", "parse_rate"))


def test_meta_awareness_weighs_parsing_by_meta_rollouts() -> None:
    table = evaluation_table(0.5, 0.0, problems=2).assign(parsed=[1.0, 0.5], meta_samples=[2, 6])
    assert awareness.meta_awareness(table)["parse_rate"] == pytest.approx(5 / 8)


def test_time_to_target_reads_the_first_crossing_off_a_monotone_fit() -> None:
    assert costs.time_to_target([0, 10, 20], [0.0, 0.4, 0.8], [0, 100, 300], 0.6) == pytest.approx(200)
    # The dip pools 0.5 and 0.3 to 0.4: the lucky early value is no crossing of 0.45.
    assert costs.time_to_target([0, 1, 2, 3], [0.0, 0.5, 0.3, 0.5], [0, 1, 2, 3], 0.45) == pytest.approx(2.5)
    assert costs.time_to_target([20, 0, 10], [0.8, 0.0, 0.4], [300, 0, 100], 0.6) == pytest.approx(200)


def test_time_to_target_never_reached_is_infinite_and_without_target_undefined() -> None:
    assert math.isinf(costs.time_to_target([0, 1], [0.1, 0.2], [0, 1], 0.3))
    assert math.isnan(costs.time_to_target([0, 1], [0.1, 0.2], [0, 1], math.nan))
    assert costs.time_to_target([0, 1], [0.4, 0.5], [0, 1], 0.3) == 0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_time_to_target_grows_with_the_target(accuracy: list[float], one: float, other: float) -> None:
    steps = list(range(len(accuracy)))
    low, high = (costs.time_to_target(steps, accuracy, steps, target) for target in sorted((one, other)))
    assert low <= high + 1e-9


def test_paired_ratio_is_the_geometric_mean_over_common_seeds_that_cross() -> None:
    reference = pd.Series({0: 100.0, 1: 100.0, 2: math.inf, 3: 100.0})
    ratio = intervals.paired_ratio(reference, pd.Series({1: 200.0, 0: 50.0, 2: 10.0, 7: 1.0}))
    assert ratio["mean"] == pytest.approx(1.0)
    assert ratio["low"] * ratio["high"] == pytest.approx(1.0)
    assert ratio["low"] < 0.01


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of grpo and masa; masa needs half the steps and has 1.5 times the tokens a step."""
    folder = tmp_path_factory.mktemp("study")
    for seed in range(3):
        write_run(folder / f"grpo-s{seed}", "grpo", seed, LINE)
        write_run(folder / f"masa-s{seed}", "masa", seed, EARLY)
    return folder


def test_comparison_json_has_the_promised_shape(study: Path) -> None:
    methods = json.loads(json.dumps(compare.compare_runs(study).summary, allow_nan=False))["methods"]
    assert list(methods) == ["grpo", "masa"]
    for arm in methods.values():
        for name in ("accuracy_final", "tokens_to_target_ratio", "seconds_to_target_ratio"):
            assert set(arm[name]) == {"mean", "low", "high"}
        for name in ("r_pass_rate", "r_length", "mae_pass_rate"):
            assert set(arm[name]) == {"before", "after"}
        assert arm["seeds"] == 3


def test_comparison_takes_accuracy_and_costs_from_the_records(study: Path) -> None:
    masa = compare.compare_runs(study).summary["methods"]["masa"]
    assert masa["accuracy_base"] == pytest.approx(0.1)
    assert masa["accuracy_final"]["mean"] == pytest.approx(0.6)
    assert masa["accuracy_above_grpo"]["mean"] == pytest.approx(0.1)
    assert (masa["tokens"], masa["tokens_meta"], masa["seconds"]) == (STEPS * 150, STEPS * 50, STEPS * 2.0)
    assert masa["r_pass_rate"]["after"] > 0.8 > masa["r_pass_rate"]["before"]
    assert masa["mae_pass_rate"]["after"] < masa["mae_pass_rate"]["before"]
    assert masa["gain_by_level"]["1"] == pytest.approx(np.mean([  # the same numbers from the tables
        (after["c"] - before["c"])[after["level"] == 1].mean() / 32
        for before, after in ([evaluation_table(0.1, 0, seed=seed), evaluation_table(0.6, 0, seed=seed)]
                              for seed in range(3))]))
    assert masa["pass_at_32_base"]["mean"] > 0.5


def test_ratios_are_grpos_cost_to_the_target_over_the_arms(study: Path) -> None:
    summary = compare.compare_runs(study).summary
    assert summary["target"] == pytest.approx(0.46)
    masa = summary["methods"]["masa"]
    assert masa["tokens_to_target_ratio"]["mean"] == pytest.approx(18 * 100 / (9 * 150))
    assert masa["seconds_to_target_ratio"]["mean"] == pytest.approx(2.0)
    assert summary["methods"]["grpo"]["tokens_to_target_ratio"]["mean"] == pytest.approx(1.0)


def test_evaluation_tokens_are_no_cost(tmp_path: Path) -> None:
    for tokens in (1, 10**9):
        write_run(tmp_path / str(tokens) / "grpo-s0", "grpo", 0, LINE, evaluation_tokens=tokens)
    cheap, dear = (compare.compare_runs(tmp_path / str(tokens)).summary for tokens in (1, 10**9))
    assert cheap == dear


def test_one_seed_has_ratios_without_interval(study: Path) -> None:
    masa = compare.compare_runs([study / "grpo-s0", study / "masa-s0"]).summary["methods"]["masa"]
    assert masa["tokens_to_target_ratio"]["mean"] == pytest.approx(18 * 100 / (9 * 150))
    assert masa["tokens_to_target_ratio"]["low"] is masa["accuracy_final"]["high"] is None


def test_seeds_that_never_cross_count_with_all_that_they_spent(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "slow-s0", "masa", 0, {0: 0.1, STEPS: 0.2})
    write_run(tmp_path / "slow-s1", "masa", 1, EARLY)
    slow = compare.compare_runs([study, tmp_path]).summary["methods"]["slow"]
    assert slow["never_crossed"] == 1
    assert slow["note"].startswith("1 of 2 seeds never reach the target")
    assert slow["tokens_to_target_ratio"]["mean"] == pytest.approx(math.sqrt(18 * 100 / (STEPS * 150) * 4 / 3))
    assert (slow["target_bound"], slow["equal_bound"]) == ("<=", "<=")
    assert slow["equal_missed"] == pytest.approx(0.5)  # half of the seeds, at each accuracy
    assert slow["tokens_equal_ratio"]["mean"] < slow["tokens_equal_ratio"]["high"]


def test_a_reference_that_misses_its_mean_target_makes_a_lower_bound(tmp_path: Path) -> None:
    for seed, last in enumerate((0.3, 0.9)):
        write_run(tmp_path / f"grpo-s{seed}", "grpo", seed, {0: 0.1, 10: 0.2, STEPS: last})
        write_run(tmp_path / f"masa-s{seed}", "masa", seed, {0: 0.1, STEPS: 0.9})
    methods = compare.compare_runs(tmp_path).summary["methods"]
    assert (methods["grpo"]["target_bound"], methods["masa"]["target_bound"]) == ("", ">=")


def test_seeds_without_a_ratio_at_equal_accuracy_are_told_of(tmp_path: Path) -> None:
    for seed, last in enumerate((0.1, 0.9)):
        write_run(tmp_path / f"grpo-s{seed}", "grpo", seed, {0: 0.1, STEPS: last})
        write_run(tmp_path / f"masa-s{seed}", "masa", seed, {0: 0.1, STEPS: 0.9})
    write_run(tmp_path / "ahead-s1", "masa", 1, {0: 0.7, STEPS: 0.9})
    methods = compare.compare_runs(tmp_path).summary["methods"]
    assert "1 of 2 seeds have no ratio at equal accuracy" in methods["masa"]["note"]
    assert "1 of 1 seeds have no ratio at equal accuracy" in methods["ahead"]["note"]
    assert methods["masa"]["tokens_equal_ratio"]["mean"] is not None


def test_seeds_of_one_accuracy_have_an_interval_with_a_width(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"grpo-s{seed}", "grpo", seed, {0: 0.1, STEPS: 1.0})
    found = compare.compare_runs(tmp_path).summary["methods"]["grpo"]["accuracy_final"]
    assert found["low"] < 0.9 < found["mean"] == found["high"] == 1.0


def test_costs_at_equal_accuracy_have_all_denominators(study: Path) -> None:
    masa = compare.compare_runs(study).summary["methods"]["masa"]
    found = {cost: masa[f"{cost}_equal_ratio"]["mean"] for cost in COSTS}
    assert found == pytest.approx({  # half the steps; 100 and 150 tokens, 30 read, 80 in the update
        "tokens": 2 * 100 / 150, "read": 2.0, "tokens_update": 2.0, "seconds": 2.0, "computed": 2 * 210 / 260,
        "computed_thrice": 2 * 370 / 420})
    assert (masa["read"], masa["computed"], masa["computed_thrice"]) == (STEPS * 30, STEPS * 260, STEPS * 420)


def test_what_a_run_reads_without_an_answer_is_cost(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "reader-s0", "masa", 0, EARLY, more=lambda step: {"tokens_read": 30})
    arm = compare.compare_runs([study, tmp_path]).summary["methods"]["reader"]
    assert arm["read_equal_ratio"]["mean"] == pytest.approx(1.0)


def test_the_whole_curve_is_read_on_the_same_problems(tmp_path: Path) -> None:
    """The ends have 24 problems and the points between the first 12, on which the ends are worse."""
    for arm in ("grpo", "masa"):
        run = write_run(tmp_path / f"{arm}-s0", arm, 0, LINE)
        for step, rate in ((0, 0.0), (10, 0.5), (STEPS, 0.75)):
            table = run.evaluation_table(step)
            table["c"] = np.where(np.arange(24) < 12, 32 * rate, 32).astype(int)
            table = table.iloc[:12] if step == 10 else table
            run.write_evaluation(step, {"problems": len(table), "accuracy": (table["c"] / 32).mean()}, table)
    comparison = compare.compare_runs(tmp_path)
    assert comparison.curves["accuracy"].tolist() == [0.0, 0.5, 0.75] * 2
    assert comparison.summary["target"] == pytest.approx(0.9 * 0.75)
    assert comparison.summary["methods"]["grpo"]["accuracy_final"]["mean"] == pytest.approx((0.75 + 1) / 2)


def test_runs_with_fewer_problems_are_compared_on_those_alone(study: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine-s0", "masa", 0, LINE)
    for step in LINE:
        table = Run.open(study / "grpo-s0").evaluation_table(step).iloc[:6]
        run.write_evaluation(step, {"problems": 6, "accuracy": (table["c"] / table["n"]).mean()}, table)
    both = compare.compare_runs([study / "grpo-s0", run.path]).summary["methods"]
    assert both["mine"]["tokens_equal_ratio"]["mean"] == pytest.approx(100 / 150)
    assert both["grpo"]["target"] == pytest.approx(0.46)
    strangers = run.evaluation_table(STEPS).assign(problem_id=[f"other {number}" for number in range(6)])
    for step in LINE:
        run.write_evaluation(step, {"problems": 6, "accuracy": 0.5}, strangers)
    summary = compare.compare_runs([study / "grpo-s0", run.path]).summary
    assert "mine-s0 and grpo have no held-out problem in common, so there is no ratio." in summary["warnings"]


@pytest.mark.parametrize(("study_name", "ratio"), [("baseline", (0.56, 0.40, 0.78)), ("smollm2", (0.46, None, None))])
def test_the_recorded_ratios_to_the_target_are_those_on_the_same_problems(
        study_name: str, ratio: tuple[float, float | None, float | None]) -> None:
    found = compare.compare_runs(compare.PAPER.parent / "runs" / study_name).summary["methods"]["masa"]
    assert tuple(value and round(value, 2) for value in found["tokens_to_target_ratio"].values()) == ratio


@pytest.mark.parametrize("grpo", [None, {0: 0.3, STEPS: 0.3}])
def test_without_a_gain_of_grpo_there_is_no_ratio(tmp_path: Path, grpo: dict[int, float] | None) -> None:
    write_run(tmp_path / "masa-s0", "masa", 0, LINE)
    if grpo:
        write_run(tmp_path / "grpo-s0", "grpo", 0, grpo)
    summary = compare.compare_runs(tmp_path).summary
    assert summary["methods"]["masa"]["tokens_to_target_ratio"] == {"mean": None, "low": None, "high": None}
    assert summary["warnings"][0].endswith("so there is no target and no ratio.")


def test_unequal_updates_and_unfinished_runs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo-s0", "grpo", 0, LINE)
    write_run(tmp_path / "masa-s0", "masa", 0, {0: 0.1, 10: 0.3}, updates=2, steps=15)
    unfinished, unequal = compare.compare_runs(tmp_path).summary["warnings"]
    assert unfinished == f"masa-s0 stands at step 15 of {STEPS}."
    assert "not compared at equal updates: grpo-s0 20, masa-s0 30." in unequal


def test_an_undefined_correlation_is_null_and_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "masa-s0", "masa", 0, LINE)
    table = run.evaluation_table(STEPS)
    run.write_evaluation(STEPS, {"accuracy": 0.5}, table.assign(predictions=[[0] * 8] * len(table)))
    masa = compare.compare_runs(tmp_path).summary["methods"]["masa"]
    assert masa["r_pass_rate"]["after"] is None
    assert masa["note"] == "r of the pass rate after training is undefined in 1 of 1 seeds."


def test_other_folders_are_the_arm_of_their_method(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "my run", "masa", 5, LINE)
    comparison = compare.compare_runs([study / "grpo-s0", tmp_path / "my run"])
    assert comparison.runs[["arm", "seed"]].to_numpy().tolist() == [["grpo", 0], ["masa", 5]]


def test_tables_have_a_row_a_run_an_evaluation_a_step_and_a_problem(study: Path) -> None:
    comparison = compare.compare_runs(study)
    assert (len(comparison.runs), len(comparison.curves), len(comparison.steps)) == (6, 18, 6 * STEPS)
    assert comparison.problems.groupby(["arm", "seed", "when"]).size().tolist() == [24] * 12


def test_runs_of_one_method_with_another_setting_are_arms_by_their_folders(tmp_path: Path) -> None:
    for name, rate in (("slow", 1e-5), ("fast", 1e-4)):
        run = write_run(tmp_path / name, "grpo", 0, LINE if name == "slow" else EARLY)
        configs.save(configs.replace(run.config, {"update.learning_rate": rate}), run.path / "config.toml")
    comparison = compare.compare_runs([tmp_path / "slow", tmp_path / "fast"])
    assert comparison.summary["settings"] == {"update.learning_rate": {"fast": "0.0001", "slow": "1e-05"}}
    fast = comparison.summary["methods"]["fast"]
    assert (fast["reference"], fast["tokens_equal_ratio"]["mean"]) == ("slow", pytest.approx(2.0))
    assert "update.learning_rate is" in report.compare([tmp_path / "slow", tmp_path / "fast"])


def test_runs_of_one_arm_and_seed_take_the_folder_above_into_their_names(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other" / "masa-s0", "masa", 0, LINE)
    write_run(tmp_path / "again", "masa", 0, LINE)
    arms = compare.compare_runs([study, tmp_path / "other", tmp_path / "again"]).summary["methods"]
    assert list(arms) == ["grpo", *sorted(["again", f"{study.name}/masa", "other/masa"])]
    assert arms["other/masa"]["reference"] == "grpo"


def test_a_live_change_is_a_difference_between_arms(study: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine-s0", "grpo", 0, LINE)
    run.append_change(5, {"update.learning_rate": 0.5})
    said = compare.compare_runs([study / "grpo-s0", run.path]).summary["settings"]["update.learning_rate"]
    assert said["mine"] == f"{said['grpo']} then 0.5"


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="There is no run in"):
        compare.compare_runs(tmp_path)


def test_a_run_that_has_only_begun_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo-s0", "grpo", 0, LINE, steps=0)
    with pytest.raises(AnalysisError, match="nothing to compare"):
        compare.compare_runs(tmp_path)


def test_every_stream_is_cost_and_what_an_oracle_measures_is_not(tmp_path: Path) -> None:
    streams = {"tokens_recheck": 10, "tokens_anchor": 5, "tokens_oracle": 10**6, "tokens_decode": 7}
    write_run(tmp_path / "masa-efficient-s0", "masa-efficient", 0, LINE, more=lambda step: streams)
    comparison = compare.compare_runs(tmp_path)
    arm = comparison.summary["methods"]["masa-efficient"]
    assert arm["tokens"] == STEPS * (100 + 50 + 10 + 5)
    assert (arm["tokens_recheck"], arm["tokens_oracle"]) == (STEPS * 10, STEPS * 10**6)
    assert comparison.curves["tokens"].tolist() == [0, 10 * 165, STEPS * 165]
    assert comparison.curves["tokens_anchor"].tolist() == [0, 50, 100]


def test_the_streams_add_up_to_the_tokens_to_the_target(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "masa-efficient-s1", "masa-efficient", 1, EARLY, tokens=80,
              more=lambda step: {"tokens_recheck": step})
    arm = compare.compare_runs([study, tmp_path]).summary["methods"]["masa-efficient"]
    parts = arm["tokens_of_reference"]
    assert parts["tokens"] == pytest.approx(sum(parts[name] for name in costs.COST))
    assert 1 / parts["tokens"] == pytest.approx(arm["tokens_to_target_ratio"]["mean"])
    assert parts["tokens_solution"] == pytest.approx(9 * 80 / (18 * 100))
    assert parts["tokens_recheck"] == pytest.approx(45 / (18 * 100), rel=0.25)  # 1 + ... + 9, between evaluations
    assert arm["steps_to_target_ratio"]["mean"] == pytest.approx(2.0)


def test_a_fresh_stream_is_measured_against_grpo_on_a_fresh_stream(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "grpo-fresh-s0", "grpo", 0, {0: 0.1, 10: 0.2, STEPS: 0.3})
    write_run(tmp_path / "masa-efficient-fresh-s0", "masa-efficient", 0, {0: 0.1, 10: 0.3, STEPS: 0.4})
    methods = compare.compare_runs([study, tmp_path]).summary["methods"]
    assert list(methods) == ["grpo", "masa", "grpo-fresh", "masa-efficient-fresh"]
    assert methods["masa"]["target"] == pytest.approx(0.46)
    fresh = methods["masa-efficient-fresh"]
    assert (fresh["reference"], fresh["target"]) == ("grpo-fresh", pytest.approx(0.28))
    assert fresh["tokens_to_target_ratio"]["mean"] == pytest.approx(18 * 100 / (9 * 150))
    assert fresh["accuracy_above_grpo"]["mean"] == pytest.approx(0.1)


def test_a_fresh_arm_without_its_reference_has_no_ratio(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "mopps-fresh-s0", "mopps", 0, LINE)
    summary = compare.compare_runs([study, tmp_path]).summary
    assert summary["warnings"] == ["There is no grpo-fresh arm, so there is no target and no ratio."]
    assert summary["methods"]["mopps-fresh"]["tokens_to_target_ratio"]["mean"] is None
    assert summary["methods"]["masa"]["tokens_to_target_ratio"]["mean"] is not None


def test_arms_come_in_the_order_of_the_methods() -> None:
    arms = ["oracle", "kernel", "grpo-fresh", "greso", "masa-efficient", "mopps", "masa", "dapo", "grpo", "level-table"]
    assert sorted(arms, key=compare.arm_rank) == ["grpo", "masa", "masa-efficient", "dapo", "mopps", "greso",
                                                   "level-table", "oracle", "kernel", "grpo-fresh"]


def test_privileged_arms_are_marked(study: Path, tmp_path: Path) -> None:
    for arm in ("oracle", "level-table", "mopps"):
        write_run(tmp_path / f"{arm}-s0", arm, 0, LINE)
    methods = compare.compare_runs([study, tmp_path]).summary["methods"]
    assert [name for name, arm in methods.items() if arm["privileged"]] == ["level-table", "oracle"]


@pytest.mark.parametrize("others", [0.9, math.nan])
def test_seconds_count_only_from_runs_alone_on_the_machine(study: Path, tmp_path: Path, others: float) -> None:
    write_run(tmp_path / "masa-efficient-s0", "masa-efficient", 0, EARLY, more=lambda step: {"cores_others": others})
    summary = compare.compare_runs([study, tmp_path]).summary
    assert summary["methods"]["masa-efficient"]["seconds_to_target_ratio"]["mean"] is None
    assert summary["methods"]["masa"]["seconds_to_target_ratio"]["mean"] == pytest.approx(2.0)
    assert summary["warnings"] == ["1 of 7 runs do not show that they had the machine to themselves, so their seconds "
                                   "are not compared."]


def test_a_rival_is_measured_against_masa_efficient_seed_by_seed(study: Path, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"masa-efficient-s{seed}", "masa-efficient", seed, EARLY)
        write_run(tmp_path / f"mopps-s{seed}", "mopps", seed, EARLY)
    methods = compare.compare_runs([study, tmp_path]).summary["methods"]
    assert methods["mopps"]["tokens_below_efficient"]["mean"] == pytest.approx(1.5)
    assert methods["grpo"]["tokens_below_efficient"]["mean"] == pytest.approx(9 * 150 / (18 * 100))
    assert compare.compare_runs(study).summary["methods"]["masa"]["tokens_below_efficient"]["mean"] is None


def test_calibration_error_has_an_interval_over_seeds(study: Path) -> None:
    error = compare.compare_runs(study).summary["methods"]["masa"]["calibration_error"]
    assert error["before"]["mean"] > 0.2 > error["after"]["mean"]
    assert error["after"]["low"] < error["after"]["mean"] < error["after"]["high"]


def test_the_calibration_curve_is_that_of_the_seeds() -> None:
    problems = pd.DataFrame({"arm": "masa", "seed": [0, 0, 0, 1, 1], "pass_rate": [0.2, 0.4, 0.9, 0.5, 0.7],
                             "predicted_pass_rate": [0.5, 0.52, 1.0, 0.49, None]})
    half, whole = compare.calibration_curve(problems).to_dict("records")
    assert (half["bin"], half["seeds"], half["problems"]) == (4, 2, 3)
    assert (half["predicted"], half["true"]) == pytest.approx((0.5, 0.4))
    assert half["low"] < 0.4 < half["high"]
    assert (whole["bin"], whole["true"]) == (8, 0.9)
    assert math.isnan(whole["low"])


def test_drop_then_align_is_counted_over_seeds_and_over_steps_without_a_gate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(2):  # the first falls and rises, the second rises alone
        run = write_run(tmp_path / f"masa-s{seed}", "masa", seed, LINE, steps=0)
        for step in range(1, 121):
            valley = abs(step - 40) / 80 if seed == 0 else step / 120
            run.append_metrics({"step": step, "predicted_pass_rate": valley + rng.normal(0, 0.05), "accuracy": 0.9,
                                "gate_on": 0, "cores_others": 0.0})
        for step in range(121, 131):
            run.append_metrics({"step": step, "predicted_pass_rate": 0.0, "accuracy": 0.0, "gate_on": 1})
    found = compare.compare_runs(tmp_path).summary["methods"]["masa"]["drop_then_align"]
    assert (found["shown"], found["measured"]) == (1, 2)
    assert found["rise"]["low"] < found["rise"]["mean"] < found["rise"]["high"]


def test_gate_quality_is_a_mean_over_seeds_with_an_interval(tmp_path: Path) -> None:
    for seed, precision in enumerate((0.9, 0.96)):
        write_run(tmp_path / f"masa-efficient-s{seed}", "masa-efficient", seed, LINE, more=lambda step, p=precision: {
            "gate_on": 1, "cap_on": int(step > 10), "gate_precision": p, "gate_recall": 0.6, "dropped": 0.3,
            "right_cut": 0.02})
    arm = compare.compare_runs(tmp_path).summary["methods"]["masa-efficient"]
    assert arm["gate_precision"]["mean"] == pytest.approx(0.93)
    assert arm["gate_precision"]["low"] < 0.9 < 0.96 < arm["gate_precision"]["high"]
    assert (arm["gate_start"]["mean"], arm["cap_steps"]["mean"]) == (1, 0.5)


@pytest.mark.parametrize(("measure", "grpo", "masa"), [("pass_rate", 0.05, 0.67), ("length", 0.08, 0.79)])
def test_the_papers_points_have_the_published_correlations(measure: str, grpo: float, masa: float) -> None:
    points = compare.paper_points(measure)
    found = {arm: awareness.correlation(part["predicted"], part["actual"]) for arm, part in points.groupby("arm")}
    assert found == pytest.approx({"grpo": grpo, "masa": masa}, abs=0.006)


def test_the_papers_folder_is_small_and_describes_each_of_its_files() -> None:
    described = (compare.PAPER / "README.md").read_text(encoding="utf8")
    files = [path for path in compare.PAPER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 900_000
    assert all(path.stem in described for path in files if path.suffix == ".csv")
