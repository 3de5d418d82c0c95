"""Gates and caps tried out: one account that agrees with the curves of replay, gates rehearsed, and the panel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import small
from synthetic import evaluation_table, rollout_table, write_run

from masa_lib import config as configs
from masa_lib.analysis import compare, costs, figures, gate_figures, report
from masa_lib.engines import make_engine
from masa_lib.lessons import environment, exercises, gate_trials, replay
from masa_lib.lessons.replay import Groups
from masa_lib.lessons.widgets import gate_replay
from masa_lib.lessons.widgets import panel as panel_module
from masa_lib.lessons.widgets.gate_replay import GateReplay
from masa_lib.method import gating
from masa_lib.models import loading
from masa_lib.runs.folder import runs_in

STEPS = (1, 5, 10, 15, 20, 25)
NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "06_doing_less.ipynb"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, found = tmp_path_factory.mktemp("gates"), []
    for seed in range(2):
        run = write_run(folder / f"masa-s{seed}", "masa", seed, {0: 0.1, 20: 0.5})
        for step in STEPS:
            table = rollout_table(step, aware=0.7, groups=24, seed=seed)
            run.write_rollouts(step, table.assign(level=table["group"] % 3))
        found.append(run.path)
    return found


@pytest.fixture(scope="module")
def runs(paths: list[Path]) -> list[Groups]:
    return [replay.read_groups(path) for path in paths]


@pytest.fixture(scope="module")
def groups(runs: list[Groups]) -> Groups:
    return gate_trials.pooled(runs)


def test_pooled_groups_are_all_groups_in_order(runs: list[Groups], groups: Groups) -> None:
    assert len(groups.steps_P) == 2 * 24 * len(STEPS)
    np.testing.assert_array_equal(groups.right_PG[:len(runs[0].steps_P)], runs[0].right_PG)
    np.testing.assert_array_equal(groups.meta_PM[len(runs[0].steps_P):], runs[1].meta_PM)


@pytest.mark.parametrize(("rule", "limit", "members"), [("signal", 0.4, 8), ("signal", 0.7, 3), ("v1", 0.1, 8),
                                                        ("v2", 0.1, 2)])
def test_the_account_of_a_gate_alone_is_that_of_its_curve(groups: Groups, rule: str, limit: float,
                                                          members: int) -> None:
    config = configs.replace(groups.config, {"gate.rule": rule, "gate.std": limit, "gate.threshold": limit,
                                             "gate.predictions": members, "cap.multiplier": 0.0, "gate.recheck": 0.2})
    found = gate_trials.account(groups, config)
    wanted = replay.gate_curve(groups, rule, [limit], members, recheck=0.2).set_index("phase")
    for name in ("dropped", "precision", "recall", "signal_lost", "tokens_saved", "gain"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-12)
    np.testing.assert_allclose(found["predictions"], wanted["meta_share"])
    assert (found[["right_cut", "stopped", "cap_tokens"]].abs() < 1e-12).all(axis=None)


def test_a_rule_that_learns_while_a_model_trains_is_refused(groups: Groups) -> None:
    panel = GateReplay(groups)
    before, message = panel.config, "posterior learns while a model trains"
    for refuses in (lambda: gate_trials.account(groups, configs.replace(groups.config, {"gate.rule": "posterior"})),
                    lambda: panel.apply({"gate.rule": "posterior", "gate.recheck": 0.5})):
        with pytest.raises(replay.ReplayError, match=message):
            refuses()
    assert panel.config == before and panel.controls["gate.recheck"].value == before.gate.recheck


@pytest.mark.parametrize(("aggregate", "multiplier"), [("max", 0.9), ("mean", 1.1), ("median", 2.0)])
def test_the_account_of_a_cap_alone_is_that_of_its_curve(groups: Groups, aggregate: str, multiplier: float) -> None:
    config = configs.replace(groups.config, {"gate.threshold": 0.0, "cap.aggregate": aggregate,
                                             "cap.multiplier": multiplier})
    found = gate_trials.account(groups, config)
    wanted = replay.cap_curve(groups, aggregate, [multiplier]).set_index("phase")
    for name, theirs in {"right_cut": "right_cut", "stopped": "stopped", "signal_lost": "signal_lost",
                         "cap_tokens": "tokens_saved"}.items():
        np.testing.assert_allclose(found[name], wanted[theirs], atol=1e-12)
    assert (found["dropped"] == 0).all()


def test_every_token_of_gate_and_cap_together_has_its_place(groups: Groups) -> None:
    config = configs.replace(groups.config, {"gate.threshold": 0.5, "cap.multiplier": 0.9, "gate.predictions": 4})
    found = gate_trials.account(groups, config)
    spent = found[["solutions", "rechecks", "predictions"]].sum(axis=1)
    np.testing.assert_allclose(found["tokens_saved"], 1 - spent)
    np.testing.assert_allclose(spent - found["predictions"] + found["dropped_tokens"] + found["cap_tokens"], 1)
    alone = [gate_trials.account(groups, configs.replace(config, {key: 0.0}))["signal_lost"]
             for key in ("gate.threshold", "cap.multiplier")]
    assert (found["signal_lost"] <= alone[0] + alone[1] + 1e-9).all()
    assert (found["signal_lost"] >= np.maximum(*alone) - 1e-9).all()


def test_a_sweep_has_the_precision_of_dropping_the_lowest_scores() -> None:
    scores, signal = np.array([0.1, 0.2, 0.3, np.inf]), np.array([False, True, False, False])
    curve = gate_trials.sweep(scores, signal)
    assert curve["precision"].tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert curve["recall"].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert gate_trials.precision_at(curve, 0.5) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert np.isnan(gate_trials.precision_at(curve, 0.9))
    chances = gate_trials.sweep(scores, np.array([0.25, 1, 0, 0]))
    assert chances["precision"].tolist() == pytest.approx([0.75, 0.375, 1.75 / 3])


def test_a_level_is_judged_by_other_runs_and_the_same_third(paths: list[Path], runs: list[Groups]) -> None:
    levels = [gate_trials.levels(path, run) for path, run in zip(paths, runs, strict=True)]
    assert levels[0].tolist() == [number % 3 for number in range(24)] * len(STEPS)
    found = gate_trials.level_scores(runs, levels)[:len(levels[0])].reshape(len(STEPS), 24)
    other = pd.DataFrame({"level": levels[1], "signal": runs[1].signal_P})[runs[1].steps_P <= 5]
    assert found[0, :3] == pytest.approx(other.groupby("level")["signal"].mean())
    assert (found[0] == found[1]).all()


def test_after_training_the_oracle_foresees_best_and_blind_predictions_do_not() -> None:
    config = configs.Config()
    means = {}
    for aware in (0.0, 1.0):
        tables = [evaluation_table(0.5, aware, problems=120, seed=seed) for seed in range(2)]
        tables = [table.assign(c=np.where(np.arange(120) % 2, table["c"], 32)) for table in tables]
        if aware:
            tables = [table.assign(predictions=[[round(c / 4)] * 8 for c in table["c"]]) for table in tables]
        curves = gate_trials.after_training(tables, config)
        means[aware] = {gate: gate_trials.precision_at(part) for gate, part in curves.groupby("gate")}
    assert means[1.0]["oracle"] > 0.9
    assert means[1.0]["predictions"] > 0.9 > means[0.0]["predictions"]


@pytest.mark.parametrize("method", ["grpo", "masa-efficient", "dapo", "mopps", "greso", "level-table", "oracle"])
def test_a_rehearsal_counts_what_each_gate_chooses_and_pays(method: str, pocket: tuple) -> None:
    config = small({"method": method, "problems.pool": 6, "sampling.problems": 3, "gate.start": 1, "gate.lost": 1.0,
                    "sampling.predictions": 2, "gate.threshold": 0.6, "rivals.samples": 4})
    model, tokenizer = pocket
    found = gate_trials.rehearse(config, make_engine("transformers", model, tokenizer, batch=64), tokenizer, 3)
    assert found["step"].tolist() == [1, 2, 3]
    assert (found["groups"] >= 1).all()
    assert (found["signal"] <= found["groups"]).all()
    assert (found["solutions"] > 0).all()
    assert (found["predictions"] > 0).all() == (method == "masa-efficient")
    assert (found["oracle"].sum() > 0) == (method == "oracle")
    if method == "masa-efficient":
        assert found["gate_on"].tolist() == [0, 1, 1]
        assert (found["candidates"] >= found["groups"]).all()


@pytest.fixture(scope="module")
def pocket() -> tuple:
    return loading.load(small().model)


@pytest.fixture
def panel(groups: Groups) -> GateReplay:
    return GateReplay(groups)


def test_the_panel_shows_the_account_of_its_setting(groups: Groups, panel: GateReplay) -> None:
    panel.apply({"gate.threshold": 0.7, "gate.predictions": 2, "cap.multiplier": 0.8})
    wanted = gate_trials.account(groups, configs.replace(groups.config, {
        "gate.threshold": 0.7, "gate.predictions": 2, "cap.multiplier": 0.8})).loc["last third"]
    pd.testing.assert_series_equal(panel.row, wanted)
    assert f"<b>{wanted['tokens_saved']:+.1%}</b>" in panel.page.value
    bars = {trace.name: trace.y[1] for trace in panel.figure.data if trace.type == "bar"}
    assert bars["predictions"] == pytest.approx(100 * wanted["predictions"])


def test_a_move_of_any_control_redraws(panel: GateReplay) -> None:
    for key, value in {"threshold": 0.8, "gate.predictions": 3, "gate.recheck": 0.5, "cap.multiplier": 0.7,
                       "cap.aggregate": "mean", "gate.rule": "v1"}.items():
        before = (panel.row["tokens_saved"], panel.row["signal_lost"])
        panel.controls[key].value = value
        assert (panel.row["tokens_saved"], panel.row["signal_lost"]) != before, key
    before = panel.row["groups"]
    panel.phase.value = "all"
    assert panel.row["groups"] > before


def test_each_rule_has_its_own_threshold(panel: GateReplay) -> None:
    panel.controls["gate.rule"].value = "v1"
    assert (panel.controls["threshold"].value, panel.controls["threshold"].max) == (0.1, 0.5)
    panel.controls["threshold"].value = 0.2
    assert (panel.config.gate.std, panel.config.gate.threshold) == (0.2, 0.4)
    panel.controls["gate.rule"].value = "signal"
    assert panel.controls["threshold"].value == 0.4


def test_dots_say_what_became_of_each_group(groups: Groups, panel: GateReplay) -> None:
    table = gate_replay.fates(groups, panel.config, "all")
    rates = np.array([[gating.admits(tuple(rate[np.isfinite(rate)]), panel.config)] for rate in groups.rates_PM])[:, 0]
    assert (table["fate"].str.startswith("kept") == rates).all()
    assert (table["fate"].str.endswith("has a signal") == groups.signal_P).all()


def test_a_setting_that_drops_nothing_can_be_sent_to_a_page(panel: GateReplay) -> None:
    panel.apply({"gate.threshold": 0.0})
    assert np.isnan(panel.row["precision"])
    assert "<b>none</b>" in panel.page.value
    json.dumps(panel.figure.to_dict(), default=list, allow_nan=False)


def test_presets_and_reset(panel: GateReplay) -> None:
    for name, settings in panel.presets.items():
        panel.preset(name)
        assert {key: configs.get(panel.config, key) for key in ("gate.rule", "cap.multiplier")} == {
            key: settings[key] for key in ("gate.rule", "cap.multiplier")}
    assert panel.row["dropped"] == 0
    panel.phase.value = "all"
    panel.reset()
    assert panel.phase.value == "last third"
    assert {key: configs.get(panel.config, key) for key in gate_trials.KEYS} == panel.initial


def test_an_impossible_setting_is_refused_and_changes_nothing(panel: GateReplay) -> None:
    before = panel.config
    with pytest.raises(configs.ConfigError, match=r"gate\.threshold is 2"):
        panel.apply({"gate.threshold": 2.0, "gate.recheck": 0.5})
    assert panel.config == before


def test_the_setting_is_given_as_options_that_a_training_takes(panel: GateReplay) -> None:
    panel.apply({"gate.rule": "v2", "gate.std": 0.05})
    words = panel.command.value.split()
    given = dict(word.split("=") for word in words[words.index("--set") + 1:])
    read = configs.replace(configs.Config(), given)
    assert (read.gate.rule, read.gate.std, read.gate.predictions) == ("v2", 0.05, 8)


def test_without_widgets_there_is_a_picture(panel: GateReplay, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(panel_module, "display", shown.append)
    for static in (True, False):
        monkeypatch.setattr(environment, "STATIC", static)
        panel._ipython_display_()
    assert [type(entry).__name__ for entry in shown] == ["Figure", "VBox"]
    assert shown[0].layout.paper_bgcolor or shown[0].layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_a_gate_exercise_is_decided_by_runs_it_was_not_tuned_on(runs: list[Groups]) -> None:
    less = {"gate.predictions": 6}
    said = exercises.gate_exercise(*runs, less).splitlines()
    row = gate_trials.account(runs[1], configs.replace(runs[1].config, less)).loc["last third"]
    assert said[1].startswith(f"Other runs: you save {row['tokens_saved']:+.1%} of the tokens, net, and lose "
                              f"{row['signal_lost']:.1%}")
    assert said[2].startswith("Beaten, also")
    for nothing_better in ({}, {"gate.threshold": 1.0, "gate.recheck": 0.0}):
        assert exercises.gate_exercise(*runs, nothing_better).splitlines()[2].startswith("Not beaten: save more")


def show_study(runs: Path) -> list[Any]:
    """What the notebook's cell about the efficiency study displays when the recorded runs lie in `runs`."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    source = next("".join(cell["source"]) for cell in cells if cell["id"] == "efficiency")
    shown: list[Any] = []
    exec(source, {"RUNS": runs, "Path": Path, "pd": pd, "compare": compare, "costs": costs, "report": report,
                  "figures": figures, "gate_figures": gate_figures, "display": shown.append, "runs_in": runs_in})
    return shown


def test_the_notebook_says_that_the_study_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_study(tmp_path) == []
    assert "The study efficiency is not recorded yet" in capsys.readouterr().out


def test_the_notebook_shows_a_recorded_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm, slow in {"grpo": 1, "masa-efficient": 2, "mopps": 3}.items():
        for seed in range(2):
            write_run(tmp_path / "efficiency" / f"{arm}-s{seed}", arm, seed, {0: 0.1, 10: 0.5 - slow / 100, 20: 0.6})
    curves, shares = show_study(tmp_path)
    assert {trace.name for trace in curves.data if trace.name} == {"grpo", "masa-efficient", "mopps"}
    assert "masa-efficient" in shares.data[0].y
    assert "masa-efficient" in capsys.readouterr().out
