"""A training that is steered from outside: real processes that read a real file."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import SETTINGS, assert_same_run, small, timeless

from masa_lib.config import ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.runs import live_control
from masa_lib.runs.folder import Run
from masa_lib.training.drive import resume, train
from masa_lib.training.trainer import Trainer

QUICK = {"steps": 6, "update.schedule": "constant", "sampling.problems": 4, "evaluation.final_problems": 2,
         "evaluation.final_samples": 2}
CHANGE = {"reward.notion_weight": 0.0, "update.learning_rate": 1e-3}


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


def wait_for_state(out: Path, process: subprocess.Popen, wanted: str) -> None:
    wait_for(lambda: live_control.state(out, process) == wanted,
             f"{wanted}, not {live_control.state(out, process)}: {(out / live_control.LOG).read_text()}")


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Callable[..., tuple[Path, subprocess.Popen]]]:
    """Starts `masa train` processes, and ends those that a test leaves behind."""
    processes: list[subprocess.Popen] = []

    def begin(changes: dict[str, Any] | None = None) -> tuple[Path, subprocess.Popen]:
        out = tmp_path / f"run-{len(processes)}"
        processes.append(live_control.start(out, SETTINGS | QUICK | (changes or {})))
        return out, processes[-1]

    yield begin
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def write(folder: Path, **asked: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / live_control.CONTROL).write_text(json.dumps(asked))


def test_pause_step_stop_and_resume_of_a_process(begun: Callable) -> None:
    out, process = begun({"steps": 500})
    assert live_control.state(out, process) == "starting"
    wait_for(lambda: live_control.steps(out) >= 1, "a first step")
    live_control.pause(out)
    wait_for_state(out, process, "paused")
    done = live_control.steps(out)
    live_control.step(out)
    wait_for_state(out, process, "paused")
    assert live_control.steps(out) == done + 1
    assert live_control.state(out) == "paused"  # found without the process, as after a restart of the kernel
    with pytest.raises(RunError, match=r"trains .* already"):
        live_control.resume(out)
    live_control.proceed(out)
    wait_for(lambda: live_control.steps(out) > done + 1, "a step after the pause")
    live_control.stop(out)
    assert process.wait(60) == 143
    assert live_control.state(out, process) == live_control.state(out) == "stopped"
    run, stopped = Run.open(out), live_control.steps(out)
    assert run.latest_checkpoint()[0] == stopped
    second = live_control.resume(out)
    try:
        wait_for(lambda: live_control.steps(out) > stopped,
                 "a step of the second life, which the old stop is not meant for")
    finally:
        second.kill()
        second.wait()
    assert live_control.state(out, second) == live_control.state(out) == "killed"
    with pytest.raises(RunError, match="Nobody trains"):
        live_control.pause(out)


def test_a_change_holds_from_the_next_step_and_a_killed_run_takes_it_over_at_the_same_step(
        begun: Callable, tmp_path: Path) -> None:
    out, process = begun({"record.checkpoint_every": 2})
    wait_for(lambda: live_control.steps(out) >= 1, "a first step")
    live_control.pause(out)
    wait_for_state(out, process, "paused")
    assert live_control.change(out, CHANGE) == 1
    wait_for(lambda: bool(Run.open(out).changes()), "the change in the record")
    step = live_control.steps(out) + 1
    assert Run.open(out).changes() == [{"step": step, "changes": CHANGE, "request": 1}]
    live_control.step(out)
    wait_for(lambda: live_control.steps(out) >= step, "the step with it")
    process.kill()  # SIGKILL, between two checkpoints or behind one
    process.wait()
    resumed = resume(out)

    def undisturbed() -> Run:
        run = Run.create(tmp_path / "undisturbed", resumed.config, "masa train")
        run.append_change(step, CHANGE, request=1)
        return resume(run.path)

    assert_same_run(resumed, undisturbed())
    assert resumed.changes() == [{"step": step, "changes": CHANGE, "request": 1}]
    rates = resumed.metrics()["learning_rate"].tolist()
    assert rates == [3e-4] * (step - 1) + [1e-3] * (6 - step + 1)


def test_a_run_without_a_control_file_and_one_that_is_asked_nothing_are_the_same(tmp_path: Path) -> None:
    config = small(QUICK | {"steps": 3})
    plain = train(config, tmp_path / "plain", "masa train")
    write(tmp_path / "asked", process=1, pause=True, stop=True)  # meant for another process
    asked = train(config, tmp_path / "asked", "masa train")
    assert_same_run(asked, plain)
    assert asked.changes() == [] and not (plain.path / "changes.jsonl").exists()


def test_what_is_asked_before_it_is_in_force_is_kept_and_the_newest_value_wins(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    assert live_control.change(run.path, {"reward.difficulty_base": 0.1, "cap.multiplier": 3}) == 1
    assert live_control.change(run.path, {"reward.difficulty_base": 0.2}) == 2
    trainer = Trainer(run.config, run)
    next(trainer)
    wanted = {"reward.difficulty_base": 0.2, "cap.multiplier": 3}
    assert run.changes() == [{"step": 1, "changes": wanted, "request": 2}]
    assert trainer.config.reward.difficulty_base == 0.2 and trainer.config.cap.multiplier == 3.0
    assert live_control.change(run.path, {"gate.lost": 1.0}) == 3
    next(trainer)
    next(trainer)
    assert run.changes()[1:] == [{"step": 2, "changes": {"gate.lost": 1.0}, "request": 3}]


def test_a_change_asked_of_a_resumed_run_comes_after_those_that_it_takes_over(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(QUICK), "masa train")
    run.append_change(4, {"update.learning_rate": 1e-3})
    live_control.change(run.path, {"update.learning_rate": 2e-3})
    rates = [result.metrics["learning_rate"] for result in Trainer(run.config, run)]
    assert rates == [3e-4] * 3 + [2e-3] * 3


@pytest.mark.parametrize(("settings", "says"), [
    ({"sampling.problems": 4}, "sampling.problems cannot change while a run trains; what can: reward"),
    ({"update.warmup_steps": 4}, "update.warmup_steps cannot change"),
    ({"reward.notion_wight": 1}, "no setting 'reward.notion_wight'. Did you mean reward.notion_weight"),
    ({"reward.notion_weight": -1.0}, "reward.notion_weight is -1.0; it takes a number at least 0"),
    ({"reward.notion_weight": 0, "reward.length_weight": 0, "reward.pass_rate_weight": 0}, "All three")])
def test_a_change_that_is_not_allowed_is_refused_in_a_sentence_by_both_sides(
        settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small({"steps": 1}), "masa train")
    with pytest.raises(ConfigError, match=says):
        live_control.change(run.path, settings)
    assert not (run.path / live_control.CONTROL).exists()
    write(run.path, request=1, settings=settings)  # by hand
    next(Trainer(run.config, run))
    (row,) = run.changes()
    assert row["changes"] == {} and row["request"] == 1 and says.partition(";")[0] in row["refused"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pause": 1}', '{"pauze": true}', '{"settings": [1]}',
                                  '{"until": "2"}', "\\u0000"])
def test_a_control_file_that_cannot_be_read_asks_for_nothing(
        text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / live_control.CONTROL).write_text(text)
    assert live_control.read(tmp_path) == live_control.Control()
    assert "left out" in caplog.text


def test_a_run_is_not_started_over_another_and_not_with_a_wrong_setting(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    with pytest.raises(RunError, match="holds a run already"):
        live_control.start(run.path, SETTINGS)
    with pytest.raises(ConfigError, match="no setting"):
        live_control.start(tmp_path / "other", {"stepps": 3})
    assert not (tmp_path / "other").exists()
    assert live_control.state(tmp_path / "other") == "new"


def test_a_training_that_cannot_begin_has_failed_and_left_its_reason(begun: Callable) -> None:
    out, process = begun({"problems.source": "no-such-file.jsonl"})
    assert process.wait(60) == 1
    assert live_control.state(out, process) == "failed"
    assert "no-such-file.jsonl" in (out / live_control.LOG).read_text()


def test_a_probe_of_the_lock_does_not_take_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    assert live_control.holder(run.path) is None
    with run.lock():
        assert live_control.holder(run.path) is not None
    assert timeless(run.status) == {"state": "running", "step": 0, "message": ""}
