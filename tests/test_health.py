"""A run that no longer learns is called so: in the log, in the panel and in the report."""

from __future__ import annotations

import copy
import html
import json
import logging
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from small import small
from synthetic import write_run

from masa_lib.analysis import compare, health, report
from masa_lib.lessons.widgets.training_panel import TrainingPanel
from masa_lib.runs.folder import Run, runs_in
from masa_lib.training.trainer import Trainer

NAN = math.nan


def rows(*steps: tuple[float, float, float]) -> pd.DataFrame:
    """Metrics from loss, entropy and accuracy of each step."""
    return pd.DataFrame([{"step": number, "loss": loss, "entropy": entropy, "accuracy": accuracy, "logp_gap": 0.0,
                          "updates": 1}
                         for number, (loss, entropy, accuracy) in enumerate(steps, 1)])


FINE, STILL, FLAT = (-0.1, 0.2, 0.4), (0.0, NAN, 0.0), (1e-7, 2e-4, 0.3)


@pytest.mark.parametrize(("last", "said"), [
    ([STILL] * 5, r"^Since step 3 the run has collapsed: no group has a gradient \(loss 0, no entropy\)"),
    ([FLAT] * 6, r"^Since step 3 the run has collapsed: its answers have an entropy below 0\.001"),
    ([FLAT, STILL, FLAT, STILL, STILL], "^Since step 3 the run has collapsed"),
    ([(0.0, NAN, 1.0)] * 7, "^Since step 3 all is solved and nothing left to learn"),
    ([STILL] * 4, "^$"), ([*[STILL] * 9, FINE], "^$"), ([FINE] * 9, "^$")])
def test_a_collapse_is_a_few_steps_in_a_row_up_to_the_last(last: list, said: str) -> None:
    assert pd.Series([health.collapse(rows(FINE, FINE, *last))]).str.contains(said).all()


def recorded() -> list[Run]:
    """All recorded runs."""
    studies = sorted(Path(__file__).parent.parent.glob("data/runs/*/"))
    return [Run.open(path) for study in studies for path in runs_in(study)]


def test_no_recorded_run_is_called_collapsed_and_one_without_metrics_is_not_either() -> None:
    found = recorded()
    assert len(found) > 50
    assert [run.path for run in found if health.collapse(run.metrics())] == []
    assert health.collapse(pd.DataFrame(columns=["step"])) == ""


def test_the_log_says_it_once_and_again_after_a_recovery(caplog: pytest.LogCaptureFixture) -> None:
    watch = health.Watch("float32")
    with caplog.at_level(logging.WARNING, "masa"):
        for row in rows(*[FINE] * 3, *[STILL] * 9, FINE, *[FLAT] * 8).to_dict("records"):
            watch.observe(row)
    assert [message.split(" the run")[0] for message in caplog.messages] == ["Since step 4", "Since step 14"]


def gaps(*found: float, updates: int = 1) -> pd.DataFrame:
    """Metrics of steps that learn, from the gap of each."""
    return rows(*[FINE] * len(found)).assign(logp_gap=found, updates=updates)


@pytest.mark.parametrize(("metrics", "said"), [
    (gaps(0, 0.02, 0.03, 0.04, 0), "^From step 2 to 4 the engine's .* were 0.03 nats a token .* explains 0.01"),
    (gaps(0, 0.5, NAN, 0.5, 0.5), "^From step 2 to 5 the engine's"), (gaps(0.5, 0.5, 0, 0.5, 0.5), "^$"),
    (gaps(*[0.009] * 9), "^$"), (gaps(*[0.5] * 9, updates=2), "^$"), (pd.DataFrame(columns=["step"]), "^$")])
def test_a_drift_is_a_few_steps_in_a_row_whose_gap_rounding_does_not_explain(metrics, said) -> None:
    assert pd.Series([health.drift(metrics, "float32")]).str.contains(said).all()
    assert not health.drift(metrics.assign(logp_gap=0.09), "bfloat16")


def test_no_recorded_run_has_drifted() -> None:
    assert not any(health.drift(run.metrics(), run.config.model.precision) for run in recorded())


def test_samples_of_other_weights_are_said_once_in_log_panel_and_report(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small({"method": "grpo", "steps": 5, "sampling.problems": 4, "sampling.solution_tokens": 24})
    run = Run.create(tmp_path / "run", config, "masa train")
    trainer = Trainer(config, run)
    trainer.engine.model = copy.deepcopy(trainer.model)
    with torch.no_grad():
        trainer.engine.model.get_output_embeddings().weight.mul_(0.8)
    with caplog.at_level(logging.WARNING, "masa"):
        list(trainer)
    said = health.drift(run.metrics(), "float32")
    assert said.startswith("From step 1 to 3 the engine's") and caplog.messages.count(said) == 1
    assert html.escape(said) in TrainingPanel(run.path).status.value
    assert f"run: {said}" in compare.compare_runs(run.path).summary["warnings"]


def test_a_training_whose_problems_nothing_solves_says_so_in_log_panel_and_report(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "hopeless.jsonl"
    file.write_text("".join(json.dumps({"problem": f"Left to right: {n} + 1", "answer": "x^7 + y"}) + "\n"
                            for n in range(40)), encoding="utf8")
    config = small({"method": "grpo", "problems.source": str(file), "problems.levels": "", "steps": health.STEPS,
                    "sampling.problems": 2, "sampling.solutions": 2, "sampling.solution_tokens": 8})
    run = Run.create(tmp_path / "run", config, "masa train")
    with caplog.at_level(logging.WARNING, "masa"):
        list(Trainer(config, run))
    said = health.collapse(run.metrics())
    assert said.startswith("Since step 1 the run has collapsed") and caplog.messages.count(said) == 1
    assert said in TrainingPanel(run.path).status.value
    assert f"run: {said}" in compare.compare_runs(run.path).summary["warnings"]


def test_the_page_and_the_table_of_a_comparison_begin_with_it(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo-s0", "grpo", 0, curve={0: 0.2, 10: 0.5}, steps=10,
              more=lambda step: {"loss": 0.0, "entropy": None, "accuracy": 0.0} if step > 3 else
              {"loss": -0.1, "entropy": 0.3, "accuracy": 0.2})
    text = report.compare([tmp_path], tmp_path / "page.html")
    said = "grpo-s0: Since step 4 the run has collapsed"
    assert said in " ".join(text.split()) and said in (tmp_path / "page.html").read_text(encoding="utf8")
