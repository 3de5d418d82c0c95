"""The reward lab: its numbers are those of the rewards, its presets and controls do what they say, its HTML is safe."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from masa_lib import DATA
from masa_lib import config as configs
from masa_lib.analysis.figures import GREEN
from masa_lib.config import Config, ConfigError
from masa_lib.lessons import environment, exercises, reward_tasks
from masa_lib.lessons.widgets import panel, reward_figures, reward_lab, reward_scenes
from masa_lib.lessons.widgets.reward_lab import RewardLab
from masa_lib.lessons.widgets.reward_scenes import Recorded
from masa_lib.method import rewards, rollouts
from masa_lib.runs.folder import Run, runs_in

RUN = DATA / "runs" / "baseline" / "masa-s0"


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    run = Run.open(RUN)
    return reward_scenes.record(run.rollouts([1, 100, 180]), run.config)


@pytest.fixture(scope="module")
def everything() -> Recorded:
    return reward_scenes.read(runs_in(RUN.parent, "masa-s*"))


@pytest.fixture
def lab(recorded: Recorded) -> RewardLab:
    return RewardLab(recorded)


def meta_row(text: str, **columns: Any) -> dict[str, Any]:
    return {"stream": "meta", "text": text, "length": 9, "correct": pd.NA, "notions": None} | columns


def made(solutions: list[tuple[str, bool]], predictions: list[tuple[str, list[str]]]) -> Recorded:
    """One group from texts."""
    rows = [{"stream": "solution", "text": text, "length": 10 + number, "correct": right, "notions": None}
            for number, (text, right) in enumerate(solutions)]
    rows += [meta_row(text, notions=notions) for text, notions in predictions]
    table = pd.DataFrame(rows).assign(group=0, problem="Add <b>1</b>.", level=1)
    table["member"] = table.groupby("stream").cumcount()
    return reward_scenes.record(table.astype({"correct": "boolean"}), Config())


def prediction(pass_rate: int, length: int, notion: str = "carry") -> tuple[str, list[str]]:
    return f'{{"math_notion": ["{notion}"], "pass_rate": {pass_rate}, "solution_length": {length}}}', [notion]


# What is computed.

@pytest.mark.parametrize("changes", [
    {}, {"reward.difficulty_mode": "brier", "reward.notion_weight": 0.25, "reward.length_slack": 0.25},
    {"update.normalise_meta": "parts"}, {"reward.mode": "released", "update.normalise_meta": "none"},
    {"reward.notion_mode": "rate", "reward.exclude_problem_notions": False, "reward.strict_length": True}])
def test_rewards_and_advantages_are_those_that_a_training_would_give(recorded: Recorded,
                                                                     changes: dict[str, Any]) -> None:
    config = configs.replace(recorded.config, reward_scenes.presets(recorded.config)["paper"] | changes)
    found = reward_scenes.scene(recorded, changes, {}).predictions
    groups = recorded.groups.index[::12]
    table = recorded.rollouts[recorded.rollouts["group"].isin(groups)].copy().assign(capped=False)
    rollouts._parse(table, table["text"], config)
    rollouts.score(table, config)
    expected = table[table["stream"] == "meta"]
    for name in ("reward", *rewards.PARTS, "advantage"):
        np.testing.assert_allclose(found.loc[expected.index, name], expected[name], rtol=1e-6, atol=1e-6)


def test_groups_are_numbered_by_rising_pass_rate(recorded: Recorded) -> None:
    assert recorded.groups["pass_rate"].is_monotonic_increasing
    assert list(recorded.groups.index) == list(range(3 * recorded.config.sampling.problems))


def test_runs_are_read_side_by_side() -> None:
    both = reward_scenes.read([RUN, RUN.with_name("masa-s1")])
    assert set(both.groups["seed"]) == {0, 1}
    assert both.rollouts.groupby("group")["problem_id"].nunique().max() == 1
    assert set(both.rollouts.groupby("group").size()) == {16}


def test_runs_without_predictions_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="runs of the method masa"):
        reward_scenes.read([RUN.with_name("grpo-s0")])


def test_ranks_do_not_move_against_the_same_setting_and_sum_to_zero_against_another(recorded: Recorded) -> None:
    presets = reward_scenes.presets(recorded.config)
    assert (reward_scenes.scene(recorded, presets["paper"], presets["paper"]).predictions["gain"] == 0).all()
    gain = reward_scenes.scene(recorded, presets["ours"], presets["paper"]).predictions
    assert gain["gain"].abs().max() > 0
    assert gain.groupby("group")["gain"].sum().abs().max() < 1e-9


def test_a_group_without_signal_is_one_whose_advantages_are_all_zero() -> None:
    same = made([("one", True), ("two", False)], [prediction(4, 10)] * 3)
    scene = reward_scenes.scene(same, {}, {})
    assert scene.no_signal == 1
    assert scene.flat.loc[4].tolist() == [1.0, 1.0]
    assert scene.drives.tolist() == [0.0, 0.0, 0.0]
    mixed = made([("one", True), ("two", False)], [prediction(4, 10), prediction(8, 10)])
    assert reward_scenes.scene(mixed, {}, {}).no_signal == 0


@pytest.mark.parametrize("mode", ["reward", "parts", "none", "contrast"])
def test_what_drives_the_advantages_adds_up_to_one(recorded: Recorded, mode: str) -> None:
    drives = reward_scenes.scene(recorded, {"update.normalise_meta": mode}, {}).drives
    assert drives.sum() == pytest.approx(1, abs=1e-4)
    alone = {"reward.pass_rate_weight": 0, "reward.notion_weight": 0, "update.normalise_meta": mode}
    assert reward_scenes.scene(recorded, alone, {}).drives["reward_length"] == pytest.approx(1, abs=1e-4)


def test_no_recorded_prediction_earns_more_than_the_best_answer_and_no_constant_either(recorded: Recorded) -> None:
    for preset in reward_scenes.presets(recorded.config).values():
        totals = reward_scenes.scene(recorded, preset, {}).payments.sum(axis=1)
        assert totals["recorded"] < totals["best answer"] <= 1
        assert 0 < totals["best constant"] <= totals["best answer"]


def test_the_best_constant_is_the_mode_for_a_sharp_kernel_and_the_mean_for_brier() -> None:
    rows = []
    for group, right in enumerate([0, 0, 0, 8, 8, 5, 5]):
        rows += [{"group": group, "stream": "solution", "text": "so", "length": 5, "correct": number < right,
                  "notions": None} for number in range(8)]
        rows.append(meta_row(prediction(1, 5)[0], group=group, notions=["carry"]))
    table = pd.DataFrame(rows).assign(problem="Add 1.", level=1).astype({"correct": "boolean"})
    table["member"] = table.groupby(["group", "stream"]).cumcount()
    recorded = reward_scenes.record(table, Config())
    sharp = reward_scenes.scene(recorded, {"reward.difficulty_base": 1e-4}, {}).constant
    proper = reward_scenes.scene(recorded, {"reward.difficulty_mode": "brier"}, {}).constant
    assert (sharp["pass_rate"], proper["pass_rate"]) == (0, 4)  # the mean is 26 / 7 = 3.7 eighths


def test_the_preset_hackable_is_and_that_of_the_paper_is_not(recorded: Recorded) -> None:
    presets = reward_scenes.presets(recorded.config)
    hacked = {name: reward_scenes.scene(recorded, preset, {}).hacked for name, preset in presets.items()}
    assert hacked["hackable"] > 0.9
    assert max(hacked[name] for name in ("paper", "released", "ours")) < 0.6


def test_a_score_with_a_high_floor_is_not_taken_for_hacked(recorded: Recorded) -> None:
    alone = {"reward.length_weight": 0.0, "reward.notion_weight": 0.0, "reward.difficulty_mode": "brier"}
    scene = reward_scenes.scene(recorded, alone, {})
    totals = scene.payments.sum(axis=1)
    assert totals["random"] / totals["best answer"] > 0.6  # anything earns that much
    assert scene.hacked < 0.6
    flat = reward_scenes.scene(recorded, alone | {"reward.difficulty_mode": "kernel", "reward.difficulty_base": 1}, {})
    assert flat.hacked == 0  # all answers earn the same: nothing to hack


# The guided tasks.

@pytest.mark.parametrize(("number", "wrong", "right"), [
    (0, {"reward.length_weight": 0.0, "reward.notion_weight": 0.0}, {"reward.difficulty_base": 1.0}),
    (1, {"update.normalise_meta": "parts"}, {"update.normalise_meta": "none"}),
    (2, {"reward.pass_rate_weight": 0.0}, {"reward.length_slack": 1.0, "reward.exclude_problem_notions": False})])
def test_a_task_begins_as_published_and_sees_that_its_goal_is_reached(everything: Recorded, number: int,
                                                                      wrong: dict[str, Any],
                                                                      right: dict[str, Any]) -> None:
    lab = RewardLab(everything)
    lab.task.value = list(reward_tasks.TASKS)[number]
    assert lab.settings == lab.presets["paper"]
    assert "Not yet" in lab.goal.value
    lab.apply(wrong)
    assert "Not yet" in lab.goal.value
    lab.apply(right)
    assert "Reached" in lab.goal.value
    lab.reset()
    assert lab.task.value == reward_lab.FREE and "Reached" not in lab.goal.value


def test_the_second_task_wants_the_reward_left_alone(lab: RewardLab) -> None:
    lab.task.value = list(reward_tasks.TASKS)[1]
    lab.apply({"update.normalise_meta": "none", "reward.pass_rate_weight": 0.1})
    assert "Not yet: the reward was changed (pass_rate_weight)" in lab.goal.value


def test_cells_of_few_predictions_are_grey_and_have_no_number(lab: RewardLab) -> None:
    count = reward_figures._cells(lab.recorded).reshape(9, 9)
    np.testing.assert_array_equal(pd.isna(np.array(lab.figure.data[6].z)), count < reward_figures.THIN)
    grey = {(round(shape.y0 + 0.45), round(shape.x0 + 0.47)) for shape in lab.figure.layout.shapes}
    assert grey == set(zip(*map(np.ndarray.tolist, np.nonzero((count > 0) & (count < reward_figures.THIN))),
                           strict=True)) != set()


# The panel.

def test_a_control_changes_scene_figure_and_config(lab: RewardLab) -> None:
    before, bars = lab.scene, lab.figure.data[-1].y.copy()
    lab.controls["reward.notion_weight"].value = 2.0
    assert lab.scene is not before
    assert not np.allclose(bars, lab.figure.data[-1].y)
    assert lab.settings["reward.notion_weight"] == 2.0
    np.testing.assert_allclose(lab.figure.data[-1].y[1:], lab.scene.payments["reward_notion"][
        [name for name in reward_figures.PAID if name != "drives"]])


def test_presets_and_reset(lab: RewardLab) -> None:
    begun = lab.settings
    for name, settings in lab.presets.items():
        lab.preset(name)
        assert lab.settings == settings
    lab.reset()
    assert lab.settings == begun == reward_scenes.settings_of(lab.recorded.config)


def test_the_copied_config_is_one_that_a_training_takes(lab: RewardLab, tmp_path: Path) -> None:
    lab.apply({"reward.difficulty_base": 0.05, "reward.difficulty_mode": "kernel", "reward.pass_rate_weight": 3.0})
    (tmp_path / "lab.toml").write_text(lab.copy.text, encoding="utf8")
    config = configs.load(tmp_path / "lab.toml")
    assert {key: configs.get(config, key) for key in lab.settings} == lab.settings
    assert config.reward.pass_rate_weight == 3.0
    assert set(tomllib.loads(lab.toml())) == {"reward", "update"}


def test_settings_are_handed_to_the_training_panel(recorded: Recorded, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, Any]] = []
    lab = RewardLab(recorded, {"reward.notion_weight": 0.5}, use=lambda settings: taken.append(settings) or "Taken.")
    lab._hand_over()
    assert taken == [lab.settings]
    assert taken[0]["reward.notion_weight"] == 0.5
    assert "Taken." in lab.message
    path = tmp_path / "runs" / "reward-lab.toml"
    assert "runs/reward-lab.toml" in reward_lab.write_settings(lab.settings, path)
    assert configs.read(path) == lab.settings


def test_a_setting_that_pays_nothing_is_said_and_leaves_the_picture(lab: RewardLab) -> None:
    lab.apply({"reward.pass_rate_weight": 0, "reward.length_weight": 0})
    before = lab.scene
    lab.controls["reward.notion_weight"].value = 0.0
    assert "weights are 0" in lab.message
    assert lab.scene is before
    lab.controls["reward.notion_weight"].value = 1.0
    assert "weights are 0" not in lab.message


def test_a_wrong_setting_is_refused_and_changes_nothing(lab: RewardLab) -> None:
    before = lab.settings
    with pytest.raises(ConfigError):
        lab.apply({"reward.length_slack": 0.5, "reward.difficulty_base": 7.0})
    assert lab.settings == before


def test_controls_without_effect_are_off(lab: RewardLab) -> None:
    lab.preset("released")
    assert lab.controls["reward.length_weight"].disabled
    assert not lab.controls["reward.mode"].disabled
    lab.preset("ours")
    assert not lab.controls["reward.length_weight"].disabled
    assert lab.controls["reward.difficulty_base"].disabled  # brier has no base


def test_every_control_has_a_label_and_says_what_it_does(lab: RewardLab) -> None:
    for key, control in lab.controls.items():
        assert control.description
        assert control.tooltip == configs.settings()[key].doc


def test_a_move_sets_nothing_that_another_trace_keeps(lab: RewardLab, monkeypatch: pytest.MonkeyPatch) -> None:
    # Plotly's live figure deletes what a batch sets for some traces from all the others.
    moves: list[dict[str, Any]] = []
    monkeypatch.setattr(lab.figure, "plotly_update", lambda restyle_data, **others: moves.append(restyle_data))
    other = reward_scenes.scene(lab.recorded, lab.presets["hackable"], lab.presets["paper"])
    with lab.figure.batch_update():
        reward_figures.fill(lab.figure, lab.recorded, other, 3)
    kept = [trace.to_plotly_json() for trace in reward_figures.blank(lab.recorded).data]
    assert set(moves[0]) == {"y", "z", "hovertext"}
    assert [key for key in moves[0] for trace in kept if key in trace] == []


def test_selecting_a_group_shows_its_advantages(lab: RewardLab) -> None:
    lab.select(7)
    wanted = lab.scene.predictions.query("group == 7")["advantage"]
    np.testing.assert_allclose(lab.figure.data[8].y + lab.figure.data[9].y, wanted)
    assert "Group 7:" in lab.page.value


def test_without_widgets_the_panel_is_a_picture(lab: RewardLab, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(panel, "display", shown.append)
    lab._ipython_display_()
    monkeypatch.setattr(environment, "STATIC", True)
    lab._ipython_display_()
    assert shown[0] is lab.box
    assert type(shown[1]) is go.Figure
    np.testing.assert_allclose(shown[1].data[-1].y, lab.figure.data[-1].y)


# The page of a group.

def test_hostile_texts_stay_texts() -> None:
    bad = '<img src=x onerror="alert(1)">'
    recorded = made([(f"carry {bad}", True), (bad, False)], [prediction(4, 10, "carry"), prediction(4, 10, "img src"),
                                                             (bad, [bad])])
    lab = RewardLab(recorded)
    hover = lab.figure.data[8].hovertext
    for text in (lab.page.value, lab.message, *hover):
        assert "<img" not in text
    assert "&lt;img src=x" in lab.page.value


@pytest.mark.parametrize(("mode", "notion", "text", "marked"), [
    ("ours", "carry", "Carry the 1, carrying on", "Carry"), ("released", "carries", "no Carry but carry", "carry"),
    ("ours", "long  division", "use long division", "long division"), ("ours", "a+b", "so a + b", "a + b")])
def test_notions_are_marked_where_the_reward_finds_them(mode: str, notion: str, text: str, marked: str) -> None:
    config = configs.replace(Config(), {"reward.mode": mode})
    pattern = reward_figures._pattern({notion: True}, mode)
    page = reward_figures._marked(text, pattern, {notion: True}, config)
    assert page.count("<mark") == 1
    assert f"solid {GREEN}\">{marked}</mark>" in page


def test_importing_the_package_of_panels_loads_no_panel() -> None:
    import masa_lib.lessons.widgets

    assert Path(masa_lib.lessons.widgets.__file__).read_text(encoding="utf8").count("\n") == 1


# The exercises of notebook 02.

def test_an_unanswered_exercise_is_said_and_is_no_error(recorded: Recorded) -> None:
    for said in (exercises.difficulty_exercise(lambda predicted, rate, base: None),
                 exercises.hack_exercise(recorded, None),
                 exercises.constant_exercise({}), exercises.notion_exercise(recorded, None)):
        assert "No answer yet" in said


def test_the_difficulty_exercise_knows_right_from_wrong() -> None:
    assert "Right" in exercises.difficulty_exercise(lambda predicted, rate, base: base ** abs(predicted / 8 - rate))
    for wrong in (lambda predicted, rate, base: base ** abs(predicted - rate),
                  lambda predicted, rate, base: base ** (predicted / 8 - rate)):
        assert exercises.difficulty_exercise(wrong).startswith("Not yet")


def test_the_constant_exercise_wants_mode_median_and_mean() -> None:
    names = ("kernel, b = 0.0001", "kernel, b = 0.99", "brier")
    assert exercises.constant_exercise(dict(zip(names, (0, 1, 3), strict=True))).count(": right.") == 3
    assert exercises.constant_exercise(dict.fromkeys(names, 2)).count("not yet") == 3


def test_the_hack_exercise_wants_a_hack_that_a_training_would_follow(recorded: Recorded) -> None:
    presets = reward_scenes.presets(recorded.config)
    assert exercises.hack_exercise(recorded, presets["hackable"]).startswith("Right")
    assert "90% of the way is asked" in exercises.hack_exercise(recorded, presets["paper"])
    flat = {"reward.difficulty_base": 1.0, "reward.length_weight": 0.0, "reward.notion_weight": 0.0}
    assert "teaches nothing" in exercises.hack_exercise(recorded, flat)


def test_the_notion_exercise_takes_words_of_form_and_no_notions() -> None:
    recorded = reward_scenes.read([RUN, RUN.with_name("masa-s1")])
    assert exercises.notion_exercise(recorded, "so").startswith("Right")
    assert exercises.notion_exercise(recorded, "carry").startswith("Not yet")
    assert "given" in exercises.notion_exercise(recorded, "boxed")


def test_rate_compares_shares_where_count_compares_numbers() -> None:
    easy = made([("so 1", True), ("so 2", True), ("so 3", False)], [prediction(4, 10)])
    assert reward_scenes.notion_pays(easy, ["so"], "count")["so"].tolist() == [True]
    assert reward_scenes.notion_pays(easy, ["so"], "rate")["so"].tolist() == [False]
