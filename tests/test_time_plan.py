"""Hours and disk of a training, as they are planned: how they move with what a config says."""

from __future__ import annotations

import pytest

from masa_lib import cli
from masa_lib import config as configs
from masa_lib.models import memory, tiers, time_plan


def test_hours_grow_with_steps_and_lengths_and_fall_with_a_faster_card() -> None:
    config = tiers.config({"model.name": "qwen3-1.7b", "method": "grpo"}, True)
    one = time_plan.hours(config, "H100")
    assert one["all"] == pytest.approx(one["solutions"] + one["update"] + one["evaluations"])
    assert one["predictions"] == one["reading"] == 0 < one["evaluations"]
    twice = time_plan.hours(configs.replace(config, {"steps": 2 * config.steps}), "H100")
    assert twice[["solutions", "update"]].tolist() == pytest.approx([2 * one["solutions"], 2 * one["update"]])
    unseen = time_plan.hours(configs.replace(config, {"evaluation.every": 0}), "H100")
    assert one["evaluations"] > unseen["evaluations"] > 0
    slower, longer = time_plan.hours(config, "A100"), time_plan.hours(config, "H100", filled=0.9)
    assert slower["all"] > one["all"] < longer["all"]


def test_hours_count_predictions_that_are_written_and_only_the_places_of_a_gate() -> None:
    config = tiers.config({"model.name": "qwen3-1.7b", "method": "grpo"}, True)
    masa, read = (time_plan.hours(configs.replace(config, {"method": name}), "H100") for name in (
        "masa", "masa-read"))
    grpo = time_plan.hours(config, "H100")
    assert masa["predictions"] > 0 == read["predictions"] and masa["all"] > grpo["all"] > read["all"]
    assert grpo["reading"] == 0 < read["reading"] < 0.02 * read["solutions"]


def test_what_a_run_writes_is_its_checkpoints_with_both_moments_the_model_and_what_is_recorded() -> None:
    config = configs.replace(tiers.config({"model.name": "qwen3-1.7b"}, True), {
        "steps": 100, "record.rollouts_every": 10, "sampling.problems": 2, "sampling.solutions": 3,
        "sampling.solution_tokens": 80})
    parameters, whole = memory.architecture("qwen3-1.7b").parameters / 2**30, 10 * 2 * 3 * 40 / 2**30
    assert time_plan.disk(config) == pytest.approx({
        "checkpoints": 4 * 12 * parameters, "final model": 2 * parameters, "rollouts": whole * time_plan.RECORDED})


def test_the_plan_of_time_has_hours_for_cards_that_fit_and_a_dash_for_others(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "qwen3-1.7b", "--hours", "--set", "steps=20"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()[0] in time_plan.CARDS}
    assert rows["L4"] == ["-"] * 6 + ["no"] and rows["H200"][-1] == "yes"
    assert 0 < float(rows["H200"][-2]) < float(rows["A100"][-2])
    assert "20 steps of masa-read" in said and "not measured" in said and "Disk" in said


def test_vllm_decodes_as_many_sequences_as_its_share_has_room_for() -> None:
    config = tiers.config({"model.name": "qwen3-1.7b"}, True)
    small, large = (time_plan.decoded_together(config, size) for size in (80, 141))
    assert 1 < small < large
    assert time_plan.decoded_together(configs.replace(config, {"sampling.engine": "transformers"}), 80) == 512
