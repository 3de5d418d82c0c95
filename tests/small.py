"""A run of a second or two on the bundled model, and what makes two runs the same run."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.runs.folder import Run

MODEL = "pocket"

SETTINGS: dict[str, Any] = {
    "steps": 3, "model.name": MODEL, "model.device": "cpu", "model.threads": 1,
    "problems.pool": 24, "problems.levels": "1-4",
    "sampling.problems": 6, "sampling.solutions": 4, "sampling.predictions": 4, "sampling.solution_tokens": 64,
    "sampling.meta_tokens": 64,
    "update.warmup_steps": 0, "update.learning_rate": 3e-4,
    "evaluation.every": 0, "evaluation.problems": 4, "evaluation.samples": 2,
    "evaluation.final_problems": 5, "evaluation.final_samples": 3, "evaluation.predictions": 2,
    "record.rollouts_every": 1, "record.checkpoint_every": 2}

#: of a run that is stopped, killed and resumed: several checkpoints and evaluations
LIVES: dict[str, Any] = {"steps": 7, "evaluation.every": 3, "sampling.problems": 4}


def small(changes: Mapping[str, Any] | None = None) -> Config:
    """The config of a small run, with changes by dotted key."""
    return configs.replace(Config(), {"method": "masa"} | SETTINGS | dict(changes or {}))


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without those that a repetition cannot repeat; NaN as None, so that it equals itself."""
    return {key: None if value != value else value for key, value in row.items()
            if not key.startswith(("seconds", "memory", "cores"))}


def assert_same_run(found: Run, expected: Run) -> None:
    """Metrics, evaluations, rollouts and last weights are identical, seconds and memory aside."""
    assert found.status["state"] == expected.status["state"] == "finished"
    for read in (Run.metrics, Run.evaluations):
        rows = [[timeless(row) for row in read(run).to_dict("records")] for run in (found, expected)]
        assert rows[0] == rows[1]
    assert found.rollout_steps() == expected.rollout_steps()
    pd.testing.assert_frame_equal(found.rollouts(), expected.rollouts(), check_exact=True)
    for step in expected.evaluations()["step"]:
        pd.testing.assert_frame_equal(found.evaluation_table(step), expected.evaluation_table(step), check_exact=True)
    (step, folder), (last, other) = found.latest_checkpoint(), expected.latest_checkpoint()
    assert step == last
    assert found.weights("best")[0] == expected.weights("best")[0] == expected.best_step()
    for name in ("model.safetensors", "state.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: writes stop in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
