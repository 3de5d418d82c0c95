"""The training panel without a browser: what it draws from records, and what its methods do to a real training."""

from __future__ import annotations

import contextlib
import html
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.io
import pytest
from small import SETTINGS, small

from masa_lib import DATA
from masa_lib.analysis import doctor
from masa_lib.analysis.awareness import correlation
from masa_lib.config import ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.lessons import environment
from masa_lib.lessons.widgets import ghost as ghosts
from masa_lib.lessons.widgets import reward_lab
from masa_lib.lessons.widgets import training_records as recorded
from masa_lib.lessons.widgets import training_view as view
from masa_lib.lessons.widgets.knobs import LIVE
from masa_lib.lessons.widgets.training_panel import TrainingPanel
from masa_lib.models import tiers
from masa_lib.runs import live_control
from masa_lib.runs.folder import Run
from masa_lib.runs.progress import PROGRESS
from masa_lib.training.rollout_bar import RolloutBar

RECORDED = DATA / "runs" / "baseline" / "masa-s0"
READ = DATA / "runs" / "beliefs" / "masa-read-s0"
GRPO = DATA / "runs" / "efficiency" / "grpo-s0"
QUICK = SETTINGS | {"steps": 6, "sampling.problems": 4, "update.schedule": "constant"}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def records() -> recorded.Records:
    return recorded.read(RECORDED)


def changed(records: recorded.Records, **more: Any) -> recorded.Records:
    return recorded.Records(**{**vars(records), **more})


# What is drawn.

def test_a_point_is_a_problem_with_its_mean_prediction_and_its_pass_rate(records: recorded.Records) -> None:
    points = recorded.problem_points(records.rollouts)
    step, group = points.loc[7, ["step", "group"]]
    rows = records.rollouts[(records.rollouts["step"] == step) & (records.rollouts["group"] == group)]
    assert points.loc[7, "predicted"] == pytest.approx(rows["predicted_pass_rate"].dropna().astype(float).mean() / 8)
    assert points.loc[7, "actual"] == rows.loc[rows["stream"] == "solution", "correct"].astype(float).mean()
    assert points["step"].nunique() == recorded.RECENT
    assert len(points) <= recorded.RECENT * records.config.sampling.problems


def test_the_figure_shows_the_numbers_of_the_records(records: recorded.Records) -> None:
    drawn = view.figure(records)
    by_name = {trace.name: trace for trace in drawn.data}  # of a name's two lines, the moving average comes second
    assert by_name["this run"].y == pytest.approx(records.evaluations["accuracy"])
    assert by_name["difficulty"].customdata == pytest.approx(records.metrics["reward_difficulty"])
    assert by_name["to predict"].customdata == pytest.approx(records.metrics["tokens_meta"])
    assert by_name["update"].customdata == pytest.approx(records.metrics["seconds_update"])
    points = recorded.problem_points(records.rollouts)
    assert len(by_name["newest step"].x) + len(by_name["steps before"].x) == len(points)
    r = correlation(points["predicted"], points["actual"])
    assert f"Predicted and true pass rate: r = {r:.2f}" in [title.text for title in drawn.layout.annotations]
    assert len({trace.legend for trace in drawn.data}) == 6 and drawn.layout.height == view.HEIGHT


def test_a_change_is_marked_before_its_first_step_on_all_curves_over_steps(records: recorded.Records) -> None:
    rows = [{"step": 31, "changes": {"reward.notion_weight": 0.0}}, {"step": 40, "changes": {}, "refused": HOSTILE}]
    drawn = view.figure(changed(records, changes=rows))
    metrics = records.metrics[records.metrics["step"] <= 30]
    written = metrics["tokens_solution"].sum() + metrics["tokens_meta"].sum()
    assert [shape.x0 for shape in drawn.layout.shapes] == [written] + [30.5] * len(view.curves(records.config))
    (mark,) = [trace for trace in drawn.data if trace.name == "setting changed"]
    assert list(mark.x) == [written] and mark.text == ("from step 31: reward.notion_weight = 0.0",)
    said = view.changes_html(rows)
    assert "from step 31: reward.notion_weight = 0.0" in said and "refused: &lt;img" in said and "<img" not in said


def test_runs_without_records_and_without_predictions_are_drawn(records: recorded.Records) -> None:
    empty = view.figure(recorded.nothing(records.config))
    assert len(empty.layout.annotations) == 6 and all(not len(trace.x) for trace in empty.data[0:1])
    grpo = view.figure(recorded.read(RECORDED.with_name("grpo-s0")))
    names = [trace.name for trace in grpo.data]
    assert "difficulty" not in names and "solution" in names
    assert "r undefined" in grpo.layout.annotations[view.SCATTER].text
    assert view.sample_html(pd.DataFrame()) == "No rollouts are recorded yet."


def test_a_sample_shows_the_newest_step_and_lets_no_text_of_a_model_become_html(records: recorded.Records) -> None:
    newest = records.rollouts[records.rollouts["step"] == records.rollouts["step"].max()]
    first = newest[newest["group"] == 0]
    right = int(first["correct"].fillna(False).sum())
    shown = view.sample_html(records.rollouts, 0)
    assert first["problem"].iloc[0] in shown and f"Solutions: {right} of {records.config.sampling.solutions}" in shown
    assert view.sample_html(records.rollouts, newest["group"].nunique()) == shown  # counted round
    hostile = view.sample_html(newest.assign(text=HOSTILE, problem=HOSTILE, answer=HOSTILE))
    assert "<img" not in hostile and hostile.count("&lt;img") >= 4
    drawn = view.figure(changed(records, rollouts=newest.assign(problem=HOSTILE)))
    assert "<img" not in drawn.to_json().replace("\\u003c", "<")


def test_a_run_is_shown_as_it_was_after_a_step() -> None:
    early, whole = recorded.read(READ, 30), recorded.read(READ)
    assert early.metrics["step"].max() == 30 and max(early.tables) == 30 and max(whole.tables) == 180
    sampled = recorded.read(RECORDED, 30)
    assert sampled.rollouts["step"].max() == 25  # every 25th is recorded


def test_the_dots_are_held_out_problems_before_the_training_and_now_where_beliefs_are_read() -> None:
    records = recorded.read(READ, 30)
    points = recorded.held_out_points(records)
    table, first = records.tables[30], records.tables[0]
    assert set(points["step"]) == {0, 30} and len(points) == 2 * len(table)
    now = points[points["step"] == 30].set_index("problem_id").loc[table["problem_id"]]
    assert now["actual"].to_numpy() == pytest.approx((table["c"] / table["n"]).to_numpy())
    means = [float(np.dot(belief, np.arange(9)) / np.sum(belief) / 8) for belief in first["belief"]]
    before = points[points["step"] == 0].set_index("problem_id").loc[first["problem_id"]]
    assert before["predicted"].to_numpy() == pytest.approx(means)
    drawn = {trace.name: trace for trace in view.figure(records).data}
    assert len(drawn["belief"].x) == 9 * len(table) and len(drawn["now"].x) == len(drawn["before training"].x)
    assert drawn["now"].y == pytest.approx(drawn["now"].customdata, abs=view.SPREAD + 1e-9)


def test_a_reading_newer_than_the_newest_evaluation_moves_the_dots_and_not_their_heights() -> None:
    records = recorded.read(READ, 30)
    ids = records.tables[30]["problem_id"].tolist()
    sure = {"step": 31, "problems": ids, "beliefs": [[0] * 8 + [1000]] * len(ids)}
    moved = recorded.held_out_points(changed(records, readings=[sure]))
    now = moved[moved["step"] == 31]
    assert (now["predicted"] == 1).all() and len(now) == len(ids)
    heights = recorded.held_out_points(records).query("step == 30")["actual"]
    assert sorted(now["actual"]) == pytest.approx(sorted(heights))
    known = recorded.knowledge(changed(records, readings=[sure]))
    assert np.isnan(known["r"][31]) and known["entropy"][31] == 0 and known["r"][30] > 0.7
    with pytest.raises(RunError, match="step 31"):
        recorded.held_out_points(changed(records, readings=[sure | {"beliefs": "none"}]))


# The ghost.

def test_a_ghost_is_measured_on_the_problems_asked_for_and_on_its_own_where_it_lacks_one() -> None:
    run = Run.open(GRPO)
    ids = run.evaluation_table(15)["problem_id"].head(54).tolist()
    ghost = ghosts.read([GRPO], ids)
    part = run.evaluation_table(15).head(54)
    assert ghost.same and ghost.curve.set_index("step")["accuracy"][15] == pytest.approx((part["c"] / part["n"]).mean())
    assert ghost.curve.set_index("step")["tokens"][15] == run.metrics()["tokens_solution"].head(15).sum()
    other = ghosts.read([GRPO], ["elsewhere", *ids])
    assert not other.same and other.curve["accuracy"].tolist() == pytest.approx(run.evaluations()["accuracy"].tolist())


def test_the_differing_settings_are_those_that_act() -> None:
    found = ghosts.differences(Run.open(READ).config, Run.open(GRPO).config)
    assert found == {"method": ("masa-read", "grpo")}


def test_the_meter_compares_costs_where_both_were_first_as_accurate() -> None:
    ghost = ghosts.read([GRPO])
    slow = ghost.curve.assign(tokens=2 * ghost.curve["tokens"])
    found = ghosts.at_equal_accuracy(slow, ghost)
    assert found.loc["here", "tokens"] == pytest.approx(2 * found.loc["ghost", "tokens"])
    better = ghosts.at_equal_accuracy(slow.assign(accuracy=slow["accuracy"] + 0.5), ghost)
    assert np.isinf(better.loc["ghost", "tokens"])
    assert ghosts.at_equal_accuracy(slow.head(1), ghost) is None
    said = ghosts.meter_html(slow, slow[list(ghosts.SHOWN)].iloc[-1], ghost)
    assert f"{found.loc['ghost', 'tokens']:,.0f}" in said and "tokens through the update" in said
    assert "not in its record" in ghosts.meter_html(slow.assign(accuracy=slow["accuracy"] + 0.5),
                                                   slow[list(ghosts.SHOWN)].iloc[-1], ghost)


# The panel.

@contextlib.contextmanager
def opened(out: Path, settings: dict[str, Any]) -> Iterator[TrainingPanel]:
    """A panel; the training that it leaves behind is ended."""
    panel = TrainingPanel(out, settings)
    try:
        yield panel
    finally:
        if panel.process and panel.process.poll() is None:
            panel.process.kill()
            panel.process.wait()


def wait_for(panel: TrainingPanel, wanted: str, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while f"<b>{wanted}</b>" not in panel.status.value:
        assert time.monotonic() < limit, f"{wanted}, not {panel.status.value} {panel.message.value}"
        time.sleep(0.05)
        panel.refresh()  # without waiting for the thread that looks once a second


def enabled(panel: TrainingPanel) -> set[str]:
    return {name for name, button in panel.buttons.items() if not button.disabled}


def test_a_panel_begins_with_the_settings_it_is_given(tmp_path: Path) -> None:
    panel = TrainingPanel(tmp_path / "run", {"reward.difficulty_base": 0.05, "cap.multiplier": 5.0, "steps": 9,
                                             "method": "masa-efficient"})
    controls = panel.controls
    assert controls.knobs["reward.difficulty_base"].value == 0.05 and controls.knobs["cap.multiplier"].value == 5.0
    assert controls.knobs["reward.difficulty_mode"].value == "brier"  # of the tier
    assert set(controls.knobs) == set(LIVE) and "Memory plan of pocket" in controls.memory.value
    controls.setup["seed"].value, controls.knobs["gate.lost"].value = 3, 1.0
    wanted = {"model.name": "pocket", "reward.difficulty_base": 0.05, "cap.multiplier": 5.0, "steps": 9, "seed": 3,
              "method": "masa-efficient", "gate.lost": 1.0}
    assert {key: value for key, value in controls.chosen().items() if not key.startswith("record.")} == wanted | {
        "evaluation.read_every": 1}
    controls.reset()
    assert controls.knobs["gate.lost"].value == 0.2 and controls.setup["seed"].value == 3
    with pytest.raises(ConfigError, match="no setting"):
        TrainingPanel(tmp_path / "run", {"reward.bass": 0.1})


def test_a_panel_begins_with_what_the_reward_lab_handed_over_says_so_and_gives_it_back(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "reward-lab.toml"
    own = {"method": "masa", "steps": 9, "reward.length_slack": 0.1}
    assert TrainingPanel(tmp_path / "run", own, handed=file).controls.handed_row.layout.display == "none"
    reward_lab.write_settings({"reward.notion_weight": 0.9, "reward.length_slack": 0.4}, file)
    panel = TrainingPanel(tmp_path / "run", own, handed=file)
    controls = panel.controls
    assert controls.handed.value == ("Begins with the settings of runs/reward-lab.toml: reward.notion_weight = 0.9, "
                                     "reward.length_slack = 0.4.")
    assert controls.handed_row.layout.display == "flex" and controls.knobs["reward.notion_weight"].value == 0.9
    chosen = controls.chosen()
    assert (chosen["reward.notion_weight"], chosen["reward.length_slack"], chosen["steps"]) == (0.9, 0.4, 9)
    controls.setup["method"].value = "masa-read"  # whose predictions are not sampled
    assert controls.handed.value.endswith("0.4. Nothing under the method masa-read: reward.notion_weight, "
                                       "reward.length_slack.")
    controls.setup["method"].value = "masa"
    assert controls.handed.value.endswith("0.4.")
    controls.setup["seed"].value = 3
    controls.back_button.click()
    assert controls.handed_row.layout.display == "none" and controls.setup["seed"].value == 3
    chosen = controls.chosen()
    assert "reward.notion_weight" not in chosen and (chosen["reward.length_slack"], chosen["steps"]) == (0.1, 9)
    file.write_text("[reward]\nnotion_weight = -1\n")
    assert "notion_weight is -1" in TrainingPanel(tmp_path / "run", own, handed=file).message.value


def offered(panel: TrainingPanel) -> dict[str, set[str]]:
    """The knobs that can be seen, by the tab that holds them."""
    seen = {key for key, knob in panel.controls.knobs.items() if knob.layout.display != "none"}
    keys = {knob.model_id: key for key, knob in panel.controls.knobs.items()}
    return {title: {keys[knob.model_id] for knob in page.children if knob.model_id in keys} & seen
            for title, page in zip(panel.controls.tabs.titles, panel.controls.tabs.children, strict=True)}


def test_a_panel_shows_the_knobs_that_act_under_the_method(tmp_path: Path) -> None:
    panel = TrainingPanel(tmp_path / "run", {"steps": 9})
    controls = panel.controls
    belief = {"prediction.score", "prediction.weight",
              *(f"belief.{name}" for name in ("places", "candidates", "recheck", "decay", "history"))}
    assert controls.setup["method"].value == "masa-read"
    assert offered(panel) == {"Belief": belief, "Reward": {"reward.mode"}, "Update": {"update.learning_rate"},
                              "Gate": {"gate.window"}}
    assert controls.knobs["prediction.weight"].description == "belief weight"
    controls.setup["method"].value = "masa-efficient"
    assert set().union(*offered(panel).values()) == {key for key in LIVE if key not in belief}
    controls.setup["method"].value = "masa"
    assert set(offered(panel)) == {"Reward", "Update"} and "reward.notion_weight" in offered(panel)["Reward"]
    controls.setup["method"].value = "grpo"
    assert offered(panel) == {"Reward": {"reward.mode"}, "Update": {"update.learning_rate"}}
    controls.setup["method"].value = "random"
    assert offered(panel)["Belief"] == {"belief.places"}
    other = TrainingPanel(tmp_path / "other", {"method": "masa", "prediction.mode": "read"}).controls
    assert other.tabs.titles[0] == "Belief"


def test_the_gate_is_opened_and_closed_by_one_control_and_one_change(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small({"method": "masa-read"}), "masa train")
    run.set_status("stopped", "Stopped.")
    panel = TrainingPanel(run.path)
    controls = panel.controls
    assert controls.choosing.value and controls.choosing.layout.display is None
    controls.choosing.value = False
    assert live_control.read(run.path).settings == {"belief.places": 1.0, "belief.candidates": 1.0}
    assert controls.knobs["belief.candidates"].value == 1.0
    controls.reset()
    assert controls.choosing.value and live_control.read(run.path).settings == {"belief.places": 0.6,
                                                                            "belief.candidates": 3.0}


def test_a_recorded_run_is_looked_at_step_by_step_beside_its_ghost(tmp_path: Path) -> None:
    panel = TrainingPanel(READ, ghost=[GRPO])
    assert panel.fixed.selected_index is None  # what was fixed before the first step is folded
    assert panel.replay.layout.display == "flex" and panel.shown.value == panel.shown.max == 180
    titles = []
    for step in (180, 30):
        panel.shown.value = step
        assert f"step {step} of 180" in panel.status.value and panel.records.metrics["step"].max() == step
        titles.append(panel.live.figure.layout.annotations[view.SCATTER].text)
    assert titles[0] != titles[1] and "within levels" in titles[0]
    assert "recorded grpo" in panel.live.meter.value
    assert "recorded grpo" in {trace.name for trace in panel.live.figure.data}
    other = TrainingPanel(tmp_path / "none")
    assert other.replay.layout.display == "none" and other.fixed.selected_index == 0
    Run.create(tmp_path / "none", small(), "masa train").set_status("stopped", "Stopped.")
    other.refresh()
    assert other.state == "stopped" and other.fixed.selected_index is None


def test_a_run_that_is_there_keeps_its_own_settings_whatever_was_handed_over(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small({"reward.notion_weight": 0.5}), "masa train")
    file = tmp_path / "lab.toml"
    reward_lab.write_settings({"reward.notion_weight": 0.9}, file)
    panel = TrainingPanel(run.path, handed=file)
    controls = panel.controls
    assert controls.knobs["reward.notion_weight"].value == 0.5 and controls.handed_row.layout.display == "none"


def test_another_model_brings_its_tiers_defaults_and_another_plan(tmp_path: Path) -> None:
    panel = TrainingPanel(tmp_path / "run", {"steps": 9})
    controls = panel.controls
    controls.setup["model.name"].value = "qwen3-1.7b"
    assert controls.setup["sampling.engine"].value == "vllm" and controls.setup["problems.source"].value == "deepscaler"
    assert controls.setup["steps"].value == 9 and controls.knobs["update.learning_rate"].value == 1e-6
    limit = time.monotonic() + 60
    while "qwen3-1.7b" not in controls.memory.value and time.monotonic() < limit:
        time.sleep(0.05)
    assert "Memory plan of qwen3-1.7b" in controls.memory.value
    assert tiers.config(controls.chosen()).problems.source == "deepscaler"


def test_a_training_is_started_steered_found_again_stopped_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with opened(out, QUICK) as panel:
        assert enabled(panel) == {"start"}
        panel.start()
        wait_for(panel, "running")
        assert enabled(panel) == {"pause", "stop"} and panel.controls.setup["steps"].disabled
        panel.pause()
        wait_for(panel, "paused")
        panel.controls.knobs["reward.notion_weight"].value = 1.5
        assert "Asked for, from the next step on: reward.notion_weight = 1.5" in panel.message.value
        panel.step()
        wait_for(panel, "paused")
        done = live_control.steps(out)
        assert f"from step {done}: reward.notion_weight = 1.5" in panel.changes.value
        found = TrainingPanel(out)  # as after a restart of the kernel
        assert found.state == "paused" and found.controls.knobs["reward.notion_weight"].value == 1.5
        assert found.controls.setup["steps"].value == 6 and found.progress.value == done
        found.controls.reset()
        assert "reward.notion_weight = 0.25" in found.message.value
        found.stop()
        wait_for(panel, "stopped")
        assert enabled(panel) == {"resume"} and panel.process.wait(300) == 143
        panel.resume()
        wait_for(panel, "finished")
        assert panel.process.wait(300) == 0 and enabled(panel) == set()
    run = Run.open(out)
    assert [row["changes"] for row in run.changes()] == [{"reward.notion_weight": 1.5}, {"reward.notion_weight": 0.25}]
    assert len(run.metrics()) == panel.progress.value == 6
    assert {trace.name: trace for trace in panel.live.figure.data}["its batches"].customdata == pytest.approx(
        run.metrics()["accuracy"])


def test_what_goes_wrong_is_said_in_the_panel_and_it_can_be_tried_again(tmp_path: Path) -> None:
    with opened(tmp_path / "run", QUICK | {"problems.source": "no-such-file.jsonl"}) as panel:
        panel.start()
        panel.process.wait(300)
        wait_for(panel, "new")
        assert "no-such-file.jsonl" in panel.message.value and enabled(panel) == {"start"}
        for part in ("pass_rate", "length", "notion"):
            panel.controls.knobs[f"reward.{part}_weight"].value = 0.0
        panel.start()
        assert panel.message.value.startswith("All three meta reward weights are 0") and panel.process is None
        panel.stop()
        assert "Nobody trains" in panel.message.value


def test_a_knob_turned_while_nobody_trains_holds_when_the_run_goes_on(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    run.set_status("stopped", f"Stopped {HOSTILE}.")
    panel = TrainingPanel(run.path)
    assert panel.state == "stopped" and enabled(panel) == {"resume"} and "&lt;img" in panel.status.value
    panel.controls.knobs["gate.threshold"].value = 0.7
    assert live_control.read(run.path).settings == {"gate.threshold": 0.7} and live_control.read(run.path).request == 1
    (run.path / "status.json").write_text(json.dumps({"state": HOSTILE, "step": 0, "message": ""}))
    panel.refresh()
    assert "takes a state (running, " in panel.message.value and "&lt;img" in panel.message.value
    assert "<img" not in panel.status.value + panel.message.value


def test_the_panel_says_how_far_the_running_step_is_and_nothing_that_a_killed_one_left(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    panel = TrainingPanel(run.path)
    assert panel.within.layout.visibility == "hidden"
    with run.lock(), RolloutBar(8, "step 1", folder=run.path, step=1) as bar:
        bar(2, 40)
        bar._write()
        panel.refresh()
        assert panel.state == "running" and "Step 1: 2 of at most 8 rollouts" in panel.status.value
        assert (panel.within.value, panel.within.max, panel.within.layout.visibility) == (2, 8, "visible")
        progress = json.loads((run.path / PROGRESS).read_text())
        (run.path / PROGRESS).write_text(json.dumps(progress | {"process": progress["process"] + 1}))
        panel.refresh()
        assert "rollouts" not in panel.status.value and panel.within.value == 0


def test_a_button_says_why_the_reward_may_be_flat_as_masa_doctor_does(tmp_path: Path) -> None:
    panel = TrainingPanel(RECORDED)
    assert panel.why.description == "Why is my reward flat?" and panel.why.tooltip and not panel.findings.value
    panel.why.value = True
    found = doctor.examine(Run.open(RECORDED))
    assert found and all(html.escape(part) in panel.findings.value for one in found
                         for part in (one.what, one.measured, one.advice))
    assert f"After step {panel.progress.value}" in panel.findings.value
    panel.why.value = False
    assert not panel.findings.value
    panel.why.value = True
    panel.out.value = str(tmp_path / "none")  # where no run is
    assert panel.why.disabled and not panel.why.value and not panel.findings.value


def test_a_page_without_widgets_gets_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = TrainingPanel(RECORDED)
    live = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in live
    assert panel.state == "finished" and panel.progress.value == len(Run.open(RECORDED).metrics())
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()  # as readers may have set it
    monkeypatch.setattr(environment, "STATIC", True)
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    assert set(panel._repr_mimebundle_()) == {"application/vnd.plotly.v1+json"}
    panel.out.value = str(tmp_path / "none")
    assert set(panel._repr_mimebundle_()) == {"text/plain"} and panel.state == "new"
