"""What the training panel says in a line: how far the running step is, and why a reward may be flat."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
from small import small

from masa_lib import DATA
from masa_lib.analysis.doctor import Finding
from masa_lib.lessons.widgets import training_records as recorded
from masa_lib.lessons.widgets import training_words as words
from masa_lib.runs.progress import Progress

NOW = Progress(1, 4, False, 64, 16, 800, 4.0)
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def records() -> recorded.Records:
    """A run of which three steps are finished, four seconds each."""
    found = recorded.read(DATA / "runs" / "baseline" / "masa-s0", 3)
    return dataclasses.replace(found, metrics=found.metrics.assign(seconds_total=4.0))


def test_a_running_step_says_its_rollouts_its_pace_and_the_time_left(records: recorded.Records) -> None:
    steps = records.config.steps
    said = words.status_html("running", records, NOW)
    assert said.startswith(f"<b>running</b>: step 3 of {steps}, 4.0 s a step, {words.duration(4 * (steps - 3))} left. ")
    assert "Step 4: 16 of at most 64 rollouts, 200 tokens/s, 12 s left." in said
    early = words.within(records, dataclasses.replace(NOW, done=0, tokens=0, seconds=0.5))
    assert early == "Step 4: 0 of at most 64 rollouts."


def test_what_is_sampled_is_graded_and_learned_from_until_its_metrics_are_there(records: recorded.Records) -> None:
    over = dataclasses.replace(NOW, over=True)
    assert words.within(records, over) == "Step 4 is graded and learned from."
    for passed in (dataclasses.replace(over, step=3), dataclasses.replace(over, evaluates=True), None):
        assert words.within(records, passed) == ""


def test_nobody_is_said_to_sample_in_a_run_that_is_at_its_end(records: recorded.Records) -> None:
    said = words.status_html("stopped", records, NOW, why=HOSTILE)
    assert "rollouts" not in said and "left" not in said and "&lt;img" in said and "<img" not in said


def test_the_first_minutes_are_not_silent() -> None:
    config = small()
    nothing = recorded.nothing(config)
    assert words.status_html("starting", nothing, waited=12.4) == (
        "<b>starting</b>: model and problems are loaded, 12 s.")
    assert words.status_html("running", nothing, waited=130) == (
        "<b>running</b>: held-out problems are solved before the first step, 2 min.")
    evaluated = dataclasses.replace(NOW, step=0, evaluates=True)
    assert words.status_html("running", nothing, evaluated, 130) == (
        "<b>running</b>: Held-out problems are solved: 16 of 64 rollouts, 200 tokens/s, 12 s left.")
    first = dataclasses.replace(nothing, evaluations=pd.DataFrame({"step": [0]}))
    assert f"the first of {config.steps} steps, 20 s." in words.status_html("running", first, waited=20)
    assert "Step 1: 16 of at most 64" in words.status_html("running", first, dataclasses.replace(NOW, step=1))


def test_durations_are_short() -> None:
    assert [words.duration(seconds) for seconds in (0.4, 99, 720, 12600)] == ["0 s", "99 s", "12 min", "3.5 h"]


def test_findings_begin_with_what_wants_something_done_and_end_with_what_is_in_order() -> None:
    ill, well = Finding("truncated", HOSTILE, "Raise the cap."), Finding("entropy", "0.4 at first")
    said = words.findings_html([ill, well], 12)
    assert "After step 12, 1 of 2 want something done:" in said and "role='status'" in said
    assert "<li><b>truncated</b>: &lt;img src=x onerror=alert(1)&gt;. Raise the cap.</li>" in said
    assert said.index("Raise the cap.") < said.index("In order: entropy: 0.4 at first.") and "<img" not in said
    assert "nothing explains a flat reward." in words.findings_html([well], 12)
