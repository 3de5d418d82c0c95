"""The benchmark of notebook 04's training trains what the notebook trains, and finds the step that it says it finds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest

from masa_lib.models import tiers

FOUND = runpy.run_path(str(Path(__file__).resolve().parent.parent / "benchmarks" / "alignment.py"))


def rows(*r: float) -> pd.DataFrame:
    """What is known after step 0, 1, ...; a step takes a second, half of it a processor's; timed from the second on."""
    steps = pd.RangeIndex(len(r), name="step")
    seconds = pd.Series(steps, index=steps, dtype=float).where(steps > 1)
    return pd.DataFrame({"r": r, "seconds": seconds, "processor": seconds / 2})


def test_its_settings_are_those_of_the_notebooks_cell_with_steps_and_seed() -> None:
    wanted = FOUND["settings"](7, 2)
    assert (wanted["steps"], wanted["seed"], wanted["method"]) == (7, 2, "masa-read")
    assert tiers.config(wanted).problems.levels == "1-18"


def test_the_first_of_enough_steps_in_a_row_counts() -> None:
    found = FOUND["reached"](rows(0.9, 0.7, 0.2, 0.7, 0.8, 0.9, 0.1), 0.6, 3)
    assert found == {"step": 3, "r": 0.7, "seconds": 3.0, "processor": 1.5}


def test_a_step_that_was_too_quick_to_be_timed_takes_the_time_of_the_next() -> None:
    assert FOUND["reached"](rows(0.0, 0.7, 0.8, 0.9), 0.6, 2) == {"step": 1, "r": 0.8, "seconds": 2.0, "processor": 1.0}


def test_what_never_stays_above_is_not_found() -> None:
    assert FOUND["reached"](rows(0.9, 0.7, 0.1, 0.7), 0.6, 2) == {}


@pytest.mark.slow
def test_a_training_is_followed_and_ended_once_r_is_high_enough() -> None:
    known = FOUND["train"](FOUND["settings"](6, 0) | {"sampling.problems": 4, "evaluation.problems": 18}, -1.0, 2)
    found = FOUND["reached"](known, -1.0, 2)
    assert found["step"] == 1 and found["processor"] > 0 and found["seconds"] > 0 and known.index.max() < 6
