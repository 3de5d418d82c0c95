"""Intervals hold what they promise: coverage by simulation, and ends inside what a number can be."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masa_lib.analysis import compare, intervals

DRAWS = 250


def rates(mean: float, spread: float | None, problems: int, samples: int) -> np.ndarray:
    """Measured pass rates, a row a draw; the true ones are Beta of this mean and size `spread`, or alike (None)."""
    rng = np.random.default_rng([problems, samples])
    shape = (DRAWS, problems)
    true = np.full(shape, mean) if spread is None else rng.beta(spread * mean, spread * (1 - mean), shape)
    return rng.binomial(samples, true) / samples


def coverage(drawn: np.ndarray, mean: float) -> float:
    found = [intervals.share_interval(row) for row in drawn]
    return float(np.mean([low <= mean <= high for _, low, high in found]))


@pytest.mark.parametrize("spread", [0.5, 2.0, 10.0, None])
@pytest.mark.parametrize("samples", [1, 4, 32])
def test_accuracy_of_30_problems_near_0_is_covered(spread: float | None, samples: int) -> None:
    assert coverage(rates(0.025, spread, 30, samples), 0.025) >= 0.93


@pytest.mark.parametrize(("mean", "problems"), [(0.005, 120), (0.1, 10), (0.5, 30), (0.73, 120), (0.99, 30)])
def test_accuracy_is_covered_anywhere(mean: float, problems: int) -> None:
    assert coverage(rates(mean, 1.0, problems, 4), mean) >= 0.93


def test_the_interval_of_a_middling_accuracy_is_no_wider_than_students() -> None:
    for row in rates(0.7, 1.0, 120, 4)[:50]:
        wide, narrow = (np.diff(interval(row)[1:])[0] for interval in (intervals.share_interval,
                                                                       intervals.mean_interval))
        assert wide == pytest.approx(narrow, rel=0.05)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_interval_of_a_share_lies_in_0_to_1_around_its_mean(values: list[float]) -> None:
    mean, low, high = intervals.share_interval(values)
    assert 0 <= low <= mean <= high <= 1
    assert high - low > 0.01


def test_two_problems_have_no_accuracy_below_0() -> None:
    assert intervals.mean_interval([0.56, 0.78])[1] < 0  # what was printed
    assert intervals.share_interval([0.56, 0.78])[1] >= 0


@pytest.mark.parametrize("never", [0.005, 0.02])
def test_pass_at_k_near_1_has_a_width_and_is_covered(never: float) -> None:
    drawn, covered = np.random.default_rng(1).binomial(60, never, 2000), {}
    for wrong in np.unique(drawn):
        table = pd.DataFrame({"problem_id": range(60), "n": 8, "c": np.where(np.arange(60) < wrong, 0, 8)})
        _, low, high = compare.pass_at_k_interval(table, 8)
        covered[wrong] = low <= 1 - never <= high
        assert high - low > 0.02
    assert np.mean([covered[wrong] for wrong in drawn]) >= 0.93


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_interval_over_seeds_is_covered(seeds: int) -> None:
    drawn = np.random.default_rng(2).normal(0.98, 0.02, (1000, seeds))
    found = [intervals.mean_interval(row, bounds=intervals.SHARE) for row in drawn]
    assert np.mean([low <= 0.98 <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.02)
    assert all(high <= 1 for _, _, high in found)


def test_a_seed_that_never_reaches_the_target_counts_with_all_that_it_spent() -> None:
    reference, arm = pd.Series([100.0, 100.0]), pd.Series([50.0, math.inf])
    spent = pd.Series([400.0, 400.0])
    ratio = intervals.paired_ratio(reference, arm, spent, spent)
    assert ratio["mean"] == pytest.approx(math.sqrt(2 * 0.25))
    assert intervals.paired_ratio(reference, arm)["mean"] == pytest.approx(2.0)  # without a bound it is left out
