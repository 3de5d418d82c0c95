"""A signal in the process that trains: what is dropped, what is waited for, and whose handlers stand afterwards."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

import pytest
from small import LIVES, assert_same_run, small

from masa_lib import config as configs
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run
from masa_lib.runs.stopping import SIGNALS, Stop, Stopped
from masa_lib.training.drive import resume, train
from masa_lib.training.trainer import Trainer

CONFIG = small(LIVES)


def test_a_closed_terminal_is_one_stop_however_often_it_is_told() -> None:
    with Stop() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def interrupted(trainer: Trainer, where: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps until a method is about to return, when SIGINT comes so many times; the KeyboardInterrupt is caught."""
    owner = trainer.learner if where == "update" else trainer.recorder
    done = getattr(owner, where)

    def late(*arguments: object) -> object:
        found = done(*arguments)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, where, late)
        next(trainer)


@pytest.mark.parametrize("where", ["update", "step"])
def test_an_interrupt_in_a_notebook_waits_for_the_update_and_its_record(
        where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.replace(CONFIG, {"steps": 3, "evaluation.every": 0, "evaluation.final_samples": 1})
    run = Run.create(tmp_path / "run", config, "a notebook")
    trainer = Trainer(config, run)
    next(trainer)
    interrupted(trainer, where, 1, monkeypatch)
    assert trainer.step == 2 and run.metrics()["step"].tolist() == [1, 2]
    assert [result.step for result in trainer] == [3]
    run.set_status("finished")
    assert_same_run(run, train(config, tmp_path / "undisturbed", "masa train"))


def test_an_update_that_was_cut_short_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.replace(CONFIG, {"steps": 2, "evaluation.final_samples": 1, "record.checkpoint_every": 1})
    run = Run.create(tmp_path / "run", config, "a notebook")
    trainer = Trainer(config, run)
    next(trainer)
    interrupted(trainer, "update", 2, monkeypatch)
    assert trainer.step == 1 and run.metrics()["step"].tolist() == [1]
    with pytest.raises(RunError, match=r"Step 2 was cut short while it moved the weights, and cannot be done again"):
        next(trainer)
    assert_same_run(resume(run.path), train(config, tmp_path / "undisturbed", "masa train"))


def test_handlers_are_those_of_before_again_and_an_ignored_signal_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Stop() as stop:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            assert not stop.signal and stop.attempt(lambda: 5) == 5
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT and stop.attempt(lambda: 5) is None
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_work_that_can_be_repeated_is_dropped_at_the_first_signal_and_the_next_one_is_raised() -> None:
    done = []
    with Stop() as stop:
        assert stop.attempt(lambda: (signal.raise_signal(signal.SIGTERM), done.append(1))) is None
        assert stop.signal == signal.SIGTERM and not done
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)

    def swallows() -> int:
        with contextlib.suppress(Stopped):
            signal.raise_signal(signal.SIGINT)
        return 1

    with Stop() as stop:
        assert stop.attempt(swallows) is None and stop.signal == signal.SIGINT

    def swallows_both() -> None:
        swallows()
        swallows()

    with Stop() as stop, pytest.raises(Stopped):
        stop.attempt(swallows_both)

    def twice() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)

    with Stop() as stop, pytest.raises(Stopped):
        stop.attempt(twice)


def test_a_training_outside_the_main_thread_sets_no_handlers(tmp_path: Path) -> None:
    before, found = [signal.getsignal(number) for number in SIGNALS], []
    config = configs.replace(CONFIG, {"steps": 1})
    thread = threading.Thread(target=lambda: found.append(train(config, tmp_path / "run", "masa train")))
    thread.start()
    while thread.is_alive():
        assert [signal.getsignal(number) for number in SIGNALS] == before
        thread.join(0.05)
    assert found[0].status["state"] == "finished"
