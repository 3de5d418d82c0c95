"""How far a step's rollouts are: what is written beside the bar, and what of a file is believed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from small import small

from masa_lib.runs import progress
from masa_lib.runs.progress import PROGRESS, Progress
from masa_lib.training import clock, drive, rollout_bar
from masa_lib.training.rollout_bar import RolloutBar
from masa_lib.training.trainer import Trainer


def test_the_file_says_what_is_done_and_how_long_the_rest_takes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_bar, "EVERY", 0.0)
    with RolloutBar(8, "step 3", folder=tmp_path, step=3) as bar:
        first = progress.read(tmp_path)
        assert (first.step, first.done, first.total, first.evaluates, first.over) == (3, 0, 8, False, False)
        assert math.isnan(first.left) and first.process == os.getpid()
        bar(0, 10)
        bar(2, 30)
        found = progress.read(tmp_path)
        assert (found.done, found.tokens) == (2, 40) and found.left == pytest.approx(found.seconds * 3)
    assert progress.read(tmp_path).over and [path.name for path in tmp_path.iterdir()] == [PROGRESS]


def test_a_bar_without_a_folder_or_with_one_that_is_gone_writes_nothing(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "gone"):
        with RolloutBar(2, "evaluate", folder=folder) as bar:
            bar(2, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"process": 1}', "[" * 5000, json.dumps({"step": [1]}),
                                  json.dumps(vars(Progress(1, 1, False, 8)) | {"done": "<b>"}),
                                  json.dumps(vars(Progress(1, 1, False, 8)) | {"seconds": math.inf}),
                                  json.dumps(vars(Progress(1, -1, False, 8)))])
def test_a_file_that_is_none_of_ours_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / PROGRESS).write_text(text)
    assert progress.read(tmp_path) is None


def test_a_training_tells_of_its_steps_and_evaluations_and_leaves_no_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_bar, "EVERY", 0.0)
    told: list[Progress] = []
    write = RolloutBar._write

    def listen(bar: RolloutBar) -> None:
        write(bar)
        told.append(progress.read(tmp_path / "run"))

    monkeypatch.setattr(RolloutBar, "_write", listen)
    config = small({"steps": 1})
    run = drive.train(config, tmp_path / "run", "masa train")
    assert [(row.step, row.evaluates) for row in told if row.over] == [(0, True), (1, False), (1, True)]
    (sampled,) = [row for row in told if row.over and not row.evaluates]
    assert sampled.done == sampled.total and sampled.tokens == run.metrics()["tokens_decode"].sum()
    assert not (run.path / PROGRESS).exists()


def test_a_trainer_without_a_run_writes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bars: list[Any] = []
    monkeypatch.setattr(clock, "RolloutBar", lambda *told: bars.append(told) or RolloutBar(*told))
    next(Trainer(small({"steps": 1})))
    assert bars[0][3] is None and not list(tmp_path.iterdir())
