"""Whether predictions fall and then align, and how good a gate was: tests on made-up runs whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal

from masa_lib.analysis import awareness
from masa_lib.method import beliefs

STEPS = 180
TRUE = np.linspace(0.3, 0.7, STEPS)


def noisy(values: np.ndarray, seed: int = 0, noise: float = 0.08) -> np.ndarray:
    return values + np.random.default_rng(seed).normal(0, noise, len(values))


def test_predictions_that_fall_and_rise_to_the_truth_are_shown() -> None:
    step = np.arange(STEPS)
    valley = np.where(step < 60, 0.7 - 0.65 * step / 60, np.minimum(0.05 + 0.65 * (step - 60) / 100, TRUE))
    found = awareness.drop_then_align(noisy(valley), noisy(TRUE, 1))
    assert found["shown"] == 1
    assert found["fall"] == pytest.approx(0.55, abs=0.1)
    assert found["rise"] == pytest.approx(0.55, abs=0.1)
    assert found["bottom"] == pytest.approx(1 / 3, abs=0.08)
    assert abs(found["gap_end"]) < 0.1 < found["gap_bottom"]


@pytest.mark.parametrize("predicted", [np.linspace(0.7, 0.1, STEPS), np.linspace(0.1, 0.7, STEPS),
                                       np.full(STEPS, 0.5), np.abs(np.linspace(-0.4, 0.4, STEPS)) + 0.7])
def test_a_fall_or_a_rise_alone_or_one_away_from_the_truth_is_none(predicted: np.ndarray) -> None:
    assert awareness.drop_then_align(noisy(predicted), TRUE)["shown"] == 0


def test_noise_falls_and_rises_in_few_runs() -> None:
    shown = [awareness.drop_then_align(noisy(np.full(STEPS, 0.5), seed), TRUE)["shown"] for seed in range(200)]
    assert sum(shown) <= 4  # fall and rise, each at 5 %


def test_choosing_the_bottom_makes_no_fall() -> None:
    falls = [awareness.drop_then_align(noisy(np.full(STEPS, 0.5), seed), TRUE)["fall"] for seed in range(200)]
    assert np.mean(falls) == pytest.approx(0.0, abs=3 * np.std(falls) / math.sqrt(200))


@given(st.integers(0, 39), st.sampled_from([40, 41, 180, 300]))
def test_short_runs_are_not_measured_and_long_ones_are(short: int, long: int) -> None:
    assert math.isnan(awareness.drop_then_align(np.zeros(short), np.zeros(short))["shown"])
    found = awareness.drop_then_align(noisy(np.zeros(long)), np.zeros(long))
    assert 0 < found["bottom"] < 1


def test_steps_without_predictions_are_left_out() -> None:
    predicted = noisy(TRUE)
    gaps = np.insert(predicted, range(0, STEPS, 3), np.nan)
    true = np.insert(TRUE, range(0, STEPS, 3), 9.0)
    assert awareness.drop_then_align(gaps, true) == awareness.drop_then_align(predicted, TRUE)


def test_a_run_of_20000_steps_is_read_as_means_of_its_steps() -> None:
    rng, place = np.random.default_rng(0), np.linspace(0, 1, 20_000)
    found = awareness.drop_then_align(np.interp(place, [0, 0.2, 1], [0.6, 0.1, 0.5]) + rng.normal(0, 0.1, 20_000),
                                      np.full(20_000, 0.5))
    assert found["shown"] and found["bottom"] == pytest.approx(0.2, abs=0.05)
    assert (found["fall"], found["rise"]) == (pytest.approx(0.4, abs=0.1), pytest.approx(0.36, abs=0.1))


def metrics(gate_on: list[int], precision: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"step": range(1, len(gate_on) + 1), "gate_on": gate_on, "gate_precision": precision,
                         "dropped": [0.25 * on for on in gate_on], "cap_on": 0, "predictions_collapsed": 0})


def test_a_gate_is_judged_where_its_whole_window_was_rechecked() -> None:
    found = awareness.gate_quality(metrics([0, 1, 1, 1, 0, 1], [0.1, 0.2, 0.8, 0.9, 0.3, 0.4]), window=2)
    assert found["gate_precision"] == pytest.approx(0.85)
    assert (found["gate_start"], found["gate_switches"]) == (2, 1)
    assert found["gate_steps"] == pytest.approx(4 / 6)
    assert found["dropped"] == pytest.approx(0.25)
    assert math.isnan(found["gate_recall"])
    assert found["cap_steps"] == found["collapsed"] == 0


def test_a_gate_that_never_acts_and_old_records_are_not_measured() -> None:
    for steps in (metrics([0] * 5, [0.5] * 5), pd.DataFrame({"step": range(5)})):
        found = awareness.gate_quality(steps, window=2)
        assert found["gate_steps"] == found["cap_steps"] == 0
        assert all(math.isnan(found[name]) for name in ("gate_precision", "gate_start", "gate_switches", "right_cut"))


def test_a_rivals_dropped_share_is_that_of_all_steps() -> None:
    steps = pd.DataFrame({"step": range(4), "gate_on": 0, "dropped": [0.0, 0.2, 0.4, 0.2]})
    assert awareness.gate_quality(steps, window=2)["dropped"] == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [60, 180])
@pytest.mark.parametrize("likeness", [0.0, 0.5, 0.9])
def test_noise_that_is_alike_from_step_to_step_seldom_falls_and_rises(steps: int, likeness: float) -> None:
    shocks = np.random.default_rng(1).normal(0, 0.1 * math.sqrt(1 - likeness**2), (150, steps + 50))
    paths = 0.5 + signal.lfilter([1], [1, -likeness], shocks, axis=1)[:, 50:]
    true = np.linspace(9, 0.5, steps)  # the gap closes, so that fall and rise alone decide
    assert np.mean([awareness.drop_then_align(path, true)["shown"] for path in paths]) <= 0.07


@pytest.mark.parametrize(("size", "mean", "samples"), [(1, 0.5, 4), (0.5, 0.2, 16), (5, 0.5, 8), (1, 0.5, 2)])
def test_the_floor_of_the_calibration_error_is_that_of_a_perfect_predictor(size: float, mean: float,
                                                                             samples: int) -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(25):
        true = rng.beta(size * mean, size * (1 - mean), 150)
        found.append(awareness.calibration(true, rng.binomial(samples, true) / samples, samples))
    assert np.mean([one["floor"] for one in found]) == pytest.approx(np.mean([one["error"] for one in found]), rel=0.12)


def test_the_floor_is_unknown_from_single_samples_and_that_of_chance_where_all_problems_are_alike() -> None:
    assert math.isnan(awareness.calibration([0.2, 0.4], [0.0, 1.0], 1)["floor"])
    assert math.isnan(awareness.calibration([0.2, 0.4], [0.0, 1.0])["floor"])
    alike = awareness.calibration(np.full(200, 0.5), np.full(200, 0.5), 4)["floor"]
    assert alike == pytest.approx(math.sqrt(2 / math.pi * 0.25 / 4 / 200))


def test_no_constant_scores_better_than_the_best_constant() -> None:
    right, solutions = [0, 0, 0, 1, 4, 8, 8], [8] * 7
    best = beliefs.log_score(np.tile(awareness.best_constant(right, solutions), (7, 1)), right, solutions).mean()
    for others in itertools.chain([beliefs.UNIFORM_V], np.random.default_rng(1).dirichlet(np.ones(9), 200)):
        assert beliefs.log_score(np.tile(others, (7, 1)), right, solutions).mean() <= best + 1e-6
