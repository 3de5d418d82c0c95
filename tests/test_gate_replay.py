"""Gates weighed and replayed: break-even, foresight, costs at equal accuracy, the gate that reads choosing again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import evaluation_table, rollout_table, write_run

from masa_lib import DATA
from masa_lib import config as configs
from masa_lib.analysis import compare, figures, gate_figures, report
from masa_lib.lessons import belief_replay, environment, gate_trials, replay
from masa_lib.lessons.belief_replay import KNOWS, Recorded
from masa_lib.lessons.gate_trials import BreakEven
from masa_lib.lessons.replay import Groups
from masa_lib.lessons.widgets import panel as panel_module
from masa_lib.lessons.widgets.gate_replay import PRESETS, GateReplay
from masa_lib.runs.folder import Run, runs_in

STEPS = (1, 5, 10, 15, 20, 25)
RECORDED = DATA / "runs" / "beliefs" / "masa-read-s0"
NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "07_did_it_help.ipynb"
SHARE = st.floats(0.05, 0.95)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Groups]:
    folder, found = tmp_path_factory.mktemp("gates"), []
    for seed in range(2):
        run = write_run(folder / f"masa-s{seed}", "masa", seed, {0: 0.1, 20: 0.5})
        for step in STEPS:
            run.write_rollouts(step, rollout_table(step, aware=0.7, groups=24, seed=seed))
        found.append(replay.read_groups(run.path))
    return found


def test_pooled_groups_are_all_groups_in_order(runs: list[Groups]) -> None:
    groups = gate_trials.pooled(runs)
    assert len(groups.steps_P) == 2 * 24 * len(STEPS)
    np.testing.assert_array_equal(groups.right_PG[:len(runs[0].steps_P)], runs[0].right_PG)
    np.testing.assert_array_equal(groups.meta_PM[len(runs[0].steps_P):], runs[1].meta_PM)


@given(price=st.floats(0, 500), dropped=SHARE, precision=SHARE, signal=SHARE, group=st.floats(100, 1000),
       ratio=st.floats(0.2, 1.5))
def test_asking_pays_exactly_below_its_worth(price: float, dropped: float, precision: float, signal: float,
                                             group: float, ratio: float) -> None:
    one = BreakEven(price, dropped, precision, signal, group, ratio * group)
    possible = signal > dropped * (1 - precision) and dropped * ratio < 1  # no more is dropped than there is
    if possible and abs(one.worth - price) > 1e-6 * group:
        assert (one.gain > 1) == (price < one.worth)


def test_a_gate_by_lot_is_worth_nothing_and_one_that_never_errs_what_it_leaves_out() -> None:
    assert BreakEven(0, 0.5, 0.6, 0.4, 100, 100).worth == pytest.approx(0)
    assert BreakEven(0, 0.5, 1.0, 0.4, 100, 80).worth == pytest.approx(40)


@pytest.mark.parametrize(("rule", "limit", "members"), [("signal", 0.4, 8), ("v1", 0.1, 3)])
def test_a_replayed_gate_has_the_gain_of_its_curve(runs: list[Groups], rule: str, limit: float, members: int) -> None:
    groups = gate_trials.pooled(runs)
    one = gate_trials.replayed(groups, rule, limit, predictions=members)
    row = replay.gate_curve(groups, rule, [limit], members, recheck=0.0).set_index("phase").loc["last third"]
    assert one.gain == pytest.approx(row["gain"])
    assert (one.dropped, one.precision) == pytest.approx((row["dropped"], row["precision"]))


def test_a_trained_gate_is_weighed_by_what_its_lots_measured() -> None:
    steps = pd.DataFrame({"arm": "masa-read", "seed": 0, "gate_on": 1, "candidates": [30, 30], "rechecked": [1, 0],
                          "tokens_solution": [5000, 5000], "tokens_recheck": [800, 0], "solution_length": [
                              5800 / 88, 62.5], "tokens_meta": 0, "tokens_prefill": 0, "tokens_read": [1400, 1360],
                          "gate_precision": 0.8, "gate_recall": 0.8, "dropped": 2 / 3})
    one = gate_trials.trained(steps, 40.0, 8)
    assert gate_trials.rolled_out(steps, 8)["groups"].tolist() == [21]
    assert one.dropped == pytest.approx(2 / 3) and one.left_out == pytest.approx(840)
    assert one.price == pytest.approx((2760 - 21 * 40) / 60)
    assert one.signal == pytest.approx(1 / 3)
    assert one.group == pytest.approx(540 / 3 + 840 * 2 / 3)
    both = gate_trials.worths(pd.concat([steps, steps.assign(seed=4)]), 40.0, 8)
    assert both.to_dict() == pytest.approx(dict.fromkeys((0, 4), one.worth / one.group))
    crowded = gate_trials.trained(steps.assign(dropped=0.5), 40.0, 8)  # a sixth would have been taken, given places
    assert crowded.precision == one.precision and crowded.price == one.price
    assert math.isnan(crowded.signal) and math.isnan(crowded.worth)


def test_a_sweep_has_the_precision_of_dropping_the_lowest_scores() -> None:
    scores, signal = np.array([0.1, 0.2, 0.3, np.inf]), np.array([False, True, False, False])
    curve = gate_trials.sweep(scores, signal)
    assert curve["precision"].tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert curve["recall"].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert gate_trials.precision_at(curve, 0.5) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert np.isnan(gate_trials.precision_at(curve, 0.9))
    chances = gate_trials.sweep(scores, np.array([0.25, 1, 0, 0]))
    assert chances["precision"].tolist() == pytest.approx([0.75, 0.375, 1.75 / 3])


def test_who_knows_foresees_better_than_who_does_not_whether_read_or_sampled() -> None:
    tables = [evaluation_table(0.5, 0.0, problems=120, seed=seed) for seed in range(2)]
    tables = [table.assign(c=np.where(np.arange(120) % 2, table["c"], 32)) for table in tables]
    eighths = [[round(c / 4) for c in table["c"]] for table in tables]
    read = [table.assign(belief=[[1000 * (answer == right) for answer in range(9)] for right in rights])
            for table, rights in zip(tables, eighths, strict=True)]
    sampled = [table.assign(predictions=[[right] * 8 for right in rights])
               for table, rights in zip(tables, eighths, strict=True)]
    curves = gate_trials.after_training({"blind": tables, "read": read, "sampled": sampled}, configs.Config())
    found = {gate: gate_trials.precision_at(part) for gate, part in curves.groupby("gate")}
    assert set(found) == {"blind", "read", "sampled", "levels"}
    assert min(found["read"], found["sampled"]) > 0.9 > found["blind"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> compare.Comparison:
    folder = tmp_path_factory.mktemp("costs")
    for arm, slow in {"grpo": 1, "masa-efficient": 2, "mopps": 3}.items():
        for seed in range(3):
            write_run(folder / f"{arm}-s{seed}", arm, seed, {0: 0.1, 10: 0.5 - slow / 100, 20: 0.6})
    return compare.compare_runs(folder)


def test_costs_at_equal_accuracy_are_those_of_the_comparison(compared: compare.Comparison) -> None:
    table = gate_trials.equal_costs(compared, ["mopps", "grpo", "history"])
    assert set(table["arm"]) == {"mopps", "grpo"}
    row = table[(table["arm"] == "mopps") & (table["cost"] == "tokens")].iloc[0]
    assert row["mean"] == pytest.approx(compared.summary["methods"]["mopps"]["tokens_equal_ratio"]["mean"])
    assert set(table["verdict"]) <= {"cheaper", "dearer", "not shown to differ"}
    table.loc[table["cost"] == "seconds", ["mean", "low", "high"]] = np.nan
    drawn = gate_figures.equal_costs(table, gate_trials.DENOMINATORS)
    assert [trace.text[0] for trace in drawn.data].count("not recorded") == 2
    assert len(drawn.layout.annotations) == 4


def test_an_arm_is_measured_against_another_over_the_seeds_of_both(compared: compare.Comparison) -> None:
    found, back = (gate_trials.against(compared, *arms) for arms in (("masa-efficient", "mopps"),
                                                                     ("mopps", "masa-efficient")))
    ratios = [compared.summary["methods"][arm]["tokens_equal_ratio"]["mean"] for arm in ("masa-efficient", "mopps")]
    assert found["mean"] == pytest.approx(ratios[0] / ratios[1]) == pytest.approx(1 / back["mean"])
    assert found["seeds"] == 3 and {found["verdict"], back["verdict"]} <= {"cheaper", "dearer", "not shown to differ"}


def test_predictions_are_priced_by_what_is_written_and_what_is_read_beyond_the_solutions_prompts() -> None:
    table = pd.DataFrame({"arm": ["masa-read", "grpo"], "seed": 0, "tokens_meta": 0, "tokens_read": [900, 0],
                          "read": [1000.0, 500.0]})
    groups = pd.DataFrame({"arm": ["masa-read", "grpo"], "seed": 0, "groups": [10, 10]})
    found = gate_trials.price_in_predictions(table, groups, 40.0)
    assert found.loc["masa-read"].tolist() == [0, 600] and found.loc["grpo"].tolist() == [0, 0]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return belief_replay.read_beliefs(RECORDED)


def test_the_gate_of_the_study_chooses_in_the_replay_what_it_chose_in_the_training(recorded: Recorded) -> None:
    found = belief_replay.shares(belief_replay.choose(recorded))
    assert found.loc["all", "own"] > 0.97  # the record rounds beliefs, and the lot decides between equals
    assert found.loc["all", "dropped"] == pytest.approx(2 / 3)


def test_shares_by_lot_weigh_each_group_by_one_over_its_chance() -> None:
    table = pd.DataFrame({"step": [1, 1, 2, 3], "judged": True, "chosen": True, "weight": [1.0, 50.0, 1.0, 0.0],
                          "signal": [True, False, True, False]})
    found = belief_replay.shares(table).loc["all"]
    assert found["signal"] == pytest.approx(2 / 52) and (found["known"], found["lots"]) == (3, 1)
    assert math.isnan(found["precision"])


def test_what_knows_more_meets_more_groups_with_a_signal_than_the_lot(recorded: Recorded) -> None:
    met = {knows: belief_replay.shares(belief_replay.choose(recorded, knows=knows)).loc["all", "signal"]
           for knows in KNOWS}
    assert met["nothing"] < min(met["belief and history"], met["belief"], met["history"])
    assert met["nothing"] == pytest.approx(belief_replay.shares(
        belief_replay.choose(recorded).assign(chosen=True)).loc["all", "signal"])


def test_fewer_places_and_candidates_are_chosen_and_judged(recorded: Recorded) -> None:
    found = belief_replay.choose(recorded, {"belief.places": 0.25, "belief.candidates": 2.0})
    assert found.groupby("step")["chosen"].sum().unique().tolist() == [4]
    assert found.groupby("step")["judged"].sum().unique().tolist() == [8]
    assert (found.loc[~found["judged"], "chance"].isna()).all()


def test_a_run_without_beliefs_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "grpo-s0", "grpo", 0, {0: 0.1, 20: 0.5})
    with pytest.raises(replay.ReplayError, match="recorded no beliefs"):
        belief_replay.read_beliefs(run.path)


@pytest.fixture
def panel(recorded: Recorded) -> GateReplay:
    return GateReplay([recorded])


def test_the_panel_shows_the_shares_of_its_setting_and_every_control_redraws(panel: GateReplay,
                                                                             recorded: Recorded) -> None:
    for key, value in {"knows": "history", "belief.places": 0.3, "belief.candidates": 2.0, "belief.decay": 0.1,
                       "belief.history": 1.0}.items():
        before = panel.shares
        panel.controls[key].value = value
        assert not panel.shares.equals(before), key
    wanted = belief_replay.shares(belief_replay.choose(recorded, {
        "belief.places": 0.3, "belief.candidates": 2.0, "belief.decay": 0.1, "belief.history": 1.0}, "history"))
    pd.testing.assert_frame_equal(panel.shares, wanted)
    assert f"<b>{wanted.loc['all', 'signal']:.0%}</b>" in panel.page.value
    bars = {trace.name: list(trace.y) for trace in panel.figure.data if trace.type == "bar"}
    assert bars["your gate"] == pytest.approx(wanted["signal"].iloc[:3].tolist())
    panel.reset()
    assert panel.shares.equals(panel.own)


def test_presets_change_what_the_gate_knows(panel: GateReplay) -> None:
    for name, (knows, trusted) in PRESETS.items():
        panel.preset(name)
        assert (panel.controls["knows"].value, panel.controls["trusted"].value) == (knows, trusted)
    json.dumps(panel.figure.to_dict(), default=list)


def test_an_impossible_setting_is_refused_and_changes_nothing(panel: GateReplay) -> None:
    with pytest.raises(configs.ConfigError, match=r"belief\.places is 2"):
        panel.apply({"belief.places": 2.0, "belief.decay": 0.1})
    assert panel.controls["belief.decay"].value == panel.initial["belief.decay"]


def test_the_setting_is_given_as_options_that_a_training_takes(panel: GateReplay) -> None:
    panel.apply({"knows": "belief", "belief.places": 0.5})
    words = panel.command.value.split()
    read = configs.replace(configs.Config(), {"method": words[words.index("--method") + 1]} | dict(
        word.split("=") for word in words[words.index("--set") + 1:]))
    assert (read.method, read.belief.places, read.belief.history) == ("masa-read", 0.5, 0.0)


def test_without_widgets_there_is_a_picture(panel: GateReplay, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(panel_module, "display", shown.append)
    for static in (True, False):
        monkeypatch.setattr(environment, "STATIC", static)
        panel._ipython_display_()
    assert [type(entry).__name__ for entry in shown] == ["Figure", "VBox"]


def test_the_choices_are_drawn_by_third_of_the_training(recorded: Recorded) -> None:
    found = {knows: belief_replay.shares(belief_replay.choose(recorded, knows=knows)) for knows in KNOWS[:2]}
    drawn = gate_figures.belief_shares(found)
    assert [bar.name for bar in drawn.data] == list(KNOWS[:2])
    assert list(drawn.data[0].x) == list(replay.PHASES[:3])
    assert list(drawn.data[1].y) == pytest.approx(found["belief"]["signal"].iloc[:3].tolist())


def own_run(folder: Path) -> list[object]:
    """What the cell of notebook 07 about the reader's own run displays, of runs in this folder."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    source = next("".join(cell["source"]) for cell in cells if cell["id"] == "mine")
    shown: list[object] = []
    exec(source.replace('ROOT / "runs" / "laptop"', "folder"), {
        "folder": folder, "runs_in": runs_in, "compare": compare, "pd": pd, "figures": figures, "Run": Run,
        "RUNS": DATA / "runs", "config": configs, "report": report, "display": shown.append,
        "study": compare.compare_runs(DATA / "runs" / "baseline")})
    return shown


def test_the_reader_sees_runs_of_their_own_beside_the_recorded_ones(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert own_run(tmp_path) == []
    assert "There is no run of yours yet" in capsys.readouterr().out
    for arm in ("grpo", "masa-read"):
        write_run(tmp_path / f"{arm}-s0", arm, 0, {0: 0.1, 20: 0.5})
    drawn, = own_run(tmp_path)
    assert {trace.name for trace in drawn.data if trace.name} == {"mine: grpo", "mine: masa-read", "grpo", "masa"}
    assert "Settings of yours that differ" in capsys.readouterr().out
