"""What the update asks of a predicted pass rate: the signs that the records give, and the panel that draws them."""

from __future__ import annotations

import numpy as np
import pytest

from masa_lib import DATA
from masa_lib import config as configs
from masa_lib.lessons import update_asks
from masa_lib.lessons.widgets import reward_scenes
from masa_lib.lessons.widgets import update_asks as drawing
from masa_lib.lessons.widgets.reward_scenes import Recorded
from masa_lib.runs.folder import runs_in

KERNEL, BRIER = "kernel, b = 0.01 (published)", "brier"
PARTS, WHOLE, CENTRED, CONTRAST = update_asks.NORMALISED


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return reward_scenes.read(runs_in(DATA / "runs" / "baseline", "masa-s*"))


def signs(recorded: Recorded, groups: np.ndarray, score: str, normalised: str) -> str:
    return update_asks.signs(update_asks.pushes(recorded, groups, update_asks.setting(score, normalised)))


def test_the_recorded_pass_rates_have_three_different_middles(recorded: Recorded) -> None:
    last = update_asks.distributions(recorded)["recorded, last third"]
    assert update_asks.middles(recorded, last) == pytest.approx({"mode": 8, "median": 7, "mean": 6.0}, abs=0.05)


@pytest.mark.parametrize(("score", "normalised", "wanted"), [
    (BRIER, CENTRED, {"++++++--"}), (BRIER, PARTS, {"+++++++-"}), (KERNEL, CENTRED, {"--++++++"}),
    (KERNEL, PARTS, {"+++++++-", "++++++++", "+++++++0"})])  # half of the pass rates are 1: a hair decides
def test_with_a_std_every_score_seeks_the_median_and_without_one_brier_the_mean(
        recorded: Recorded, score: str, normalised: str, wanted: set[str]) -> None:
    last = update_asks.distributions(recorded)["recorded, last third"]
    assert signs(recorded, last, score, normalised) in wanted


def test_under_the_published_std_kernel_and_brier_push_alike_at_the_first_step(recorded: Recorded) -> None:
    first = update_asks.distributions(recorded)["recorded, first step"]
    assert {signs(recorded, first, score, WHOLE) for score in (KERNEL, BRIER)} == {"--------"}  # down to 0: the drop
    assert update_asks.middles(recorded, first)["median"] == 2


def test_a_contrast_pushes_no_value_for_all_problems_but_hard_and_easy_ones_apart(recorded: Recorded) -> None:
    first = update_asks.distributions(recorded)["recorded, first step"]
    pushed = update_asks.pushes(recorded, first, update_asks.setting(BRIER, CONTRAST))
    assert update_asks.signs(pushed) == "0" * 8 and update_asks.rests(pushed) == []
    assert (pushed["hard"] < 0).all() and (pushed["easy"] > 0).all()


def test_other_parts_of_the_reward_move_nothing_where_each_has_its_own_std(recorded: Recorded) -> None:
    groups, config = update_asks.drawn(recorded, (1,) * 9), update_asks.setting(BRIER, PARTS)
    alone = configs.replace(config, {"reward.length_weight": 0.0, "reward.notion_weight": 0.0})
    together, by_itself = (update_asks.pushes(recorded, groups, how) for how in (config, alone))
    np.testing.assert_allclose(3 * together, by_itself, atol=1e-9)


def test_problems_of_ones_own_have_the_shares_that_were_asked_for(recorded: Recorded) -> None:
    groups = update_asks.drawn(recorded, (3, 0, 0, 0, 1, 0, 0, 0, 0), problems=40)
    assert update_asks.eighths_of(recorded)[groups].value_counts().to_dict() == {0: 30, 4: 10}
    for wrong in ((0,) * 9, (1, 2), (-1,) + (1,) * 8):
        with pytest.raises(ValueError, match="Nine shares"):
            update_asks.drawn(recorded, wrong)


def test_a_hump_and_a_tail_tells_mode_median_and_mean_apart(recorded: Recorded) -> None:
    groups = update_asks.distributions(recorded)["a hump and a tail"]
    found = update_asks.middles(recorded, groups)
    assert found["mode"] < found["median"] < found["mean"]
    rest = {normalised: update_asks.rests(update_asks.pushes(recorded, groups, update_asks.setting(BRIER, normalised)))
            for normalised in (PARTS, CENTRED)}
    assert rest == {PARTS: [round(found["median"])], CENTRED: [round(found["mean"])]}


def test_the_panel_draws_what_is_chosen_and_says_it(recorded: Recorded) -> None:
    panel = drawing.UpdateAsks(recorded)
    begun = panel.settings
    panel.apply({"score": BRIER, "normalised": CENTRED})
    pushed = update_asks.pushes(recorded, panel.distributions["recorded, last third"],
                                update_asks.setting(BRIER, CENTRED))
    np.testing.assert_allclose(panel.figure.data[4].y + panel.figure.data[5].y, pushed["push"])
    assert "mean 6.0" in panel.said and "rest at 6 of 8" in panel.note.value
    panel.shares[0].value = 12
    assert panel.settings["problems"] == drawing.OWN
    panel.apply({"shares": (0,) * 9})
    assert "Nine shares" in panel.said
    panel.reset()
    assert panel.settings == begun
    assert panel.static().data[0].y.sum() == pytest.approx(1)


def test_every_control_of_the_panel_has_a_label_of_its_own(recorded: Recorded) -> None:
    panel = drawing.UpdateAsks(recorded)
    labels = [control.description for control in (panel.score, panel.normalised, panel.problems, *panel.shares)]
    assert all(labels) and len(set(labels)) == len(labels)
