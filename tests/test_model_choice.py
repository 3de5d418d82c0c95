"""The model that notebook 00 chose is the one that the others find."""

from __future__ import annotations

from pathlib import Path

import pytest

from masa_lib import cli
from masa_lib import config as configs
from masa_lib.hub import HubError
from masa_lib.lessons import model_choice
from masa_lib.models import memory, tiers


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_choice, "PLACE", tmp_path / "runs" / "model.txt")
    monkeypatch.setattr(model_choice, "SMOKE", False)


def test_before_any_choice_it_is_the_pocket_model() -> None:
    assert model_choice.chosen() == "pocket"


@pytest.mark.parametrize("name", ["smollm2", "Qwen/Qwen3-0.6B-Base"])
def test_a_choice_is_kept(name: str) -> None:
    assert model_choice.choose(f" {name} ") == model_choice.chosen() == name


def test_a_folder_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_choice.choose("my-model") == model_choice.chosen() == str(tmp_path / "my-model")


def test_automatic_checks_neither_follow_nor_change_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model_choice.choose("smollm2")
    monkeypatch.setattr(model_choice, "SMOKE", True)
    assert model_choice.choose("pocket") == "pocket"
    assert model_choice.chosen() == "pocket"
    monkeypatch.setattr(model_choice, "SMOKE", False)
    assert model_choice.chosen() == "smollm2"


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "qwen3-1.7", "/no/such/folder", "", "a b"])
def test_a_model_that_is_nowhere_is_refused_and_the_choice_before_stands(name: str) -> None:
    model_choice.choose("smollm2")
    with pytest.raises(HubError, match="is neither a tier") as refused:
        model_choice.choose(name)
    assert "\n" not in str(refused.value) and model_choice.chosen() == "smollm2"


def test_hours_grow_with_steps_and_lengths_and_fall_with_a_faster_card() -> None:
    config = tiers.config({"model.name": "qwen3-1.7b", "method": "grpo"}, True)
    one = model_choice.hours(config, "H100")
    assert one["all"] == pytest.approx(one["solutions"] + one["update"] + one["evaluations"])
    assert one["predictions"] == one["reading"] == 0 < one["evaluations"]
    twice = model_choice.hours(configs.replace(config, {"steps": 2 * config.steps}), "H100")
    assert twice[["solutions", "update"]].tolist() == pytest.approx([2 * one["solutions"], 2 * one["update"]])
    unseen = model_choice.hours(configs.replace(config, {"evaluation.every": 0}), "H100")
    assert one["evaluations"] > unseen["evaluations"] > 0
    slower, longer = model_choice.hours(config, "A100"), model_choice.hours(config, "H100", filled=0.9)
    assert slower["all"] > one["all"] < longer["all"]


def test_hours_count_predictions_that_are_written_and_only_the_places_of_a_gate() -> None:
    config = tiers.config({"model.name": "qwen3-1.7b", "method": "grpo"}, True)
    masa, read = (model_choice.hours(configs.replace(config, {"method": name}), "H100") for name in (
        "masa", "masa-read"))
    grpo = model_choice.hours(config, "H100")
    assert masa["predictions"] > 0 == read["predictions"] and masa["all"] > grpo["all"] > read["all"]
    assert grpo["reading"] == 0 < read["reading"] < 0.02 * read["solutions"]


def test_what_a_run_writes_is_its_checkpoints_with_both_moments_the_model_and_what_is_recorded() -> None:
    config = configs.replace(tiers.config({"model.name": "qwen3-1.7b"}, True), {
        "steps": 100, "record.rollouts_every": 10, "sampling.problems": 2, "sampling.solutions": 3,
        "sampling.solution_tokens": 80})
    parameters, whole = memory.architecture("qwen3-1.7b").parameters / 2**30, 10 * 2 * 3 * 40 / 2**30
    assert model_choice.disk(config) == pytest.approx({
        "checkpoints": 4 * 12 * parameters, "final model": 2 * parameters, "rollouts": whole * model_choice.RECORDED})


def test_the_plan_of_time_has_hours_for_cards_that_fit_and_a_dash_for_others(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "qwen3-1.7b", "--hours", "--set", "steps=20"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()[0] in model_choice.CARDS}
    assert rows["L4"] == ["-"] * 6 + ["no"] and rows["H200"][-1] == "yes"
    assert 0 < float(rows["H200"][-2]) < float(rows["A100"][-2])
    assert "20 steps of masa-read" in said and "not measured" in said and "Disk" in said


def test_vllm_decodes_as_many_sequences_as_its_share_has_room_for() -> None:
    config = tiers.config({"model.name": "qwen3-1.7b"}, True)
    small, large = (model_choice.decoded_together(config, size) for size in (80, 141))
    assert 1 < small < large
    assert model_choice.decoded_together(configs.replace(config, {"sampling.engine": "transformers"}), 80) == 512


def test_automatic_checks_train_on_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "SMOKE", True)
    assert model_choice.gpu_memory() == 0
